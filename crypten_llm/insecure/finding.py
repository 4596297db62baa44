"""What holding an operation of ``wire`` against ``plain`` found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.wire.domain import domains

if TYPE_CHECKING:
    from crypten_llm.engines.wire.numbers import WireConfig


FLOAT = 2.0**-40  # of shown values, which are the doubles nearest to them


@dataclass(frozen=True)
class Finding:
    """One operation: where it ran, its largest error against ``plain``, and its declared bound there.

    outside: what had left the operation's domain, where its bound does not hold.
    """

    where: str
    operation: str
    error: float
    bound: float
    outside: str = ""

    @property
    def holds(self) -> bool:
        return not self.outside and self.error <= self.bound  # a NaN does not

    @property
    def used(self) -> float:
        """Share of the bound."""
        return self.error / self.bound if self.bound else math.inf if self.error else 0.0

    def to_dict(self) -> dict:
        return {**asdict(self), "holds": self.holds}


def worst(
    where: str,
    operation: str,
    seen: torch.Tensor | None,
    expected: torch.Tensor,
    bound: float | torch.Tensor,
    outside: str = "",
) -> Finding:
    """The element that uses most of its bound; bound: one for all, or one for each."""
    assert seen is not None, "whoever holds a value against another was shown it"
    errors = (seen - expected).abs().flatten()
    bounds_each = torch.as_tensor(bound, dtype=errors.dtype).expand(expected.shape).flatten()
    bounds_each = bounds_each + FLOAT * (1 + expected.abs().max())
    index = (errors / bounds_each).nan_to_num(nan=math.inf).argmax()
    return Finding(where, operation, errors[index].item(), bounds_each[index].item(), outside)


def outside(config: WireConfig, operation: str, seen: torch.Tensor) -> str:
    """What has left the domain of ``operation``, a key of ``domains``, or nothing.

    seen: what is limited there: of rms_norm sum x^2 + eps H, of softmax the scores without those masked, of its rows
    log(sum exp(s)), of mix its results, of others their inputs.
    """
    what, low, high = domains(config).get(operation, ("inputs", -math.inf, math.inf))
    least, most = seen.min().item(), seen.max().item()
    if low <= least and most <= high:
        return ""
    return f"{what} from {least:.3g} to {most:.3g}, its domain is {low:.3g} to {high:.3g}"
