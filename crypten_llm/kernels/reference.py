"""Kernels to read: every function of ``kernels.ring`` in Python's integers, one element after the other.

Owns the twins that other kernels are held against, bit by bit. It is hundreds of times slower than ``kernels.cpu``,
shares no code with it, and is for tests and for readers. Integers have no width here, so where a ring ends is written
down each time: ``% 2**bits``. Trigonometric sums and bits at secret places are in ``reference_trigonometry``
and ``reference_places``.
"""

import math
from collections.abc import Sequence

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from crypten_llm.kernels import (
    reference_field,
    reference_keys,
    reference_lifted,
    reference_places,
    reference_trigonometry,
    reference_wide,
)
from crypten_llm.kernels.integers import as_words, indices, integers, signed, write
from crypten_llm.kernels.ring import DIGITS, SIGNS

# Key streams.


class KeyStream:
    """ChaCha20 with a counter of 64 bits, enciphered from the first byte each time."""

    def __init__(self, key: bytes) -> None:
        self._key, self._used = key, 0

    def fill(self, count: int, over: Tensor | None = None) -> Tensor:
        cipher = Cipher(algorithms.ChaCha20(self._key, bytes(16)), None).encryptor()
        stream = cipher.update(bytes(self._used + count))[self._used :]
        self._used += count
        found = torch.tensor(list(stream), dtype=torch.uint8)
        return found if over is None else found ^ over


# Matrix products.


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    return matmul_nn(x, w.transpose(-2, -1))


def matmul_nn(x: Tensor, w: Tensor) -> Tensor:
    assert x.shape[:-2] == w.shape[:-2], f"batches {tuple(x.shape)} and {tuple(w.shape)} differ"
    shape = (*x.shape[:-1], w.shape[-1])
    lefts = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]).tolist()
    rights = w.reshape(math.prod(w.shape[:-2]), *w.shape[-2:]).tolist()
    return as_words(
        (
            sum(row[k] * right[k][column] for k in range(x.shape[-1]))
            for left, right in zip(lefts, rights, strict=True)
            for row in left
            for column in range(w.shape[-1])
        ),
        shape,
    )


# What travels, and numbers in limbs.

pack, unpack = reference_wide.pack, reference_wide.unpack
hide_wide, show_wide = reference_wide.hide_wide, reference_wide.show_wide
reduce_wide, widen = reference_wide.reduce_wide, reference_wide.widen
add_wide, subtract_wide = reference_wide.add_wide, reference_wide.subtract_wide
multiply_wide, sum_wide = reference_wide.multiply_wide, reference_wide.sum_wide
shift_wide, drop_wide = reference_wide.shift_wide, reference_wide.drop_wide
lift_mask, dot_wide = reference_lifted.lift_mask, reference_lifted.dot_wide
scale_lifted = reference_lifted.scale_lifted
add_ones, subtract_ones = reference_wide.add_ones, reference_wide.subtract_ones
multiply_ones, sum_ones = reference_wide.multiply_ones, reference_wide.sum_ones
power_ones, rotate_ones = reference_wide.power_ones, reference_wide.rotate_ones
turned_exponents, read_exponents = reference_wide.turned_exponents, reference_wide.read_exponents
window_ones = reference_wide.window_ones


def hide(share: Tensor, mask: Tensor, offset: int, bits: int) -> tuple[Tensor, Tensor]:
    value = [(s + m + offset) % 2**bits for s, m in zip(integers(share), integers(mask), strict=True)]
    words = as_words(value, (share.numel(),))
    return words, pack(words, bits)


def show(value: Tensor, packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    theirs = integers(unpack(packed, bits, (value.numel(),)))
    return as_words(((mine + other) % 2**bits for mine, other in zip(integers(value), theirs, strict=True)), shape)


def unwrap(opened: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    values = integers(opened)
    shown = as_words((value - 2 ** (bits - 2) for value in values), opened.shape)
    return shown, as_words(((1 - (value >> bits - 1 & 1)) << bits for value in values), opened.shape)


# Of modules of their own.

waves, combine = reference_trigonometry.waves, reference_trigonometry.combine
coefficients = reference_trigonometry.coefficients
cosines, add_cosines = reference_trigonometry.cosines, reference_trigonometry.add_cosines
flip_places, parities, xor_rows = reference_places.flip_places, reference_places.parities, reference_places.xor_rows
multiply_field = reference_field.multiply_field


# Tables turned by a mask.


def turn_table(table: Tensor, places: Tensor, words: Tensor) -> Tensor:
    entries, moved = table.tolist(), places.tolist()
    for i, v in indices(words):
        write(words, (i, v), entries[(v - moved[i]) % len(entries)] - int(words[i, v]))
    return words


def read_table(words: Tensor, opened: Tensor, steps: Tensor) -> Tensor:
    size, places, moves = words.shape[1], opened.tolist(), steps.tolist()
    found = [int(words[i, (place - step) % size]) for i, place in enumerate(places) for step in moves]
    return as_words(found, (len(places), len(moves)))


# Comparison by digits. A word holds a field for each digit, the lowest digit's in the lowest bits: field j counts 2^j
# modulo 2^SIGNS, so it has SIGNS - j bits.


def _fields(word: int) -> list[int]:
    fields = []
    for j in range(DIGITS):
        fields.append(word % 2 ** (SIGNS - j))
        word >>= SIGNS - j
    return fields


def _digits(number: int, digit_bits: int) -> list[int]:
    return [number >> digit_bits * j & 2**digit_bits - 1 for j in range(DIGITS)]


def turn_signs(masks: Tensor, digit_bits: int, words: Tensor) -> Tensor:
    digits = [_digits(mask, digit_bits) for mask in integers(masks)]
    for i, v in indices(words):
        made, place = 0, 0
        for j, field in enumerate(_fields(int(words[i, v]))):
            sign = (v > digits[i][j]) - (v < digits[i][j])
            made += (sign - field) % 2 ** (SIGNS - j) << place
            place += SIGNS - j
        write(words, (i, v), made)
    return words


def read_signs(words: Tensor, points: Tensor, digit_bits: int) -> Tensor:
    totals = []
    for i, row in enumerate(points.tolist()):
        for point in row:
            places = _digits(point % 2**64, digit_bits)
            totals.append(sum(_fields(int(words[i, place]))[j] << j for j, place in enumerate(places)))
    return as_words(totals, points.shape)


def turn_bits(masks: Tensor, tops: Tensor, words: Tensor) -> Tensor:
    bits = (words.shape[2] - 1).bit_length()
    for i, t, v in indices(words):
        below = signed(v - int(masks[i, t]), bits) < 0
        write(words, (i, t, v), (below ^ int(tops.flatten()[i])) - int(words[i, t, v]))
    return words


def read_bits(words: Tensor, opened: Tensor, flips: Tensor, one: int) -> Tensor:
    found = []
    for i, t in indices(opened):
        bit = int(words[i, t, int(opened[i, t])])
        found.append(one - bit if int(flips[i, t]) else bit)
    return as_words(found, opened.shape)


# Comparison keys.

compare_keys, compare = reference_keys.compare_keys, reference_keys.compare
