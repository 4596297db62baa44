"""How fast the kernels of device cuda are, beside the rate at which the card copies its memory.

    python -m experiments.measure.cuda_kernels --json

Needs a GPU, which every table names. ``of_copy`` is the bytes that a kernel has to read and write per second over those
of a plain copy in the same run, read and written; for products of many rows, which are bound by arithmetic,
``tmac_per_s`` says 10^12 multiplications of words a second. Each figure is the median of repetitions, taken over calls
in a row by the card's own clock, and, for what is small, from a graph of captured calls, without the time that Python
takes to start them. Sizes are those of a Llama-2-7B token: weights 11,008 by 4,096, openings of 4,096 to 2^22 numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from crypten_llm.kernels import cuda
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import provenance
from experiments.tools.tables import print_table

RESULTS = Path(__file__).parents[1] / "results" / "cuda_kernels.json"
COPY_BYTES = 1 << 30
WIDE, NARROW = 11008, 4096
REPEATS, CALLS = 5, 20


def words(*shape: int) -> torch.Tensor:
    """Uniform test words, not secrets."""
    return torch.randint(-(2**63), 2**63 - 1, shape, device="cuda")


def seconds(act: Callable[[], object], captured: bool = False, calls: int = CALLS) -> float:
    """Of one call: the median of repetitions."""
    act(), act()
    torch.cuda.synchronize()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                act()
        run = graph.replay
    else:

        def run() -> None:
            for _ in range(calls):
                act()

    run()
    found = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / calls / 1e3)
    return median(found)


def copy_rate() -> float:
    """Bytes a second that a plain copy reads and writes."""
    source, target = (torch.full((COPY_BYTES // 8,), value, device="cuda") for value in (1, 0))
    return 2 * COPY_BYTES / seconds(lambda: target.copy_(source), calls=5)


def row(kernel: str, size: str, time: float, moved: float, copy: float, products: float = 0) -> dict:
    return {
        "kernel": kernel,
        "size": size,
        "microseconds": round(time * 1e6, 1),
        "gb_per_s": round(moved / time / 1e9, 1),
        "of_copy": round(moved / time / copy, 3),
        "tmac_per_s": round(products / time / 1e12, 2) if products else "",
    }


def products(copy: float):
    for columns, depth in ((WIDE, NARROW), (NARROW, WIDE), (NARROW, NARROW)):
        for narrow in (False, True):
            weights = [words(columns, depth) for _ in range(3)]  # so many that no cache holds what is read next
            weights = [(w >> 40).int() for w in weights] if narrow else weights
            for rows in (1, 16, 512):
                x, each = words(rows, depth), weights[0]
                time = seconds(Turns(x, weights), calls=9)
                moved = each.numel() * each.element_size() + 8 * rows * (columns + depth)
                name = f"matmul_nt {'int32' if narrow else 'int64'}"
                yield row(name, f"{rows} x {depth} x {columns}", time, moved, copy, rows * columns * depth)
    for rows in (1, 512):
        x, values = words(32, rows, 2048), words(32, 2048, 128)
        time = seconds(partial(cuda.matmul_nn, x, values))
        moved = 8 * (x.numel() + values.numel() + 32 * rows * 128)
        yield row("matmul_nn int64", f"32 heads, {rows} x 2048 x 128", time, moved, copy, 32 * rows * 2048 * 128)


class Turns:
    """Products by one matrix after the other."""

    def __init__(self, x: torch.Tensor, weights: list[torch.Tensor]) -> None:
        self.x, self.weights = x, cycle(weights)

    def __call__(self) -> torch.Tensor:
        return cuda.matmul_nt(self.x, next(self.weights))


def streams(copy: float):
    for size in (1 << 16, 1 << 22, 1 << 30):
        stream = cuda.KeyStream(bytes(32))
        time = seconds(partial(stream.fill, size), captured=size < 1 << 22)
        yield row("KeyStream.fill (ChaCha20)", f"{size:,} bytes", time, size, copy)


def openings(copy: float):
    for count in (4096, 1 << 16, 1 << 22):
        for bits in (24, 35, 64):
            x, mask, small = words(count), words(count), count < 1 << 22
            value, packed = cuda.hide(x, mask, 5, bits)
            time = seconds(partial(cuda.hide, x, mask, 5, bits), small)
            yield row(f"hide, {bits} bits", f"{count:,}", time, 24 * count + packed.numel(), copy)
            time = seconds(partial(cuda.show, value, packed, bits, (count,)), small)
            yield row(f"show, {bits} bits", f"{count:,}", time, 16 * count + packed.numel(), copy)


def fits(copy: float):
    for count, modes in ((1 << 21, 17), (1 << 21, 10), (WIDE, 7)):
        opened, shares = words(count), words(2 * modes, count)
        factors = torch.ones(modes, dtype=torch.float64, device="cuda")
        numbers, pairs, small = torch.arange(modes, device="cuda"), shares.view(modes, 2, count), count < 1 << 20
        acts = {
            "combine": partial(cuda.combine, opened, 27, 2.0**29, factors, factors, shares, 5),
            "add_cosines": partial(cuda.add_cosines, opened, 27, numbers, factors, numbers, pairs, 5),
            "waves": partial(cuda.waves, opened, 27, 2.0**29, modes),
        }
        for name, act in acts.items():
            moved = 8 * count * (2 * modes + (1 if name == "waves" else 2))
            yield row(f"{name}, {modes} modes", f"{count:,}", seconds(act, small), moved, copy)


def run(parts=(products, streams, openings, fits), say: Callable[[dict], None] | None = None) -> dict:
    """All rows, and the copy's rate before and after them (bytes a second)."""
    before, rows = copy_rate(), []
    for part in parts:
        for each in part(before):
            rows.append(each)
            if say is not None:
                say(each)
    return {
        "made_by": [provenance("numba")],
        "card": torch.cuda.get_device_name(),
        "copy_gb_per_s": [round(value / 1e9, 1) for value in (before, copy_rate())],
        "rows": rows,
    }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="F", help=f"keep the figures (default: {RESULTS.name})"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here; run this on a machine that has one, with a torch built for CUDA")
    result = run(say=lambda each: print(*each.values(), sep="  ", flush=True))
    print_table(result["rows"])
    print(f"\n{result['card']}; a plain copy, before and after: {result['copy_gb_per_s']} GB/s read and written")
    kept.save(arguments.json, result)


if __name__ == "__main__":
    sys.exit(main())
