"""The largest of several secrets, without showing which: top-k, one-hot rows, maxima.

Owns the plans on top of ``comparison`` and ``lookup``. x is a exact wire modulo 2^l (``comparison.ordered``), compared
exactly as it was opened, from -2^(l - 2) to 2^(l - 2) - 1; equal values go to the lower index. Shapes, rounds and bytes
follow from shapes and counts.
"""

from typing import Any

import torch
from torch import Tensor

from crypten_llm.protocols import lookup, products
from crypten_llm.protocols.comparison import below, bit_opening, difference, times_bits
from crypten_llm.protocols.dealer.runtime import Parts, Runtime
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret, Wire, shares_of

BIT = 32  # width of selected bits
BLOCK = 8  # candidates that a tournament for the first compares with each other
STEP = 3  # bits of the threshold that one iteration of the search finds


def top(runtime: Runtime, x: Wire, count: int, pairs_up_to: int) -> Protocol[Secret]:
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
        return (yield from by_tournament(runtime, x))
    return (yield from (by_pairs if n <= pairs_up_to else by_search)(runtime, x, count))


def by_pairs(runtime: Runtime, x: Wire, count: int) -> Protocol[Secret]:
    """``top`` by all comparisons: a value's rank is the number of those before it.

    Cost: 2 rounds; for each of the N (N - 1) / 2 pairs that of ``below`` with words of 1 byte (2 for N > 256); for each
    value m bits each way and 2^m dealer words of 4 bytes, m = ceil(log2 N).
    """
    rank = yield from _ranks(runtime, x)
    return lookup.read(runtime, rank, (torch.arange(1 << rank.width) < count).long(), BIT)


def best(runtime: Runtime, x: Wire, count: int) -> Protocol[Secret]:
    """One-hot rows of the ``count`` largest of the last dimension, the largest first: [..., N] to [..., count, N].

    As ``top`` by pairs and ``picks`` after it, without the round of the latter.

    Reveals: openings behind fresh uniform masks. Error: none. The result is valid modulo 2^64.
    Cost: that of ``by_pairs``, with words of 8 bytes for a value's table.
    """
    rank = yield from _ranks(runtime, x)
    return lookup.one_hot(runtime, rank, torch.arange(count)).transpose(-1, -2)


def ranks(runtime: Runtime, x: Wire) -> Protocol[Secret]:
    """The number of values before each, as shares modulo a byte's or two bytes' numbers: [..., N] to [..., N].

    Cost: 1 round; for each of the N (N - 1) / 2 pairs that of ``below`` with words of 1 byte (2 for N > 256).
    """
    n = x.shape[-1]
    first, second = torch.triu_indices(n, n, 1, device=runtime.device)
    pairs = difference(columns(x, first), columns(x, second))
    later = yield from below(runtime, pairs, [0], 8 if n <= 256 else 16)  # 1 where the second is larger

    def before() -> Tensor:
        bit = later.share[..., 0]
        found = bit.new_zeros(x.shape)
        return found.index_add_(-1, first, bit).index_add_(-1, second, runtime.plus(-bit, 1))

    return later.like(runtime.share(x.shape, before))


def _ranks(runtime: Runtime, x: Wire) -> Protocol[Wire]:
    """The number of values before each, opened modulo 2^ceil(log2 N)."""
    rank = yield from ranks(runtime, x)
    (opened,) = yield [Opening(rank, ring=lookup.index_bits(x.shape[-1]), function=True)]
    return opened


def by_tournament(runtime: Runtime, x: Wire) -> Protocol[Secret]:
    """``top`` for count 1: blocks of 8 by pairs, then the largest of each block, and so on.

    Cost: for L = ceil(log8 N) levels 4 L rounds for 2 levels and more (L - 2 of them to compose); about 4 comparisons
    of ``by_pairs`` a value, and what composing takes: for each level but the last, l bits a value and 2 l a block each
    way, l a value and l a block of the dealer's.
    """
    n = x.shape[-1]
    levels: list[tuple[int, Wire]] = []  # all but the last
    while n > 1:
        blocks = -(-n // BLOCK) if n > 2 * BLOCK else 1
        x = padded(x, blocks * BLOCK - n if blocks > 1 else 0)
        grouped = x.reshape(*x.shape[:-1], blocks, -1)
        hot = yield from by_pairs(runtime, grouped, 1)
        if blocks == 1:
            break
        (hot_wire,) = yield [Opening(hot, ring=x.width, function=True)]
        levels.append((n, hot_wire))
        column = grouped.reshape(*grouped.shape, 1)
        row = hot_wire.reshape(*hot_wire.shape[:-1], 1, -1)
        best = products.matmul(runtime, row, column, transposed=False, bits=x.bits)
        (opened,) = yield [Opening(best.reshape(*x.shape[:-1], blocks), ring=x.width, function=True)]
        x, n = opened, blocks
    chosen = hot.reshape(*x.shape[:-1], -1)[..., :n]
    for n, hot_wire in reversed(levels):
        (above,) = yield [Opening(chosen, ring=hot_wire.width, function=True)]
        both = products.multiply(runtime, above.reshape(*above.shape, 1), hot_wire, bits=1)
        chosen = both.reshape(*above.shape[:-1], -1)[..., :n]
    return chosen


def by_search(runtime: Runtime, x: Wire, count: int) -> Protocol[Secret]:
    """``top`` by finding the value of rank ``count``, ``STEP`` bits an iteration; ties by counting.

    tau is the largest t for which ``count`` values are t or more: an iteration counts the values below 7 candidates,
    compares the counts with ``count`` by a table, and adds. What is above tau is chosen, and of what equals tau as many
    as are missing, from the lowest index on.

    Cost: with I = ceil((l - 1) / 3) iterations 3 I + 3 rounds; a value and iteration one table of digits and 7
    openings of 5 bits with 32 words of 1 byte (2 for N > 127), and at the end about two comparisons more; a row and
    iteration l bits each way and for each of 7 counts m bits and 2^m dealer words of 8 bytes, m = ceil(log2(N + 1)).
    """
    n, width = x.shape[-1], x.width
    narrow = 8 if n < 128 else 16 if n < 1 << 15 else 32
    lead, size = x.shape[:-1], lookup.index_bits(n + 1)
    tau = lookup.public(runtime, torch.full((*lead, 1), -(1 << (width - 2))))
    position = width - 1
    while position:
        step = min(STEP, position)
        position -= step
        moves = [(v << position) for v in range(1, 1 << step)]
        less = yield from below(runtime, difference(x, (yield from _opened(tau, x))), moves, narrow)
        counts = less.like(less.share.sum(-2))  # [..., moves]: values below tau + move
        (opened,) = yield [Opening(counts, ring=size, function=True)]
        reached = lookup.read(runtime, opened, (torch.arange(1 << size) <= n - count).long(), 64)
        moved = reached.share.sum(-1, keepdim=True) << position
        tau = tau.like(tau.share + moved)
    less = yield from below(runtime, difference(x, (yield from _opened(tau, x))), [0, 1], BIT)
    lower, not_higher = less.share.unbind(-1)  # 1 where x < tau, where x <= tau
    equal, higher = not_higher - lower, runtime.plus(-not_higher, 1)
    missing = runtime.plus(-higher.sum(-1, keepdim=True), count)
    # Of those that equal tau the first ``missing`` have place <= 0; the others are moved out of that range.
    place = equal.cumsum(-1) - missing + 2 * n * (lower - higher)
    places = Secret(place, 0, 32, lookup.index_bits(4 * n))
    (opened,) = yield [Opening(places, ring=places.bits + 2)]
    return (yield from below(runtime, opened, [1], BIT))[..., 0]


def picks(runtime: Runtime, bits: Secret, count: int) -> Protocol[Secret]:
    """One-hot rows [..., count, N] of 0/1 bits [..., N] with exactly ``count`` ones, in order of position.

    Value i goes to row d = number of ones before it if its bit is 1: 2 d + bit is opened, and a turned unit vector says
    which row that is.

    Reveals: one opening behind a fresh uniform mask. Error: none. The result is valid modulo 2^64.
    Cost: 1 round (none for count 0 and N) of m + 1 bits a value each way; dealer 2^(m + 1) words of 8
    bytes a value, m = ceil(log2 count).
    """
    n = bits.shape[-1]
    assert 0 <= count <= n, f"{count} rows of {n}"
    if count in (0, n):
        return lookup.public(runtime, torch.eye(n, dtype=torch.int64)[:count].expand(*bits.shape[:-1], count, n))
    size = 1 + (lookup.index_bits(count) if count > 1 else 0)
    before = bits.share.cumsum(-1) - bits.share
    (opened,) = yield [Opening(bits.like(2 * before + bits.share), ring=size, function=True)]
    return lookup.one_hot(runtime, opened, 2 * torch.arange(count) + 1).transpose(-1, -2)


def largest(runtime: Runtime, x: Wire) -> Protocol[Secret]:
    """The maximum over the last dimension: [..., N] to [...], at the wire's scale, valid modulo its ring.

    A tournament of pairs; the larger of a pair is y + 1{y < x} (x - y), so a level opens its values, the signs and the
    bits.

    Reveals: openings behind fresh uniform masks. Error: none.
    Cost: 3 ceil(log2 N) - 1 rounds for an opened x; N - 1 comparisons of ``below`` with words of 1 byte, each with 1
    bit each way for it and 2 l dealer bits; l bits each way for each value of a level but the first.
    """
    scale, width, bits = x.scale, x.width, x.bits
    secret = None
    while (n := x.shape[-1]) > 1:
        half = n // 2
        left, right, rest = (columns(x, slice(*ends)) for ends in ((0, half), (half, 2 * half), (2 * half, n)))
        apart = difference(left, right)
        smaller = (yield from below(runtime, apart, [0], 8))[..., 0]
        (bit,) = yield [bit_opening(smaller)]
        gained = times_bits(runtime, bit, difference(right, left))  # where the left is below: right - left
        kept = shares_of(runtime, left)
        best = torch.cat([kept + gained.share, shares_of(runtime, rest)], -1)
        secret = Secret(best, scale, width, bits)
        if secret.shape[-1] > 1:
            (x,) = yield [Opening(secret, ring=width, function=True)]
        else:
            break
    if secret is None:
        secret = Secret(shares_of(runtime, x), scale, width, bits)
    return secret[..., 0]


def _opened(tau: Secret, like: Wire) -> Protocol[Wire]:
    (opened,) = yield [Opening(tau, ring=like.width, function=True)]
    opened.scale = like.scale
    return opened


def columns(x: Wire, index: Any) -> Wire:
    return x.map(lambda t: t[..., index])


def padded(x: Wire, count: int) -> Wire:
    """``count`` columns more, of the lowest value; their public part is that value and their mask zero."""
    if not count:
        return x
    shape, lowest = (*x.shape[:-1], count), -(1 << (x.width - 2))
    masks = torch.cat([x.mask.held, x.mask.held.new_zeros(shape)], -1)
    public = None if x.public is None else torch.cat([x.public, x.public.new_full(shape, lowest)], -1)
    return Wire(public, Parts(masks), x.scale, x.width, x.bits)
