"""Draws a trace: positions by layer, kept and attended to, and the attention that they recover."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from crypten_llm.commands.trace import Trace


def save(trace: Trace, path: str | Path) -> None:
    """Writes the drawing of a ``Trace`` to ``path``; its ending says which format.

    Raises ModuleNotFoundError without matplotlib.
    """
    draw(trace).savefig(path, dpi=120)


def draw(trace: Trace) -> Any:
    """A ``Trace`` as a matplotlib ``Figure``.

    Left: a row per layer and kv head, a column per position; grey was dropped, light is kept after the prompt, dark is
    attended to, the darker the more steps. Right: attention mass recovered, by layer, mean and range over the steps.
    Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.figure import Figure  # without pyplot, so that a notebook's or a program's backend stays as it is

    counts = [len(record.kept[0]) for record in trace.layers]
    length = max(record.keys.shape[1] for record in trace.layers)
    image = np.zeros((sum(counts), length))
    rows = ((record, head) for record, count in zip(trace.layers, counts, strict=True) for head in range(count))
    for row, (record, head) in enumerate(rows):
        image[row, record.kept[0][head]] = 0.35
        for attended in record.attended:
            image[row, attended[head]] += 0.65 / len(record.attended)
    figure = Figure(figsize=(11, 1.5 + 0.16 * len(image)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[4, 1])
    left.imshow(image, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ends = np.cumsum(counts)
    left.set_yticks(ends - (np.array(counts) + 1) / 2, [record.label for record in trace.layers])
    for boundary in ends[:-1]:
        left.axhline(boundary - 0.5, color="white", linewidth=1)
    left.axvline(trace.prompt_tokens - 0.5, color="tab:orange", linewidth=1)
    left.set_xlabel("position (orange: end of the prompt)")
    left.set_ylabel("layer, a line for each kv head")
    left.set_title(f"{trace.policy} on {trace.engine}: kept (light) and attended to (dark)")
    for index, record in enumerate(trace.layers):
        mass = record.mass or [float("nan")]
        right.plot([min(mass), max(mass)], [index, index], color="tab:blue", linewidth=2)
        right.plot(sum(mass) / len(mass), index, "o", color="tab:blue")
    right.set_xlim(0, 1.02)
    right.set_ylim(len(trace.layers) - 0.5, -0.5)
    right.set_xlabel("attention mass recovered")
    return figure
