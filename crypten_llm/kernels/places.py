"""Kernels for processors: bits at secret places, and rows chosen by bits (``kernels.ring`` says what each does)."""

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels.compiling import compiled

_WORTH_SUMMING = 16  # choices from which it pays to compute all sums of a few rows first
_TOGETHER = 4  # rows of those
_COLUMNS = 1024  # at a time, so that the sums and what they are added to stay in cache


@compiled
def _flip(places: np.ndarray, rows: np.ndarray) -> None:
    low = 8 * rows.shape[1] - 1
    for i in range(rows.shape[0]):
        place = places[i] & low
        rows[i, place >> 3] ^= np.uint8(1 << (place & 7))


@compiled
def _windows(sets: np.ndarray, out: np.ndarray) -> None:
    """out[s, q]: 64 bits of set s read backwards from place -q: bit i is that of -q - i."""
    low = sets.shape[1] - 1
    for s in range(sets.shape[0]):
        window = np.uint64(0)
        for q in range(low + 64, -1, -1):
            window = (window << np.uint64(1)) | np.uint64(sets[s, -q & low])
            if q <= low:
                out[s, q] = window


@compiled
def _parities(rows: np.ndarray, turns: np.ndarray, windows: np.ndarray, out: np.ndarray) -> None:
    """rows: of words of any width; windows as wide."""
    low, step = windows.shape[1] - 1, windows.shape[1] // rows.shape[1]
    for i in range(rows.shape[0]):
        for s in range(windows.shape[0]):
            found = np.uint64(0)
            for w in range(rows.shape[1]):
                found ^= np.uint64(rows[i, w] & windows[s, (w * step - turns[i]) & low])
            for half in (32, 16, 8, 4, 2, 1):
                found ^= found >> np.uint64(half)
            out[i, s] = np.int64(found & np.uint64(1))


def flip_places(places: Tensor, words: Tensor) -> Tensor:
    _flip(places.reshape(-1).numpy(), words.numpy())
    return words


def parities(words: Tensor, turns: Tensor, sets: Tensor) -> Tensor:
    many, size = sets.shape
    dtype = np.dtype(f"u{min(8, size // 8)}")
    windows = np.empty((many, size), dtype=np.uint64)
    _windows(sets.numpy(), windows)
    rows = np.ascontiguousarray(words.numpy()).view(dtype)
    out = np.empty((rows.shape[0], many), dtype=np.int64)
    _parities(rows, turns.reshape(-1).numpy(), windows.astype(dtype), out)
    return torch.from_numpy(out)


# Rows chosen by bits.


@compiled
def _xor_rows(table: np.ndarray, chosen: np.ndarray, out: np.ndarray) -> None:
    for v in range(table.shape[0]):
        row = table[v]
        for t in range(chosen.shape[0]):
            if chosen[t, v >> 3] >> (v & 7) & 1:
                total = out[t]
                for h in range(row.shape[0]):
                    total[h] ^= row[h]


@compiled
def _xor_sums(table: np.ndarray, chosen: np.ndarray, sums: np.ndarray, out: np.ndarray) -> None:
    """The same, ``_TOGETHER`` rows at a time: sums[c] is the xor of those whose bit is set in c."""
    rows, columns = table.shape
    for first in range(0, columns, sums.shape[1]):
        size = min(sums.shape[1], columns - first)
        for v in range(0, rows, _TOGETHER):
            many = min(_TOGETHER, rows - v)
            for b in range(many):
                row = table[v + b, first : first + size]
                for c in range(1 << b):
                    for h in range(size):
                        sums[(1 << b) + c, h] = sums[c, h] ^ row[h]
            for t in range(chosen.shape[0]):
                found = sums[chosen[t, v >> 3] >> (v & 7) & ((1 << many) - 1)]
                total = out[t, first : first + size]
                for h in range(size):
                    total[h] ^= found[h]


def xor_rows(table: Tensor, chosen: Tensor) -> Tensor:
    rows, bits = np.ascontiguousarray(table.numpy()), np.ascontiguousarray(chosen.numpy()).view(np.uint8)
    out = np.zeros((bits.shape[0], rows.shape[1]), dtype=np.int32)
    if len(bits) < _WORTH_SUMMING:
        _xor_rows(rows, bits, out)
    else:
        sums = np.zeros((1 << _TOGETHER, _COLUMNS), dtype=np.int32)
        _xor_sums(rows, bits, sums, out)
    return torch.from_numpy(out)
