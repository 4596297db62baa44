"""Kernels for processors: bits at secret places (``kernels.ring`` says what each does)."""

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels.compiling import compiled


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
