"""Policy ``head_split``: a few kv heads look far and keep every row, the others see the beginning and what is near."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eviction import trained
from eviction.full import Full
from eviction.operations import Layer, Operations, Seen
from eviction.policy import HeadGroup, Policy
from eviction.rows import take
from eviction.settings import fitting, share, whole

WITH_RANKS = (trained.SHIPPED, "SmolLM2-135M-Instruct")  # models whose ranks come with the project
FITTING = "fitting"


@dataclass(frozen=True)
class HeadSplit(Policy):
    """Heads that look far, and heads that do not: these see ``start`` first and ``recent`` last tokens, also while a
    prompt is read. Scores outside are neither computed nor dealt, and rows that leave the window are dropped.

    far: the share of all kv heads that look far, those of the lowest ranks. reading: how many last tokens the others
    see while a prompt is read, where that is more than ``recent``; its end leaves ``recent``, so that a step reads no
    more for it. weights: where the ranks are: ``shipped`` or ``SmolLM2-135M-Instruct``, ``fitting`` for that of the two
    that has the model's layers and kv heads, or the name of registered ones. A file holds ``ranks`` [layers, kv_heads],
    each of 0 to layers * kv_heads - 1 once; ``crypten_llm calibrate --heads-out`` writes one.

    Source: Xiao et al. 2024. Deviations: the file has the heads' order, by gates as the paper trains them or by the
    attention that heads pay to a needle from the place where it is asked for; their number is a setting, and so is a
    wider window for the prompt.
    """

    far: float = share(0.25)
    start: int = whole(16, 0)
    recent: int = whole(128, 1)
    reading: int = whole(0, 0)
    weights: str = trained.weights(*WITH_RANKS[1:], FITTING, default=FITTING)

    name: ClassVar[str] = "head_split"
    paper: ClassVar[str] = "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads"
    arxiv: ClassVar[str] = "2410.10819"
    when: ClassVar[str] = "prefill and step"
    shared_over: ClassVar[str] = "kv head"
    reveals: ClassVar[str] = "nothing; which heads look far is public"
    cost: ClassVar[str] = "none: public indices"
    goes_on: ClassVar[bool] = True
    cuts_prompts: ClassVar[bool] = True
    style: ClassVar[tuple[str, str, str]] = ("#0072B2", "d", "-")
    uses: ClassVar[tuple[str, ...]] = ("take",)

    @classmethod
    def at_budget(cls, rows: int, prompt_tokens: int, heads: int, **changed: Any) -> dict[str, Any]:
        start, recent = fitting(cls.start, rows / 8), fitting(cls.recent, rows / 4)
        near = start + recent
        far = min(1.0, max(0.0, rows - near) / max(1, prompt_tokens - near) or 1e-6)
        return {"far": far, "start": start, "recent": recent, **changed}

    def split(self, layer: Layer) -> tuple[HeadGroup, ...]:
        is_far = self.looks_far(layer.layers, layer.kv_heads)[layer.index]
        far, near = (tuple(index.nonzero()[:, 0].tolist()) for index in (is_far, ~is_far))
        window = max(self.reading, self.recent)
        inside = Full() if window == self.recent else _Near(self.start, self.recent)
        groups = (HeadGroup(far, Full()), HeadGroup(near, inside, window, self.start))
        return tuple(group for group in groups if group.heads)

    def looks_far(self, layers: int, kv_heads: int) -> torch.Tensor:
        """Public bool [layers, kv_heads]. Raises PolicyError where no ranks are of such a model."""
        names = WITH_RANKS if self.weights == FITTING else (self.weights,)
        found = {name: trained.load(name, self.name, HeadSplit.name).get("ranks") for name in names}
        for ranks in found.values():
            if ranks is not None and _are_of(ranks, layers, kv_heads):
                return ranks < max(1, round(self.far * layers * kv_heads))
        there_are = " and ".join(
            "missing" if ranks is None else f"of shape {tuple(ranks.shape)}" for ranks in found.values()
        )
        raise self.refuse(
            f"its weights are for another model: ranks are {there_are}, not each of 0 to {layers * kv_heads - 1} once "
            f"in ({layers}, {kv_heads}); write them for this model (python -m crypten_llm calibrate --heads-out FILE), "
            "start every party with them (--policy-weights FILE) and name them (--set weights=NAME)"
        )


@dataclass(frozen=True)
class _Near(Policy):
    """What heads do that do not look far, where an answer sees less than its prompt did. What it drops is gone for the
    turns to come too."""

    start: int = whole(HeadSplit.start, 0)
    recent: int = whole(HeadSplit.recent, 1)

    name: ClassVar[str] = HeadSplit.name

    def evict(self, ops: Operations, layer: Layer) -> None:
        """Leaves what the next token sees beside itself."""
        rows, last = len(layer), self.recent - 1
        if rows > self.start + last:
            index = torch.arange(rows)
            take(ops, layer, torch.cat([index[: self.start], index[rows - last :]]))

    def after_step(self, ops: Operations, layer: Layer, seen: Seen) -> None:
        self.evict(ops, layer)


def _are_of(ranks: torch.Tensor, layers: int, kv_heads: int) -> bool:
    every = torch.arange(layers * kv_heads)
    return ranks.shape == (layers, kv_heads) and torch.equal(ranks.flatten().sort()[0], every)
