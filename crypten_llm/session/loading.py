"""The owner's weights as they come from their files, its model in the clear, and the bar that shows how far it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.models import checkpoint
from crypten_llm.models.balance import balance
from crypten_llm.models.llama import Llama, prepare

if TYPE_CHECKING:
    import torch

    from crypten_llm.engines.base import Engine
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


def in_the_clear(engine: Engine, model: Llama, folder: str | Path | None) -> Llama:
    """The owner's model on engine ``plain``. A private engine has let the floats go; they are read again."""
    assert folder, "the owner has loaded a model"
    if not engine.is_private:
        return model
    plain, config = PlainEngine(softmax_base=engine.softmax_base), model.config
    weights = checkpoint.load_weights(folder, config)
    prepared = {name: plain.parameter(prepare(name, value, config), value.shape) for name, value in weights}
    if engine.balances:
        balance(prepared, config)
    return Llama(plain, config, prepared)


def loading_bar(total: int | None, progress: bool) -> tqdm:
    return tqdm(desc="loading weights", total=total, unit="tensor", disable=not progress, leave=False)
