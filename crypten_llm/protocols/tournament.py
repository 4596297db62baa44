"""Where the largest of very many secrets is, and the largest few: what takes a token out of a vocabulary.

Owns ``place_of_largest`` and ``largest_few``. Values are cut into blocks, a block is compared pair by pair, and its
largest goes on with its place. How wide blocks are is the cheapest plan for as many values (``plan``): pairs at first,
where bytes count, wide blocks at the end, where rounds do. x is an exact wire of at most 32 bits, compared as in
``selection``; of equal values the lower index is taken, by ``largest_few`` any. Shapes, rounds and bytes follow from
shapes and counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from crypten_llm.protocols import lookup, products, selection
from crypten_llm.protocols.comparison import difference
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret, Wire, shares_of

WIDEST = 128  # values of a block
MOST = 1024  # values of which all pairs are compared, where a few are looked for
# What a plan weighs, in bytes: a round (20 ms of 100 Mbit/s, and as much of a core's work on material), a comparison of
# 24 bits, an entry of a rank's tables (of 1, of the value, of its place), a value and its place opened again.
ROUND, PAIR, ENTRY, OPENED = 1 << 18, 163, 12, 12


def place_bits(count: int) -> int:
    """The ring of an index below ``count``, which is not negative there."""
    return lookup.index_bits(count) + 1


@dataclass
class _Choice:
    """Which value of each block of ``width`` is the largest, for ``number`` blocks.

    ahead: of all values but a block's last, how many are before it, opened. hot: shares of whether that is none; where
    it is so for no value, the last is taken.
    """

    width: int
    number: int
    ahead: Wire
    hot: Secret

    def taken(self, runtime: Runtime, x: Wire) -> Secret:
        """Of each block of x [..., N] the value that was chosen: [..., blocks]; local.

        The last value, plus for the other that was chosen, if one was, by what it differs. Cost: dealer 2^m words of 4
        bytes for each value but a block's last, m bits being those of ``ahead``.
        """
        grid = _grid(x, self.number, self.width)
        last = selection.columns(grid, slice(-1, None))
        more = lookup.times_hot(runtime, self.ahead, self.hot, difference(selection.columns(grid, slice(0, -1)), last))
        return Secret(shares_of(runtime, last)[..., 0] + more.share.sum(-1), x.scale, x.width, x.bits)

    def places(self, runtime: Runtime, bits: int) -> Secret:
        """The index of the value that was chosen, modulo 2^bits: [..., blocks]; local."""
        before = (self.hot.share * torch.arange(1 - self.width, 0, device=runtime.device)).sum(-1)
        last = torch.arange(1, self.number + 1, device=runtime.device) * self.width - 1
        return Secret(runtime.plus(before, last), 0, bits, bits - 1)


def _choice(runtime: Runtime, x: Wire, width: int) -> Protocol[_Choice]:
    """Cost: 2 rounds; ``selection.ranks`` of each block, and for each value but its last m = ceil(log2 width) bits each
    way and 2^m dealer words of 4 bytes."""
    number = -(-x.shape[-1] // width)
    rank = yield from selection.ranks(runtime, _grid(x, number, width))
    (opened,) = yield [Opening(rank[..., :-1], ring=lookup.index_bits(width), function=True)]
    return _Choice(width, number, opened, lookup.first(runtime, opened))


def place_of_largest(runtime: Runtime, x: Wire) -> Protocol[Secret]:
    """The index of the largest of the last dimension: [..., N] to [...], N >= 1, valid modulo 2^``place_bits``.

    Reveals: openings behind fresh uniform masks. Error: none.
    Cost: 3 rounds a level of ``plan``, 2 for the last. A level of blocks of a: ``selection.ranks`` of each; for each of
    their values but the last m = ceil(log2 a) bits each way, and 2^m dealer words of 4 bytes twice or, where it has
    both a value to hand on and a place from before, three times; of each but the last level x's bits and ``place_bits``
    a block each way.
    """
    count, bits, place = x.shape[-1], place_bits(x.shape[-1]), None
    for width in plan(x.shape[:-1].numel(), count):
        choice = yield from _choice(runtime, x, width)
        found = choice.places(runtime, bits) if place is None else choice.taken(runtime, place)
        if choice.number == 1:
            return found[..., 0]
        x, place = yield [_again(choice.taken(runtime, x)), _again(found)]
    only = torch.zeros(tuple(x.shape[:-1]), dtype=torch.int64)  # there is one value
    return Secret(runtime.public(only), 0, bits, bits - 1)


def largest_few(runtime: Runtime, x: Wire, count: int) -> Protocol[tuple[Secret, Secret]]:
    """The ``count`` largest of x [N], the largest first: their indices, valid modulo 2^``place_bits``, and themselves.

    They are in the ``count`` blocks whose own largest are the largest. These blocks are picked out of all, and so on
    (``cuts``), until all pairs of what is left are compared.

    1 <= count <= N. Reveals: openings behind fresh uniform masks. Error: none.
    Cost: of a cut into B blocks of s, the tournament of ``place_of_largest`` in each without places, and a last round
    with x's bits a block; ``selection.best`` of B; a round with x's bits for each of count B picks, and one with x's
    and ``place_bits`` for each of count s values, and as many of the dealer's for these (of places not in the first
    cut). At last ``selection.best`` of what is left, a round with its picks, and the dealer's for the results.
    """
    total, place = x.shape[-1], None
    bits = place_bits(total)
    for number in cuts(total, count):
        size = -(-x.shape[-1] // number)
        grid = _grid(x, number, size)
        hot = yield from selection.best(runtime, (yield from _maxima(runtime, grid)), count)
        (wire,) = yield [Opening(hot, ring=x.width, function=True)]
        values = products.matmul(runtime, wire, grid, transposed=False, bits=x.bits)
        if place is None:
            blocks, inside = (torch.arange(many, device=runtime.device) for many in (number, size))
            starts = (hot.share * (size * blocks)).sum(-1, keepdim=True)
            places = Secret(runtime.plus(starts.expand(count, size), inside), 0, bits, bits - 1)
        else:
            places = products.matmul(runtime, wire, _grid(place, number, size), transposed=False, bits=bits - 1)
        x, place = yield [_again(values.reshape(-1)), _again(places.reshape(-1))]
    hot = yield from selection.best(runtime, x, count)
    (wire,) = yield [Opening(hot, ring=x.width, function=True)]
    values = products.matmul(runtime, wire, x.reshape(-1, 1), transposed=False, bits=x.bits)[..., 0]
    if place is None:
        indices = (hot.share * torch.arange(x.shape[-1], device=runtime.device)).sum(-1)
        return Secret(indices, 0, bits, bits - 1), values
    places = products.matmul(runtime, wire, place.reshape(-1, 1), transposed=False, bits=bits - 1)[..., 0]
    return places, values


def _maxima(runtime: Runtime, x: Wire) -> Protocol[Wire]:
    """The largest of the last dimension, opened again: [..., N] to [...]."""
    for width in plan(x.shape[:-1].numel(), x.shape[-1]):
        choice = yield from _choice(runtime, x, width)
        (x,) = yield [_again(choice.taken(runtime, x))]
    return x.map(lambda t: t[..., 0])


def _grid(x: Wire, number: int, size: int) -> Wire:
    """[..., N] cut into blocks [..., number, size], the last of them filled up with what is never the largest."""
    return selection.padded(x, number * size - x.shape[-1]).reshape(*x.shape[:-1], number, size)


def _again(x: Secret) -> Opening:
    return Opening(x, ring=x.width, function=True)


def plan(rows: int, count: int) -> tuple[int, ...]:
    """How wide the blocks are, level by level, for a tournament of ``count`` values in each of ``rows`` rows."""
    return _cheapest(rows, count)[1]


@cache
def _cheapest(rows: int, count: int) -> tuple[int, tuple[int, ...]]:
    """Bytes that stand for the cost of ``plan``, and the plan."""
    if count == 1:
        return 0, ()
    found = []
    for width in range(2, min(count, WIDEST) + 1):
        number = -(-count // width)
        tables = (width - 1) * ENTRY << lookup.index_bits(width)
        own = rows * number * (width * (width - 1) // 2 * PAIR + tables + OPENED) + 3 * ROUND
        rest, widths = _cheapest(rows, number)
        found.append((own + rest, (width, *widths)))
    return min(found)


def cuts(total: int, count: int) -> tuple[int, ...]:
    """Into how many blocks ``largest_few`` cuts, one cut after another."""
    return _cheapest_cuts(total, count)[1]


@cache
def _cheapest_cuts(total: int, count: int) -> tuple[int, tuple[int, ...]]:
    found: list[tuple[int, tuple[int, ...]]] = []
    if total <= MOST:
        found.append((_all_pairs(total), ()))
    for number in range(count + 1, min(MOST, total // 2) + 1):
        size = -(-total // number)
        left = count * size
        if left < total and (number & (number - 1) == 0 or number % 16 == 0):
            own = _cheapest(number, size)[0] + _all_pairs(number) + left * OPENED + 2 * ROUND
            rest, numbers = _cheapest_cuts(left, count)
            found.append((own + rest, (number, *numbers)))
    return min(found)


def _all_pairs(count: int) -> int:
    return count * (count - 1) // 2 * PAIR + (8 * count << lookup.index_bits(count)) + 3 * ROUND
