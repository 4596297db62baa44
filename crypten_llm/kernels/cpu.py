"""Kernels for processors: compiled loops over words (signatures and meanings: ``kernels.ring``).

Owns the loops, which Numba compiles on first use; ``python -m experiments.measure.ring_kernels`` times the products
beside torch's and the memory's bandwidth. What is wider than a word is in ``limbs``, ``lifted``, ``ones``
and ``exponents``; the others are in ``trigonometry``, ``tables``, ``places`` and ``dcf``.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

from crypten_llm.kernels import dcf, exponents, field, lifted, limbs, ones, places, tables, trigonometry
from crypten_llm.kernels.compiling import compiled, word_at

_WORTH_TURNING = 8  # rows from which a transposed copy of the right matrix pays


@compiled
def _row_by_rows(x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """out[0, j] = sum_k x[0, k] w[j, k] in numbers as x's: what is read once is read in its order, which memory is
    fastest in.
    """
    row, number = x[0], x.dtype.type
    for j in range(w.shape[0]):
        total, weights = number(0), w[j]
        for k in range(row.shape[0]):
            total = number(total + number(row[k] * number(weights[k])))
        out[0, j] = total


@compiled
def _rows_by_rows(x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """out[m, j] = sum_k x[m, k] w[j, k] in numbers as x's, two rows of x by four of w at a time: eight sums for six
    loads. Of int32 an instruction makes sixteen products, where words allow eight slower ones.
    """
    rows, columns, depth, number = x.shape[0], w.shape[0], x.shape[1], x.dtype.type
    even, full = rows - rows % 2, columns - columns % 4
    for j in range(0, full, 4):
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for m in range(0, even, 2):
            first, second = x[m], x[m + 1]
            a, b, c, d = number(0), number(0), number(0), number(0)
            e, f, g, h = number(0), number(0), number(0), number(0)
            for k in range(depth):
                u, v = first[k], second[k]
                p, q, y, z = number(w0[k]), number(w1[k]), number(w2[k]), number(w3[k])
                a = number(a + number(u * p))
                b = number(b + number(u * q))
                c = number(c + number(u * y))
                d = number(d + number(u * z))
                e = number(e + number(v * p))
                f = number(f + number(v * q))
                g = number(g + number(v * y))
                h = number(h + number(v * z))
            out[m, j], out[m, j + 1], out[m, j + 2], out[m, j + 3] = a, b, c, d
            out[m + 1, j], out[m + 1, j + 1], out[m + 1, j + 2], out[m + 1, j + 3] = e, f, g, h
        for m in range(even, rows):
            row = x[m]
            a, b, c, d = number(0), number(0), number(0), number(0)
            for k in range(depth):
                v = row[k]
                a = number(a + number(v * number(w0[k])))
                b = number(b + number(v * number(w1[k])))
                c = number(c + number(v * number(w2[k])))
                d = number(d + number(v * number(w3[k])))
            out[m, j], out[m, j + 1], out[m, j + 2], out[m, j + 3] = a, b, c, d
    for j in range(full, columns):
        for m in range(rows):
            a = number(0)
            for k in range(depth):
                a = number(a + number(x[m, k] * number(w[j, k])))
            out[m, j] = a


@compiled
def _rows_by_columns(x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """out[m, :] = sum_k x[m, k] w[k, :], four k a pass over a row of ``out`` that stays in cache."""
    depth, columns = w.shape
    full = depth - depth % 4
    for m in range(x.shape[0]):
        row = out[m]
        for j in range(columns):
            row[j] = 0
        for k in range(0, full, 4):
            a, b, c, d = x[m, k], x[m, k + 1], x[m, k + 2], x[m, k + 3]
            w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
            for j in range(columns):
                row[j] += a * np.int64(w0[j]) + b * np.int64(w1[j]) + c * np.int64(w2[j]) + d * np.int64(w3[j])
        for k in range(full, depth):
            factor, w0 = x[m, k], w[k]
            for j in range(columns):
                row[j] += factor * np.int64(w0[j])


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    return _batched(_row_by_rows if x.shape[-2] == 1 else _rows_by_rows, x, w, w.shape[-2])


def matmul_nn(x: Tensor, w: Tensor) -> Tensor:
    if x.shape[-2] >= _WORTH_TURNING:
        return _batched(_rows_by_rows, x, w.transpose(-2, -1), w.shape[-1])
    return _batched(_rows_by_columns, x, w, w.shape[-1])


def _batched(
    kernel: Callable[[np.ndarray, np.ndarray, np.ndarray], None], x: Tensor, w: Tensor, columns: int
) -> Tensor:
    batch, (rows, depth) = x.shape[:-2], x.shape[-2:]
    assert batch == w.shape[:-2], f"batches {tuple(x.shape)} and {tuple(w.shape)} differ"
    out = np.empty((*batch, rows, columns), dtype=np.int64)
    if not batch:
        kernel(_whole(x.numpy()), _whole(w.numpy()), out)
        return torch.from_numpy(out)
    count = math.prod(batch)
    left, right, result = x.numpy(), w.numpy(), out
    if len(batch) != 1:
        left, result = left.reshape(count, rows, depth), out.reshape(count, rows, columns)
        right = right.reshape(count, *right.shape[-2:])
    for i in range(count):  # a view of a cache's first rows is contiguous head by head
        kernel(_whole(left[i]), _whole(right[i]), result[i])
    return torch.from_numpy(out)


def _whole(matrix: np.ndarray) -> np.ndarray:
    """In one piece."""
    return matrix if matrix.flags.c_contiguous else np.ascontiguousarray(matrix)


# Key streams.

_CHUNK = 1 << 20  # bytes of one call into OpenSSL
_ZEROS = bytes(_CHUNK)
_BLOCK = 64  # bytes
_TURN = _BLOCK << 32  # bytes after which the counter of one call's cipher ends: the next has the next upper word


class KeyStream:
    """ChaCha20 under ``key``, 32 bytes, from OpenSSL. Its position only moves forward."""

    def __init__(self, key: bytes) -> None:
        self._key, self._position = key, 0
        self._start()

    def _start(self) -> None:
        """The cipher for what comes at a whole block; of 2^64 blocks there is no next."""
        counter = (self._position // _BLOCK).to_bytes(8, "little")
        self._encryptor = Cipher(algorithms.ChaCha20(self._key, counter + bytes(8)), None).encryptor()

    def fill(self, count: int, over: Tensor | None = None) -> Tensor:
        """The next ``count`` bytes, xor as many of ``over``, in memory of their own: uint8."""
        data = None if over is None else over.numpy().data
        buffer = np.empty(count, dtype=np.uint8)
        view, done = buffer.data, 0
        while done < count:
            size = min(_CHUNK, count - done, _TURN - self._position % _TURN)
            source = memoryview(_ZEROS)[:size] if data is None else data[done : done + size]
            self._encryptor.update_into(source, view[done : done + size])
            done, self._position = done + size, self._position + size
            if self._position % _TURN == 0:
                self._start()
        return torch.from_numpy(buffer)


# What travels. Packed words lie one behind the other, the lowest bit first.


@compiled
def _pack(words: np.ndarray, bits: int, keep: np.uint64, out: np.ndarray) -> None:
    """out: uint64, room for all. Bits are gathered in one word and written when it is full."""
    gathered, filled, place = np.uint64(0), 0, 0
    for i in range(words.shape[0]):
        word = np.uint64(words[i]) & keep
        gathered |= word << np.uint64(filled)
        filled += bits
        if filled >= 64:
            out[place] = gathered
            place += 1
            filled -= 64
            gathered = word >> np.uint64(bits - filled) if filled else np.uint64(0)
    if filled:
        out[place] = gathered


@compiled
def _unpack(data: np.ndarray, bits: int, keep: np.int64, out: np.ndarray) -> None:
    """Adds what is packed to ``out``, modulo 2^bits."""
    if not data.shape[0]:
        out &= keep
        return
    inner = max(0, min(out.shape[0], (8 * data.shape[0] - 65) // bits))  # whose nine bytes are all there
    for i in range(inner):
        first = i * bits
        word = word_at(data, first >> 3) >> np.uint64(first & 7)
        if bits > 57:
            word |= (np.uint64(data[(first >> 3) + 8]) << np.uint64(63 - (first & 7))) << np.uint64(1)
        out[i] = (out[i] + np.int64(word)) & keep
    for i in range(inner, out.shape[0]):
        out[i] = (out[i] + np.int64(limbs.bits_from(data, i * bits, bits))) & keep


@compiled
def _hide(
    share: np.ndarray, mask: np.ndarray, offset: np.int64, bits: int, keep: np.int64, value: np.ndarray, out: np.ndarray
) -> None:
    """value, and the same as ``_pack`` writes it."""
    gathered, filled, place = np.uint64(0), 0, 0
    for i in range(share.shape[0]):
        word = (share[i] + mask[i] + offset) & keep
        value[i] = word
        gathered |= np.uint64(word) << np.uint64(filled)
        filled += bits
        if filled >= 64:
            out[place] = gathered
            place += 1
            filled -= 64
            gathered = np.uint64(word) >> np.uint64(bits - filled) if filled else np.uint64(0)
    if filled:
        out[place] = gathered


@compiled
def _unwrap(opened: np.ndarray, offset: np.int64, bits: int, shown: np.ndarray, wrap: np.ndarray) -> None:
    for i in range(opened.shape[0]):
        word = opened[i]
        shown[i] = word - offset
        wrap[i] = (1 - ((word >> (bits - 1)) & 1)) << bits


def pack(words: Tensor, bits: int) -> Tensor:
    if bits > 64:
        return limbs.pack(words, bits)
    flat = _flat(words)
    if bits == 64:
        return torch.from_numpy(flat.copy().view(np.uint8))  # a strided view has no bytes of its own
    out = np.empty((flat.size * bits + 63) // 64, dtype=np.uint64)
    _pack(flat, bits, _keep(bits).view(np.uint64), out)
    return torch.from_numpy(out.view(np.uint8)[: (flat.size * bits + 7) // 8])


def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    if bits > 64:
        return limbs.unpack(data, bits, shape)
    if bits == 64 and data.storage_offset() % 8 == 0:
        return data.view(torch.int64).view(shape)
    out = np.zeros(shape, dtype=np.int64)
    _unpack(data.numpy(), bits, _keep(bits), out.reshape(-1))
    return torch.from_numpy(out)


def hide(share: Tensor, mask: Tensor, offset: int, bits: int) -> tuple[Tensor, Tensor]:
    flat, masks = _flat(share), _flat(mask)
    value = np.empty(flat.size, dtype=np.int64)
    packed = np.empty((flat.size * bits + 63) // 64, dtype=np.uint64)
    _hide(flat, masks, np.int64(offset), bits, _keep(bits), value, packed)
    return torch.from_numpy(value), torch.from_numpy(packed.view(np.uint8)[: (flat.size * bits + 7) // 8])


def show(value: Tensor, packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    out = value.numpy().reshape(shape).copy()
    _unpack(packed.numpy(), bits, _keep(bits), out.reshape(-1))
    return torch.from_numpy(out)


def unwrap(opened: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    flat, shape = _flat(opened), tuple(opened.shape)
    shown, wrap = np.empty(flat.size, dtype=np.int64), np.empty(flat.size, dtype=np.int64)
    _unwrap(flat, np.int64(1 << (bits - 2)), bits, shown, wrap)
    return torch.from_numpy(shown.reshape(shape)), torch.from_numpy(wrap.reshape(shape))


def _flat(words: Tensor) -> np.ndarray:
    return words.reshape(-1).numpy()


@lru_cache(maxsize=64)
def _keep(bits: int) -> np.int64:
    return np.int64(-1 if bits == 64 else (1 << bits) - 1)


# Comparison keys, and what has modules of its own.

compare_keys, compare = dcf.compare_keys, dcf.compare
turn_table, read_table = tables.turn_table, tables.read_table
turn_signs, read_signs = tables.turn_signs, tables.read_signs
turn_bits, read_bits = tables.turn_bits, tables.read_bits
waves, combine = trigonometry.waves, trigonometry.combine
coefficients = trigonometry.coefficients
cosines, add_cosines = trigonometry.cosines, trigonometry.add_cosines
flip_places, parities, xor_rows = places.flip_places, places.parities, places.xor_rows
multiply_field = field.multiply_field
hide_wide, show_wide = limbs.hide_wide, limbs.show_wide
reduce_wide, widen = limbs.reduce_wide, limbs.widen
add_wide, subtract_wide, multiply_wide = limbs.add_wide, limbs.subtract_wide, limbs.multiply_wide
sum_wide, shift_wide, drop_wide = limbs.sum_wide, limbs.shift_wide, limbs.drop_wide
lift_mask, dot_wide, scale_lifted = lifted.lift_mask, lifted.dot_wide, lifted.scale_lifted
add_ones, subtract_ones, sum_ones = limbs.add_ones, limbs.subtract_ones, limbs.sum_ones
multiply_ones, power_ones = ones.multiply_ones, ones.power_ones
rotate_ones, window_ones = ones.rotate_ones, ones.window_ones
turned_exponents, read_exponents = exponents.turned_exponents, exponents.read_exponents
