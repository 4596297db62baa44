"""Truth tables and one-hot vectors of a small opened value. Nothing is opened here.

Owns the rotated tables. A value v is opened as V = v + r modulo 2^m; the dealer shares the table turned by r, and each
party reads its share of T[v] at the public place V. Shares are as wide as their words, 8 to 64 bits.

Source: one-time truth tables (Ishai et al., TCC 2013, section 3), with additive shares.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.secret import Secret, Wire

BLOCK = 1 << 20  # words of tables at a time
WORD = 32  # bits of a table's words, of what is chosen


def read(runtime: Runtime, wire: Wire, table: Tensor, width: int) -> Secret:
    """T[v] for v opened modulo its ring of m bits (``Opening(function=True)``): shares of ``width`` bits; local.

    table: public int64 [2^m]. width: 8, 16, 32 or 64. Error: none. Cost: dealer 2^m words of that width an element.
    """
    assert len(table) == 1 << wire.width, f"a table of {len(table)} entries for {wire.width} bits"
    bits = int(table.abs().max()).bit_length()
    share = _shares(runtime, wire, runtime.moved(table), _unmoved(runtime), width)
    return Secret(share[..., 0], 0, width, bits)


def one_hot(runtime: Runtime, wire: Wire, values: Tensor) -> Secret:
    """1{v == values[k]} for v as in ``read``: [...] to [..., K], valid modulo 2^64; local.

    values: public int64 [K]. Error: none. Cost: dealer 2^m words of 8 bytes an element, however many values.
    """
    table = (torch.arange(1 << wire.width, device=runtime.device) == 0).long()
    return Secret(_shares(runtime, wire, table, runtime.moved(values), 64), 0, 64, 1)


def first(runtime: Runtime, wire: Wire) -> Secret:
    """1{v == 0} for v as in ``read``, valid modulo 2^32; local. Error: none. Cost: dealer 2^m words of 4 bytes."""
    return read(runtime, wire, (torch.arange(1 << wire.width) == 0).long(), WORD)


def times_hot(runtime: Runtime, wire: Wire, hot: Secret, x: Wire) -> Secret:
    """1{v == 0} x for v as in ``read``, its shares ``hot`` (``first``) and an exact wire x of its shape; local.

    x = X - r, and the dealer, who knows where v is zero and what r is, shares a table of 1{v == 0} r.

    Error: none. Cost: dealer 2^m words of 4 bytes an element.
    """
    assert x.wrap is None and x.width <= WORD, "what is chosen is an exact wire of 32 bits at most"
    numbers = x.mask.held.reshape(-1)

    def turn(words: Tensor, places: Tensor, part: slice) -> Tensor:
        low = numbers[part].contiguous().view(torch.int32)[::2]  # the low half of each word
        return words.neg_().scatter_add_(1, places[:, None], low[:, None])

    masked = _dealt(runtime, wire, _unmoved(runtime), WORD, turn)[..., 0]
    share = runtime.share(x.shape, lambda: x.seen * hot.share - masked)
    return Secret(share, x.scale, x.width, x.bits)


def _unmoved(runtime: Runtime) -> Tensor:
    """The one step of a table that is read where it was opened."""
    return torch.zeros(1, dtype=torch.int64, device=runtime.device)


def _shares(runtime: Runtime, wire: Wire, table: Tensor, steps: Tensor, width: int) -> Tensor:
    """Shares of T[v - steps[k]]: [..., K]."""

    def turn(words: Tensor, places: Tensor, part: slice) -> Tensor:
        return runtime.kernels.turn_table(table, places, words)

    return _dealt(runtime, wire, steps, width, turn)


def _dealt(
    runtime: Runtime, wire: Wire, steps: Tensor, width: int, turn: Callable[[Tensor, Tensor, slice], Tensor]
) -> Tensor:
    """What a table of 2^m words an element holds at the opened place less steps[k]: [..., K].

    turn: at the dealer, makes the client's part of a block of tables from the owner's, the places by which they are
    turned, and which elements they are of.
    """
    size, mask = 1 << wire.width, wire.mask.held.reshape(-1)
    raw = None if wire.public is None else wire.public.reshape(-1)
    blocks = []
    for part in runtime.blocks(mask.numel(), max(1, BLOCK // size)):

        def turned(words: Tensor, part: slice = part) -> Tensor:
            return turn(words, mask[part], part)

        words = runtime.deal_table((part.stop - part.start, size), width, turned)
        if raw is not None and words is not None:
            blocks.append(runtime.kernels.read_table(words, raw[part], steps))
    shape = (*wire.shape, len(steps))
    return runtime.share(shape, lambda: torch.cat(blocks).view(shape))


def public(runtime: Runtime, value: Tensor, scale: int = 0, bits: int = 1) -> Secret:
    """Public integers as a ``Secret``; local."""
    return Secret(runtime.public(value), scale, 64, bits)


def index_bits(count: int) -> int:
    """Bits that tell ``count`` values apart; at least 1."""
    return max(1, math.ceil(math.log2(count))) if count else 1
