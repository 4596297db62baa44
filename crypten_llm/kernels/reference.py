"""Kernels to read: every function of ``kernels.ring`` in Python's integers, one element after the other.

Owns the twins that other kernels are held against, bit by bit. It is hundreds of times slower than ``kernels.cpu``,
shares no code with it, and is for tests and for readers. Integers have no width here, so where a ring ends is written
down each time: ``% 2**bits``.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from crypten_llm.kernels.ring import DIGITS, SIGNS

# Between tensors and integers.


def _integers(words: Tensor) -> list[int]:
    """The elements as unsigned 64-bit integers, in order."""
    return [value % 2**64 for value in words.flatten().tolist()]


def _signed(value: int, bits: int = 64) -> int:
    """The integer in [-2^(bits-1), 2^(bits-1)) that is ``value`` modulo 2^bits."""
    value %= 2**bits
    return value - 2**bits if value >> (bits - 1) else value


def _words(values: Iterable[int], shape: Iterable[int]) -> Tensor:
    """Integers modulo 2^64 as words of ``shape``."""
    return torch.tensor([_signed(value) for value in values], dtype=torch.int64).reshape(tuple(shape))


def _places(words: Tensor) -> Iterator[tuple[int, ...]]:
    """Every index, the last dimension fastest."""
    return product(*map(range, words.shape))


def _write(words: Tensor, index: tuple[int, ...], value: int) -> None:
    """words[index] = value modulo the width of a table's words, of which 8 bits are held unsigned."""
    bits = 8 * words.element_size()
    words[index] = value % 2**bits if words.dtype == torch.uint8 else _signed(value, bits)


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
    return _words(
        (
            sum(row[k] * right[k][column] for k in range(x.shape[-1]))
            for left, right in zip(lefts, rights, strict=True)
            for row in left
            for column in range(w.shape[-1])
        ),
        shape,
    )


# What travels: one long number, whose lowest ``bits`` are the first word.


def pack(words: Tensor, bits: int) -> Tensor:
    number = 0
    for place, value in enumerate(_integers(words)):
        number |= value % 2**bits << place * bits
    return torch.tensor(list(number.to_bytes((words.numel() * bits + 7) // 8, "little")), dtype=torch.uint8)


def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    number = int.from_bytes(bytes(data.tolist()), "little")
    return _words((number >> place * bits & 2**bits - 1 for place in range(math.prod(shape))), shape)


def hide(share: Tensor, mask: Tensor, offset: int, bits: int) -> tuple[Tensor, Tensor]:
    value = [(s + m + offset) % 2**bits for s, m in zip(_integers(share), _integers(mask), strict=True)]
    words = _words(value, (share.numel(),))
    return words, pack(words, bits)


def show(value: Tensor, packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    theirs = _integers(unpack(packed, bits, (value.numel(),)))
    return _words(((mine + other) % 2**bits for mine, other in zip(_integers(value), theirs, strict=True)), shape)


def unwrap(opened: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    values = _integers(opened)
    shown = _words((value - 2 ** (bits - 2) for value in values), opened.shape)
    return shown, _words(((1 - (value >> bits - 1 & 1)) << bits for value in values), opened.shape)


# Trigonometric sums. Floats are those of the compiled loops, operation by operation: the last bit counts.

_SINE = [  # of fdlibm, k_sin.c and k_cos.c: x + x^3 (S1 + ...), 1 - x^2 (1/2 - x^2 (C1 + ...)), the highest power first
    1.58969099521155010221e-10,
    -2.50507602534068634195e-08,
    2.75573137070700676789e-06,
    -1.98412698298579493134e-04,
    8.33333333332248946124e-03,
    -1.66666666666666324348e-01,
]
_COSINE = [
    -1.13596475577881948265e-11,
    2.08757232129817482790e-09,
    -2.75573143513906633035e-07,
    2.48015872894767294178e-05,
    -1.38888888888741095749e-03,
    4.16666666666666019037e-02,
]


def _horner(coefficients: list[float], z: float) -> float:
    total = coefficients[0]
    for coefficient in coefficients[1:]:
        total = coefficient + z * total
    return total


def _cos_sin(m: int, shift: int) -> tuple[float, float]:
    """cos and sin of m 2^shift / 2^64 turns."""
    turn = m * 2**shift % 2**64
    quarter = (turn + 2**61) % 2**64 // 2**62
    x = float(_signed(turn - quarter * 2**62)) * (2 * math.pi / 2.0**64)
    z = x * x
    sine, cosine = x + x * z * _horner(_SINE, z), 1.0 - z * (0.5 - z * _horner(_COSINE, z))
    return [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)][quarter]


def _multiples(m: int, shift: int, modes: int) -> Iterator[tuple[float, float]]:
    """cos and sin of 1 .. modes times the angle, each from the one before."""
    first = c, s = _cos_sin(m, shift)
    for _ in range(modes):
        yield c, s
        c, s = c * first[0] - s * first[1], s * first[0] + c * first[1]


def waves(mask: Tensor, shift: int, scale: float, modes: int) -> Tensor:
    columns = []
    for m in _integers(mask):
        cosines, sines = [], []
        for c, s in _multiples(m, shift, modes):
            cosines.append(round(scale * c))
            sines.append(round(scale * s))
        columns.append(cosines + sines)
    return _words((column[row] for row in range(2 * modes) for column in columns), (2 * modes, mask.numel()))


def combine(
    opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor, shares: Tensor, constant: int
) -> Tensor:
    modes, rows, results = len(cosine), shares.tolist(), []
    for i, m in enumerate(_integers(opened)):
        total = constant
        for j, (c, s) in enumerate(_multiples(m, shift, modes)):
            a, b = cosine[j].item(), sine[j].item()
            total += round(scale * (a * c + b * s)) * rows[j][i]
            total += round(scale * (a * s - b * c)) * rows[modes + j][i]
        results.append(total)
    return _words(results, (len(results),))


def turned(cosine: Tensor, sine: Tensor, turns: int) -> tuple[Tensor, Tensor]:
    both = zip(_multiples(turns, 0, len(cosine)), cosine.tolist(), sine.tolist(), strict=True)
    pairs = [(a * c + b * s, b * c - a * s) for (c, s), a, b in both]
    made = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2)
    return made[:, 0].clone(), made[:, 1].clone()


# Tables turned by a mask.


def turn_table(table: Tensor, places: Tensor, words: Tensor) -> Tensor:
    entries, moved = table.tolist(), places.tolist()
    for i, v in _places(words):
        _write(words, (i, v), entries[(v - moved[i]) % len(entries)] - int(words[i, v]))
    return words


def read_table(words: Tensor, opened: Tensor, steps: Tensor) -> Tensor:
    size, places, moves = words.shape[1], opened.tolist(), steps.tolist()
    found = [int(words[i, (place - step) % size]) for i, place in enumerate(places) for step in moves]
    return _words(found, (len(places), len(moves)))


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
    digits = [_digits(mask, digit_bits) for mask in _integers(masks)]
    for i, v in _places(words):
        made, place = 0, 0
        for j, field in enumerate(_fields(int(words[i, v]))):
            sign = (v > digits[i][j]) - (v < digits[i][j])
            made += (sign - field) % 2 ** (SIGNS - j) << place
            place += SIGNS - j
        _write(words, (i, v), made)
    return words


def read_signs(words: Tensor, points: Tensor, digit_bits: int) -> Tensor:
    totals = []
    for i, row in enumerate(points.tolist()):
        for point in row:
            places = _digits(point % 2**64, digit_bits)
            totals.append(sum(_fields(int(words[i, place]))[j] << j for j, place in enumerate(places)))
    return _words(totals, points.shape)


def turn_bits(masks: Tensor, tops: Tensor, words: Tensor) -> Tensor:
    bits = (words.shape[2] - 1).bit_length()
    for i, t, v in _places(words):
        below = _signed(v - int(masks[i, t]), bits) < 0
        _write(words, (i, t, v), (below ^ int(tops.flatten()[i])) - int(words[i, t, v]))
    return words


def read_bits(words: Tensor, opened: Tensor, flips: Tensor, one: int) -> Tensor:
    found = []
    for i, t in _places(opened):
        bit = int(words[i, t, int(opened[i, t])])
        found.append(one - bit if int(flips[i, t]) else bit)
    return _words(found, opened.shape)


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
    numbers = zip(_integers(alpha), payloads, first, second, strict=True)
    keys = [_key(limit, payload, one, other, bits) for limit, payload, one, other in numbers]
    count, levels = len(keys), range(bits)
    seeds = [word for level in levels for key in keys for word in key[level][0]]
    values = [word for level in range(bits + 1) for key in keys for word in key[level][1]]
    flags = [left + 2 * right for level in levels for key in keys for left, right in [key[level][2]]]
    return [
        _words(seeds, (bits, count, 2)),
        _words(values, (bits + 1, count, 2)),
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
    return _words(results, (*points.shape, 2))


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
