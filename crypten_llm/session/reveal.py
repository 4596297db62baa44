"""The one place where a secret becomes readable, and the record of it.

Owns every opening of an unmasked value: who learns what, and why that is meant. Nothing else calls
``Engine.open_to``. It also keeps the public facts, which all parties know from the start. The run's report prints
both lists, so that a reader can check them against the threat model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from crypten_llm.engines.base import Engine
    from eviction.operations import Handle


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

    def copy(self) -> RevealLog:
        """A log that goes on from here and leaves this one as it is."""
        return RevealLog(dict(self._counts))

    def public(self, what: str, why: str) -> None:
        """Records a fact that every party, the dealer too, knows."""
        self._record(Revealed(what, "all", why))

    def told(self, what: str, to: str, why: str) -> None:
        """Records what the parties tell ``to`` of themselves."""
        self._record(Revealed(what, to, why))

    def open_to_client(self, engine: Engine, handle: Handle, client: int, what: str, why: str) -> torch.Tensor | None:
        """The float value of ``handle`` at the client, ``None`` elsewhere.

        Reveals: the value, to the client alone; on an engine that tells, to the compute parties before, whether any
        number left its range. Cost: the engine's, of ``open_to``. Raises: LeftRange, where one did.
        """
        if engine.tells_range:
            self._record(
                Revealed("whether any number left the engine's range", "parties", "a wrong answer is not given")
            )
        self._record(Revealed(what, "client", why))
        return engine.open_to(handle, client)

    def _record(self, entry: Revealed) -> None:
        self._counts[entry] = self._counts.get(entry, 0) + 1

    def as_list(self) -> list[dict]:
        return [{**asdict(entry), "times": times} for entry, times in self._counts.items()]
