"""One decode step on engine ``wire`` beside the same step on engine ``crypten``, in one run on one machine.

    python -m experiments.measure.compare_engines --json --repeats 3
    python -m experiments.measure.compare_engines --json --repeats 3 --shapes SmolLM2 --engines crypten "wire, tape"
    python -m experiments.measure.compare_engines --json F --shapes 7B --device cuda --steps 5 --engines crypten wire

Each shape is measured on every engine in turn, ``--repeats`` times, as in ``crypten_llm bench``: random weights, a
secret cache of the given length, all parties on this machine. SmolLM2's is a whole token after 256 others, from its id
to its logits, the other shapes are one decoder layer. The dealer of ``crypten`` answers along the way; that
of ``wire`` works along, and once more ``wire`` runs from a tape that is dealt before. ``times faster`` is the median
of the pairs' ratios. Rounds and bytes are a step's; bytes are those of the party that sent most, the dealer's those
of its links to both parties.

With ``--json`` every measurement is written when it is done, and a run that is started again goes on from there; a
Markdown table of the same name follows. At hidden size 4,096 a step of ``crypten`` takes half a minute and several GB.

On a GPU (``--device cuda``) all parties of both engines are on the card: CrypTen takes its own path for one, and what
it opens goes through sockets like the dealer's corrections. The first steps of ``wire`` compile and capture: count five
or more, of which the median is taken.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from tqdm import tqdm

from crypten_llm.commands.deal import deal
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from crypten_llm.session.settings import split
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import sign
from experiments.tools.tables import markdown_of

RESULTS = Path(__file__).parents[1] / "results" / "compare_engines.json"
SHAPES = {
    "small": Shape(hidden=256, heads=8, kv_heads=8, ffn=688, kv_len=1024, steps=5),
    "7B": Shape(hidden=4096, heads=32, kv_heads=32, ffn=11008, kv_len=512, steps=1),
    "SmolLM2": Shape(hidden=576, heads=9, kv_heads=3, ffn=1536, layers=30, kv_len=256, steps=2, vocab=49152),
}
BASELINE = "crypten"
ENGINES = (BASELINE, "wire", "wire, tape")


def measure(shape: Shape, engine: str, timeout: float, device: str = "cpu") -> dict:
    """Figures of one step of ``shape``, the median of ``shape.steps`` after one that is not counted."""
    settings = {"engine": engine.partition(",")[0], "timeout": timeout, "device": device}
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        if engine.endswith("tape"):
            settings["tape"] = str(Path(folder) / "tape")
            deal(shape, settings["tape"], say=lambda line: None)
        with PrivateLlama(*split(settings)) as llama:
            figures, cost = llama.bench(shape)
    return {
        "seconds": figures["seconds_per_step"],
        "rounds": cost.rounds() // shape.steps,
        "dealer_rounds": cost.dealer_rounds() // shape.steps,
        "bytes_sent": max(cost.bytes_sent()) // shape.steps,
        "dealer_bytes": cost.dealer_bytes() // shape.steps,
        "peak_bytes": max(cost.peak_bytes()),
        "max_abs_err": figures["max_abs_err"],
    }


def key(shape: Shape, engine: str, repeat: int, device: str = "cpu") -> str:
    sizes = f"d={shape.hidden} ffn={shape.ffn} heads={shape.heads} T={shape.kv_len} layers={shape.layers}"
    sizes += f" vocab={shape.vocab}" if shape.vocab else ""
    sizes += f" sequences={shape.sequences}" if shape.sequences > 1 else ""
    sizes += f" on {device}" if device != "cpu" else ""
    return f"{sizes}/{shape.steps} steps/{engine}/{repeat}"


def summary(shapes: list[Shape], cells: dict[str, dict], device: str = "cpu") -> list[dict]:
    """A row for each shape and engine that has been measured; repeats whose baseline is missing have no ratio."""
    rows = []
    for shape in shapes:
        by_engine = {engine: _repeats(shape, engine, cells, device) for engine in ENGINES}
        for engine, found in by_engine.items():
            if not found:
                continue
            base = by_engine[BASELINE]
            ratios = [base[repeat]["seconds"] / cell["seconds"] for repeat, cell in found.items() if repeat in base]
            first = next(iter(found.values()))
            exact = {name: first[name] for name in ("rounds", "dealer_rounds", "bytes_sent", "dealer_bytes")}
            rows.append(
                {
                    "shape": key(shape, "", 0, device).partition("/")[0],
                    "engine": engine,
                    "seconds": round(median(cell["seconds"] for cell in found.values()), 4),
                    "times_faster": round(median(ratios), 1) if ratios else None,
                    "repeats": len(found),
                    **exact,
                    "peak_bytes": max(cell["peak_bytes"] for cell in found.values()),
                    "max_abs_err": float(f"{max(cell['max_abs_err'] for cell in found.values()):.2g}"),
                }
            )
    return rows


def _repeats(shape: Shape, engine: str, cells: dict[str, dict], device: str) -> dict[int, dict]:
    start = key(shape, engine, 0, device)[:-1]
    return {int(name[len(start) :]): cell for name, cell in cells.items() if name.startswith(start)}


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    return "\n".join(markdown_of(rows)) + "\n"


def save(path: Path, shapes: list[Shape], result: dict, device: str) -> None:
    result["summary"] = summary(shapes, result["cells"], device)
    kept.save(path, result)
    path.with_suffix(".md").write_text(markdown(result["summary"]), "utf-8")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="pairs of each shape (default: 1)")
    parser.add_argument("--steps", type=int, metavar="N", help="counted steps instead of the shape's own")
    parser.add_argument("--device", default="cpu", help="where all parties compute, as of bench (default: cpu)")
    parser.add_argument("--timeout", type=float, default=900.0, metavar="S")
    parser.add_argument("--quick", action="store_true", help="the small shape alone, two steps, once")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="F", help=f"keep the figures (default: {RESULTS.name})"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shapes, arguments.steps, arguments.repeats = ["small"], 2, 1
    shapes = [SHAPES[name] for name in arguments.shapes]
    if arguments.steps:
        shapes = [replace(shape, steps=arguments.steps) for shape in shapes]
    result = kept.load(arguments.json)
    cells, device = result.setdefault("cells", {}), arguments.device
    todo = [
        (shape, engine, repeat)
        for shape in shapes
        for repeat in range(arguments.repeats)
        for engine in arguments.engines
        if key(shape, engine, repeat, device) not in cells
    ]
    with tqdm(todo, unit="run", disable=not sys.stderr.isatty()) as bar:
        for shape, engine, repeat in bar:
            name = key(shape, engine, repeat, device)
            bar.set_postfix_str(name)
            cells[name] = measure(shape, engine, arguments.timeout, device)
            sign(result, "crypten", device=device)
            if arguments.json:
                save(arguments.json, shapes, result, device)
    if arguments.json:
        save(arguments.json, shapes, result, device)
    print(markdown(summary(shapes, cells, device)), end="")


if __name__ == "__main__":
    sys.exit(main())
