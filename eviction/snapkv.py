"""Policy ``snapkv``: what the end of the prompt looks at is what the answer will need."""

from dataclasses import dataclass
from typing import Any, ClassVar

from eviction.operations import Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import add_mass, pooled, retain, spread
from eviction.settings import budget, fitting, tokens, whole


@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention of the last ``window`` queries to the rows before them, summed, then averaged over ``kernel``
    neighbours; the best rows stay, and the window. What is generated joins and stays. A further turn of a conversation
    is a prompt of its own: the rows that are there stay, and the choice is among those that it adds.

    budget: rows kept of the prompt, the window among them. kernel: odd.

    Source: Li et al. 2024, section 4; window, kernel and budget of the authors' code. Deviation: one choice per kv
    head, weights averaged over its query heads.
    """

    budget: float = budget(2048)
    window: int = whole(32, 1)
    kernel: int = whole(5, 1)

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation"
    arxiv: ClassVar[str] = "2404.14469"
    when: ClassVar[str] = "prefill"
    shared_over: ClassVar[str] = "kv head"
    cost: ClassVar[str] = "none after the prefill"
    goes_on: ClassVar[bool] = True
    style: ClassVar[tuple[str, str, str]] = ("#009E73", "D", "-")
    uses: ClassVar[tuple[str, ...]] = ("mass", "within", "public", "top", "picks", "keep", "take")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise self.refuse(f"kernel is {self.kernel}; it must be odd, to have a middle")

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {"budget": rows, "window": fitting(cls.window, rows / 2), **changed}

    def go_on(self, ops: Operations, layer: Layer, turn_tokens: int) -> None:
        layer.notes["held rows"], layer.notes["turn tokens"] = len(layer), turn_tokens

    def watches(self, prompt_tokens: int) -> int:
        return min(self.window, prompt_tokens)

    def watch(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        rows = seen.positions >= layer.prompt_tokens - self.window
        if rows.any():
            add_mass(ops, layer.notes, ops.mass(seen.weights, spread(layer, rows)), limit=self.window)

    def kept(self, layer: Layer) -> int:
        """Rows that a layer keeps of the prompt."""
        return tokens(self.budget, self.prompt(layer))

    def prompt(self, layer: Layer) -> int:
        """Tokens of the prompt, or of the turn that is now."""
        return layer.notes.get("turn tokens", layer.prompt_tokens)

    def evict(self, ops: Operations, layer: Layer) -> None:
        kept, mass, held = self.kept(layer), layer.notes.pop("mass"), layer.notes.get("held rows", 0)
        if kept >= len(layer) - held:
            return
        window = min(self.window, kept)
        older = mass[..., held : len(layer) - window]
        retain(ops, layer, pooled(ops, older, self.kernel // 2, self.window), held, kept - window, window)
