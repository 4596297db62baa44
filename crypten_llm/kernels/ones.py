"""Kernels for processors: numbers modulo 2^q - 1 (``kernels.ring`` says what each does).

Owns their products, and rotations, which are products by a power of two: limbs are read off the number written twice,
one behind the other. Limbs and ``top`` as in ``kernels.limbs``, which has sums and differences.
"""

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.compiling import compiled, inlined
from crypten_llm.kernels.limbs import ALL, ONE, ZERO, added, flat_of, fold, product, rows_of, tensor_of, top_of


@compiled
def _multiply_ones(a: np.ndarray, b: np.ndarray, top: int, out: np.ndarray) -> None:
    """The product's high q bits are added to its low ones."""
    count = out.shape[1]
    keep, below, above = ALL >> np.uint64(64 - top), np.uint64(top - 1), np.uint64(64 - top)
    whole = np.empty(2 * count, np.uint64)
    for i in range(out.shape[0]):
        whole[:] = ZERO
        for j in range(count):
            carry = ZERO
            for k in range(count):
                low, high = product(a[i, j], b[i, k])
                low, first = added(low, whole[j + k], ZERO)
                whole[j + k], second = added(low, carry, ZERO)
                carry = high + first + second
            whole[j + count] = carry
        carry = ZERO
        for j in range(count):
            low = whole[j] if j < count - 1 else whole[j] & keep
            high = ((whole[count - 1 + j] >> below) >> ONE) | (whole[count + j] << above)
            out[i, j], carry = added(low, high, carry)
        fold(out, i, count - 1, carry, top)


@inlined
def write(twice: np.ndarray, turn: int, last: int, top: int, rows: np.ndarray, i: int) -> None:
    """rows[i] = the number in twice[0], rotated by ``turn`` bits, 0 to q - 1.

    twice: [1, 2 L + 1]; from its limb L - 1 on the number is written once more, behind its own last bit.
    """
    below, above = np.uint64(top - 1), np.uint64(64 - top)
    before, final = twice[0, 0], twice[0, last]
    twice[0, last] = final | ((before << below) << ONE)
    for j in range(1, last + 1):
        word = twice[0, j] if j < last else final
        twice[0, last + j] = (before >> above) | ((word << below) << ONE)
        before = word
    twice[0, 2 * last + 1], twice[0, 2 * last + 2] = before >> above, ZERO
    start = 64 * last + top - turn
    place, bits = start >> 6, np.uint64(start & 63)
    rest = np.uint64(63) - bits
    low = twice[0, place]
    for j in range(last + 1):
        high = twice[0, place + j + 1]
        rows[i, j] = (low >> bits) | ((high << ONE) << rest)
        low = high
    rows[i, last] &= ALL >> np.uint64(64 - top)


@compiled
def _rotate(turns: np.ndarray, q: int, rows: np.ndarray) -> None:
    limbs, top = rows.shape[1], (q - 1) % 64 + 1
    twice = np.empty((1, 2 * limbs + 1), np.uint64)
    for i in range(rows.shape[0]):
        for j in range(limbs):
            twice[0, j] = rows[i, j]
        write(twice, turns[i] % q, limbs - 1, top, rows, i)


@compiled
def _window(
    words: np.ndarray, turns: np.ndarray, starts: np.ndarray, q: int, bits: int, up: bool, out: np.ndarray
) -> None:
    """Where a stretch's window lies is the same for all of it: in two limbs, and in the lowest where it wraps."""
    limbs = words.shape[1]
    keep, low = ALL >> np.uint64(64 - bits), np.empty(limbs, np.uint64)
    for r in range(turns.shape[0]):
        start = (q - bits - turns[r]) % q
        first, room = start >> 6, q - start
        second = min(first + 1, limbs - 1)
        bit, rest = np.uint64(start & 63), np.uint64(63 - (start & 63))
        has_second, wraps = ALL if second > first else ZERO, ALL if room < bits else ZERO
        shift = np.uint64(room & 63)
        low[:] = ALL if up else ZERO  # the bits outside of the window: those that are rounded
        for k in range(bits):
            place = (start + k) % q
            low[place >> 6] &= ~(ONE << np.uint64(place & 63))
        for i in range(starts[r], starts[r + 1]):
            value = (words[i, first] >> bit) | (((words[i, second] & has_second) << ONE) << rest)
            value |= (words[i, 0] & wraps) << shift
            if up:
                lost = ZERO
                for j in range(limbs):
                    lost |= words[i, j] & low[j]
                value += np.uint64(lost != ZERO)
            out[i] = np.int64(value & keep)


def multiply_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    shape = ring.broadcast(a.shape[:-1], b.shape[:-1])
    left, right = (rows_of(x.expand(*shape, x.shape[-1])) for x in (a, b))
    out = np.empty_like(left)
    _multiply_ones(left, right, top_of(q), out)
    return tensor_of(out, shape)


def power_ones(exponents: Tensor, q: int) -> Tensor:
    flat = exponents.reshape(-1).numpy() % q
    out = np.zeros((flat.size, ring.limbs(q)), dtype=np.uint64)
    out[np.arange(flat.size), flat >> 6] = ONE << (flat & 63).astype(np.uint64)
    return torch.from_numpy(out.view(np.int64).reshape(*exponents.shape, out.shape[1]))


def rotate_ones(words: Tensor, turns: Tensor, q: int) -> Tensor:
    out = words.clone(memory_format=torch.contiguous_format)
    _rotate(flat_of(turns), q, rows_of(out))
    return out


def window_ones(words: Tensor, turns: Tensor, starts: Tensor, q: int, bits: int, up: bool) -> Tensor:
    rows = rows_of(words)
    out = np.empty(rows.shape[0], dtype=np.int64)
    _window(rows, flat_of(turns), flat_of(starts), q, bits, up, out)
    return torch.from_numpy(out)
