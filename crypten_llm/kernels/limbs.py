"""Kernels for processors: numbers wider than 64 bits, in limbs (``kernels.ring`` says what each does).

Owns the loops over limbs, which are uint64 here, [N, L]. ``top`` says how many bits of the highest limb are in use, 1
to 64. Shifts go up to 63 bits on a processor: where 64 may occur, a shift is one by a bit less and one by a bit.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.compiling import compiled, high_word, word_at

ZERO, ONE = np.uint64(0), np.uint64(1)
HALF, HALF_MASK, ALL = np.uint64(32), np.uint64(2**32 - 1), np.uint64(2**64 - 1)

# Parts of loops.


@compiled
def added(x: np.uint64, y: np.uint64, carry: np.uint64) -> tuple[np.uint64, np.uint64]:
    """x + y + carry, carry at most 1: the low word and the next carry."""
    once = x + y
    total = once + carry
    return total, np.uint64(once < x) | np.uint64(total < once)


@compiled
def product(x: np.uint64, y: np.uint64) -> tuple[np.uint64, np.uint64]:
    """x y in two words."""
    return x * y, high_word(x, y)


@compiled
def fold(rows: np.ndarray, i: int, last: int, carry: np.uint64, top: int) -> None:
    """rows[i] up to limb ``last``, plus carry 2^(64 (last + 1)), becomes a number of q = 64 last + top bits that is the
    same modulo 2^q - 1: what is above the lowest q bits is added to them, until nothing is. carry: below 2^top.
    """
    keep, below, above = ALL >> np.uint64(64 - top), np.uint64(top - 1), np.uint64(64 - top)
    high = ((rows[i, last] >> below) >> ONE) | (carry << above)
    while high:
        rows[i, last] &= keep
        for j in range(last + 1):
            rows[i, j], high = added(rows[i, j], high, ZERO)
            if not high:
                break
        high = ((rows[i, last] >> below) >> ONE) | (high << above)


# What travels. The lowest bit comes first.


@compiled
def _pack(rows: np.ndarray, top: int, out: np.ndarray) -> None:
    gathered, filled, place = ZERO, 0, 0
    last, keep = rows.shape[1] - 1, ALL >> np.uint64(64 - top)
    for i in range(rows.shape[0]):
        for j in range(last + 1):
            word, width = rows[i, j], 64
            if j == last:
                word, width = word & keep, top
            gathered |= word << np.uint64(filled)
            filled += width
            if filled >= 64:
                out[place] = gathered
                place += 1
                filled -= 64
                gathered = word >> np.uint64(width - filled) if filled else ZERO
    if filled:
        out[place] = gathered


@compiled
def bits_from(data: np.ndarray, first: int, count: int) -> np.uint64:
    """The word whose lowest bit is bit ``first`` of packed bytes; only its lowest ``count`` bits need be right."""
    place, used = first >> 3, first & 7
    if place + 9 <= data.shape[0]:
        return (word_at(data, place) >> np.uint64(used)) | ((np.uint64(data[place + 8]) << np.uint64(63 - used)) << ONE)
    word = np.uint64(data[place]) >> np.uint64(used)
    for i in range(1, (used + count + 7) >> 3):
        word |= np.uint64(data[place + i]) << np.uint64(8 * i - used)
    return word


@compiled
def _unpack(data: np.ndarray, top: int, out: np.ndarray) -> None:
    last, keep = out.shape[1] - 1, ALL >> np.uint64(64 - top)
    for i in range(out.shape[0]):
        first = i * (64 * last + top)
        for j in range(last):
            out[i, j] = bits_from(data, first + 64 * j, 64)
        out[i, last] = bits_from(data, first + 64 * last, top) & keep


@compiled
def _hide(share: np.ndarray, mask: np.ndarray, offset: np.ndarray, ones: bool, top: int, out: np.ndarray) -> None:
    last, keep = out.shape[1] - 1, ALL >> np.uint64(64 - top)
    for i in range(out.shape[0]):
        first, second = ZERO, ZERO
        for j in range(last + 1):
            word, first = added(share[i, j], mask[i, j], first)
            out[i, j], second = added(word, offset[j], second)
        if ones:
            fold(out, i, last, first + second, top)
        else:
            out[i, last] &= keep


def pack(words: Tensor, bits: int) -> Tensor:
    return torch.from_numpy(_packed(rows_of(words), bits))


def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    if bits % 64 == 0 and data.storage_offset() % 8 == 0:
        return data.view(torch.int64).view(*shape, bits // 64)
    return tensor_of(_unpacked(data, bits, math.prod(shape)), shape)


def hide_wide(share: Tensor, mask: Tensor, offset: int, bits: int, ones: bool) -> tuple[Tensor, Tensor]:
    shares, masks = rows_of(share), rows_of(mask)
    value = np.empty_like(shares)
    rest = offset % ((1 << bits) - ones)
    limbs = np.array([rest >> 64 * j & 2**64 - 1 for j in range(shares.shape[1])], dtype=np.uint64)
    _hide(shares, masks, limbs, ones, top_of(bits), value)
    return torch.from_numpy(value.view(np.int64)), torch.from_numpy(_packed(value, bits))


def show_wide(value: Tensor, packed: Tensor, bits: int, ones: bool, shape: Sequence[int]) -> Tensor:
    theirs = _unpacked(packed, bits, value.shape[0])
    out = np.empty_like(theirs)
    _hide(rows_of(value), theirs, np.zeros(theirs.shape[1], dtype=np.uint64), ones, top_of(bits), out)
    return tensor_of(out, shape)


def _packed(rows: np.ndarray, bits: int) -> np.ndarray:
    if bits % 64 == 0:
        return rows.copy().view(np.uint8).reshape(-1)
    out = np.empty((rows.shape[0] * bits + 63) // 64, dtype=np.uint64)
    _pack(rows, top_of(bits), out)
    return out.view(np.uint8)[: ring.packed_size(rows.shape[0], bits)]


def _unpacked(data: Tensor, bits: int, count: int) -> np.ndarray:
    raw = data.numpy()
    if bits % 64 == 0:
        return raw.copy().view(np.uint64).reshape(count, bits // 64)
    out = np.empty((count, ring.limbs(bits)), dtype=np.uint64)
    _unpack(raw, top_of(bits), out)
    return out


# Arithmetic. Of an operand of a result [A, B, L] in one piece: how far on the next row is, and the next element of a
# row, 0 where it is repeated; and how many limbs it has.

Lies = tuple[int, int, int]


@compiled
def _add(
    a: np.ndarray, a_lies: Lies, b: np.ndarray, b_lies: Lies, minus: bool, ones: bool, top: int, out: np.ndarray
) -> None:
    """a + b, or a - b: a plus the complement of b, which is -b modulo 2^q - 1, and plus 1 modulo 2^q."""
    (a_row, a_step, a_limbs), (b_row, b_step, b_limbs) = a_lies, b_lies
    last, keep = out.shape[2] - 1, ALL >> np.uint64(64 - top)
    flip, one = ALL if minus else ZERO, ONE if minus and not ones else ZERO
    for r in range(out.shape[0]):
        rows = out[r]
        for i in range(out.shape[1]):
            left, right, carry = r * a_row + i * a_step, r * b_row + i * b_step, one
            for j in range(last + 1):
                x = a[left + j] if j < a_limbs else ZERO
                y = (b[right + j] if j < b_limbs else ZERO) ^ flip
                if j == last:
                    y &= keep
                rows[i, j], carry = added(x, y, carry)
            if ones:
                fold(rows, i, last, carry, top)
            else:
                rows[i, last] &= keep


@compiled
def _multiply(a: np.ndarray, a_lies: Lies, b: np.ndarray, b_lies: Lies, top: int, out: np.ndarray) -> None:
    (a_row, a_step, a_limbs), (b_row, b_step, b_limbs) = a_lies, b_lies
    last, keep = out.shape[2] - 1, ALL >> np.uint64(64 - top)
    for r in range(out.shape[0]):
        for i in range(out.shape[1]):
            left, right = r * a_row + i * a_step, r * b_row + i * b_step
            for j in range(last + 1):
                out[r, i, j] = ZERO
            for j in range(min(a_limbs, last + 1)):
                carry = ZERO
                for k in range(min(b_limbs, last + 1 - j)):
                    if j + k == last:  # what is above is not wanted
                        out[r, i, last] += a[left + j] * b[right + k] + carry
                        continue
                    low, high = product(a[left + j], b[right + k])
                    low, first = added(low, out[r, i, j + k], ZERO)
                    out[r, i, j + k], second = added(low, carry, ZERO)
                    carry = high + first + second
                if j + b_limbs < last + 1:
                    out[r, i, j + b_limbs] = carry
            out[r, i, last] &= keep


@compiled
def _sum(words: np.ndarray, starts: np.ndarray, ones: bool, top: int, out: np.ndarray) -> None:
    """Low and high halves are summed apart, so that nothing is carried below 2^31 elements."""
    count = out.shape[1]
    keep = ALL >> np.uint64(64 - top)
    halves = np.empty((2, count), np.uint64)
    for r in range(out.shape[0]):
        halves[:] = ZERO
        for i in range(starts[r], starts[r + 1]):
            for j in range(count):
                word = words[i, j]
                halves[0, j] += word & HALF_MASK
                halves[1, j] += word >> HALF
        carry = ZERO
        for j in range(count):
            low = halves[0, j] + carry
            high = halves[1, j] + (low >> HALF)
            out[r, j] = (high << HALF) | (low & HALF_MASK)
            carry = high >> HALF
        if ones:
            fold(out, r, count - 1, carry, top)
        else:
            out[r, count - 1] &= keep


@compiled
def _shift(a: np.ndarray, count: int, up: bool, top: int, out: np.ndarray) -> None:
    """The bits from ``count`` on, which may be negative; plus 1 where ``up`` and a bit below them is set."""
    last, keep = out.shape[1] - 1, ALL >> np.uint64(64 - top)
    first, bits = count >> 6, count & 63
    for i in range(out.shape[0]):
        carry = ZERO
        if up:
            below = ZERO
            for j in range(first):
                below |= a[i, j]
            if bits:
                below |= a[i, first] << np.uint64(64 - bits)
            carry = np.uint64(below != ZERO)
        for j in range(last + 1):
            low, high = first + j, first + j + 1
            word = a[i, low] >> np.uint64(bits) if 0 <= low < a.shape[1] else ZERO
            if 0 <= high < a.shape[1]:
                word |= (a[i, high] << ONE) << np.uint64(63 - bits)
            out[i, j], carry = added(word, carry, ZERO)
        out[i, last] &= keep


def reduce_wide(words: Tensor, bits: int) -> Tensor:
    rows = rows_of(words)
    out = np.zeros((rows.shape[0], ring.limbs(bits)), dtype=np.uint64)
    out[:, : rows.shape[1]] = rows[:, : out.shape[1]]
    out[:, -1] &= np.uint64(2 ** top_of(bits) - 1)
    return tensor_of(out, words.shape[:-1])


def widen(words: Tensor, bits: int, signed: bool) -> Tensor:
    flat = words.reshape(-1).numpy()
    out = np.empty((flat.size, ring.limbs(bits)), dtype=np.int64)
    out[:, 0] = flat
    out[:, 1:] = (flat >> 63)[:, None] if signed else 0
    unsigned = out.view(np.uint64)
    unsigned[:, -1] &= np.uint64(2 ** top_of(bits) - 1)
    return tensor_of(unsigned, words.shape)


def add_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return _sum_of_two(a, b, bits, False, False)


def subtract_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return _sum_of_two(a, b, bits, True, False)


def add_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    return _sum_of_two(a, b, q, False, True)


def subtract_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    return _sum_of_two(a, b, q, True, True)


def _sum_of_two(a: Tensor, b: Tensor, bits: int, minus: bool, ones: bool) -> Tensor:
    shape, out = _result(a, b, bits)
    _add(*_operand(a, shape), *_operand(b, shape), minus, ones, top_of(bits), out)
    return tensor_of(out, shape)


def multiply_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    shape, out = _result(a, b, bits)
    _multiply(*_operand(a, shape), *_operand(b, shape), top_of(bits), out)
    return tensor_of(out, shape)


def shift_wide(a: Tensor, count: int, bits: int) -> Tensor:
    return _shifted(a, -count, False, bits)


def drop_wide(a: Tensor, bits: int, count: int, up: bool) -> Tensor:
    dropped = _shifted(a, count, up, bits - count)
    return dropped[..., 0] if bits - count <= 64 else dropped


def _shifted(a: Tensor, count: int, up: bool, bits: int) -> Tensor:
    rows = rows_of(a)
    out = np.empty((rows.shape[0], ring.limbs(bits)), dtype=np.uint64)
    _shift(rows, count, up, top_of(bits), out)
    return tensor_of(out, a.shape[:-1])


def sum_wide(a: Tensor, bits: int) -> Tensor:
    *shape, size, _ = a.shape
    starts = np.arange(math.prod(shape) + 1) * size
    return _sums(a, starts, bits, False).reshape(*shape, 1, ring.limbs(bits))


def sum_ones(words: Tensor, starts: Tensor, q: int) -> Tensor:
    return _sums(words, starts.numpy(), q, True)


def _sums(words: Tensor, starts: np.ndarray, bits: int, ones: bool) -> Tensor:
    out = np.empty((starts.size - 1, ring.limbs(bits)), dtype=np.uint64)
    _sum(rows_of(words), np.ascontiguousarray(starts), ones, top_of(bits), out)
    return torch.from_numpy(out.view(np.int64))


# Between tensors and arrays.


def top_of(bits: int) -> int:
    """Bits of the highest limb that are in use."""
    return (bits - 1) % 64 + 1


def rows_of(words: Tensor) -> np.ndarray:
    """Limbs [..., L] as uint64 [N, L] in one piece; the same memory where they are."""
    return np.ascontiguousarray(_unsigned(words).reshape(-1, words.shape[-1]))


def flat_of(words: Tensor) -> np.ndarray:
    """Words [...] as int64 [N] in one piece; the same memory where they are."""
    return words.reshape(-1).contiguous().numpy()


def tensor_of(rows: np.ndarray, shape: Sequence[int]) -> Tensor:
    """Limbs [*shape, L]: the memory of ``rows``, uint64 [N, L]."""
    return torch.from_numpy(rows.view(np.int64).reshape(*shape, rows.shape[-1]))


def _result(a: Tensor, b: Tensor, bits: int) -> tuple[Sequence[int], np.ndarray]:
    """The leading dimensions of an element-wise result, and memory for it as [A, B, L]; B is the last of them."""
    shape = a.shape[:-1]
    if shape == b.shape[:-1]:  # then rows need not be told apart
        return shape, np.empty((1, shape.numel(), ring.limbs(bits)), dtype=np.uint64)
    wider = ring.broadcast(shape, b.shape[:-1])
    return wider, np.empty((math.prod(wider[:-1]), wider[-1], ring.limbs(bits)), dtype=np.uint64)


def _operand(x: Tensor, shape: Sequence[int]) -> tuple[np.ndarray, Lies]:
    *own, limbs = x.shape
    if own == list(shape):
        return _unsigned(x).reshape(-1), (limbs * shape[-1] if shape else 0, limbs, limbs)
    if math.prod(own[:-1]) == 1:  # one row for all, or one element
        return _unsigned(x).reshape(-1), (0, limbs if own and own[-1] == shape[-1] else 0, limbs)
    x = x.contiguous()
    x = x.expand(*shape, limbs).reshape(math.prod(shape[:-1]), shape[-1], limbs)  # a copy where rows do not merge
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    row, step, _ = x.stride()
    return _unsigned(x.as_strided((extent if x.numel() else 0,), (1,))), (row, step, limbs)


def _unsigned(words: Tensor) -> np.ndarray:
    return words.numpy().view(np.uint64)
