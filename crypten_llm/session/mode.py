"""How much of each step's logits the client learns: all, the best of them, or the chosen token's id alone.

Owns the mode and what a client can ask for in it. What a party reveals follows from its own settings and its own
program. Nothing that a peer sends changes it: a plan of another mode is refused (``generation``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crypten_llm.errors import UsageError

if TYPE_CHECKING:
    from crypten_llm.engines.wire.numbers import WireConfig
    from crypten_llm.session.sampling import SamplingConfig

HOTTEST = 16.0  # temperature at which noise still fits beside a logit
MOST = 64  # logits of a step
ALL = "logits"
ID = "tokens"


@dataclass(frozen=True)
class Mode:
    """What the client learns of a step, by all parties' own settings.

    kind: "logits", all of them, from which the client chooses; "tokens", the chosen token's id alone; "top-k", ids and
    logits of the ``count`` largest.
    """

    kind: str = ALL
    count: int = 0

    @classmethod
    def parse(cls, text: Any) -> Mode:
        """From "tokens", "top-20" or "logits". Raises UsageError for any other."""
        if text in (ID, ALL):
            return cls(text)
        found = re.fullmatch(r"top-([1-9][0-9]?)", text) if isinstance(text, str) else None
        if found is None or int(found[1]) > MOST:
            shown = repr(text)[:40]
            raise UsageError(
                f"what is revealed is {shown}; it must be tokens, top-K with K from 1 to {MOST}, or logits (--reveal)"
            )
        return cls("top-k", int(found[1]))

    def wire(self, precision: str = "default") -> WireConfig:
        """The numbers of engine ``wire``, by its preset; logits that are compared on shares need more bits behind the
        point."""
        from crypten_llm.engines.wire.numbers import WireConfig  # not where a command line is read

        return WireConfig.of(precision) if self.kind == ALL else WireConfig.choosing(precision)

    def __str__(self) -> str:
        return f"top-{self.count}" if self.count else self.kind

    def check(self, sampling: SamplingConfig, logprobs: int | None = None, within: bool = False) -> None:
        """Raises UsageError where the client would need more of the logits to choose as it is asked to; within: a
        grammar, which it can among the best of them too.
        """
        if self.kind == ALL:
            return
        if within and self.kind == ID:
            raise UsageError(
                "a JSON schema, a grammar or tools are followed by choosing among logits, and --reveal tokens does not "
                "show the client any; leave them out, or use --reveal logits or top-K"
            )
        needs = {
            "logprobs": logprobs,
            "repetition_penalty": None if sampling.repetition_penalty == 1 else sampling.repetition_penalty,
        }
        if not sampling.greedy and self.kind == ID:
            needs |= {"top_k": sampling.top_k or None, "min_p": sampling.min_p or None, "seed": sampling.seed}
            needs["top_p"] = None if sampling.top_p == 1 else sampling.top_p
        for name, value in needs.items():
            if value is not None:
                why = "draws with the dealer's noise" if name == "seed" else "does not show the client all logits"
                hint = {"repetition_penalty": "1", "top_k": "0", "top_p": "1", "min_p": "0"}.get(name)
                remedy = f"set it to {hint}" if hint else "leave it out"
                raise UsageError(f"{name} is {value:g}, but --reveal {self} {why}; {remedy} or use --reveal logits")
        if not sampling.greedy and self.kind == ID and sampling.temperature > HOTTEST:
            raise UsageError(
                f"temperature is {sampling.temperature:g}; with --reveal tokens it must be {HOTTEST:g} at most"
            )
        if not sampling.greedy and self.count and not 1 <= (sampling.top_k or 0) <= self.count:
            raise UsageError(
                f"top_k is {sampling.top_k}, but --reveal {self} shows the client {self.count} logits; give a top_k of "
                f"1 to {self.count} or use --reveal logits"
            )

    def temperature(self, sampling: SamplingConfig) -> float:
        """What must be public of how a token is chosen: the temperature of what is drawn on shares, 0 for none."""
        return 0.0 if self.kind != ID or sampling.greedy else float(sampling.temperature)

    def fact(self, temperature: float) -> str:
        """What all parties know of how a step's token is chosen; nothing where that is the client's own affair."""
        if self.kind == ID:
            return "tokens are chosen on shares, " + (f"at temperature {temperature:g}" if temperature else "greedily")
        return f"the {self.count} best logits are found on shares" if self.count else ""
