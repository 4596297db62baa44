"""Truth tables and one-hot vectors of a small opened value. Nothing is opened here.

Owns the rotated tables. A value v is opened as V = v + r modulo 2^m; the dealer shares the table turned by r, and each
party reads its share of T[v] at the public place V. Shares are as wide as their words, 8 to 64 bits.

Source: one-time truth tables (Ishai et al., TCC 2013, section 3), with additive shares.
"""

import math

import torch
from torch import Tensor

from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.secret import Secret, Wire

BLOCK = 1 << 20  # words of tables at a time


def read(runtime: Runtime, wire: Wire, table: Tensor, width: int) -> Secret:
    """T[v] for v opened modulo its ring of m bits (``Opening(function=True)``): shares of ``width`` bits; local.

    table: public int64 [2^m]. width: 8, 16, 32 or 64. Error: none. Cost: dealer 2^m words of that width an element.
    """
    assert len(table) == 1 << wire.width, f"a table of {len(table)} entries for {wire.width} bits"
    share = _shares(runtime, wire, table, torch.zeros(1, dtype=torch.int64), width)
    return Secret(share[..., 0], 0, width, int(table.abs().max()).bit_length())


def one_hot(runtime: Runtime, wire: Wire, values: Tensor) -> Secret:
    """1{v == values[k]} for v as in ``read``: [...] to [..., K], valid modulo 2^64; local.

    values: public int64 [K]. Error: none. Cost: dealer 2^m words of 8 bytes an element, however many values.
    """
    table = torch.zeros(1 << wire.width, dtype=torch.int64)
    table[0] = 1
    return Secret(_shares(runtime, wire, table, values, 64), 0, 64, 1)


def _shares(runtime: Runtime, wire: Wire, table: Tensor, steps: Tensor, width: int) -> Tensor:
    """Shares of T[v - steps[k]]: [..., K]."""
    kernels, size = runtime.kernels, len(table)
    mask = wire.mask.held.reshape(-1)
    raw = None if wire.public is None else wire.public.reshape(-1)
    blocks = []
    for part in runtime.blocks(mask.numel(), max(1, BLOCK // size)):

        def turned(words: Tensor, part: slice = part) -> Tensor:
            return kernels.turn_table(table, mask[part], words)

        words = runtime.deal_table((part.stop - part.start, size), width, turned)
        if raw is not None and words is not None:
            blocks.append(kernels.read_table(words, raw[part], steps))
    shape = (*wire.shape, len(steps))
    return runtime.share(shape, lambda: torch.cat(blocks).view(shape))


def public(runtime: Runtime, value: Tensor, scale: int = 0, bits: int = 1) -> Secret:
    """Public integers as a ``Secret``; local."""
    return Secret(runtime.public(value), scale, 64, bits)


def index_bits(count: int) -> int:
    """Bits that tell ``count`` values apart; at least 1."""
    return max(1, math.ceil(math.log2(count))) if count else 1
