"""The largest of several secrets, without showing which: top-k, one-hot rows, maxima.

Owns the plans on top of ``comparison`` and ``lookup``. Each function is handed ``open_``, which opens openings all in
one round, so that an engine can add what else waits. x is a narrow wire modulo 2^l (``comparison.ordered``), compared
exactly as it was opened, from -2^(l - 2) to 2^(l - 2) - 1; equal values go to the lower index. Shapes, rounds and bytes
follow from shapes and counts.
"""

import numpy as np
import torch

from crypten_llm.protocols import lookup, products
from crypten_llm.protocols.comparison import below, bit_opening, difference, times_bits
from crypten_llm.protocols.dealer.roles import PARTY0
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Opening, Secret, Wire

BIT = np.uint32  # words of selected bits
BLOCK = 8  # candidates that a tournament for the first compares with each other
STEP = 3  # bits of the threshold that one iteration of the search finds


def top(runtime, open_, x: Wire, count: int, pairs_up_to: int) -> Secret:
    """1 at the ``count`` largest of the last dimension, 0 elsewhere: [..., N] to [..., N], valid modulo 2^32.

    0 <= count <= N. All pairs are compared for up to ``pairs_up_to`` candidates; beyond, a tournament finds the first
    and a search for the threshold the first ``count``.

    Reveals: openings behind fresh uniform masks. Error: none.
    Cost: that of ``by_pairs``, ``by_tournament`` or ``by_search``; none for count 0 and N.
    """
    n = x.shape[-1]
    assert 0 <= count <= n, f"the {count} largest of {n}"
    if count in (0, n):
        return lookup.public(runtime, torch.full(x.shape, int(count > 0)))
    if count == 1 and n > 2 * BLOCK:
        return by_tournament(runtime, open_, x)
    return by_pairs(runtime, open_, x, count) if n <= pairs_up_to else by_search(runtime, open_, x, count)


def by_pairs(runtime, open_, x: Wire, count: int) -> Secret:
    """``top`` by all comparisons: a value's rank is the number of those before it.

    Cost: 2 rounds; for each of the N (N - 1) / 2 pairs that of ``Below`` with words of 1 byte (2 for N > 256); for each
    value ceil(m / 8) bytes each way and 2^m dealer words of 4 bytes, m = ceil(log2 N).
    """
    rank = _ranks(runtime, open_, x)
    return lookup.read(runtime, rank, (torch.arange(1 << rank.width) < count).long(), BIT)


def best(runtime, open_, x: Wire, count: int) -> Secret:
    """One-hot rows of the ``count`` largest of the last dimension, the largest first: [..., N] to [..., count, N].

    As ``top`` by pairs and ``picks`` after it, without the round of the latter.

    Reveals: openings behind fresh uniform masks. Error: none. The result is valid modulo 2^64.
    Cost: that of ``by_pairs``, with words of 8 bytes for a value's table.
    """
    rank = _ranks(runtime, open_, x)
    return lookup.one_hot(runtime, rank, torch.arange(count)).transpose(-1, -2)


def _ranks(runtime, open_, x: Wire) -> Wire:
    """The number of values before each, opened modulo 2^ceil(log2 N)."""
    n = x.shape[-1]
    first, second = torch.triu_indices(n, n, 1)
    pairs = difference(_columns(x, first), _columns(x, second))
    later = below(runtime, open_, pairs, [0], np.uint8 if n <= 256 else np.uint16)  # 1 where the second is larger
    rank = later._like(later.share.new_zeros(x.shape))
    if not runtime.is_dealer:
        bit = later.share[..., 0]
        rank.share.index_add_(-1, first, bit).index_add_(-1, second, int(runtime.role == PARTY0) - bit)
    (opened,) = open_(Opening(rank, ring=lookup.index_bits(n), function=True))
    return opened


def by_tournament(runtime, open_, x: Wire) -> Secret:
    """``top`` for count 1: blocks of 8 by pairs, then the largest of each block, and so on.

    Cost: for L = ceil(log8 N) levels 4 L rounds for 2 levels and more (L - 2 of them to compose); about 4 comparisons
    of ``by_pairs`` a value, and what composing takes: 3 bytes each way and 8 of the dealer's a value and level.
    """
    n, levels = x.shape[-1], []
    while n > 1:
        blocks = -(-n // BLOCK) if n > 2 * BLOCK else 1
        x = _padded(x, blocks * BLOCK - n if blocks > 1 else 0)
        grouped = x.reshape(*x.shape[:-1], blocks, -1)
        hot = by_pairs(runtime, open_, grouped, 1)
        levels.append((n, hot))
        if blocks == 1:
            break
        (hot_wire,) = open_(Opening(hot, ring=x.width, function=True))
        hot_wire = plain(hot_wire)
        levels[-1] = (n, hot_wire)
        column = grouped.reshape(*grouped.shape, 1)
        row = hot_wire.reshape(*hot_wire.shape[:-1], 1, -1)
        best = products.matmul(runtime, row, column, transposed=False, bits=x.bits)
        (opened,) = open_(Opening(best.reshape(*x.shape[:-1], blocks), ring=x.width, function=True))
        x, n = plain(opened), blocks
    chosen = levels.pop()[1].reshape(*x.shape[:-1], -1)[..., :n]
    while levels:
        n, hot_wire = levels.pop()
        (above,) = open_(Opening(chosen, ring=hot_wire.width, function=True))
        above = plain(above)
        both = products.multiply(runtime, above.reshape(*above.shape, 1), hot_wire, bits=1)
        chosen = both.reshape(*above.shape[:-1], -1)[..., :n]
    return chosen


def by_search(runtime, open_, x: Wire, count: int) -> Secret:
    """``top`` by finding the value of rank ``count``, ``STEP`` bits an iteration; ties by counting.

    tau is the largest t for which ``count`` values are t or more: an iteration counts the values below 7 candidates,
    compares the counts with ``count`` by a table, and adds. What is above tau is chosen, and of what equals tau as many
    as are missing, from the lowest index on.

    Cost: with I = ceil((l - 1) / 3) iterations 3 I + 3 rounds; a value and iteration one table of digits and 7
    openings of 1 byte with 32 words of 1 byte (2 for N > 127), and at the end about two comparisons more.
    """
    n, width = x.shape[-1], x.width
    narrow = np.uint8 if n < 128 else np.uint16 if n < 1 << 15 else np.uint32
    lead, size = x.shape[:-1], lookup.index_bits(n + 1)
    tau = lookup.public(runtime, torch.full((*lead, 1), -(1 << (width - 2))))
    position = width - 1
    while position:
        step = min(STEP, position)
        position -= step
        moves = [(v << position) for v in range(1, 1 << step)]
        less = below(runtime, open_, difference(x, _opened(open_, tau, x)), moves, narrow)
        counts = less._like(less.share.sum(-2))  # [..., moves]: values below tau + move
        (opened,) = open_(Opening(counts, ring=size, function=True))
        reached = lookup.read(runtime, opened, (torch.arange(1 << size) <= n - count).long(), np.uint64)
        moved = reached.share.sum(-1, keepdim=True) << position
        tau = tau._like(tau.share + moved)
    less = below(runtime, open_, difference(x, _opened(open_, tau, x)), [0, 1], BIT)
    lower, not_higher = less.share.unbind(-1)  # 1 where x < tau, where x <= tau
    one = int(runtime.role == PARTY0)
    equal, higher = not_higher - lower, one - not_higher
    missing = one * count - higher.sum(-1, keepdim=True)
    # Of those that equal tau the first ``missing`` have place <= 0; the others are moved out of that range.
    place = equal.cumsum(-1) - missing + 2 * n * (lower - higher)
    places = Secret(place, 0, 32, lookup.index_bits(4 * n))
    (opened,) = open_(Opening(places, ring=places.bits + 2))
    return _squeezed(below(runtime, open_, opened, [1], BIT))


def picks(runtime, open_, bits: Secret, count: int) -> Secret:
    """One-hot rows [..., count, N] of 0/1 bits [..., N] with exactly ``count`` ones, in order of position.

    Value i goes to row d = number of ones before it if its bit is 1: 2 d + bit is opened, and a turned unit vector says
    which row that is.

    Reveals: one opening behind a fresh uniform mask. Error: none. The result is valid modulo 2^64.
    Cost: 1 round (none for count 0 and N) of 1 byte a value each way for up to 128 rows; dealer 2^(m + 1) words of 8
    bytes a value, m = ceil(log2 count).
    """
    n = bits.shape[-1]
    assert 0 <= count <= n, f"{count} rows of {n}"
    if count in (0, n):
        return lookup.public(runtime, torch.eye(n, dtype=torch.int64)[:count].expand(*bits.shape[:-1], count, n))
    size = 1 + (lookup.index_bits(count) if count > 1 else 0)
    before = bits.share.cumsum(-1) - bits.share
    (opened,) = open_(Opening(bits._like(2 * before + bits.share), ring=size, function=True))
    return lookup.one_hot(runtime, opened, 2 * torch.arange(count) + 1).transpose(-1, -2)


def largest(runtime, open_, x: Wire) -> Secret:
    """The maximum over the last dimension: [..., N] to [...], at the wire's scale, valid modulo its ring.

    A tournament of pairs; the larger of a pair is y + 1{y < x} (x - y), so a level opens its values, the signs and the
    bits.

    Reveals: openings behind fresh uniform masks. Error: none.
    Cost: 3 ceil(log2 N) - 1 rounds for an opened x; N - 1 comparisons of ``Below`` with words of 1 byte, each with 1
    byte each way for its bit and 16 dealer bytes; ceil(l / 8) bytes each way for each value of a level but the first.
    """
    scale, width, bits = x.scale, x.width, x.bits
    secret = None
    while (n := x.shape[-1]) > 1:
        half = n // 2
        left, right, rest = (_columns(x, slice(*ends)) for ends in ((0, half), (half, 2 * half), (2 * half, n)))
        apart = difference(left, right)
        smaller = _squeezed(below(runtime, open_, apart, [0], np.uint8))
        (bit,) = open_(bit_opening(smaller))
        gained = times_bits(runtime, bit, difference(right, left))  # where the left is below: right - left
        kept = shares_of(runtime, left)
        best = torch.cat([kept + gained.share, shares_of(runtime, rest)], -1)
        secret = Secret(best, scale, width, bits)
        if secret.shape[-1] > 1:
            (opened,) = open_(Opening(secret, ring=width, function=True))
            x = plain(opened)
        else:
            break
    if secret is None:
        secret = Secret(shares_of(runtime, x), scale, width, bits)
    return secret[..., 0]


def plain(opened: Wire) -> Wire:
    """What was opened whole for a function, as the narrow wire modulo its own ring that it also is; local."""
    mask = opened.mask
    return Wire(opened.raw, [(-1, mask)], opened.scale, opened.width, opened.bits, opened.raw, mask)


def shares_of(runtime, x: Wire) -> torch.Tensor:
    """Additive shares behind a narrow wire, valid modulo its ring; local."""
    mask = x.masks[0][1]
    if runtime.is_dealer:
        return shape_only(mask.shape)
    return x.public - mask if runtime.role == PARTY0 else -mask


def _opened(open_, tau: Secret, like: Wire) -> Wire:
    (opened,) = open_(Opening(tau, ring=like.width, function=True))
    opened = plain(opened)
    opened.scale = like.scale
    return opened


def _columns(x: Wire, index) -> Wire:
    public = None if x.public is None else x.public[..., index]
    return Wire(public, [(-1, x.masks[0][1][..., index])], x.scale, x.width, x.bits)


def _padded(x: Wire, count: int) -> Wire:
    """``count`` columns more, of the lowest value; their public part is that value and their mask zero."""
    if not count:
        return x
    mask = x.masks[0][1]
    shape = (*mask.shape[:-1], count)
    masks = torch.cat([mask, mask.new_zeros(shape)], -1)
    lowest = -(1 << (x.width - 2))
    public = None if x.public is None else torch.cat([x.public, x.public.new_full(shape, lowest)], -1)
    return Wire(public, [(-1, masks)], x.scale, x.width, x.bits)


def _squeezed(bits: Secret) -> Secret:
    return bits[..., 0]
