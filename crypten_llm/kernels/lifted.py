"""Kernels for processors: numbers that were opened in a narrow ring and are used in a wide one (``kernels.ring`` says
what each does).

Owns their masks, and sums and products in which such a number is one factor. Each is one loop: a row of a decode step
has so few elements that calls would take longer than the arithmetic. Limbs and ``top`` as in ``kernels.limbs``. A loop
is given as many zeros as a result has limbs, in a tuple, whose length is known when it is compiled (ten times faster).
"""

import math

import numpy as np
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.compiling import compiled, inlined
from crypten_llm.kernels.limbs import ALL, ONE, ZERO, added, product, rows_of, tensor_of, top_of

Length = tuple[int, ...]


@inlined
def _add_product(word: np.int64, numbers: np.ndarray, i: int, total: np.ndarray, r: int, length: Length) -> None:
    """total[r] += word numbers[i]. Of a negative word, 2^64 times the number is taken away, limb by limb."""
    factor, negative, count = np.uint64(word), np.uint64(word >> 63), numbers.shape[1]
    carry, below, borrow = ZERO, ZERO, ONE
    for j in range(len(length)):
        limb = numbers[i, j] if j < count else ZERO
        low, high = product(factor, limb)
        low, first = added(low, carry, ZERO)
        low, second = added(low, total[r, j], ZERO)
        total[r, j], borrow = added(low, ~(below & negative), borrow)
        carry, below = high + first + second, limb


@compiled
def _lift(
    mask: np.ndarray,
    carry: np.ndarray,
    bit: np.ndarray,
    unwrapped: np.ndarray,
    size: int,
    top: int,
    out: np.ndarray,
    length: Length,
) -> None:
    last, keep = len(length) - 1, ALL >> np.uint64(64 - top)
    whole, bits, rest, count = size >> 6, np.uint64(size & 63), np.uint64(63 - (size & 63)), carry.shape[1]
    for i in range(out.shape[0]):
        chosen, word = ZERO - np.uint64(unwrapped[i]), np.uint64(mask[i])
        first, borrow, below = ZERO, ONE, ZERO
        for j in range(len(length)):
            place, wrapped = j - whole, ZERO
            if 0 <= place and place < count:
                wrapped, first = added(carry[i, place], bit[i, place] & chosen, first)
            out[i, j], borrow = added(word, ~((wrapped << bits) | ((below >> ONE) >> rest)), borrow)
            below, word = wrapped, ZERO
        out[i, last] &= keep


@compiled
def _dot(words: np.ndarray, numbers: np.ndarray, top: int, out: np.ndarray, length: Length) -> None:
    last, keep = len(length) - 1, ALL >> np.uint64(64 - top)
    size = words.shape[1]
    for r in range(out.shape[0]):
        for j in range(len(length)):
            out[r, j] = ZERO
        for h in range(size):
            _add_product(words[r, h], numbers, r * size + h, out, r, length)
        out[r, last] &= keep


@compiled
def _scale(
    public: np.ndarray,
    unwrapped: np.ndarray,
    mask: np.ndarray,
    own: np.ndarray,
    shown: np.ndarray,
    pairs: np.ndarray,
    wraps: np.ndarray,
    size: int,
    kept: int,
    top: int,
    out: np.ndarray,
    length: Length,
) -> None:
    last, keep = len(length) - 1, ALL >> np.uint64(64 - top)
    whole, bits, rest = size >> 6, np.uint64(size & 63), np.uint64(63 - (size & 63))
    kept_whole, kept_bits, kept_rest = kept >> 6, np.uint64(kept & 63), np.uint64(63 - (kept & 63))
    width, minus = public.shape[1], np.empty((1, out.shape[1]), np.uint64)
    for r in range(public.shape[0]):
        carry = ONE
        for j in range(len(length)):
            minus[0, j], carry = added(~shown[r, j], ZERO, carry)
        for h in range(width):
            i, chosen = r * width + h, ZERO - np.uint64(unwrapped[r, h])
            pair_below, wrap_below, borrow = ZERO, ZERO, ONE
            for j in range(len(length)):
                place, pair = j - kept_whole, ZERO
                if 0 <= place and place < pairs.shape[1]:
                    pair = pairs[i, place]
                place, wrap = j - whole, ZERO
                if 0 <= place and place < wraps.shape[1]:
                    wrap = wraps[i, place] & chosen
                positive = (pair << kept_bits) | ((pair_below >> ONE) >> kept_rest)
                out[i, j], borrow = added(positive, ~((wrap << bits) | ((wrap_below >> ONE) >> rest)), borrow)
                pair_below, wrap_below = pair, wrap
            _add_product(public[r, h], own, r, out, i, length)
            for j in range(len(length)):
                carry = ZERO
                for k in range(len(length) - j):
                    low, high = product(mask[i, j], minus[0, k])
                    low, first = added(low, carry, ZERO)
                    out[i, j + k], second = added(low, out[i, j + k], ZERO)
                    carry = high + first + second
            out[i, last] &= keep


def lift_mask(mask: Tensor, carry: Tensor, bit: Tensor, unwrapped: Tensor, size: int, bits: int) -> Tensor:
    out, length = _result(mask.numel(), bits)
    words, chosen = (x.reshape(-1).contiguous().numpy() for x in (mask, unwrapped))
    _lift(words, rows_of(carry), rows_of(bit), chosen, size, top_of(bits), out, length)
    return tensor_of(out, mask.shape)


def dot_wide(words: Tensor, numbers: Tensor, bits: int) -> Tensor:
    *shape, size = words.shape
    out, length = _result(math.prod(shape), bits)
    _dot(words.reshape(-1, size).contiguous().numpy(), rows_of(numbers), top_of(bits), out, length)
    return tensor_of(out, shape)


def scale_lifted(
    public: Tensor,
    unwrapped: Tensor,
    mask: Tensor,
    own: Tensor,
    shown: Tensor,
    pairs: Tensor,
    wraps: Tensor,
    size: int,
    kept: int,
    bits: int,
) -> Tensor:
    out, length = _result(public.numel(), bits)
    words, chosen = (x.reshape(-1, public.shape[-1]).contiguous().numpy() for x in (public, unwrapped))
    masks, factors, opened, dealt, wrapped = (rows_of(x) for x in (mask, own, shown, pairs, wraps))
    _scale(words, chosen, masks, factors, opened, dealt, wrapped, size, kept, top_of(bits), out, length)
    return tensor_of(out, public.shape)


def _result(count: int, bits: int) -> tuple[np.ndarray, Length]:
    """Memory for that many numbers, and their length as the loops take it."""
    limbs = ring.limbs(bits)
    return np.empty((count, limbs), dtype=np.uint64), (0,) * limbs
