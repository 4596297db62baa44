"""How fast the ring's matrix products are, beside torch's own and beside the memory's bandwidth.

    python -m experiments.measure.ring_kernels --json

Products are modulo 2^64: int64 by int64, or by int32 as the owner's plain weights are; and of int32 by int32 modulo
2^32, as in the narrow rings of the quantised preset. torch multiplies no int64 by int32 and adds no int32 up in int32,
so its int64 product stands beside all. ``nt`` has the right side's rows along the sum (weights, scores), ``nn``
its columns (values). Ours and torch's take turns in one process on one thread; a row of the table holds medians, and
``ratio`` is the median of the pairs' ratios, above one where ours is faster. ``bandwidth`` is the bytes of both factors
and of the result per second over those of a plain copy in the same run, read and written. What fits a cache beats
the copy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from tqdm import tqdm

from crypten_llm.kernels import cpu
from experiments.tools import kept
from experiments.tools.command import command
from experiments.tools.provenance import provenance
from experiments.tools.tables import print_table

RESULTS = Path(__file__).parents[1] / "results" / "ring_kernels.json"
COPY_BYTES = 1 << 28  # more than a last-level cache
VECTORS, MATRICES = (256, 512, 1024, 2048, 4096), (64, 128, 256, 512)
KINDS = (("int64", "int64"), ("int64", "int32"), ("int32", "int32"))  # of x and w
PRODUCTS = {"nt": (cpu.matmul_nt, True), "nn": (cpu.matmul_nn, False)}


def copy_bandwidth() -> float:
    """Bytes a second that a plain copy reads and writes."""
    source, target = (torch.full((COPY_BYTES // 8,), value, dtype=torch.int64) for value in (1, 0))
    return 2 * COPY_BYTES / median(_timed(lambda: target.copy_(source), 1) for _ in range(5))


def _timed(act, times: int) -> float:
    started = perf_counter()
    for _ in range(times):
        act()
    return (perf_counter() - started) / times


def words(generator: torch.Generator, *shape, narrow: bool = False) -> torch.Tensor:
    """Uniform test words, not secrets."""
    if narrow:
        return torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).int()
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator)


def measure(
    product: str, rows: int, size: int, kind: tuple[str, str], bandwidth: float, repeats: int, seconds: float
) -> dict:
    """One row of the table: [rows, size] by [size, size]; ``seconds`` is the least time of one repetition."""
    narrow, short = (which == "int32" for which in kind)
    generator = torch.Generator().manual_seed(size)
    multiply, transposed = PRODUCTS[product]
    x, w = words(generator, rows, size, narrow=narrow), words(generator, size, size, narrow=short)
    wide = w.long()
    left, theirs = x.long(), wide.T if transposed else wide

    def ours_once():
        return multiply(x, w)

    def torch_once():
        return left @ theirs

    ours, due = (found << 32 if narrow else found for found in (ours_once(), torch_once()))
    if not torch.equal(ours, due):
        raise AssertionError(f"{product} of {rows} x {size} by {size} x {size} differs from torch's")
    times = max(1, round(seconds / max(_timed(ours_once, 1), 1e-6)))
    times_torch = max(1, round(seconds / max(_timed(torch_once, 1), 1e-6)))
    pairs = [(_timed(ours_once, times), _timed(torch_once, times_torch)) for _ in range(repeats)]
    mine, other = (median(column) for column in zip(*pairs, strict=True))
    products = rows * size * size
    moved = sum(t.numel() * t.element_size() for t in (x, w)) + 8 * rows * size
    return {
        "product": product,
        "rows": rows,
        "size": size,
        "x": kind[0],
        "w": kind[1],
        "microseconds": round(mine * 1e6, 1),
        "gmac_per_s": round(products / mine / 1e9, 2),
        "torch_gmac_per_s": round(products / other / 1e9, 2),
        "ratio": round(median(theirs / ours for ours, theirs in pairs), 2),
        "gb_per_s": round(moved / mine / 1e9, 2),
        "bandwidth": round(moved / mine / bandwidth, 2),
    }


def run(vectors=VECTORS, matrices=MATRICES, repeats: int = 7, seconds: float = 0.01, progress: bool = True) -> dict:
    """All rows, and the copy's bandwidth before and after them (bytes a second)."""
    before = copy_bandwidth()
    cells = [(1, size) for size in vectors] + [(size, size) for size in matrices]
    todo = [(name, *cell, kind) for cell in cells for name in PRODUCTS for kind in KINDS]
    rows = [
        measure(name, count, size, kind, before, repeats, seconds)
        for name, count, size, kind in tqdm(todo, unit="product", disable=not progress, leave=False)
    ]
    return {
        "made_by": [provenance("numba")],
        "copy_gb_per_s": [round(value / 1e9, 2) for value in (before, copy_bandwidth())],
        "rows": rows,
    }


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="pairs of each row (default: 7)")
    parser.add_argument("--quick", action="store_true", help="two sizes of each kind, three pairs")
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, metavar="F", help=f"keep the figures (default: {RESULTS.name})"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick = {"vectors": (256, 1024), "matrices": (64, 256), "repeats": 3} if arguments.quick else {}
    result = run(**{"repeats": arguments.repeats, **quick}, progress=sys.stderr.isatty())
    print_table(result["rows"])
    print(f"\na plain copy, before and after: {result['copy_gb_per_s']} GB/s read and written")
    kept.save(arguments.json, result)


if __name__ == "__main__":
    sys.exit(main())
