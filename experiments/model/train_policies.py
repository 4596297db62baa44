"""Trains the small networks of the policies ``locret`` and ``attention_gate`` on a model, and writes their files.

    python -m experiments.model.train_policies --model crypten_llm/shipped --name shipped

Both learn from the attention of answers: for a document with its question and answer, a token's label, one per kv head,
is the largest score that any query of the answer has with its key. ``locret`` fits the label (smooth L1, after Huang et
al. 2024, section 3.3); ``attention_gate`` fits whether it is in the upper half (the paper's eviction rate of one half).
The question is the last thing in a document, so what they can learn is which tokens are ever asked for.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import eviction
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.insecure.recorder import Recorder
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.session.party import Party
from eviction import trained
from experiments.model.evaluate import draw_all
from experiments.tools.command import command

TASKS = ("passkey", "key_value", "one_hop", "two_hop", "few_shot", "span_copy")
DOMAIN = 10.0  # silu's arguments are trained to stay below; on shares they must not exceed 12


@torch.no_grad()
def collect(party, tokenizer, samples) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """By layer and sample: features [P, F] of the prompt's tokens and labels [kv_heads, P]."""
    config, found = party.model.config, [[] for _ in party.model.blocks]
    for sample in tqdm(samples, desc="reading", unit="document"):
        prompt = tokenizer(sample.prompt)["input_ids"]
        ids = prompt + tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        cache = party.model.new_cache()
        recorder = Recorder(eviction.FULL, lambda handle: handle, keep_seen=True)
        cache.follow(recorder, len(ids))
        party.model.extend(party.engine.tokens(torch.tensor(ids), len(ids), config.vocab_size), cache)
        for index, layer in enumerate(cache.layers):
            seen = recorder.in_order[index].seen[0]
            size, group = len(prompt), layer.layer.group
            query = seen.query.reshape(config.num_key_value_heads, group, len(ids), -1)[:, :, size - 1 :]
            scores = torch.einsum("gmad,gpd->gmap", query, seen.key[:, :size])
            features = trained.features(party.engine, layer.layer, seen)[:size]
            found[index].append((features.clone(), scores.amax((1, 2)).clone()))
    return found


def fit_locret(data, width: int, steps: int, generator) -> tuple[dict, float]:
    """W1 [F, width] and W2 [width, kv_heads] of one layer, and the correlation of scores and labels."""
    x, y = torch.cat([features for features, _ in data]), torch.cat([label.T for _, label in data])
    w1 = torch.randn(x.shape[1], width, generator=generator) / math.sqrt(x.shape[1])
    w2 = torch.randn(width, y.shape[1], generator=generator) / math.sqrt(width)
    target = y - y.mean(0)  # only the order within a layer and head counts

    def loss(rows):
        hidden = x[rows] @ w1
        outside = (hidden.abs() - DOMAIN).relu().square().mean()
        return F.smooth_l1_loss(F.silu(hidden) @ w2, target[rows]) + outside

    _descend([w1, w2], lambda: loss(torch.randint(len(x), (1024,), generator=generator)), steps)
    with torch.no_grad():
        score = F.silu(x @ w1) @ w2
    return {"w1": w1, "w2": w2}, _correlation(score, target)


def fit_gate(data, width: int, steps: int, generator) -> tuple[dict, float]:
    """Matrices of one layer's gate, and the share of tokens whose half it tells."""
    count, heads = data[0][0].shape[1], data[0][1].shape[0]
    maps = [torch.randn(count, width, generator=generator) / math.sqrt(count) for _ in range(3)]
    maps.append(torch.randn(width, heads, generator=generator) / math.sqrt(width))
    right = []

    def loss():
        features, label = data[int(torch.randint(len(data), (), generator=generator))]
        wanted = (label >= label.median(1, keepdim=True).values).float()
        query, key, value = (features @ part for part in maps[:3])
        scores = query @ key.T
        hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
        found = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value @ maps[3]).T
        right.append(((found > 0) == (wanted > 0)).float().mean().item())
        outside = (scores[~hidden].abs() - DOMAIN).relu().square().mean()
        return F.binary_cross_entropy_with_logits(found, wanted) + outside

    _descend(maps, loss, steps)
    late = right[len(right) * 3 // 4 :]
    return dict(zip(("query", "key", "value", "gate"), maps, strict=True)), sum(late) / len(late)


def _descend(weights, loss, steps: int) -> None:
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
    for weight in weights:
        weight.requires_grad_(False)


def _correlation(x, y) -> float:
    x, y = ((z - z.mean(0)) / z.std(0) for z in (x, y))
    return (x * y).mean().item()


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="folder of the model (default: the shipped one)")
    parser.add_argument("--name", default="shipped", help="of the files: POLICY-NAME.safetensors")
    parser.add_argument("--out", type=Path, default=trained.FOLDER, help="where to write (default: the package)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512], help="prompt tokens")
    parser.add_argument("--samples", type=int, default=16, help="documents per task and length")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=32, help="hidden numbers of locret; a quarter of it for the gate")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    drawn = draw_all(args.model, TASKS, args.lengths, args.samples, split="train", seed=args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    party = Party(PlainEngine())
    party.load(str(args.model))
    data = collect(party, tokenizer, [sample for part in drawn.values() for sample in part])
    generator = torch.Generator().manual_seed(args.seed)
    fits = {"locret": (fit_locret, args.width), "attention_gate": (fit_gate, max(2, args.width // 4))}
    args.out.mkdir(parents=True, exist_ok=True)
    for policy, (fit, width) in fits.items():
        weights = {}
        for index, layer in enumerate(data):
            found, quality = fit(layer, width, args.steps, generator)
            weights |= {f"layers.{index}.{name}": value.half().contiguous() for name, value in found.items()}
            print(f"{policy}, layer {index}: {quality:.3f}")
        save_file(weights, args.out / f"{policy}-{args.name}.safetensors")


if __name__ == "__main__":
    sys.exit(main())
