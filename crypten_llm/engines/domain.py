"""What a model's numbers reach, held against the ranges in which an engine is right.

Owns ``Reached``, one such number, and ``Calibration``, all of an engine's, with the words for whoever has to hear of
them. The owner sees what was measured; the other parties are told why it stops, so a refusal holds the engine's public
ranges and nothing of the model but which of them it leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

SPARE = 2.0  # how many times larger numbers may become, at least, before they leave: less is warned of
MEASURED, CHECKED, PROVED = "measured", "measured; checked in each step", "proved from the weights"


class Limit(NamedTuple):
    """what: is limited, in words; low, high: from where to where."""

    what: str
    low: float
    high: float


@dataclass(frozen=True)
class Reached:
    """lowest, highest: what a limited number was, or with ``PROVED`` the most that it can be for any prompt.

    how: ``MEASURED``, ``CHECKED`` where the engine also looks at every prompt's, or ``PROVED``.
    """

    limit: Limit
    lowest: float
    highest: float
    how: str = MEASURED

    @property
    def is_inside(self) -> bool:
        return self.limit.low <= self.lowest <= self.highest <= self.limit.high  # and is a number

    @property
    def headroom(self) -> float:
        """How many times larger, or smaller where the range ends above zero, it may become before it leaves."""
        low, high = self.limit.low, self.limit.high
        ratios = [math.inf]
        if high > 0 and self.highest > 0:
            ratios.append(high / self.highest)
        if low < 0 and self.lowest < 0:
            ratios.append(low / self.lowest)
        if low > 0:
            ratios.append(self.lowest / low)
        return min(ratios)

    @property
    def is_tight(self) -> bool:
        """Whether another prompt might well leave the range."""
        return self.is_inside and self.how != PROVED and self.headroom < SPARE

    def words(self) -> str:
        """That it leaves its range, without a number of the model."""
        may = "may leave" if self.how == PROVED else "leave"
        return f"{self.limit.what} {may} the range {self._range()}"

    def _range(self) -> str:
        low, high = self.limit.low, self.limit.high
        return f"up to {high:.3g}" if low == -math.inf else f"{low:.3g} to {high:.3g}"

    def row(self) -> str:
        """A line of ``Calibration.table``."""
        bits = f"{math.log2(self.headroom):.1f} bits" if self.is_inside and self.headroom < math.inf else ""
        mark = "" if self.is_inside else "  <-- outside"
        mark = f"  <-- less than {math.log2(SPARE):.0f} bit" if self.is_tight else mark
        reached = f"{self.lowest:>11.3g}{self.highest:>11.3g}"
        return f"{self.limit.what:<52}{reached}  {self._range():<22}{bits:>10}  {self.how}{mark}"


@dataclass(frozen=True)
class Calibration:
    """norm_scales: public, by the name of a norm's weight (``Engine.rms_norm``). reached: all that is limited."""

    engine: str
    norm_scales: dict[str, float] = field(default_factory=dict)
    reached: Sequence[Reached] = ()

    @property
    def outside(self) -> list[Reached]:
        return [reached for reached in self.reached if not reached.is_inside]

    @property
    def can_be_forced(self) -> bool:
        """Whether what is outside was only measured: what the weights do not rule out has no measure."""
        return all(reached.how != PROVED for reached in self.outside)

    def refusal(self) -> str:
        """Why the engine would be wrong, for all parties; nothing where the model stays inside."""
        if not self.outside:
            return ""
        return f"engine {self.engine!r} would be wrong on this model: " + "; ".join(r.words() for r in self.outside)

    def warning(self) -> str:
        """What is close to its limit, for the owner; nothing where nothing is."""
        tight = [f"{r.limit.what} ({math.log2(r.headroom):.1f} bits)" for r in self.reached if r.is_tight]
        if not tight:
            return ""
        return f"little headroom on engine {self.engine!r}, so a prompt may leave its range: {', '.join(tight)}"

    def table(self, tokens: dict[str, int]) -> str:
        """All of it, for the owner alone; tokens: how many were measured, by their kind."""
        counts = " and ".join(f"{count:,} {kind}" for kind, count in tokens.items())
        head = f"{'measured on ' + counts:<52}{'lowest':>11}{'highest':>11}  {'range':<22}{'headroom':>10}"
        return "\n".join([head, *(reached.row() for reached in self.reached)])
