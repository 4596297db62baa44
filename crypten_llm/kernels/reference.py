"""Kernels to read: every function of ``kernels.ring`` in Python's integers, one element after the other.

Owns the twins that other kernels are held against, bit by bit. It is hundreds of times slower than ``kernels.cpu``,
shares no code with it, and is for tests and for readers. Integers have no width here, so where a ring ends is written
down each time: ``% 2**bits``. Trigonometric sums and bits at secret places are in ``reference_trigonometry``
and ``reference_places``.
"""

import math
from collections.abc import Sequence

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from crypten_llm.kernels import reference_places, reference_trigonometry, reference_wide
from crypten_llm.kernels.reference_words import as_words, indices, integers, signed, write
from crypten_llm.kernels.ring import DIGITS, SIGNS

# Key streams.


class KeyStream:
    """AES-256 in counter mode, enciphered from the first byte each time."""

    def __init__(self, key: bytes) -> None:
        self._key, self._used = key, 0

    def fill(self, count: int) -> Tensor:
        cipher = Cipher(algorithms.AES(self._key), modes.CTR(bytes(16))).encryptor()
        stream = cipher.update(bytes(self._used + count))[self._used :]
        self._used += count
        return torch.tensor(list(stream), dtype=torch.uint8)


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

waves, combine, turned = reference_trigonometry.waves, reference_trigonometry.combine, reference_trigonometry.turned
coefficients = reference_trigonometry.coefficients
cosines, add_cosines = reference_trigonometry.cosines, reference_trigonometry.add_cosines
flip_places, parities, xor_rows = reference_places.flip_places, reference_places.parities, reference_places.xor_rows


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


# Comparison keys: a binary tree of seeds, whose node has a seed of 128 bits, of which the lowest is zero, and a control
# bit. At a node off the path to alpha the parties' seeds and bits are equal, so their values cancel.

Pair = tuple[int, ...]  # two words: a seed, or a value


def _block(seed: Pair) -> list[int]:
    """The 8 words of 64 bits of a ChaCha20 block under the seed twice, counter and nonce 0 (RFC 8439, section 2.3)."""
    key = [half >> 32 * i & 2**32 - 1 for half in seed for i in (0, 1)]
    start = [int.from_bytes(b"expand 16-byte k"[i : i + 4], "little") for i in range(0, 16, 4)]
    start = [*start, *key, *key, 0, 0, 0, 0]
    x = start.copy()

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for first, second, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[first] = (x[first] + x[second]) % 2**32
            mixed = x[third] ^ x[first]
            x[third] = (mixed << turn | mixed >> 32 - turn) % 2**32

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    words = [(a + b) % 2**32 for a, b in zip(x, start, strict=True)]
    return [low + (high << 32) for low, high in zip(words[::2], words[1::2], strict=True)]


def _split(first: int, second: int) -> tuple[Pair, int]:
    """A seed and its control bit."""
    return (first - first % 2, second), first % 2


def _children(seed: Pair) -> list[tuple[Pair, int, Pair]]:
    """(seed, control bit, value) of the left child and of the right one. A leaf's value is what would be its left
    child's.
    """
    block = _block(seed)
    return [(*_split(*block[2 * side : 2 * side + 2]), tuple(block[4 + 2 * side : 6 + 2 * side])) for side in (0, 1)]


def compare_keys(alpha: Tensor, beta: Tensor, seed0: Tensor, seed1: Tensor, bits: int) -> list[Tensor]:
    payloads, first, second = (rows.reshape(-1, 2).tolist() for rows in (beta, seed0, seed1))
    numbers = zip(integers(alpha), payloads, first, second, strict=True)
    keys = [_key(limit, payload, one, other, bits) for limit, payload, one, other in numbers]
    count, levels = len(keys), range(bits)
    seeds = [word for level in levels for key in keys for word in key[level][0]]
    values = [word for level in range(bits + 1) for key in keys for word in key[level][1]]
    flags = [left + 2 * right for level in levels for key in keys for left, right in [key[level][2]]]
    return [
        as_words(seeds, (bits, count, 2)),
        as_words(values, (bits + 1, count, 2)),
        torch.tensor(flags, dtype=torch.uint8).reshape(bits, count),
    ]


def _key(alpha: int, beta: list[int], seed0: list[int], seed1: list[int], bits: int) -> list[tuple]:
    """By level the corrections (of the seed, of the value, of both control bits); then that of the leaf's value.

    Figure 1 of Boyle et al. (EUROCRYPT 2021), whose notation this keeps: V is what the parties' values so far differ
    by on the path to alpha.
    """
    seeds = [_split(*(word % 2**64 for word in seed))[0] for seed in (seed0, seed1)]
    controls, v, key = [0, 1], [0, 0], []
    for level in range(bits):
        bit = alpha >> bits - 1 - level & 1
        nodes = [_children(seed) for seed in seeds]
        lost = [node[1 - bit] for node in nodes]
        kept = [node[bit] for node in nodes]
        sign = -1 if controls[1] else 1
        seed = tuple(a ^ b for a, b in zip(lost[0][0], lost[1][0], strict=True))
        value = tuple(sign * (lost[1][2][w] - lost[0][2][w] - v[w] + bit * beta[w]) for w in (0, 1))
        flags = tuple(nodes[0][side][1] ^ nodes[1][side][1] ^ (side == bit) for side in (0, 1))
        v = [v[w] + kept[0][2][w] - kept[1][2][w] + sign * value[w] for w in (0, 1)]
        seeds = [
            tuple(a ^ t * b for a, b in zip(child[0], seed, strict=True))
            for child, t in zip(kept, controls, strict=True)
        ]
        controls = [child[1] ^ t * flags[bit] for child, t in zip(kept, controls, strict=True)]
        key.append((seed, value, flags))
    leaves = [_children(seed)[0][2] for seed in seeds]
    sign = -1 if controls[1] else 1
    return [*key, (None, tuple(sign * (leaves[1][w] - leaves[0][w] - v[w]) for w in (0, 1)))]


def compare(seed: Tensor, common: list[Tensor], party: int, points: Tensor) -> Tensor:
    corrections, sign = [part.tolist() for part in common], -1 if party else 1
    results = []
    for n, (first, second) in enumerate(seed.tolist()):
        root = _split(first % 2**64, second % 2**64)[0]
        for point in points[n].tolist():
            found = _descend(root, int(party), point % 2**64, 0, n, corrections)
            results += [sign * word for word in found]
    return as_words(results, (*points.shape, 2))


def _descend(seed: Pair, control: int, point: int, level: int, n: int, corrections: list) -> tuple[int, int]:
    """The sum of what a node and all below it on the way to ``point`` add, before the party's sign."""
    seeds, values, flags = corrections
    children, value = _children(seed), values[level][n]
    if level == len(seeds):
        own = children[0][2]
        return own[0] + control * value[0], own[1] + control * value[1]
    side = point >> len(seeds) - 1 - level & 1
    child, bit, own = children[side]
    if control:
        child = tuple(a ^ b % 2**64 for a, b in zip(child, seeds[level][n], strict=True))
        bit ^= flags[level][n] >> side & 1
    below = _descend(child, bit, point, level + 1, n, corrections)
    return own[0] + control * value[0] + below[0], own[1] + control * value[1] + below[1]
