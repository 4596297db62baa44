"""Numbers of a group on processors: the payloads of comparison keys (see ``kernels.ring``'s ``Group``).

Owns their arithmetic and how they are packed, as parts of the loops of ``kernels.dcf``. A number is two words, (low,
high). In a group modulo q ``field`` is (q, floor(2^32 / q), 2^32 mod q), and the high word is zero but in sums; else
``field`` is zeros, and numbers are modulo 2^128 until they are written. Nothing branches on a number or divides it.
"""

import numpy as np

from crypten_llm.kernels.compiling import compiled
from crypten_llm.kernels.ring import Group

Word = np.uint64
Number = tuple[np.uint64, np.uint64]
Field = tuple[np.uint64, np.uint64, np.uint64]

ZERO, ONE = np.uint64(0), np.uint64(1)
HALF, LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


def field_of(group: Group) -> Field:
    q = group.modulus
    return (np.uint64(q), np.uint64(2**32 // q), np.uint64(2**32 % q)) if q else (ZERO, ZERO, ZERO)


@compiled
def plus(low: Word, high: Word, other_low: Word, other_high: Word) -> Number:
    """The sum modulo 2^128."""
    total = low + other_low
    return total, high + other_high + np.uint64(total < low)


@compiled
def _below(x: Word, field: Field) -> Word:
    """x < 2 q modulo q."""
    return x - field[0] * np.uint64(x >= field[0])


@compiled
def _residue(x: Word, field: Field) -> Word:
    """x < 2^32 modulo q, without a division, whose time may depend on what it divides."""
    return _below(x - ((x * field[1]) >> HALF) * field[0], field)


@compiled
def reduced(low: Word, high: Word, field: Field) -> Number:
    """Any number of two words, in the group."""
    if not field[0]:
        return low, high
    rest = _residue(high >> HALF, field)
    rest = _residue(rest * field[2] + _residue(high & LOW, field), field)
    rest = _residue(rest * field[2] + _residue(low >> HALF, field), field)
    return _residue(rest * field[2] + _residue(low & LOW, field), field), ZERO


@compiled
def total(low: Word, high: Word, other_low: Word, other_high: Word, field: Field) -> Number:
    """The sum of two numbers of the group."""
    low, high = plus(low, high, other_low, other_high)
    return _below(low, field), high


@compiled
def difference(low: Word, high: Word, other_low: Word, other_high: Word, field: Field) -> Number:
    high -= other_high + np.uint64(low < other_low)
    low, high = plus(low - other_low, high, field[0], ZERO)
    return _below(low, field), high


@compiled
def signed(low: Word, high: Word, minus: Word, field: Field) -> Number:
    """Minus the number where ``minus`` is 1, the number where it is 0."""
    other_low, other_high = difference(ZERO, ZERO, low, high, field)
    mask = ZERO - minus
    return low ^ ((low ^ other_low) & mask), high ^ ((high ^ other_high) & mask)


@compiled
def put(rows: np.ndarray, n: int, place: int, low: Word, high: Word, bits: int) -> None:
    """The lowest ``bits`` of a number, at bit ``place`` of rows[n], bytes that are zero there."""
    at, shift = place >> 3, place & 7
    while bits > 0:
        taken = min(8 - shift, bits)
        rows[n, at] |= np.uint8((low & ((ONE << np.uint64(taken)) - ONE)) << np.uint64(shift))
        low = (low >> np.uint64(taken)) | (high << np.uint64(64 - taken))
        high >>= np.uint64(taken)
        bits -= taken
        at, shift = at + 1, 0


@compiled
def get(rows: np.ndarray, n: int, place: int, bits: int) -> Number:
    low, high, done = ZERO, ZERO, 0
    at, shift = place >> 3, place & 7
    while done < bits:
        taken = min(8 - shift, bits - done)
        part = (np.uint64(rows[n, at]) >> np.uint64(shift)) & ((ONE << np.uint64(taken)) - ONE)
        if done < 64:
            low |= part << np.uint64(done)
            if done + taken > 64:
                high = part >> np.uint64(64 - done)
        else:
            high |= part << np.uint64(done - 64)
        done += taken
        at, shift = at + 1, 0
    return low, high
