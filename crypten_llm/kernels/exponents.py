"""Kernels for processors: exponentials modulo 2^q - 1, where y is an exponent (``kernels.ring`` says what each does).

Owns the mantissas' tables, which are made of integers alone: parties multiply their shares by them, so they must be
alike on every machine. Limbs as in ``kernels.limbs``.
"""

from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.compiling import compiled
from crypten_llm.kernels.limbs import ALL, HALF, HALF_MASK, ONE, ZERO, added, flat_of, fold, rows_of
from crypten_llm.kernels.ones import write

LARGEST_TABLE = 20  # bits of its places


@lru_cache(maxsize=4)
def mantissas(e: int) -> tuple[np.ndarray, np.ndarray]:
    """round(2^MANTISSA 2^(f / 2^e)) and round(2^MANTISSA 2^(-f / 2^e)) for 0 <= f < 2^e, uint16.

    The powers are products of 2^(1/2), 2^(1/4), ... cut to 64 fractional bits, e of them at most: wrong by less than
    2^-58 of themselves. None but the first, which is exact, is so close to where rounding turns (a test for the largest
    table, which has the others' powers).
    """
    assert 0 <= e <= LARGEST_TABLE, f"a table of 2^{e} mantissas is too large; the largest has 2^{LARGEST_TABLE}"
    root, powers = 2 << 64, [1 << 64]
    for _ in range(e):  # from the multiples of 2^-k to those of 2^-(k + 1)
        root = isqrt(root << 64)
        powers = [power for even in powers for power in (even, even * root >> 64)]
    # What they are times twice 2^MANTISSA, without the fraction.
    doubled = np.array([power >> (63 - ring.MANTISSA) for power in powers], dtype=np.int64)
    rising = (doubled + 1) >> 1
    # 2^(-f / 2^e) is half of 2^(1 - f / 2^e).
    falling = np.concatenate([rising[:1], ((doubled[:0:-1] >> 1) + 1) >> 1])
    return rising.astype(np.uint16), falling.astype(np.uint16)


# Exponents: X is a number modulo 2^bits, spare the bits of its table's places that are always zero.


@compiled
def _turn(
    mask: np.ndarray, rotation: np.ndarray, bits: int, q: int, spare: int, falling: np.ndarray, words: np.ndarray
) -> None:
    last, top, ring_mask = words.shape[1] - 1, (q - 1) % 64 + 1, (1 << bits) - 1
    keep = ALL >> np.uint64(64 - top)
    for i in range(words.shape[0]):
        scaled = (mask[i] & ring_mask) * q
        factor = np.uint64(falling[(scaled & ring_mask) >> spare])
        turn = rotation[i] - (scaled >> bits)
        if turn < 0:
            turn += q
        place, bit = turn >> 6, np.uint64(turn & 63)
        low, high, over = factor << bit, (factor >> ONE) >> (np.uint64(63) - bit), ZERO
        if q - turn < 16:  # a mantissa has 15 bits
            over = factor >> np.uint64(q - turn)
        carry = ZERO
        for j in range(last + 1):
            word = ~words[i, j]
            piece = low if j == place else (high if j == place + 1 else ZERO)
            if j == last:
                word, piece = word & keep, piece & keep
            words[i, j], carry = added(word, piece | (over if j == 0 else ZERO), carry)
        fold(words, i, last, carry, top)


@compiled
def _read(
    words: np.ndarray, opened: np.ndarray, low: int, bits: int, q: int, spare: int, rising: np.ndarray, limb: tuple
) -> None:
    """limb: as many zeros as there are limbs. Loops over a tuple's length, which its type has, take a fifth less."""
    limbs, top, ring_mask = len(limb), (q - 1) % 64 + 1, (1 << bits) - 1
    twice = np.empty((1, 2 * limbs + 1), np.uint64)
    for i in range(words.shape[0]):
        scaled = (opened[i] & ring_mask) * q
        factor = np.uint64(rising[(scaled & ring_mask) >> spare])
        carry = ZERO
        for j in range(limbs):
            word = words[i, j]
            part = (word & HALF_MASK) * factor + carry
            rest = (word >> HALF) * factor + (part >> HALF)
            twice[0, j] = (rest << HALF) | (part & HALF_MASK)
            carry = rest >> HALF
        fold(twice, 0, limbs - 1, carry, top)
        turn = (scaled >> bits) + low
        write(twice, turn - q if turn >= q else turn, limbs - 1, top, words, i)


def turned_exponents(mask: Tensor, rotation: Tensor, bits: int, q: int, words: Tensor) -> Tensor:
    rows, spare = rows_of(words), _spare(bits, q)
    _turn(flat_of(mask), flat_of(rotation), bits, q, spare, mantissas(bits - spare)[1], rows)
    return _into(words, rows)


def read_exponents(words: Tensor, opened: Tensor, low: int, bits: int, q: int) -> Tensor:
    rows, spare = rows_of(words), _spare(bits, q)
    _read(rows, flat_of(opened), low % q, bits, q, spare, mantissas(bits - spare)[0], (0,) * rows.shape[1])
    return _into(words, rows)


def _spare(bits: int, q: int) -> int:
    """The factors 2 of q, which need no place in a table of 2^bits mantissas: at most ``bits``."""
    return min(bits, (q & -q).bit_length() - 1)


def _into(words: Tensor, rows: np.ndarray) -> Tensor:
    """``words``, whose memory ``rows`` are unless its layout is another."""
    if not words.is_contiguous():
        words.copy_(torch.from_numpy(rows.view(np.int64)).view(words.shape))
    return words
