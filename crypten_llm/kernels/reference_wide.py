"""Kernels to read: numbers wider than 64 bits, and exponentials modulo 2^q - 1, in Python's integers.

Owns the twins of ``kernels.limbs``, ``ones`` and ``exponents``, and of packing at any width; they share no code with
them.
"""

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_HALF_EVEN, Context, Decimal

import torch
from torch import Tensor

from crypten_llm.kernels.integers import as_words, integers, numbers, wide
from crypten_llm.kernels.ring import MANTISSA, broadcast

# What travels: one long number, whose lowest ``bits`` are the first word.


def pack(words: Tensor, bits: int) -> Tensor:
    values = integers(words) if bits <= 64 else numbers(words)
    number = sum(value % 2**bits << place * bits for place, value in enumerate(values))
    return torch.tensor(list(number.to_bytes((len(values) * bits + 7) // 8, "little")), dtype=torch.uint8)


def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    number = int.from_bytes(bytes(data.tolist()), "little")
    values = [number >> place * bits & 2**bits - 1 for place in range(math.prod(shape))]
    return as_words(values, shape) if bits <= 64 else wide(values, bits, shape)


def hide_wide(share: Tensor, mask: Tensor, offset: int, bits: int, ones: bool) -> tuple[Tensor, Tensor]:
    pairs = zip(numbers(share), numbers(mask), strict=True)
    offset %= 2**bits - ones
    value = wide((_reduced(s + m + offset, bits, ones) for s, m in pairs), bits, share.shape[:-1])
    value = value.reshape(-1, share.shape[-1])
    return value, pack(value, bits)


def show_wide(value: Tensor, packed: Tensor, bits: int, ones: bool, shape: Sequence[int]) -> Tensor:
    pairs = zip(numbers(value), numbers(unpack(packed, bits, value.shape[:-1])), strict=True)
    return wide((_reduced(mine + theirs, bits, ones) for mine, theirs in pairs), bits, shape)


def _folded(value: int, q: int) -> int:
    """The number modulo 2^q - 1 that is left when what is above the lowest q bits is added to them."""
    while value >> q:
        value = value % 2**q + (value >> q)
    return value


def _reduced(value: int, bits: int, ones: bool) -> int:
    return _folded(value, bits) if ones else value % 2**bits


# Modulo 2^bits.


def reduce_wide(words: Tensor, bits: int) -> Tensor:
    return wide((value % 2**bits for value in numbers(words)), bits, words.shape[:-1])


def widen(words: Tensor, bits: int, signed: bool) -> Tensor:
    values = words.flatten().tolist() if signed else integers(words)
    return wide((value % 2**bits for value in values), bits, words.shape)


def add_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return _each(lambda x, y: (x + y) % 2**bits, a, b, bits)


def subtract_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return _each(lambda x, y: (x - y) % 2**bits, a, b, bits)


def multiply_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return _each(lambda x, y: x * y % 2**bits, a, b, bits)


def _each(result: Callable[[int, int], int], a: Tensor, b: Tensor, bits: int) -> Tensor:
    shape = broadcast(a.shape[:-1], b.shape[:-1])
    pairs = zip(*(numbers(x.expand(*shape, x.shape[-1])) for x in (a, b)), strict=True)
    return wide((result(x, y) for x, y in pairs), bits, shape)


def sum_wide(a: Tensor, bits: int) -> Tensor:
    *shape, size, _ = a.shape
    values = numbers(a)
    sums = (sum(values[row * size : row * size + size]) % 2**bits for row in range(math.prod(shape)))
    return wide(sums, bits, (*shape, 1))


def shift_wide(a: Tensor, count: int, bits: int) -> Tensor:
    values = numbers(a)
    moved = (value << count if count > 0 else value >> -count for value in values)
    return wide((value % 2**bits for value in moved), bits, a.shape[:-1])


def drop_wide(a: Tensor, bits: int, count: int, up: bool) -> Tensor:
    left = bits - count
    dropped = [(-(-value >> count) if up else value >> count) % 2**left for value in numbers(a)]
    return as_words(dropped, a.shape[:-1]) if left <= 64 else wide(dropped, left, a.shape[:-1])


# Modulo 2^q - 1.


def add_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    return _each(lambda x, y: _folded(x + y, q), a, b, q)


def subtract_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    return _each(lambda x, y: _folded(x + 2**q - 1 - y, q), a, b, q)


def multiply_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    return _each(lambda x, y: _folded(x * y, q), a, b, q)


def sum_ones(words: Tensor, starts: Tensor, q: int) -> Tensor:
    values, places = numbers(words), starts.tolist()
    sums = [_folded(sum(values[start:stop]), q) for start, stop in zip(places, places[1:], strict=False)]
    return wide(sums, q, (len(sums),))


def power_ones(exponents: Tensor, q: int) -> Tensor:
    return wide((2 ** (exponent % q) for exponent in exponents.flatten().tolist()), q, exponents.shape)


def rotate_ones(words: Tensor, turns: Tensor, q: int) -> Tensor:
    pairs = zip(numbers(words), turns.flatten().tolist(), strict=True)
    return wide((_rotated(value, turn, q) for value, turn in pairs), q, words.shape[:-1])


def _rotated(value: int, turn: int, q: int) -> int:
    return _folded(value << turn % q, q)


def window_ones(words: Tensor, turns: Tensor, starts: Tensor, q: int, bits: int, up: bool) -> Tensor:
    values, places, found = numbers(words), starts.tolist(), []
    for j, turn in enumerate(turns.tolist()):
        for value in values[places[j] : places[j + 1]]:
            value = _rotated(value, turn, q)
            found.append((-(-value >> q - bits) if up else value >> q - bits) % 2**bits)
    return _in_a_row(found)


def _in_a_row(values: list[int]) -> Tensor:
    return as_words(values, (len(values),))


# Exponents.

_EXACT = Context(prec=60)


def _mantissa(f: int, e: int) -> int:
    """round(2^MANTISSA 2^(f / 2^e))."""
    power = _EXACT.power(Decimal(2), MANTISSA + Decimal(f) / 2**e)
    return int(power.to_integral_value(ROUND_HALF_EVEN))


def _split(value: int, bits: int, q: int) -> tuple[int, int, int]:
    """The exponents q value / 2^bits as whole ones, and f and e of the rest, f / 2^e, with one e for all values."""
    whole, rest = divmod(value % 2**bits * q, 2**bits)
    common = math.gcd(q, 2**bits)
    return whole, rest // common, (2**bits // common).bit_length() - 1


def turned_exponents(mask: Tensor, rotation: Tensor, bits: int, q: int, words: Tensor) -> Tensor:
    results = []
    for r, rho, share in zip(integers(mask), rotation.flatten().tolist(), numbers(words), strict=True):
        whole, f, e = _split(r, bits, q)
        turned = _rotated(_mantissa(-f, e), rho - whole, q)
        results.append(_folded(turned + 2**q - 1 - share, q))
    return words.copy_(wide(results, q, words.shape[:-1]))


def read_exponents(words: Tensor, opened: Tensor, low: int, bits: int, q: int) -> Tensor:
    results = []
    for m, share in zip(integers(opened), numbers(words), strict=True):
        whole, f, e = _split(m, bits, q)
        results.append(_rotated(_folded(share * _mantissa(f, e), q), whole + low, q))
    return words.copy_(wide(results, q, words.shape[:-1]))
