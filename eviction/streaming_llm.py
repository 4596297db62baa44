"""Policy ``streaming_llm``: the first rows, which take the attention that nothing else wants, and the last ones."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction.operations import Layer, Operations, Seen
from eviction.policy import Policy
from eviction.rows import take
from eviction.settings import budget, tokens, whole


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Attention sinks and a window. Which rows stay is public, so nothing is computed on secrets.

    start: sinks. recent: window.

    Source: Xiao et al. 2024, section 3.2. Deviation: keys keep the position they had in the text, where the paper
    numbers positions inside the cache; within the trained context the distance to the window is the same.
    """

    start: int = whole(4, 0)
    recent: float = budget(512)

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks"
    arxiv: ClassVar[str] = "2309.17453"
    when: ClassVar[str] = "prefill and step"
    shared_over: ClassVar[str] = "all"
    cost: ClassVar[str] = "none: public indices"
    goes_on: ClassVar[bool] = True
    style: ClassVar[tuple[str, str, str]] = ("#999999", "<", "-")
    uses: ClassVar[tuple[str, ...]] = ("take",)

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        return {"start": cls.start, "recent": rows - cls.start, **changed}

    def watches(self, prompt_tokens: int) -> int:
        return 0

    def evict(self, ops: Operations, layer: Layer) -> None:
        recent = tokens(self.recent, layer.prompt_tokens)
        if len(layer) > self.start + recent:
            index = torch.arange(len(layer))
            take(ops, layer, torch.cat([index[: self.start], index[-recent:]]))

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        self.evict(ops, layer)
