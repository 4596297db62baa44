"""Arithmetic modulo 2^64 on int64 tensors: matrix products, unsigned shifts, narrow packing.

Owns the compiled loops, which Numba compiles on first use; ``python -m experiments.measure.ring_kernels`` times them
beside torch's products and the memory's bandwidth. Protocols call the functions here and never a kernel, so that
another device can bring its own.
"""

import math

import numpy as np
import torch

from crypten_llm.kernels.compiling import compiled

_WORTH_TURNING = 8  # rows from which a transposed copy of the right matrix pays


@compiled
def _rows_by_rows(x, w, out):
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
def _rows_by_columns(x, w, out):
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


def matmul_nt(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T modulo 2^64: int64 [..., M, K] by int64 or int32 [..., N, K] to int64 [..., M, N]."""
    return _batched(_rows_by_rows, x, w, w.shape[-2])


def matmul_nn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w modulo 2^64: int64 [..., M, K] by int64 or int32 [..., K, N] to int64 [..., M, N]."""
    if x.shape[-2] >= _WORTH_TURNING:
        return _batched(_rows_by_rows, x, w.transpose(-2, -1), w.shape[-1])
    return _batched(_rows_by_columns, x, w, w.shape[-1])


def _batched(kernel, x, w, columns):
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


def low_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """x modulo 2^bits, as the non-negative representative (for 64 bits: x itself)."""
    return x if bits == 64 else x & ((1 << bits) - 1)


def shift_right(x: torch.Tensor, count: int) -> torch.Tensor:
    """Unsigned shift of 64-bit words."""
    return x if count == 0 else (x >> count) & ((1 << (64 - count)) - 1)


def top_bit(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Bit ``bits - 1`` of each word, 0 or 1."""
    return (x >> (bits - 1)) & 1


def pack(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The low ``bits`` of each word in as few whole bytes: uint8 [n * ceil(bits / 8)]."""
    width = (bits + 7) // 8
    return x.reshape(-1).contiguous().view(torch.uint8).view(-1, 8)[:, :width].reshape(-1)


def unpack(data: torch.Tensor, bits: int, shape) -> torch.Tensor:
    """The inverse of ``pack``: int64 of ``shape``, non-negative below 64 bits."""
    width = (bits + 7) // 8
    words = torch.zeros(data.numel() // width, 8, dtype=torch.uint8)
    words[:, :width] = data.view(-1, width)
    return low_bits(words.view(torch.int64).view(shape), bits)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``pack`` makes of ``count`` words."""
    return count * ((bits + 7) // 8)


@compiled
def _hide(share, mask, offset, keep, width, value, packed):
    for i in range(share.shape[0]):
        word = (share[i] + mask[i] + offset) & keep
        value[i] = word
        for j in range(width):
            packed[i * width + j] = np.uint8((word >> (8 * j)) & 0xFF)


@compiled
def _show(value, packed, keep, width, out):
    for i in range(value.shape[0]):
        word = np.int64(0)
        for j in range(width):
            word |= np.int64(packed[i * width + j]) << (8 * j)
        out[i] = (value[i] + word) & keep


def hide(share: torch.Tensor, mask: torch.Tensor, offset: int, bits: int, packed: np.ndarray) -> np.ndarray:
    """share + mask + offset modulo 2^bits, flat, and the same as ``pack`` makes it, written to ``packed``."""
    flat = share.reshape(-1).numpy()
    value = np.empty(flat.size, dtype=np.int64)
    _hide(flat, mask.reshape(-1).numpy(), np.int64(offset), _keep(bits), (bits + 7) // 8, value, packed)
    return value


def show(value: np.ndarray, packed: np.ndarray, bits: int, shape) -> torch.Tensor:
    """What ``hide`` gave here plus what it packed at the other party, modulo 2^bits."""
    out = np.empty(value.size, dtype=np.int64)
    _show(value, packed, _keep(bits), (bits + 7) // 8, out)
    return torch.from_numpy(out.reshape(shape))


@compiled
def _cut(opened, count, offset, bits, shown, unwrapped):
    low = np.int64((1 << (64 - count)) - 1) if count else np.int64(-1)
    for i in range(opened.shape[0]):
        word = opened[i]
        shown[i] = ((word >> count) & low) - offset
        if unwrapped.shape[0]:
            unwrapped[i] = (1 - ((word >> (bits - 1)) & 1)) << (bits - count)


def cut(opened: torch.Tensor, count: int, offset: int, bits: int, lifted: bool):
    """(opened >> count) - offset, unsigned; and (1 - bit ``bits - 1``) << (bits - count), None unless ``lifted``."""
    flat = opened.reshape(-1).numpy()
    shown = np.empty(flat.size, dtype=np.int64)
    unwrapped = np.empty(flat.size if lifted else 0, dtype=np.int64)
    _cut(flat, np.int64(count), np.int64(offset), np.int64(bits), shown, unwrapped)
    shape = tuple(opened.shape)
    return torch.from_numpy(shown.reshape(shape)), torch.from_numpy(unwrapped.reshape(shape)) if lifted else None


def _keep(bits: int) -> np.int64:
    return np.int64(-1 if bits == 64 else (1 << bits) - 1)
