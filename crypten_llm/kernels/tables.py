"""Kernels for processors: tables turned by a mask, and comparisons by digits (``kernels.ring`` says what each does)."""

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels.compiling import compiled
from crypten_llm.kernels.ring import DIGITS, SIGNS


@compiled
def _turn(table: np.ndarray, places: np.ndarray, words: np.ndarray) -> None:
    low = words.shape[1] - 1
    for i in range(words.shape[0]):
        for v in range(words.shape[1]):
            words[i, v] = table[(v - places[i]) & low] - np.int64(words[i, v])


@compiled
def _read(words: np.ndarray, opened: np.ndarray, steps: np.ndarray, out: np.ndarray) -> None:
    low = words.shape[1] - 1
    for i in range(words.shape[0]):
        for k in range(steps.shape[0]):
            out[i, k] = np.int64(words[i, (opened[i] - steps[k]) & low])


def turn_table(table: Tensor, places: Tensor, words: Tensor) -> Tensor:
    _turn(table.numpy(), _flat(places), words.numpy())
    return words


def read_table(words: Tensor, opened: Tensor, steps: Tensor) -> Tensor:
    out = np.empty((words.shape[0], steps.numel()), dtype=np.int64)
    _read(words.numpy(), _flat(opened), steps.numpy(), out)
    return torch.from_numpy(out)


# Comparison by digits.

# Where the digits' signs lie in a word of 16 bits, lowest digit first: the sign of digit j counts 2^j modulo 2^SIGNS,
# so SIGNS - j bits of it are needed.
_WIDTHS = np.arange(SIGNS, SIGNS - DIGITS, -1)
_PLACES = np.concatenate([[0], np.cumsum(_WIDTHS)[:-1]])


@compiled
def _turn_signs(masks: np.ndarray, digit_bits: int, widths: np.ndarray, places: np.ndarray, words: np.ndarray) -> None:
    low = words.shape[1] - 1
    for i in range(words.shape[0]):
        for v in range(words.shape[1]):
            word, made = np.int64(words[i, v]), np.int64(0)
            for j in range(widths.shape[0]):
                digit = (masks[i] >> (digit_bits * j)) & low
                sign = np.int64(v > digit) - np.int64(v < digit)
                made |= ((sign - (word >> places[j])) & ((1 << widths[j]) - 1)) << places[j]
            words[i, v] = made


@compiled
def _read_signs(
    words: np.ndarray, points: np.ndarray, digit_bits: int, widths: np.ndarray, places: np.ndarray, out: np.ndarray
) -> None:
    low = words.shape[1] - 1
    for i in range(words.shape[0]):
        for t in range(points.shape[1]):
            total = np.int64(0)
            for j in range(widths.shape[0]):
                word = np.int64(words[i, (points[i, t] >> (digit_bits * j)) & low])
                total += ((word >> places[j]) & ((1 << widths[j]) - 1)) << j
            out[i, t] = total


@compiled
def _turn_bits(masks: np.ndarray, tops: np.ndarray, words: np.ndarray) -> None:
    size = words.shape[2]
    for i in range(words.shape[0]):
        for t in range(words.shape[1]):
            for v in range(size):
                below = ((v - masks[i, t]) & (size - 1)) >= size // 2
                words[i, t, v] = (np.int64(below) ^ tops[i]) - np.int64(words[i, t, v])


@compiled
def _read_bits(words: np.ndarray, opened: np.ndarray, flips: np.ndarray, one: np.int64, out: np.ndarray) -> None:
    for i in range(words.shape[0]):
        for t in range(words.shape[1]):
            bit = np.int64(words[i, t, opened[i, t]])
            out[i, t] = one - bit if flips[i, t] else bit


def turn_signs(masks: Tensor, digit_bits: int, words: Tensor) -> Tensor:
    _turn_signs(_flat(masks), digit_bits, _WIDTHS, _PLACES, words.numpy())
    return words


def read_signs(words: Tensor, points: Tensor, digit_bits: int) -> Tensor:
    out = np.empty(tuple(points.shape), dtype=np.int64)
    _read_signs(words.numpy(), points.numpy(), digit_bits, _WIDTHS, _PLACES, out)
    return torch.from_numpy(out)


def turn_bits(masks: Tensor, tops: Tensor, words: Tensor) -> Tensor:
    _turn_bits(masks.numpy(), _flat(tops), words.numpy())
    return words


def read_bits(words: Tensor, opened: Tensor, flips: Tensor, one: int) -> Tensor:
    out = np.empty(tuple(opened.shape), dtype=np.int64)
    _read_bits(words.numpy(), opened.numpy(), flips.numpy(), np.int64(one), out)
    return torch.from_numpy(out)


def _flat(words: Tensor) -> np.ndarray:
    return words.reshape(-1).numpy()
