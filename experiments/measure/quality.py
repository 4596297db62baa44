"""How good answers are under eviction policies, on engine ``plain``: one score per example and policy.

    python -m experiments.measure.quality --tasks passkey two_hop --length 512 --samples 20 --policies full mpcache h2o
    python -m experiments.measure.quality --model SmolLM2-135M-Instruct --tasks ruler/niah_multikey_1 --length 1024

Owns the decoding and its scores; what to compare is up to the caller (``compare_baselines``, a search over settings).
All policies of an example share one prefill (``shared_prefill``), and a greedy answer ends at the token with which its
score is known (``settled``), so scores come many times faster than from ``PrivateLlama.generate``; they are the same,
and the tests hold them to that.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean
from typing import ClassVar

import torch
from tqdm import tqdm

from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import load_tokenizer
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.plan import DEFAULT_CHUNK, Plan, parse_policy
from eviction import FULL, Policy
from experiments.measure.shared_prefill import prefill_all
from experiments.tasks import Example, Task, Text, find, score
from experiments.tools import real_model
from experiments.tools.command import command
from experiments.tools.processes import processes
from experiments.tools.tables import print_table


@dataclass
class Counted:
    """A policy, and how many rows its decode steps found in the cache and attended to, added up over kv heads."""

    policy: Policy
    total: Counter = field(default_factory=Counter)
    acts: ClassVar[bool] = True

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def choose(self, ops, layer, query, query_before):
        choice = self.policy.choose(ops, layer, query, query_before)
        self.total["kept"] += len(layer) * layer.kv_heads
        self.total["attended"] += (len(layer) if choice is None else choice.count) * layer.kv_heads
        return choice

    def split(self, layer):
        return tuple(replace(group, policy=Counted(group.policy, self.total)) for group in self.policy.split(layer))


class Decoder:
    """Goes on from a prompt's cache, in which ``counted`` is the policy, and says what rows that found there."""

    def __init__(self, model, cache, logits: torch.Tensor, counted: Counted):
        self.model, self.cache, self.logits, self.counted = model, cache, logits, counted
        self.seen = 0

    def feed(self, token: int) -> None:
        """One decode step; ``logits`` [V] are then those after ``token``."""
        engine = self.model.engine
        one_hot = engine.tokens(torch.tensor([token]), 1, self.model.config.vocab_size)
        self.logits = self.model(one_hot, self.cache)[0]
        self.seen += self.cache.length * sum(cache.layer.kv_heads for cache in self.cache.layers)

    def shares(self) -> dict:
        """Rows in the cache and rows attended to, of those that the full cache has at the same steps; ``None`` where
        there was no step."""
        names = ("kept", "attended")
        return {name: self.counted.total[name] / self.seen if self.seen else None for name in names}


def answer(decoder: Decoder, stop_ids, max_new_tokens: int, settled=lambda token_ids: False) -> list[int]:
    """Greedy token ids, a stop token among them; ends where ``settled`` says that the score is known."""
    token_ids: list[int] = []
    while True:
        token_ids.append(int(decoder.logits.argmax()))
        if token_ids[-1] in stop_ids or len(token_ids) == max_new_tokens or settled(token_ids):
            return token_ids
        decoder.feed(token_ids[-1])


def loss(decoder: Decoder, token_ids: Sequence[int]) -> float:
    """Mean negative log-likelihood, in nats, of all but the first of ``token_ids``, each given those before it."""
    total = 0.0
    for given, wanted in zip(token_ids, token_ids[1:], strict=False):
        decoder.feed(given)
        total -= decoder.logits.log_softmax(-1)[wanted].item()
    return total / (len(token_ids) - 1)


def may_match(text: str, answers: Sequence[str]) -> bool:
    """Whether a prediction that begins with ``text`` can still be one of the answers, space around both aside."""
    begun = text.rstrip("\ufffd").lstrip()  # the end of a character may be missing
    return any(wanted.startswith(begun) or begun.rstrip() == wanted for wanted in map(str.strip, answers))


def settled(task: Task, example: Example, text: str) -> bool:
    """Whether a prediction that begins with ``text`` has its score already: no match, or all that is asked for."""
    if task.metric == "exact_match":
        return not may_match(text, example.answers)
    return task.metric.startswith("string_match") and score(task, example, text) == 1


class Scorer:
    """Scores of policies on one example after another, in this process, with ``llama`` on engine ``plain``."""

    def __init__(self, llama: PrivateLlama, to_the_end: bool = False):
        """to_the_end: decode whole answers, even those that cannot match."""
        self.llama, self.to_the_end = llama, to_the_end

    @torch.inference_mode()
    def rows(self, example: Example | Text, policies: Sequence[str]) -> list[dict]:
        """See ``Evaluator.rows``."""
        ids, rest = self._split(example)
        model, found, wanted = self.llama.party.model, {}, list(policies)
        if rest is None and not example.answers:  # the full cache's answer comes first: it is the others' measure
            wanted = list(dict.fromkeys([FULL.name, *policies]))
        counted = {policy: Counted(parse_policy(policy)) for policy in wanted}
        for policy, cache, logits in prefill_all(model, counted, ids, DEFAULT_CHUNK):
            decoder = Decoder(model, cache, logits, counted[policy])
            if rest is None:
                token_ids = self._tokens(example, decoder)
                text = self._text(token_ids)
                if not example.answers:
                    example = replace(example, answers=(text,))
                scored = {"score": score(find(example.task), example, text), "token_ids": token_ids}
            else:
                scored = {"score": loss(decoder, rest)}
            row = {"task": example.task, "index": example.index, "tokens": len(ids), "policy": policy}
            found[policy] = row | scored | decoder.shares()
        return [found[policy] for policy in policies]

    def _split(self, example) -> tuple[list[int], list[int] | None]:
        """A prompt's token ids, and those of a text that are to be predicted, with the one before them."""
        ids, rest = example.ids(self.llama.tokenizer), None
        more = example.max_new_tokens if isinstance(example, Example) else example.scored
        if not isinstance(example, Example):
            ids, rest = ids[: -more - 1], ids[-more - 1 :]
        if not ids:
            raise UsageError(f"a text of {example.task} has {len(rest)} tokens; give a length above {more + 1}")
        Plan(len(ids), more).check(self.llama.config)
        return ids, rest

    def _tokens(self, example: Example, decoder: Decoder) -> list[int]:
        """The answer, up to where its score is known; all of it where it is what others are compared with."""
        early, task = {}, find(example.task)
        if example.answers and not self.to_the_end:
            early["settled"] = lambda token_ids: settled(task, example, self._text(token_ids))
        return answer(decoder, self.llama.config.eos_token_ids, example.max_new_tokens, **early)

    def _text(self, token_ids: list[int]) -> str:
        """Without the stop token."""
        kept = token_ids[:-1] if token_ids[-1] in self.llama.config.eos_token_ids else token_ids
        return self.llama.tokenizer.decode(kept, skip_special_tokens=True)


class Evaluator:
    """Scores of policies on many examples; a with block, which ends the processes.

    model, offline, device: as for ``PrivateLlama``, and a model also by ``real_model.NAME``. workers: processes, of one
    thread each; with one, this process does it all.
    """

    def __init__(self, model: str = "shipped", workers: int = 2, offline: bool = False, device: str = "cpu"):
        self.workers, self._arguments = workers, (real_model.resolved(model), offline, device)
        self._open = ExitStack()

    def __enter__(self):
        if self.workers > 1:
            found = self._open.enter_context(processes(self.workers, _start_worker, *self._arguments))
            self._map, self._score = found.map, _score
        else:
            self._open.callback(torch.set_num_threads, torch.get_num_threads())
            self._map, self._score = map, self._open.enter_context(_scorer(*self._arguments)).rows
        return self

    def __exit__(self, *error):
        return self._open.__exit__(*error)

    def rows(self, examples: Iterable[Example | Text], policies: Sequence[str]) -> Iterator[dict]:
        """Yields a row for each example and policy, in that order: its score and what it kept.

        score: of the task's metric; for a text its loss (see ``loss``), of which less is better. token_ids: the answer,
        up to where its score was clear. kept, attended: see ``Decoder.shares``.

        Raises UsageError for a policy that there is not, or that cannot run on the model, and for a prompt that does
        not fit.
        """
        for found in self._map(partial(self._score, policies=tuple(policies)), examples):
            yield from found


@contextmanager
def _scorer(model: str, offline: bool, device: str):
    with PrivateLlama.from_pretrained(model, engine="plain", threads=1, offline=offline, device=device) as llama:
        yield Scorer(llama)


def _start_worker(*arguments) -> None:
    global _worker
    _worker = _scorer(*arguments).__enter__()


def _score(example, policies) -> list[dict]:
    return _worker.rows(example, policies)


def draw(
    name: str,
    tokenizer,
    length: int,
    count: int,
    seed: int = 0,
    data: str | None = None,
    offline: bool = False,
) -> list[Example | Text]:
    """The first examples, or texts, of the task called ``name``; arguments as for ``find`` and its tasks.

    Raises UsageError where the task has fewer.
    """
    task = find(name, data, offline)
    drawn = (task.texts if task.metric == "perplexity" else task.examples)(tokenizer, length, count, seed)
    if len(drawn) < count:
        raise UsageError(f"task {name} has {len(drawn)} examples, and {count} are asked for; ask for fewer")
    return drawn


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shipped", help=f"also {real_model.NAME} (default: shipped)")
    parser.add_argument("--tasks", nargs="+", default=["passkey", "two_hop"], metavar="TASK")
    parser.add_argument("--length", type=int, default=512, help="prompt tokens, at most (default: 512)")
    parser.add_argument("--samples", type=int, default=20, help="of each task (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", nargs="+", default=["full", "mpcache"], metavar="POLICY")
    parser.add_argument("--data", metavar="DATA", help="of the tasks: a folder, a hub id, or a text file")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(real_model.resolved(arguments.model))
    drawn = [
        example
        for task in arguments.tasks
        for example in draw(task, tokenizer, arguments.length, arguments.samples, arguments.seed, arguments.data)
    ]
    scores: dict[tuple, list[dict]] = {}
    with Evaluator(arguments.model, arguments.workers, device=arguments.device) as evaluator:
        rows = evaluator.rows(drawn, arguments.policies)
        for row in tqdm(rows, total=len(drawn) * len(arguments.policies), unit="answer"):
            scores.setdefault((row["task"], row["policy"]), []).append(row)
    print_table([{"task": task, "policy": policy, **means(rows)} for (task, policy), rows in scores.items()])


def means(rows: Sequence[dict]) -> dict:
    """Means of a policy's rows; of a share, over the examples that took a decode step."""
    out = {"samples": len(rows), "score": mean(row["score"] for row in rows)}
    for name in ("kept", "attended"):
        known = [row[name] for row in rows if row[name] is not None]
        out[name] = mean(known) if known else None
    return out


if __name__ == "__main__":
    sys.exit(main())
