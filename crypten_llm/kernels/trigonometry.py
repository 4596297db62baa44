"""Kernels for processors: trigonometric sums (``kernels.ring`` says what each does)."""

import math

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels.compiling import compiled


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
def _coefficients(
    m: np.ndarray, shift: int, scale: float, cosine: np.ndarray, sine: np.ndarray, out: np.ndarray
) -> None:
    modes = cosine.shape[0]
    for i in range(m.shape[0]):
        c1, s1 = _cos_sin(m[i], shift)
        c, s = c1, s1
        for j in range(modes):
            out[j, i] = np.int64(np.rint(scale * (cosine[j] * c + sine[j] * s)))
            out[modes + j, i] = np.int64(np.rint(scale * (cosine[j] * s - sine[j] * c)))
            c, s = c * c1 - s * s1, s * c1 + c * s1


def waves(mask: Tensor, shift: int, scale: float, modes: int) -> Tensor:
    flat = mask.reshape(-1).numpy()
    out = np.empty((2 * modes, flat.size), dtype=np.int64)
    _waves(flat, shift, scale, out)
    return torch.from_numpy(out)


def combine(
    opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor, shares: Tensor, constant: int
) -> Tensor:
    flat = opened.reshape(-1).numpy()
    out = np.full(flat.size, constant % 2**64, dtype=np.uint64).view(np.int64)  # the sum fits, its terms need not
    _combine(flat, shift, scale, cosine.numpy(), sine.numpy(), shares.numpy(), out)
    return torch.from_numpy(out)


def coefficients(opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor) -> Tensor:
    flat = opened.reshape(-1).numpy()
    out = np.empty((2 * len(cosine), flat.size), dtype=np.int64)
    _coefficients(flat, shift, scale, cosine.numpy(), sine.numpy(), out)
    return torch.from_numpy(out)


# Frequencies of one's own: no angle is a multiple of another, so each is computed from the start.


@compiled
def _cosines(r: np.ndarray, shift: int, frequencies: np.ndarray, scales: np.ndarray, out: np.ndarray) -> None:
    for j in range(frequencies.shape[0]):
        k, scale, cosine, sine = np.uint64(frequencies[j]), scales[j], out[j, 0], out[j, 1]
        for i in range(r.shape[0]):
            c, s = _cos_sin(np.uint64(r[i]) * k, shift)
            cosine[i] = np.int64(np.rint(scale * c))
            sine[i] = np.int64(np.rint(scale * s))


@compiled
def _add_cosines(
    m: np.ndarray,
    shift: int,
    frequencies: np.ndarray,
    coefficients: np.ndarray,
    ups: np.ndarray,
    shares: np.ndarray,
    out: np.ndarray,
) -> None:
    for j in range(frequencies.shape[0]):
        k, a, up, cosine, sine = np.uint64(frequencies[j]), coefficients[j], ups[j], shares[j, 0], shares[j, 1]
        for i in range(m.shape[0]):
            c, s = _cos_sin(np.uint64(m[i]) * k, shift)
            out[i] += (np.int64(np.rint(a * c)) * cosine[i] + np.int64(np.rint(a * s)) * sine[i]) << up


def cosines(mask: Tensor, shift: int, frequencies: Tensor, scales: Tensor) -> Tensor:
    flat = mask.reshape(-1).numpy()
    out = np.empty((len(frequencies), 2, flat.size), dtype=np.int64)
    _cosines(flat, shift, frequencies.numpy(), scales.numpy(), out)
    return torch.from_numpy(out)


def add_cosines(
    opened: Tensor, shift: int, frequencies: Tensor, coefficients: Tensor, ups: Tensor, shares: Tensor, constant: int
) -> Tensor:
    flat = opened.reshape(-1).numpy()
    out = np.full(flat.size, constant % 2**64, dtype=np.uint64).view(np.int64)
    _add_cosines(flat, shift, frequencies.numpy(), coefficients.numpy(), ups.numpy(), shares.numpy(), out)
    return torch.from_numpy(out)
