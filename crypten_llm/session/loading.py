"""The owner's weights as they come from their files, and the bar that shows how far they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from crypten_llm.models import checkpoint
from crypten_llm.models.llama import prepare

if TYPE_CHECKING:
    import torch

    from crypten_llm.models.config import LlamaConfig


def read_weights(
    folder: str | Path,
    config: LlamaConfig,
    progress: bool,
    beat: Callable[[int, int], None],
    seen: Callable[[str, torch.Tensor], None],
) -> dict[str, torch.Tensor]:
    """By name, as ``prepare`` makes them; beat: hears how far it is, ``(loaded, total)``; seen: each as it was read."""
    total = len(checkpoint.expected_shapes(config))
    weights = {}
    with loading_bar(total, progress) as bar:
        for name, value in checkpoint.load_weights(folder, config):
            seen(name, value)
            weights[name] = prepare(name, value, config)
            bar.update()
            beat(len(weights), total)
    return weights


def loading_bar(total: int | None, progress: bool) -> tqdm:
    return tqdm(desc="loading weights", total=total, unit="tensor", disable=not progress, leave=False)
