"""The one place where a secret becomes readable, and the record of it.

Owns every opening of an unmasked value: who learns what, and why that is meant. Nothing else calls
``Engine.open_to``. It also keeps the public facts, which all parties know from the start. The run's report prints
both lists, so that a reader can check them against the threat model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.session.mode import ID

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine
    from crypten_llm.session.mode import Mode
    from crypten_llm.session.thin import Side
    from eviction.operations import Handle


def choice_of(shown: Sequence[torch.Tensor], mode: Mode, vocabulary: int) -> torch.Tensor:
    """What a client chooses a token from, of what it was shown: logits [V], of which all but the best are -inf in mode
    "top-k"; in mode "tokens" the id, a tensor [].
    """
    if not mode.count:
        return shown[0][0]
    ids, best = shown
    return torch.full((vocabulary,), -torch.inf).scatter(0, ids.long(), best)


@dataclass(frozen=True)
class Revealed:
    """One thing that one party learns, or the compute parties ("parties"), or the dealer too ("all")."""

    what: str
    to: str
    why: str


class RevealLog:
    """What has been revealed on this party's knowledge, in order, each with how often."""

    def __init__(self, counts: dict[Revealed, int] | None = None) -> None:
        self._counts = counts or {}
        self.tokens = 0  # steps of which the client was shown what it chooses from

    def copy(self) -> RevealLog:
        """A log that goes on from here and leaves this one as it is."""
        return RevealLog(dict(self._counts))

    def public(self, what: str, why: str) -> None:
        """Records a fact that every party, the dealer too, knows."""
        self._record(Revealed(what, "all", why))

    def told(self, what: str, to: str, why: str) -> None:
        """Records what the parties tell ``to`` of themselves."""
        self._record(Revealed(what, to, why))

    def open_choice(
        self, engine: Engine, logits: Handle, client: int, mode: Mode, temperature: float, thin: Side | None = None
    ) -> Any:
        """What the client chooses a token from, ``None`` elsewhere: see ``choice_of``. For a thin client, at the helper
        what it is to pass on, a list of ``Padded``.

        logits: [1, V]. temperature: of mode "tokens". thin: this party's side of a thin client. Reveals, raises: as
        ``open_to_client``. Cost: the engine's, of ``sample`` or ``top_k``, and of ``open_to`` or ``pass_on``.
        """
        if mode.kind == ID:
            with engine.meter.operation("choice of the token", "choice"):
                chosen = engine.sample(logits, temperature)
            what, why = "id of each generated token", "the answer"
        elif mode.count:
            with engine.meter.operation(f"the {mode.count} best logits", "choice"):
                chosen = engine.top_k(logits, mode.count)
            what, why = f"ids and logits of the {mode.count} best tokens, each step", "the client samples among them"
        else:
            chosen, what, why = logits, "logits of each generated token", "the client samples its own answer"
        with engine.meter.operation("reveal to the client", "reveal"):
            self.tokens += 1
            shown = self.open_to_client(engine, chosen, client, what, why, thin)
        if shown is None or thin is not None:
            return shown
        return choice_of(shown if mode.count else (shown,), mode, logits.shape[-1])

    def open_to_client(
        self, engine: Engine, handle: Handle, client: int, what: str, why: str, thin: Side | None = None
    ) -> Any:
        """The float value of ``handle`` at the client, ``None`` elsewhere; of several in a tuple, of each. For a thin
        client, at the helper each value behind a pad.

        Reveals: the value, to the client alone; on an engine that tells, to the compute parties before, whether any
        number left its range. Cost: the engine's, of ``open_to`` or ``pass_on``. Raises: LeftRange, where one did.
        """
        if engine.tells_range:
            self._record(
                Revealed("whether any number left the engine's range", "parties", "a wrong answer is not given")
            )
        self._record(Revealed(what, "client", why))
        return engine.open_to(handle, client) if thin is None else thin.pass_on(engine, handle, client)

    def _record(self, entry: Revealed) -> None:
        self._counts[entry] = self._counts.get(entry, 0) + 1

    def as_list(self) -> list[dict]:
        return [{**asdict(entry), "times": times} for entry, times in self._counts.items()]
