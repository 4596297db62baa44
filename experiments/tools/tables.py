"""Tables as text, aligned for a terminal or as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from crypten_llm.units import size


def print_table(rows: list[dict]) -> None:
    """Prints dictionaries as an aligned table; missing cells stay empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [
        [f"{row[n]:.4g}" if isinstance(row.get(n), float) else str(row.get(n, "")) for n in names] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence], missing: str = "") -> list[str]:
    """Lines of a Markdown table; ``missing``: what is written for ``None``."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(missing if cell is None else str(cell) for cell in row) + " |" for row in rows]


def markdown_of(rows: list[dict]) -> list[str]:
    """Lines of a Markdown table of dictionaries, as people read them."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = map(readable, rows)
    return markdown_table([name.replace("_", " ") for name in names], ([row[name] for name in names] for row in shown))


def readable(row: dict) -> dict:
    """A row with its numbers of bytes, which are told by their names, as people write them."""
    return {
        name: size(value) if "bytes" in name and isinstance(value, int | float) else value
        for name, value in row.items()
    }
