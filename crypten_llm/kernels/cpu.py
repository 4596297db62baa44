"""Kernels for processors: compiled loops over words (signatures and meanings: ``kernels.ring``).

Owns the loops, which Numba compiles on first use; ``python -m experiments.measure.ring_kernels`` times the products
beside torch's and the memory's bandwidth. Tables and comparison keys are in ``kernels.tables`` and ``kernels.dcf``.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from crypten_llm.kernels import dcf, ring, tables
from crypten_llm.kernels.compiling import compiled

_WORTH_TURNING = 8  # rows from which a transposed copy of the right matrix pays


@compiled
def _rows_by_rows(x: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """out[m, j] = sum_k x[m, k] w[j, k], two rows of x by four of w at a time: eight sums for six loads."""
    rows, columns, depth = x.shape[0], w.shape[0], x.shape[1]
    even, full = rows - rows % 2, columns - columns % 4
    for j in range(0, full, 4):
        w0, w1, w2, w3 = w[j], w[j + 1], w[j + 2], w[j + 3]
        for m in range(0, even, 2):
            first, second = x[m], x[m + 1]
            a, b, c, d = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
            e, f, g, h = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
            for k in range(depth):
                u, v = first[k], second[k]
                p, q, y, z = np.int64(w0[k]), np.int64(w1[k]), np.int64(w2[k]), np.int64(w3[k])
                a += u * p
                b += u * q
                c += u * y
                d += u * z
                e += v * p
                f += v * q
                g += v * y
                h += v * z
            out[m, j], out[m, j + 1], out[m, j + 2], out[m, j + 3] = a, b, c, d
            out[m + 1, j], out[m + 1, j + 1], out[m + 1, j + 2], out[m + 1, j + 3] = e, f, g, h
        for m in range(even, rows):
            row = x[m]
            a, b, c, d = np.int64(0), np.int64(0), np.int64(0), np.int64(0)
            for k in range(depth):
                v = row[k]
                a += v * np.int64(w0[k])
                b += v * np.int64(w1[k])
                c += v * np.int64(w2[k])
                d += v * np.int64(w3[k])
            out[m, j], out[m, j + 1], out[m, j + 2], out[m, j + 3] = a, b, c, d
    for j in range(full, columns):
        for m in range(rows):
            a = np.int64(0)
            for k in range(depth):
                a += x[m, k] * np.int64(w[j, k])
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
    return _batched(_rows_by_rows, x, w, w.shape[-2])


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
    count = math.prod(batch)
    left, right, result = x.numpy(), w.numpy(), out
    if len(batch) != 1:
        left, result = left.reshape(count, rows, depth), out.reshape(count, rows, columns)
        right = right.reshape(count, *right.shape[-2:])
    for i in range(count):  # a view of a cache's first rows is contiguous head by head
        kernel(np.ascontiguousarray(left[i]), np.ascontiguousarray(right[i]), result[i])
    return torch.from_numpy(out)


# Key streams.

_CHUNK = 1 << 20  # bytes of one call into OpenSSL
_ZEROS = bytes(_CHUNK)


class KeyStream:
    """AES-256 in counter mode under ``key``, 32 bytes. Its counter only moves forward."""

    def __init__(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def fill(self, count: int) -> Tensor:
        """The next ``count`` bytes, in memory of their own: uint8."""
        buffer = np.empty(count + 15, dtype=np.uint8)  # update_into wants room for one block more
        view = buffer.data
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            self._encryptor.update_into(memoryview(_ZEROS)[:size], view[start : start + size + 15])
        return torch.from_numpy(buffer[:count])


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
def _unpack(data: np.ndarray, bits: int, keep: np.uint64, out: np.ndarray) -> None:
    """data: uint64, with a word more than is needed behind it."""
    place, used = 0, 0
    for i in range(out.shape[0]):
        word = data[place] >> np.uint64(used)
        if used + bits > 64:
            word |= data[place + 1] << np.uint64(64 - used)
        out[i] = np.int64(word & keep)
        used += bits
        if used >= 64:
            used -= 64
            place += 1


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
def _show(value: np.ndarray, keep: np.int64, out: np.ndarray) -> None:
    for i in range(value.shape[0]):
        out[i] = (value[i] + out[i]) & keep


@compiled
def _unwrap(opened: np.ndarray, offset: np.int64, bits: int, shown: np.ndarray, wrap: np.ndarray) -> None:
    for i in range(opened.shape[0]):
        word = opened[i]
        shown[i] = word - offset
        wrap[i] = (1 - ((word >> (bits - 1)) & 1)) << bits


def pack(words: Tensor, bits: int) -> Tensor:
    flat = _flat(words)
    if bits == 64:
        return torch.from_numpy(flat.copy().view(np.uint8))  # a strided view has no bytes of its own
    out = np.empty((flat.size * bits + 63) // 64, dtype=np.uint64)
    _pack(flat, bits, np.uint64(_keep(bits)), out)
    return torch.from_numpy(out.view(np.uint8)[: (flat.size * bits + 7) // 8])


def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    if bits == 64 and data.storage_offset() % 8 == 0:
        return data.view(torch.int64).view(shape)
    return torch.from_numpy(_unpacked(data, bits, math.prod(shape)).reshape(shape))


def _unpacked(data: Tensor, bits: int, count: int) -> np.ndarray:
    raw = data.numpy()
    if bits == 64:
        return raw.copy().view(np.int64)
    padded = np.empty((count * bits + 63) // 64 + 1, dtype=np.uint64)
    padded.view(np.uint8)[: raw.size] = raw
    out = np.empty(count, dtype=np.int64)
    _unpack(padded, bits, np.uint64(_keep(bits)), out)
    return out


def hide(share: Tensor, mask: Tensor, offset: int, bits: int) -> tuple[Tensor, Tensor]:
    flat, masks = _flat(share), _flat(mask)
    value = np.empty(flat.size, dtype=np.int64)
    packed = np.empty((flat.size * bits + 63) // 64, dtype=np.uint64)
    _hide(flat, masks, np.int64(offset), bits, _keep(bits), value, packed)
    return torch.from_numpy(value), torch.from_numpy(packed.view(np.uint8)[: (flat.size * bits + 7) // 8])


def show(value: Tensor, packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    out = _unpacked(packed, bits, value.numel())
    _show(value.numpy(), _keep(bits), out)
    return torch.from_numpy(out.reshape(shape))


def unwrap(opened: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    flat, shape = _flat(opened), tuple(opened.shape)
    shown, wrap = np.empty(flat.size, dtype=np.int64), np.empty(flat.size, dtype=np.int64)
    _unwrap(flat, np.int64(1 << (bits - 2)), bits, shown, wrap)
    return torch.from_numpy(shown.reshape(shape)), torch.from_numpy(wrap.reshape(shape))


def _flat(words: Tensor) -> np.ndarray:
    return words.reshape(-1).numpy()


def _keep(bits: int) -> np.int64:
    return np.int64(-1 if bits == 64 else (1 << bits) - 1)


# Trigonometric sums.


@compiled
def _cos_sin(m: np.int64 | np.uint64, shift: int) -> tuple[np.float64, np.float64]:
    """cos and sin of m 2^shift / 2^64 turns, to about an ulp.

    Additions and multiplications alone, which IEEE 754 fixes to the last bit: two parties whose machines have other
    mathematical libraries get the same bits, and must, because what they compute from them multiplies their shares.
    Polynomials of fdlibm (k_sin.c, k_cos.c) on an eighth of a turn either way.
    """
    turn = np.uint64(m) << np.uint64(shift)
    quarter = (turn + np.uint64(1 << 61)) >> np.uint64(62)
    x = np.float64(np.int64(turn - (quarter << np.uint64(62)))) * (2 * math.pi / 2.0**64)
    z = x * x
    p = 2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)
    p = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * p)
    sine = x + x * z * (-1.66666666666666324348e-01 + z * p)
    p = -2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)
    p = 4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 + z * p))
    cosine = 1.0 - z * (0.5 - z * p)
    if quarter & np.uint64(1):
        cosine, sine = -sine, cosine
    if quarter & np.uint64(2):
        cosine, sine = -cosine, -sine
    return cosine, sine


@compiled
def _waves(r: np.ndarray, shift: int, scale: float, out: np.ndarray) -> None:
    modes = out.shape[0] // 2
    for i in range(r.shape[0]):
        c1, s1 = _cos_sin(r[i], shift)
        c, s = c1, s1
        for j in range(modes):
            out[j, i] = np.int64(np.rint(scale * c))
            out[modes + j, i] = np.int64(np.rint(scale * s))
            c, s = c * c1 - s * s1, s * c1 + c * s1


@compiled
def _combine(
    m: np.ndarray, shift: int, scale: float, cosine: np.ndarray, sine: np.ndarray, shares: np.ndarray, out: np.ndarray
) -> None:
    modes = cosine.shape[0]
    for i in range(m.shape[0]):
        c1, s1 = _cos_sin(m[i], shift)
        c, s = c1, s1
        total = np.int64(0)
        for j in range(modes):
            total += np.int64(np.rint(scale * (cosine[j] * c + sine[j] * s))) * shares[j, i]
            total += np.int64(np.rint(scale * (cosine[j] * s - sine[j] * c))) * shares[modes + j, i]
            c, s = c * c1 - s * s1, s * c1 + c * s1
        out[i] += total


@compiled
def _turned(cosine: np.ndarray, sine: np.ndarray, m: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    c1, s1 = _cos_sin(m, 0)
    c, s = c1, s1
    a, b = np.empty_like(cosine), np.empty_like(sine)
    for j in range(cosine.shape[0]):
        a[j] = cosine[j] * c + sine[j] * s
        b[j] = sine[j] * c - cosine[j] * s
        c, s = c * c1 - s * s1, s * c1 + c * s1
    return a, b


def waves(mask: Tensor, shift: int, scale: float, modes: int) -> Tensor:
    flat = _flat(mask)
    out = np.empty((2 * modes, flat.size), dtype=np.int64)
    _waves(flat, shift, scale, out)
    return torch.from_numpy(out)


def combine(
    opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor, shares: Tensor, constant: int
) -> Tensor:
    flat = _flat(opened)
    out = np.full(flat.size, constant % 2**64, dtype=np.uint64).view(np.int64)  # the sum fits, its terms need not
    _combine(flat, shift, scale, cosine.numpy(), sine.numpy(), shares.numpy(), out)
    return torch.from_numpy(out)


def turned(cosine: Tensor, sine: Tensor, turns: int) -> tuple[Tensor, Tensor]:
    a, b = _turned(cosine.numpy(), sine.numpy(), np.uint64(turns))
    return torch.from_numpy(a), torch.from_numpy(b)


# Comparison keys, and tables.


def compare_keys(alpha: Tensor, beta: Tensor, seed0: Tensor, seed1: Tensor, bits: int) -> list[Tensor]:
    parts = [torch.empty(shape, dtype=dtype) for shape, dtype in ring.key_sizes(bits, alpha.shape[0])]
    seeds, values, flags = parts
    first, second = _unsigned(seed0), _unsigned(seed1)
    made = _unsigned(seeds), _unsigned(values), flags.numpy()
    dcf.generate(_unsigned(alpha), _unsigned(beta), first, second, bits, *made)
    return parts


def compare(seed: Tensor, common: list[Tensor], party: int, points: Tensor) -> Tensor:
    seeds, values, flags = common
    out = torch.zeros((*points.shape, dcf.WORDS), dtype=torch.int64)
    corrections = _unsigned(seeds), _unsigned(values), flags.numpy()
    dcf.evaluate(_unsigned(seed), *corrections, party, _unsigned(points), _unsigned(out))
    return out


def _unsigned(words: Tensor) -> np.ndarray:
    return words.contiguous().numpy().view(np.uint64)


turn_table, read_table = tables.turn_table, tables.read_table
turn_signs, read_signs = tables.turn_signs, tables.read_signs
turn_bits, read_bits = tables.turn_bits, tables.read_bits
