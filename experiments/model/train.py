"""Trains the shipped model from scratch on the corpus.

    python -m experiments.model.train --smoke                      # about a minute on two cores, tiny model
    python -m experiments.model.train --out runs/model             # one GPU
    python -m experiments.model.train --out runs/model             # again after being killed: goes on where it was

Document number i of step n is a function of (seed, n, i), so the data position is the step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM

from crypten_llm.models.checkpoint import SHIPPED
from experiments.model import forward
from experiments.model.corpus import Encoder
from experiments.model.evaluate import draw_all, score
from experiments.model.losses import head_losses, penalised_block
from experiments.model.rows import training_batch
from experiments.model.schedule import SMOKE, Limits, Settings, learning_rate, length_of
from experiments.model.weights import new_model, save_model
from experiments.tools.command import command
from experiments.tools.tables import print_table


class Batches(torch.utils.data.Dataset):
    """Batch for each (step, length), written on demand in the loader's processes."""

    def __init__(self, s: Settings, tokenizer):
        self.s, self.encode = s, Encoder(tokenizer)

    def __getitem__(self, key: tuple[int, int]):
        step, length = key
        rows = max(1, self.s.batch_tokens // length)
        return training_batch(self.s.seed, step, rows, length, self.s.mix, self.encode)


class Run:
    """A training run in a folder: `checkpoint.pt`, `log.jsonl`, `settings.json`, `model/`."""

    def __init__(
        self, s: Settings, folder: Path, tokenizer, device: str, init_from: Path | None = None, compiled: bool = False
    ):
        self.s, self.folder, self.tokenizer, self.device = s, folder, tokenizer, torch.device(device)
        folder.mkdir(parents=True, exist_ok=True)
        if init_from:
            model = LlamaForCausalLM.from_pretrained(init_from, dtype=torch.float32)
        else:
            model = new_model(s, tokenizer)
        self.model = model.to(self.device)
        self.probe = torch.nn.Parameter(torch.eye(s.hidden, device=self.device))
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [self.probe] + [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=s.learning_rate,
            betas=s.betas,
            fused=self.device.type == "cuda",
        )
        self.step, self.minutes = 0, 0.0
        if self.checkpoint.exists():
            self._load()
        self._block, self._head = penalised_block, head_losses
        if compiled:
            # One layer is compiled and reused: far quicker to compile than the whole model.
            torch._dynamo.config.cache_size_limit = 64
            self._block = torch.compile(penalised_block, dynamic=False)
            self._head = torch.compile(head_losses, dynamic=False)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def progress(self) -> float:
        """Share of the run that is over, by steps or by minutes, whichever is further."""
        return self._progress(self.step)

    def _progress(self, step: int) -> float:
        return max(step / self.s.steps, self.minutes / self.s.max_minutes)

    def save(self) -> None:
        """Writes the checkpoint; a kill at any moment leaves the old one or the new one."""
        torch.save(
            {
                "model": self.model.state_dict(),
                "probe": self.probe.data,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "minutes": self.minutes,
                "rng": torch.get_rng_state(),
            },
            temporary := self.checkpoint.with_suffix(".tmp"),
        )
        os.replace(temporary, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.probe.data.copy_(state["probe"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.minutes = state["step"], state["minutes"]
        torch.set_rng_state(state["rng"])
        # Lines written after the checkpoint will be written again.
        log = self.folder / "log.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            log.write_text("".join(line + "\n" for line in lines))

    def _log(self, row: dict) -> None:
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step, "minutes": round(self.minutes, 3)} | row) + "\n")

    def _keys(self):
        """(step, length) for the steps to come; read ahead by the loader, so lengths lag by a few steps."""
        for step in range(self.step, self.s.steps):
            yield step, length_of(self.s, step, self._progress(step))

    def _bridge_loss(self, x: torch.Tensor, bridges: np.ndarray) -> torch.Tensor:
        """Cross-entropy of the probe on the residual x (B,T,D), where `bridges` (B,T) is not -1."""
        # Picked out on the host, so that the device need not be waited for.
        places = np.flatnonzero(bridges.ravel() >= 0)
        if not len(places):
            return x.new_zeros(())
        targets = torch.from_numpy(bridges.ravel()[places].astype(np.int64)).to(x.device, non_blocking=True)
        rows = x.flatten(0, 1)[torch.from_numpy(places).to(x.device, non_blocking=True)]
        embedding = self.model.model.embed_tokens.weight
        read = forward.head(rows, torch.full_like(rows[0], 0.125), self.probe, self.model.config.rms_norm_eps)
        return F.cross_entropy(F.linear(read, embedding).float(), targets)

    def losses(self, ids: torch.Tensor, kinds: torch.Tensor, bridges: np.ndarray) -> dict[str, torch.Tensor]:
        """`loss` to minimise and its parts, of a batch (B,T)."""
        s, config = self.s, self.model.config
        cos, sin = forward.rope_tables(ids.shape[1], config.head_dim, s.rope_theta, ids.device)
        x = F.embedding(ids, self.model.model.embed_tokens.weight)
        penalty = x.new_zeros(())
        for index, layer in enumerate(forward.layers(self.model), start=1):
            x, more = self._block(x, layer, cos, sin, config.rms_norm_eps, s.limits)
            penalty = penalty + more
            if index == s.bridge_after:
                bridge = self._bridge_loss(x, bridges)
        # Targets are the ids one to the left; the last position predicts nothing.
        targets, kinds = ids.roll(-1, 1), F.pad(kinds[:, 1:], (0, 1))
        loss, more, answer, prose = self._head(
            x, self.model.model.norm.weight, self.model.lm_head.weight, targets, kinds, config.rms_norm_eps, s
        )
        penalty = penalty + more
        total = loss + s.penalty * penalty + s.bridge_weight * bridge
        return {"loss": total, "answer": answer, "prose": prose, "penalty": penalty, "bridge": bridge}

    def train(self, stop_at: int | None = None) -> None:
        """Runs to the end of the schedule, or to step `stop_at` (as a kill would)."""
        s, cuda = self.s, self.device.type == "cuda"
        (self.folder / "settings.json").write_text(json.dumps(asdict(s), indent=1, default=str) + "\n")
        held_out = draw_all(
            self.tokenizer.name_or_path, [t for t in s.mix if t != "stories"], [s.evaluate_length], s.evaluate_samples
        )
        loader = iter(
            DataLoader(
                Batches(s, self.tokenizer),
                batch_size=None,
                sampler=self._keys(),
                collate_fn=_as_is,
                num_workers=s.workers,
                prefetch_factor=4 if s.workers else None,
            )
        )
        mixed = torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()
        began, before, seen = time.monotonic(), self.minutes, 0
        with tqdm(total=s.steps, initial=self.step, unit="step", mininterval=5) as bar:
            while self.progress < 1 and self.step != stop_at:
                *arrays, bridges = next(loader)
                ids, kinds = (torch.from_numpy(a).to(self.device, non_blocking=True) for a in arrays)
                rate = learning_rate(s, self.step, self.progress)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                with mixed:
                    parts = self.losses(ids.long(), kinds, bridges)
                parts["loss"].backward()
                norm = torch.nn.utils.clip_grad_norm_([*self.model.parameters(), self.probe], s.clip)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                seen += ids.numel()
                self.minutes = before + (time.monotonic() - began) / 60
                bar.update()
                if self.step % s.log_every == 0:
                    row = {
                        "length": ids.shape[1],
                        **{name: part.item() for name, part in parts.items()},
                        "gradient": norm.item(),
                        "rate": rate,
                        "tokens_per_second": round(seen / (time.monotonic() - began)),
                    }
                    if not math.isfinite(row["loss"]):
                        raise FloatingPointError(f"loss {row['loss']} at step {self.step}: resume with a lower rate")
                    self._log(row)
                    bar.set_postfix(
                        answer=f"{row['answer']:.3f}",
                        prose=f"{row['prose']:.2f}",
                        T=row["length"],
                        bridge=f"{row['bridge']:.3f}",
                        rate=row["tokens_per_second"],
                    )
                if self.step % s.evaluate_every == 0:
                    self._log({"exact_match": (found := self.evaluate(held_out))})
                    shown = " ".join(f"{task} {match:.3f}" for task, match in found.items())
                    tqdm.write(f"{self.step} {self.minutes:.2f} min {shown}")
                if self.step % s.checkpoint_every == 0:
                    self.save()

    def evaluate(self, held_out) -> dict[str, float]:
        """Held-out exact match per task."""
        cuda = self.device.type == "cuda"
        encode = Encoder(self.tokenizer)
        return {
            task: score(self.model, encode, drawn, 1 << 15, autocast=cuda)["exact_match"]
            for (task, _), drawn in held_out.items()
        }

    def finish(self) -> Path:
        """Saves the model, draws the curves where matplotlib is installed, prints a summary."""
        self.save()
        save_model(self.model, self.tokenizer, self.folder / "model")
        rows = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        plot(rows, self.folder / "model" / "training.png")
        evaluated = [row for row in rows if "exact_match" in row]
        count = sum(p.numel() for p in self.model.parameters())
        print(f"{count:,} parameters, {self.step:,} steps, {self.minutes:.1f} minutes: {self.folder / 'model'}")
        if evaluated:
            last = evaluated[-1]["exact_match"]
            print_table([{"held-out task": task, "exact match": float(match)} for task, match in last.items()])
        return self.folder / "model"


def _as_is(batch):
    """Collating would copy arrays into shared memory, which containers keep small."""
    return batch


def plot(rows: list[dict], path: Path) -> None:
    """Draws loss and held-out exact match by step; does nothing without matplotlib."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        print("no curves drawn: matplotlib is not installed (pip install matplotlib)")
        return
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    losses, matches = [r for r in rows if "loss" in r], [r for r in rows if "exact_match" in r]
    for name in ("answer", "prose", "bridge", "penalty"):
        left.plot([r["step"] for r in losses], [max(r[name], 1e-5) for r in losses], label=name, linewidth=1)
    left.set(yscale="log", xlabel="step", ylabel="loss")
    for task in matches[-1]["exact_match"] if matches else ():
        right.plot([r["step"] for r in matches], [r["exact_match"][task] for r in matches], label=task, linewidth=1)
    right.set(xlabel="step", ylabel="held-out exact match", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/model"), help="folder of the run; resumes what is there")
    parser.add_argument("--tokenizer", type=Path, default=SHIPPED, help="folder with tokenizer.json")
    parser.add_argument("--init-from", type=Path, help="start from the weights of this model folder, new optimizer")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the layer (pays on a GPU)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings to change, values as JSON")
    args = parser.parse_args()
    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)}
    unknown = set(changes) - set(asdict(Settings()))
    if unknown:
        parser.error(f"unknown setting {', '.join(sorted(unknown))}: choose from {', '.join(asdict(Settings()))}")
    needed = (("--tokenizer", args.tokenizer, "tokenizer.json"), ("--init-from", args.init_from, "config.json"))
    for option, folder, file in needed:
        if folder and not (folder / file).exists():
            parser.error(f"{option} {folder} has no {file}: give a folder that holds one")
    if "limits" in changes:
        changes["limits"] = Limits(**changes["limits"])
    settings = replace(SMOKE if args.smoke else Settings(), **changes)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    run = Run(settings, args.out, tokenizer, args.device, args.init_from, args.compile)
    run.train()
    run.finish()


if __name__ == "__main__":
    sys.exit(main())
