"""Truth tables and one-hot vectors of a small opened value. No message is sent here.

Owns the rotated tables. A value v is opened as V = v + r modulo 2^m; the dealer shares the table turned by r, and each
party reads its share of T[v] at the public place V. Shares are as wide as their words, 8 to 64 bits.

Source: one-time truth tables (Ishai et al., TCC 2013, section 3), with additive shares.
"""

import math

import numpy as np
import torch

from crypten_llm.kernels.compiling import compiled
from crypten_llm.protocols.dealer.roles import PARTY0
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Secret, Wire

BLOCK = 1 << 20  # words of tables at a time


@compiled
def _turn(table, places, words):
    """words[i, V] becomes T[V - r_i] - words[i, V]: what party 1 needs beside party 0's words."""
    low = words.shape[1] - 1
    for i in range(words.shape[0]):
        for v in range(words.shape[1]):
            words[i, v] = table[(v - places[i]) & low] - np.int64(words[i, v])


@compiled
def _read(words, opened, steps, out):
    """out[i, k] = words[i, V_i - steps[k]]."""
    low = words.shape[1] - 1
    for i in range(words.shape[0]):
        for k in range(steps.shape[0]):
            out[i, k] = np.int64(words[i, (opened[i] - steps[k]) & low])


def read(runtime, wire: Wire, table: torch.Tensor, dtype) -> Secret:
    """T[v] for v opened modulo its ring of m bits (``Opening(function=True)``): shares as wide as ``dtype``; local.

    table: public int64 [2^m]. Error: none. Cost: dealer 2^m words an element.
    """
    assert len(table) == 1 << wire.width, f"a table of {len(table)} entries for {wire.width} bits"
    share = _shares(runtime, wire, table, torch.zeros(1, dtype=torch.int64), dtype)
    bits = int(table.abs().max()).bit_length()
    return Secret(share[..., 0], 0, 8 * np.dtype(dtype).itemsize, bits)


def one_hot(runtime, wire: Wire, values: torch.Tensor) -> Secret:
    """1{v == values[k]} for v as in ``read``: [...] to [..., K], valid modulo 2^64; local.

    values: public int64 [K]. Error: none. Cost: dealer 2^m words of 8 bytes an element, however many values.
    """
    table = torch.zeros(1 << wire.width, dtype=torch.int64)
    table[0] = 1
    return Secret(_shares(runtime, wire, table, values, np.uint64), 0, 64, 1)


def _shares(runtime, wire: Wire, table, steps, dtype):
    """Shares of T[v - steps[k]]: [..., K]."""
    count, size = wire.mask.numel(), len(table)
    block = max(1, BLOCK // size)
    out = None if runtime.is_dealer else np.empty((count, len(steps)), dtype=np.int64)
    for start in range(0, count, block):
        stop = min(start + block, count)

        def turned(words, start=start, stop=stop):
            _turn(table.numpy(), wire.mask.reshape(-1)[start:stop].numpy(), words)
            return words

        words = runtime.deal_words((stop - start, size), dtype, turned)
        if out is not None:
            _read(words, wire.raw.reshape(-1)[start:stop].numpy(), steps.numpy(), out[start:stop])
    shape = (*wire.shape, len(steps))
    if out is None:
        return shape_only(shape)
    return torch.from_numpy(out).view(shape)


def public(runtime, value: torch.Tensor, scale: int = 0, bits: int = 1) -> Secret:
    """Public integers as a ``Secret``: party 0's share is the value; local."""
    if runtime.is_dealer:
        return Secret(shape_only(value.shape), scale, 64, bits)
    return Secret(value.clone() if runtime.role == PARTY0 else torch.zeros_like(value), scale, 64, bits)


def index_bits(count: int) -> int:
    """Bits that tell ``count`` values apart; at least 1."""
    return max(1, math.ceil(math.log2(count))) if count else 1
