"""Choosing the next token from the logits, on the client, who alone sees them.

Owns the sampling settings and the draw. It never sees a share and makes no protocol randomness: its torch.Generator
decides only which token the client picks, so a repeatable seed is a feature here and would be a fault there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.models.fields import short

if TYPE_CHECKING:
    from crypten_llm.session.grammar import Guide

FILTERS = ("temperature", "top_k", "top_p", "min_p")
"""What greedy decoding has no use for."""


@dataclass(frozen=True)
class SamplingConfig:
    """Greedy by default; with `do_sample`, temperature, then top-k, top-p and min-p, as in transformers.

    temperature: divides the logits; 0 means greedy, the limit it tends to.
    top_k: keep the k best tokens, and those equal to the last of them; None or 0 keeps all.
    top_p: keep the best tokens until their probabilities reach this sum, at least one; 1 keeps all.
    min_p: keep tokens at least this share as likely as the best; 0 keeps all.
    repetition_penalty: of tokens that prompt or answer hold, logits above 0 are divided by it, others multiplied,
    before all else and in greedy decoding too; 1 changes nothing.
    seed: of the draws; None takes a fresh one.

    Raises UsageError naming the value that is out of range, or that greedy decoding would ignore.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.do_sample, bool):
            raise UsageError(f"do_sample is {short(self.do_sample)}; it must be true or false")
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {short(self.temperature)}; it must be 0 (greedy) or a positive number")
        if self.top_k is not None and (not _is_integer(self.top_k) or not 0 <= self.top_k < 2**63):
            raise UsageError(f"top_k is {short(self.top_k)}; it must be a positive integer, or 0 to keep all tokens")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {short(self.top_p)}; it must be above 0 and at most 1")
        if not _is_number(self.min_p) or not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p is {short(self.min_p)}; it must be from 0 (keeps all) to 1")
        if not _is_number(self.repetition_penalty) or not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(
                f"repetition_penalty is {short(self.repetition_penalty)}; it must be a positive number, 1 for none"
            )
        if self.seed is not None and (not _is_integer(self.seed) or not 0 <= self.seed < 2**63):
            raise UsageError(f"seed is {short(self.seed)}; it must be an integer from 0 to 2^63 - 1")
        if not self.do_sample:
            ignored = {
                "temperature": self.temperature not in (0, 1),
                "top_k": self.top_k,
                "top_p": self.top_p != 1,
                "min_p": self.min_p,
            }
            for name in FILTERS:
                if ignored[name]:
                    raise UsageError(f"{name} is {short(getattr(self, name))} but do_sample is false; leave it out")

    @property
    def greedy(self) -> bool:
        return not self.do_sample or self.temperature == 0

    def __str__(self) -> str:
        """In words, for who looks on: "greedy", or "temperature 0.7, top_p 0.9"; the seed is the caller's own."""
        shown = [] if not self.greedy else ["greedy"]
        if not self.greedy:
            shown.append(f"temperature {self.temperature:g}")
            neutral = {"top_k": (None, 0), "top_p": (1,), "min_p": (0,)}
            shown += [f"{n} {getattr(self, n):g}" for n, none in neutral.items() if getattr(self, n) not in none]
        if self.repetition_penalty != 1:
            shown.append(f"repetition_penalty {self.repetition_penalty:g}")
        return ", ".join(shown)


class Sampler:
    """Draws one token a call; a fresh one with the same seed, ids and logits repeats the same tokens."""

    def __init__(self, config: SamplingConfig, ids: Iterable[int] = (), guide: Guide | None = None) -> None:
        """ids: of the prompt, and of all before it that the model has seen; the drawn tokens join them. guide: says
        which tokens may be drawn, before temperature and filters.
        """
        self.config, self._guide = config, guide
        self._seen = set(ids)
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """Token id for logits [vocab_size]. Ties go to the lower id.

        Raises CryptenLLMError on NaN or +inf, and NotFollowed where the guide allows none.
        """
        drawn = self._draw(logits)
        self._seen.add(drawn)
        if self._guide is not None:
            self._guide.take(drawn)
        return drawn

    def _draw(self, logits: torch.Tensor) -> int:
        if not (logits < float("inf")).all():
            raise CryptenLLMError("the logits hold NaN or infinite values: the model's computation overflowed")
        # A stable order on the CPU in float64 makes a draw the same on every machine.
        penalized = self._penalized(logits.detach().cpu().double())
        allowed = penalized if self._guide is None else self._guide.mask(penalized)
        scores, tokens = allowed.sort(descending=True, stable=True)
        if self.config.greedy:
            return int(tokens[0])
        probabilities = self._filtered(scores)
        draw = torch.rand((), dtype=torch.float64, generator=self._generator)
        # The first token whose cumulated probability exceeds the draw; clamped against rounding at the very end.
        rank = torch.searchsorted(probabilities.cumsum(0), draw * probabilities.sum(), right=True)
        return int(tokens[min(int(rank), int(probabilities.count_nonzero()) - 1)])

    def _penalized(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores [vocab_size] with the penalty on those of tokens that were seen."""
        penalty = self.config.repetition_penalty
        if penalty == 1 or not self._seen:
            return scores
        seen = torch.tensor(sorted(self._seen))
        penalized = scores.clone()
        penalized[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        return penalized

    def _filtered(self, scores: torch.Tensor) -> torch.Tensor:
        """Weights of the draw from scores in descending order, [vocab_size] both; what is filtered out has 0."""
        # Relative to the best, so that a tiny temperature cannot overflow.
        scores = (scores - scores[0]) / self.config.temperature
        if self.config.top_k and self.config.top_k < len(scores):
            scores = scores.masked_fill(scores < scores[self.config.top_k - 1], float("-inf"))
        probabilities = scores.softmax(0)
        if self.config.top_p < 1:
            better = probabilities.cumsum(0) - probabilities
            better[0] = 0  # the best token stays, whatever the rounding
            probabilities = probabilities.masked_fill(better >= self.config.top_p, 0)
        if self.config.min_p:
            # What was left out before changes all others' shares alike, so their ratio to the best is as it was.
            probabilities = probabilities.masked_fill(probabilities < self.config.min_p * probabilities[0], 0)
        return probabilities


@dataclass(frozen=True)
class Logprobs:
    """Of one step, as the model gives them, before penalty, temperature and filters: natural logarithms.

    logprob: of the token that was drawn. top: the best tokens' ids and theirs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logits: torch.Tensor, token_id: int, count: int) -> Logprobs:
        """From logits [vocab_size], with the ``count`` best tokens; ties go to the lower id."""
        found = logits.detach().cpu().double().log_softmax(0)
        values, ids = found.sort(descending=True, stable=True)
        best = zip(ids[:count].tolist(), values[:count].tolist(), strict=True)
        return cls(token_id, float(found[token_id]), tuple(best))


def _is_number(value: Any) -> bool:
    """One that a float holds: JSON has integers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 1e300


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
