"""Selection with CrypTen's own protocols: the operations of ``eviction.operations`` for engine ``crypten``.

Owns what an eviction policy is handed there, as a mixin of the engine. The baseline: its comparison (by bit
decomposition), its products, one-hot rows by comparing ranks with constants, rows moved by products with one-hot
matrices; all comparisons that do not depend on each other are made at once.

Bits and one-hot rows are integers, as CrypTen's comparisons return them (scale 1), all else has the engine's fractional
bits: a product with a bit is then exact and is not truncated. ``==`` is never used: CrypTen's equality divides by the
scale of what it compared, and is wrong by it for integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.crypten.bridge import crypten
from eviction.operations import Choice, Handle

if TYPE_CHECKING:
    from crypten_llm.engines.crypten.domain import CryptenConfig


MPCTensor = crypten.mpc.MPCTensor

# Which protocol ``top`` takes follows from public sizes. All pairs of n values are n (n - 1) / 2 comparisons of 216
# bytes in 16 rounds. A search for the least of the best is 7 comparisons a value in each of some 14 steps of 16 rounds:
# 992 values take 21 MB and 232 rounds, all their pairs 106 MB. One value among many is found by a tree of maxima.
PAIRS = 256
TREE = 64
DIGIT = 3  # bits of the threshold that one step of the search finds
LIMIT_BITS = 14  # the threshold is looked for in (-2^14, 2^14); mass that 16,384 queries gave to one row
DIRECT = 16  # up to so many one-hot rows each is compared for; more are products of two digits' rows
RATIO = 2.0**-11  # of ends of a reciprocal: its least argument is then 0.002, where 10 steps from 8 are enough
SIGMOID_NEWTON_STEPS = 2  # from a straight line that is 1/z to 9 % on [1, 2]: 0.086^4 = 5e-5


class CryptenSelection:
    """Mixin of ``CryptenEngine``; rows and handles are both MPCTensors.

    Shapes are those of ``eviction.operations.Operations``. Reveals, for every method: nothing but what CrypTen's
    protocols open behind fresh randomness of the dealer, in rounds and sizes that follow from shapes, counts and
    settings. Errors are absolute, u = 2^-f; each truncation may be wild as the engine says. A comparison costs 8
    rounds, 216 bytes sent to each other party and 120 of the dealer's; a product 1 round, 8 bytes an element of each
    factor, and of the result from the dealer. Costs are those of two parties. CrypTen's truncation rounds at random, so
    of equal inputs a function makes results a unit or two apart: ties stay ties only up to there.
    """

    config: CryptenConfig
    rank: int

    # Local: linear with public coefficients.

    def add(self, x: Handle, y: Handle) -> Handle:
        """Error: none. Cost: none."""
        x, y = _alike([x, y])
        return _handle(x.share + y.share, x)

    def cat(self, handles: list[Handle], dim: int) -> Handle:
        """Error: none. Cost: none."""
        handles = _alike(handles)
        return _handle(crypten.common.util.torch_cat([x.share for x in handles], dim), handles[0])

    def public(self, value: torch.Tensor) -> Handle:
        """Error: u / 2. Cost: none."""
        units = (value.double() * 2**self.config.precision_bits).round().long()
        return MPCTensor.from_shares(units if self.rank == 0 else torch.zeros_like(units))

    def scale(self, x: Handle, factor: float | torch.Tensor) -> Handle:
        """Error: none for whole factors and for bits times multiples of u; u for 1 / n; else u |x| more. Cost: none."""
        factor = torch.as_tensor(factor, dtype=torch.float64)
        inverse = 1 / factor if factor.dim() == 0 and factor else None
        if inverse is not None and inverse == inverse.round() and abs(inverse) > 1 and x.encoder.scale > 1:
            return x.div(int(inverse))
        return self._linear(x, factor, torch.mul)

    def total(self, x: Handle, dim: int) -> Handle:
        """Error: none. Cost: none."""
        return _handle(x.share.sum(dim), x)

    def transform(self, x: Handle, matrix: torch.Tensor) -> Handle:
        """Error: none for a matrix of whole numbers; else u, and u / 2 for the rounding of each of its numbers, times
        x. Cost: none."""
        return self._linear(x, matrix.double(), torch.matmul)

    def within(self, x: Handle, limit: float) -> Handle:
        """Error: none. Cost: none; comparisons are of whole shares."""
        return x

    def _linear(self, x: Handle, factor: torch.Tensor, product: Callable[[Any, Any], Any]) -> Handle:
        """x by public numbers: whole ones as they are, others as fixed point with one truncation (none for bits)."""
        if (factor == factor.round()).all():
            return _handle(product(x.share, factor.long()), x)
        scale = 2**self.config.precision_bits
        made = MPCTensor.from_shares(product(x.share, (factor * scale).round().long()))
        return made if x.encoder.scale == 1 else made.div(scale)

    # Attention.

    def mass(self, weights: Handle, queries: torch.Tensor) -> Handle:
        """Local. Error: u, none for whole numbers of queries, beside that of the weights. Cost: none."""
        return self.transform(weights.permute(0, 2, 1), queries[:, None])[..., 0]

    def gather_scores(self, choice: Choice, scores: Handle) -> Handle:
        """Error: none. Cost: none without picks, else 1 round: one product of picks [G, k, C] and [G, C, M * size]."""
        parts = [scores[..., choice.rows]] if len(choice.rows) else []
        if choice.picks is not None:
            (heads, queries, _), (count, blocks) = scores.shape, choice.picks.shape[-2:]
            stretch = scores[..., choice.first : choice.first + blocks * choice.size]
            stretch = stretch.reshape(heads, queries, blocks, choice.size).permute(0, 2, 1, 3)
            found = choice.picks.matmul(stretch.reshape(heads, blocks, queries * choice.size))
            found = found.reshape(heads, count, queries, choice.size).permute(0, 2, 1, 3)
            parts.append(found.reshape(heads, queries, count * choice.size))
        return self.cat(parts, -1)

    def scatter_weights(self, choice: Choice, weights: Handle, count: int) -> Handle:
        """Error: none. Cost: none without picks, else 1 round: one product of picks [G, C, k] and [G, k, M * size]."""
        (heads, queries, _), fixed = weights.shape, len(choice.rows)
        placed = weights.share.new_zeros(heads, queries, count)
        placed.index_add_(-1, choice.rows, weights.share[..., :fixed])
        if choice.picks is not None:
            kept, blocks = choice.picks.shape[-2:]
            chosen = weights[..., fixed:].reshape(heads, queries, kept, choice.size).permute(0, 2, 1, 3)
            found = choice.picks.transpose(-1, -2).matmul(chosen.reshape(heads, kept, queries * choice.size))
            found = found.reshape(heads, blocks, queries, choice.size).permute(0, 2, 1, 3)
            stop = choice.first + blocks * choice.size
            placed[..., choice.first : stop] += found.share.reshape(heads, queries, -1)
        return _handle(placed, weights)

    # Rows of the cache.

    def contents(self, rows: Handle) -> Handle:
        """Local."""
        return rows

    def fixed(self, x: Handle, values: bool = False) -> Handle:
        """Local: CrypTen opens the rows in each product."""
        return x

    def take(self, rows: Handle, index: torch.Tensor) -> Handle:
        """Local."""
        return rows[:, index]

    def keep(self, rows: Handle, picks: Handle, size: int = 1) -> Handle:
        """Error: none. Cost: 1 round: one product of picks [G or 1, K, C] and blocks [G, C, size * D]."""
        heads, count, dim = rows.shape
        kept = picks.matmul(rows.reshape(heads, count // size, size * dim))
        return kept.reshape(heads, picks.shape[-2] * size, dim)

    def drop(self, rows: Handle, hot: Handle) -> Handle:
        """Each row moves up by one from the dropped one on. Error: none.

        Cost: 1 round: one product of [G or 1, N - 1] bits and [G, N - 1, D].
        """
        after = _handle(hot.share.cumsum(-1)[..., :-1, None], hot)
        return self.choose(after, rows[:, 1:], rows[:, :-1])

    def coarse(self, rows: Handle, bits: int) -> Handle:
        """CrypTen's bit decomposition of the level; rows are held as others are: no memory is saved. Error: u.

        Cost: 17 rounds; two comparisons, two products with bits, a decomposition of 208 bytes and 8 bytes a bit of the
        level, for each number.
        """
        most, one, x = 2 ** (bits - 1) - 1, rows.encoder.scale, rows.share
        beyond = torch.stack([self._public(one) - x, x + self._public(one)])  # negative beyond the ends
        moved = _bits(self._negative(beyond)) * _handle(beyond * torch.tensor([1, -1]).view(2, 1, 1, 1), rows)
        above = (x + moved.share.sum(0)) * most + self._public(one * most + one // 2)
        binary = _bits(above)._to_ptype(crypten.mpc.binary)
        binary.share >>= one.bit_length() - 1  # the whole part is the level
        level = binary._to_ptype(crypten.mpc.arithmetic, precision=0, bits=bits).share - self._public(most)
        return _handle(level * one, rows).div(most)

    # Comparisons.

    def top(self, x: Handle, count: int) -> Handle:
        """Error: none beyond that of x.

        Cost: up to ``PAIRS`` values n (n - 1) / 2 + n comparisons in 16 rounds. Beyond, with b = ceil(log2 n), a step
        for each ``DIGIT`` of f + 15 + b bits, of 16 rounds and 7 n comparisons, and at last n comparisons in 8 rounds;
        the result is right if the least of the best is in the range of ``LIMIT_BITS``. For count 1 beyond ``TREE``
        values 9 b + 8 rounds and 2 n comparisons.
        Raises: ValueError for a count that there is not.
        """
        n, share = x.shape[-1], x.share
        if not 0 <= count <= n:
            raise ValueError(f"top: the {count} largest of {n} values; give 0 to {n}")
        if count in (0, n):
            return _bits(torch.full_like(share, count > 0) * self._public(1))
        if count == 1 and n > TREE:
            distinct = _bits(self._distinct(share))
            return self._not_below(distinct.share - row_maximum(distinct).share)
        if n > PAIRS:
            distinct = self._distinct(share)
            bits = x.encoder._precision_bits + LIMIT_BITS + 1 + (n - 1).bit_length()
            return self._not_below(distinct - self._least_of_best(distinct, count, bits)[..., None])
        return _bits(self._negative(self._ranks(share) - self._public(count)))

    def best(self, x: Handle, count: int) -> Handle:
        """Error: none. Cost: as ``picks`` of ranks; up to ``PAIRS`` values n (n - 1) / 2 comparisons in 8 rounds more,
        beyond that ``top`` and ``picks``. Raises: ValueError as ``top``.
        """
        n = x.shape[-1]
        if count == 0 or n == 1 or n > (TREE if count == 1 else PAIRS):
            return self.picks(self.top(x, count), count)
        if not 0 <= count <= n:
            raise ValueError(f"best: the {count} largest of {n} values; give 0 to {n}")
        ranks = self._ranks(x.share)
        every = torch.ones_like(ranks) * self._public(1)
        return _bits(self._hot(ranks, every, count, n - 1))

    def picks(self, bits: Handle, count: int) -> Handle:
        """A one's place among the ones is a local sum; rows are hot where the place is theirs. Error: none.

        Cost: up to ``DIRECT`` rows 8 rounds and count - 1 comparisons a bit (none for one row). Beyond, with s the root
        of count rounded up, 17 rounds, 2 (s - 1) comparisons a bit, and a product of 2 s numbers and count results.
        """
        hot = bits.share
        if count == 0:
            return _bits(hot.new_zeros(*hot.shape[:-1], 0, hot.shape[-1]))
        place = hot.cumsum(-1) - self._public(1)
        far = place - (self._public(1) - hot) * hot.shape[-1]  # below zero at a zero
        return _bits(self._hot(far, hot, count, count - 1))

    def gather(self, picks: Handle, x: Handle) -> Handle:
        """Error: none for picks and bits. Cost: 1 round: one product."""
        return picks.matmul(x)

    def largest(self, x: Handle, dim: int) -> Handle:
        """Error: none. Cost: 9 ceil(log2 n) rounds; n - 1 comparisons and products."""
        dim = dim % x.dim()
        x = x.permute(*(d for d in range(x.dim()) if d != dim), dim)
        return row_maximum(x)[..., 0]

    def above(self, x: Handle, threshold: float) -> Handle:
        """Error: the threshold is rounded down to a multiple of u. Cost: a comparison each in 8 rounds."""
        limit = self._public(math.floor(threshold * x.encoder.scale))
        return _bits(self._negative(limit - x.share))

    # Arithmetic on two secrets, and functions.

    def multiply(self, x: Handle, y: Handle) -> Handle:
        """Error: u, none where one is bits; u (|x| + |y|) for the rounding of inputs. Cost: 1 round: one product."""
        return x * y

    def choose(self, bits: Handle, x: Handle, y: Handle) -> Handle:
        """y + bits (x - y). Error: none. Cost: 1 round: one product."""
        x, y = _alike([x, y])
        return self.add(bits * _handle(x.share - y.share, x), y)

    def sigmoid(self, x: Handle) -> Handle:
        """1 / (1 + exp(-|x|)) for x >= 0, one minus that below. Domain: |x| < 2^k, k squarings of the engine's exp.

        Error: 2^-(k+1) + 2^k u. Cost: 23 rounds at 16 fractional bits.
        """
        sign = 1 - 2 * (x < 0)
        z = (-(x * sign)).exp() + 1
        inverse = 1.4571 - 0.5 * z
        for _ in range(SIGMOID_NEWTON_STEPS):
            inverse = inverse * (2 - z * inverse)
        return 0.5 + (inverse - 0.5) * sign

    def reciprocal(self, x: Handle, low: float, high: float) -> Handle:
        """CrypTen's Newton iteration on x times a public power of two that brings ``high`` into (4, 8].

        The iteration takes y^2 x, in which the unit of y^2 is multiplied by x: beyond about 64 it diverges. Error: 64 u
        of the result, and u / x of it for the rounding of x. Cost: 29 rounds at 16 fractional bits.
        Raises: ValueError unless 0 < low <= high, with ``low`` no less than ``RATIO`` of ``high``.
        """
        if not RATIO * high <= low <= high or low <= 0:
            raise ValueError(f"reciprocal: from {low:g} to {high:g}; give 0 < low <= high <= {1 / RATIO:g} low")
        factor = 2.0 ** math.floor(math.log2(8 / high))
        return self.scale(self.scale(x, factor).reciprocal(), factor)

    # Shared, on shares of integers.

    def _public(self, value: Any) -> Any:
        """This party's share of a public integer, or of integers."""
        return value if self.rank == 0 else value * 0

    def _negative(self, share: torch.Tensor) -> torch.Tensor:
        """Shares of [x < 0]. Cost: a comparison each in 8 rounds."""
        return _bits(share)._ltz().share

    def _not_below(self, share: torch.Tensor) -> Handle:
        """[x >= 0] as bits. Cost: as ``_negative``."""
        return _bits(self._public(1) - self._negative(share))

    def _distinct(self, share: torch.Tensor) -> torch.Tensor:
        """Values in the same order, and of equal ones the first largest."""
        n = share.shape[-1]
        return (share << (n - 1).bit_length()) - self._public(torch.arange(n))

    def _ranks(self, share: torch.Tensor) -> torch.Tensor:
        """How many values come before each of a row. Cost: a comparison for each pair in 8 rounds."""
        n = share.shape[-1]
        first, second = torch.triu_indices(n, n, 1)
        less = self._negative(share[..., first] - share[..., second])
        ranks = torch.zeros_like(share).index_add_(-1, first, less)
        return ranks.index_add_(-1, second, self._public(1) - less)

    def _least_of_best(self, share: torch.Tensor, count: int, bits: int) -> torch.Tensor:
        """The ``count``-th largest of distinct integers in [-2^(bits-1), 2^(bits-1)): [..., n] to [...].

        Each step finds the next ``DIGIT`` bits: of 2^DIGIT - 1 thresholds at equal distances, it takes the last that
        ``count`` values reach. Cost: see ``top``.
        """
        n, bits = share.shape[-1], -(-bits // DIGIT) * DIGIT
        least = torch.zeros_like(share[..., 0]) - self._public(1 << (bits - 1))
        multiples = torch.arange(1, 1 << DIGIT)
        for shift in range(bits - DIGIT, -1, -DIGIT):
            thresholds = least[..., None] + self._public(multiples << shift)
            below = self._negative(share[..., None, :] - thresholds[..., None]).sum(-1)
            missed = self._negative(self._public(n - count) - below)  # more than n - count values are below
            least = least + ((self._public(len(multiples)) - missed.sum(-1)) << shift)
        return least

    def _hot(self, number: torch.Tensor, counted: torch.Tensor, count: int, most: int) -> torch.Tensor:
        """One-hot rows [..., count, N] of integers [..., N] of ``most`` at most: 1 in row r where the number is r.

        counted: shares of 1 where the number is not negative, of 0 elsewhere. Cost: see ``picks``.
        """
        if count <= DIRECT:
            return self._digits(number, counted, count, 1, most)
        size = math.isqrt(count - 1) + 1
        rows = -(-count // size)
        high = self._digits(number, counted, rows, size, most)
        index = torch.arange(rows)[:, None] * size
        low = self._digits(number - (high * index).sum(-2), counted, size, 1, size - 1)
        both = _bits(high[..., :, None, :]) * _bits(low[..., None, :, :])
        return both.share.reshape(*number.shape[:-1], rows * size, number.shape[-1])[..., :count, :]

    def _digits(self, number: torch.Tensor, counted: torch.Tensor, rows: int, size: int, most: int) -> torch.Tensor:
        """1 in row r where size r <= number < size (r + 1)."""
        limits = torch.arange(1, min(rows, most // size) + 1) * size
        reached = counted[..., None, :]
        if len(limits):
            below = self._negative(number[..., None, :] - self._public(limits)[:, None])
            reached = torch.cat([reached, self._public(1) - below], -2)
        following = torch.cat([reached[..., 1:, :], torch.zeros_like(reached[..., :1, :])], -2)
        hot = (reached - following)[..., :rows, :]
        missing = rows - hot.shape[-2]
        return hot if not missing else torch.cat([hot, hot.new_zeros(*hot.shape[:-2], missing, hot.shape[-1])], -2)


def row_maximum(x: Handle) -> Handle:
    """Maximum over the last dimension by a tree of comparisons, kept as a dimension of 1."""
    while x.shape[-1] > 1:
        n = x.shape[-1]
        left, right = x[..., : n // 2], x[..., n // 2 : 2 * (n // 2)]
        larger = right + (left - right) * (left >= right)
        x = crypten.cat([larger, x[..., 2 * (n // 2) :]], -1) if n % 2 else larger
    return x


def _handle(share: torch.Tensor, like: Handle) -> Handle:
    """An MPCTensor of these shares with the fractional bits of another."""
    return MPCTensor.from_shares(share, precision=like.encoder._precision_bits)


def _bits(share: torch.Tensor) -> Handle:
    """Shares of integers as an MPCTensor."""
    return MPCTensor.from_shares(share, precision=0)


def _alike(handles: list[Handle]) -> list[Handle]:
    """The same values with one number of fractional bits; the given handles stay as they are."""
    most = max(handles, key=lambda x: x.encoder.scale)
    return [_handle(x.share * (most.encoder.scale // x.encoder.scale), most) for x in handles]
