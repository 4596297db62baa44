"""Whether engine ``wire`` chooses the rows that ``plain`` chooses, policy by policy, on held-out prompts.

    python -m experiments.measure.eviction_agreement --json

Both engines answer the same prompts of the shipped model, ``wire`` going on from the tokens of ``plain``. **INSECURE**
by purpose: every value of a policy is opened to this process. Two questions are answered.

*Each choice by itself.* Wherever a policy compares, ``plain`` computes the same from the queries, keys and values that
``wire`` had in that layer, and from what ``wire`` chose before; with it comes the error that is declared for ``wire``
(``insecure.tracked``). Of the indices that ``plain`` takes, the table gives the share that ``wire`` takes too:
the best of several, and those above a threshold. Then that share up to ties, which must be all: an index is a tie where
what ``wire`` took instead, or the threshold, is no further from it than the declared error and two units of the
comparison. *margin* is how much of that was needed at most. *operations off*: whose error left its declared bound.

*Along the run*, where one difference leads to others: rows kept after the prompt and rows attended to at each step, by
layer and kv head; and the attention that they recover, wire's over plain's.

A prompt is prefilled once for all policies that do not change the prefill. With ``--json`` a prompt's figures are
written when it is done, and a run that is started again goes on from there; a Markdown table of the same name follows.
Without ``--length``, both sets of ``SETS`` are run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.insecure.recorder import Recorder
from crypten_llm.insecure.tracked import TrackedEngine
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.roles import CLIENT
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.party import Party
from crypten_llm.session.plan import DEFAULT_CHUNK, parse_policy
from experiments.measure.eviction_cost import markdown
from experiments.measure.shared_prefill import Onlookers, prefill
from experiments.model.corpus import Encoder, sample
from experiments.model.drafts import TASKS
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.processes import processes
from experiments.tools.provenance import sign

RESULTS = Path(__file__).parents[1] / "results" / "eviction_agreement.json"
ASKED = ("one_hop", "passkey", "few_shot", "two_hop", "key_value")
POLICIES = (
    *("streaming_llm(recent=0.25)", "random", "h2o", "tova(size=0.5)", "snapkv(budget=0.5)", "pyramidkv(budget=0.5)"),
    *("locret(budget=0.5)", "attention_gate", "lazyeviction(window=2)", "mikv", "quest(budget=0.25)"),
    *("infllm(block=16,blocks=4,initial=16,local=64)", "longcache(top=1,span=16,sinks=16,local=64)"),
    *("mpcache(coarse=32,fine=16,least=0)", "mpcache(coarse=32,fine=32,least=0)"),
    "mpcache_spread(budget=64,block=8)",
)
LONGER = (
    *("h2o", "tova(size=0.5)", "snapkv(budget=0.5)", "lazyeviction(window=2)", "quest(budget=0.25)"),
    *("mpcache", "mpcache_spread"),
)
SETS = ((256, 8, POLICIES), (1024, 2, LONGER))  # prompt tokens, prompts, policies


class Judged(Recorder):
    """Records a policy, and on a ``TrackedEngine`` what of its choices and operations was held against ``plain``."""

    def __init__(self, policy, see):
        super().__init__(policy, see)
        self.chosen, self.findings = [], []

    def choose(self, ops, layer, query, query_before):
        return self._judge(super().choose, ops, layer, query, query_before)

    def watch(self, ops, layer, seen):
        self._judge(super().watch, ops, layer, seen)

    def evict(self, ops, layer):
        self._judge(super().evict, ops, layer)

    def after_step(self, ops, layer, seen):
        self._judge(super().after_step, ops, layer, seen)

    def _judge(self, hook, ops, *shown):
        if not hasattr(ops, "chosen"):
            return hook(ops, *shown)
        before = len(ops.chosen), len(ops.findings)
        out = hook(ops, *shown)
        self.chosen += ops.chosen[before[0] :]
        self.findings += ops.findings[before[1] :]
        return out


@dataclass(frozen=True)
class Seen:
    """A policy and what it did with a prompt; tokens: those that decoding went on from."""

    judged: Judged
    tokens: list[int]

    def rows(self, name: str) -> list[torch.Tensor]:
        """Positions [G, N] kept after the prompt, or attended to at each step, of each layer."""
        layers = self.judged.layers
        return [rows for i in sorted(layers) for rows in (layers[i].kept[:1] if name == "kept" else layers[i].attended)]

    @property
    def mass(self) -> float:
        """Share of attention recovered, the mean over steps and layers."""
        return torch.tensor([record.mass for record in self.judged.layers.values()]).double().mean().item()


@torch.inference_mode()
def observe(party, policies, ids: list[int], steps: int, follow: dict[str, Seen] | None = None) -> dict[str, Seen]:
    """All policies on one prompt; ``follow``: whose tokens to go on from, else decoding is greedy.

    Every role of engine ``wire`` runs this; the client's result counts.
    """
    engine, model, vocab = party.engine, party.model, party.model.config.vocab_size
    see = getattr(engine, "see", lambda handle: handle)
    onlookers = Onlookers({text: Judged(parse_policy(text), see) for text in policies})
    with engine.section("prompt"):
        watched, logits = prefill(model, onlookers, ids, DEFAULT_CHUNK)
    shared, found = dict(onlookers.policies), {}
    for text in policies:
        judged, last = shared.get(text), logits
        with engine.section(f"{text} after the prompt"):
            if judged is None:  # it changed the prefill
                judged = Judged(parse_policy(text), see)
                cache, last = prefill(model, judged, ids, DEFAULT_CHUNK)
            else:
                cache = onlookers.cache(text, watched)
            cache.end_prompt()
        tokens = list(follow[text].tokens) if follow else []
        for step in range(steps):
            if follow is None:
                tokens.append(int(last.argmax()))
            with engine.section(f"{text} step {step}"), engine.meter.phase("decode"):
                hidden = model.extend(engine.tokens(torch.tensor(tokens[step : step + 1]), 1, vocab), cache)
                last = model.logits(hidden)[0] if follow is None else None
        found[text] = Seen(judged, tokens)
    return found


def loaded(engine, transport=None) -> Party:
    """The shipped model at this role."""
    party = Party(engine, transport, compute_parties=2 if transport else 1)
    party.load(SHIPPED)
    return party


def recall(clear: list[torch.Tensor], private: list[torch.Tensor]) -> tuple[int, int]:
    """(indices in common, indices of the first) of two lists of [G, N]."""
    pairs = [
        (set(mine.tolist()), set(other.tolist()))
        for one, two in zip(clear, private, strict=True)
        for mine, other in zip(one, two, strict=True)
    ]
    return sum(len(mine & other) for mine, other in pairs), sum(len(mine) for mine, _ in pairs)


def measure(job: tuple) -> tuple[str, dict[str, dict]]:
    """job: a prompt's name, policies, token ids, decode steps. Returns the name, and figures by policy."""
    name, policies, ids, steps = job
    clear = observe(loaded(PlainEngine()), policies, ids, steps)

    def play(transport):
        return observe(loaded(TrackedEngine(transport), transport), policies, ids, steps, follow=clear)

    private = run_roles(play)[CLIENT]
    return name, {text: figures(clear[text], private[text]) | {"tokens": len(ids)} for text in policies}


def figures(clear: Seen, private: Seen) -> dict:
    """Of one policy on one prompt."""
    chosen, findings = private.judged.chosen, private.judged.findings
    rows = [one for one in chosen if one.operation != "above"]
    found = {name: sum(getattr(one, name) for one in rows) for name in ("taken", "agreed")}
    found["over"] = sum(one.taken for one in chosen if one.operation == "above")
    found["over_agreed"] = sum(one.agreed for one in chosen if one.operation == "above")
    found["compared"] = found["taken"] + found["over"]
    found["beyond"] = sum(one.beyond for one in chosen)
    found["margin"] = max((one.margin for one in chosen), default=0.0)
    found["operations"] = len(findings)
    found["off"] = sum(not finding.holds for finding in findings)
    for name in ("kept", "attended"):
        found[f"{name}_found"], found[name] = recall(clear.rows(name), private.rows(name))
    return found | {"mass": clear.mass, "mass_found": private.mass}


def summary(samples: dict[str, dict], policies) -> list[dict]:
    """A row for each policy, over its prompts; key of a sample: policy, then the rest behind a bar. Shares are of all
    indices; in brackets, where it is less, that of the prompt with the least."""
    rows = []
    for policy in policies:
        found = [sample for name, sample in samples.items() if name.partition("|")[0] == policy]
        if not found:
            continue
        tied = [one | {"tied": one["compared"] - one["beyond"]} for one in found]
        masses = [one["mass_found"] / one["mass"] for one in found]
        rows.append(
            {
                "policy": f"`{policy}`",
                "prompts": len(found),
                "chosen": f"{sum(one['taken'] for one in found):,}",
                "the_same": _share(found, "agreed", "taken"),
                "above_a_threshold": f"{sum(one['over'] for one in found):,}",
                "of_them_the_same": _share(found, "over_agreed", "over"),
                "up_to_ties": _share(tied, "tied", "compared"),
                "margin": f"{max(one['margin'] for one in found):.2f}",
                "operations_off": f"{sum(one['off'] for one in found)} of {sum(one['operations'] for one in found)}",
                "kept": _share(found, "kept_found", "kept"),
                "attended": _share(found, "attended_found", "attended"),
                "mass": f"{sum(one['mass'] for one in found) / len(found):.3f}",
                "wire's_over_plain's": f"{sum(masses) / len(masses):.4f} ({min(masses):.4f} to {max(masses):.4f})",
            }
        )
    return rows


def _share(found: list[dict], part: str, whole: str) -> str:
    """Of all prompts together; the least of one in brackets."""
    total = sum(one[whole] for one in found)
    if not total:
        return "–"
    share, least = sum(one[part] for one in found) / total, min(one[part] / one[whole] for one in found)
    return f"{share:.2%}" + (f" ({least:.2%})" if least < share else "")


def tables(samples: dict[str, dict]) -> str:
    """Markdown: a table for each length."""
    lengths = sorted({int(name.partition("|")[2].split("/")[1]) for name in samples})
    found = {}
    for length in lengths:
        mine = {name: one for name, one in samples.items() if f"/{length}/" in name.partition("|")[2]}
        policies = dict.fromkeys([*POLICIES, *(name.partition("|")[0] for name in mine)])
        found[f"Choices of wire beside those of plain, prompts of {length:,} tokens"] = summary(mine, policies)
    return markdown(found)


def _measured(jobs: list[tuple], workers: int) -> Iterator[tuple]:
    """``measure`` of each, as they are done."""
    if jobs:
        with processes(min(workers, len(jobs)), torch.set_num_threads, 1) as found:
            yield from found.map(measure, jobs, ordered=False)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help="with --length; (default: those of SETS)")
    parser.add_argument("--tasks", nargs="+", default=list(ASKED), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--samples", type=int, default=1, help="with --length: prompts, of the tasks in turn")
    parser.add_argument("--length", type=int, help="prompt tokens, at most, of one set of prompts")
    parser.add_argument("--steps", type=int, default=6, help="decode steps (default: 6)")
    parser.add_argument("--workers", type=int, default=2, help="processes, a prompt each (default: 2)")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="F", help=f"keep the figures (default: {RESULTS.name})"
    )
    arguments = parser.parse_args()
    sets = SETS
    if arguments.length:
        sets = ((arguments.length, arguments.samples, arguments.policies or list(POLICIES)),)
    path, todo = arguments.json, []
    result = kept.load(path)
    samples = result.setdefault("samples", {})
    with PrivateLlama.from_pretrained("shipped", engine="plain") as plain:
        encode = Encoder(plain.tokenizer)
        for length, count, policies in sets:
            for index in range(count):
                task = arguments.tasks[index % len(arguments.tasks)]
                name = f"{task}/{length}/{arguments.steps}/{index}"
                missing = [policy for policy in policies if f"{policy}|{name}" not in samples]
                if missing:
                    ids = plain.encode(sample(task, length, index, encode).prompt)
                    todo.append((name, missing, ids, arguments.steps))
    print("INSECURE: this run reveals every choice of the policies to this process", file=sys.stderr)
    for name, made in tqdm(
        _measured(todo, arguments.workers), total=len(todo), unit="prompt", disable=not sys.stderr.isatty()
    ):
        samples |= {f"{policy}|{name}": figures for policy, figures in made.items()}
        sign(result)
        kept.save(path, result)
        if path:
            path.with_suffix(".md").write_text(tables(samples), "utf-8")
    print(tables(samples), end="")


if __name__ == "__main__":
    sys.exit(main())
