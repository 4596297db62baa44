"""Whether what a party is to hold fits where it computes: a model, the caches of requests, a bench.

Owns the question, which is asked before anything of that size is made. Of parties that share a card the first
counts for all of them, as none has taken its part yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from crypten_llm import memory
from crypten_llm.roles import role_names
from crypten_llm.session import sizes
from crypten_llm.units import size

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine, Held
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.bench import Shape
    from crypten_llm.session.plan import Plan


class Fits:
    """Of the party of ``rank`` on this engine. sharing: ranks that are known to be on the same card, itself among them.

    Every method raises UsageError where there is not enough memory, with what each of them needs.
    """

    def __init__(self, engine: Engine, rank: int, parties: int, sharing: Sequence[int] = ()) -> None:
        on_a_card = engine.device.type != "cpu"
        self._ranks = [other for other in sharing if other >= rank] if on_a_card and sharing else [rank]
        self._engine, self._parties = engine, parties

    def model(self, config: LlamaConfig) -> None:
        self._check(lambda held: config.parameters * held.weight, f"a model of {config.parameters:,} parameters")

    def requests(self, config: LlamaConfig, plans: Sequence[Plan]) -> None:
        tokens = sum(plan.prompt_tokens for plan in plans)
        self._check(
            lambda held: sizes.of_requests(config, plans, held.cached), f"{len(plans)} prompts of {tokens:,} tokens"
        )

    def bench(self, shape: Shape) -> None:
        self._check(lambda held: sizes.of_bench(shape, held), "a bench of these sizes")

    def _check(self, bytes_of: Callable[[Held], int], what: str) -> None:
        needed = {rank: bytes_of(self._engine.holds(rank)) for rank in self._ranks}
        memory.check(sum(needed.values()), f"{what}{by_role(needed, self._parties)}", self._engine.device)


def by_role(needed: Mapping[int, int], parties: int) -> str:
    """ " (owner 3.4 GB, client 6.7 GB)" of several; nothing of one, whose figure is said anyway."""
    names = role_names(parties)
    each = ", ".join(f"{names[rank]} {size(count)}" for rank, count in needed.items())
    return f" ({each})" if len(needed) > 1 else ""
