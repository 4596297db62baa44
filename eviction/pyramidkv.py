"""Policy ``pyramidkv``: SnapKV with many rows in the first layers, which look everywhere, and few in the last."""

from dataclasses import dataclass
from typing import ClassVar

from eviction.operations import Layer
from eviction.settings import budget, tokens, whole
from eviction.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """A budget that falls linearly over the layers, and SnapKV's choice in each.

    budget: rows kept per layer, on average, above half of the last layers' window. beta: how steep; the last layer's
    share of the average is 1 / beta.

    Source: Cai et al. 2024, section 4. The schedule counts as the reimplementation in kvpress does: the average plus
    the window is what is divided, and a first layer that would keep more than there is hands the rest on. Deviation:
    where the schedule leaves less than a window, every layer gets the budget.
    """

    budget: float = budget(2048)
    window: int = whole(8, 1)
    kernel: int = whole(5, 1)
    beta: int = whole(20, 1)

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling"
    arxiv: ClassVar[str] = "2406.02069"
    style: ClassVar[tuple[str, str, str]] = ("#009E73", "d", "--")

    def kept(self, layer: Layer) -> int:
        prompt, window = self.prompt(layer), self.window
        average = tokens(self.budget, prompt)
        if layer.layers == 1 or average >= prompt:
            return min(average, prompt)
        low = average // self.beta
        high = 2 * average - low
        if high >= prompt - window:
            high = prompt - window
            low = 2 * average - high
        if not window <= low <= high:
            return average
        return round(high - layer.index * (high - low) / (layer.layers - 1))
