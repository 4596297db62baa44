"""Kernels in torch's own operations: trigonometric sums (``kernels.ring`` says what each does).

Owns the same additions and multiplications as ``kernels.trigonometry``, in the same order, each an operation of its own
that is rounded by itself: what is fused would have other last bits than the other party's.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from crypten_llm.kernels.cuda_choice import hot
from crypten_llm.kernels.cuda_limbs import word

UNIT = 2 * math.pi / 2.0**64
# Of fdlibm (k_sin.c, k_cos.c), the highest power first: x + x z (S1 + ...) and 1 - z (1/2 - z (C1 + ...)), z = x^2.
SINE = (
    1.58969099521155010221e-10,
    -2.50507602534068634195e-08,
    2.75573137070700676789e-06,
    -1.98412698298579493134e-04,
    8.33333333332248946124e-03,
    -1.66666666666666324348e-01,
)
COSINE = (
    -1.13596475577881948265e-11,
    2.08757232129817482790e-09,
    -2.75573143513906633035e-07,
    2.48015872894767294178e-05,
    -1.38888888888741095749e-03,
    4.16666666666666019037e-02,
)


def _horner(factors: tuple[float, ...], z: Tensor) -> Tensor:
    total = z * factors[0]
    for factor in factors[1:-1]:
        total = (total + factor) * z
    return total + factors[-1]


def cos_sin(m: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """cos and sin of m 2^shift / 2^64 turns."""
    turn = m << shift
    quarter = ((turn + (1 << 61)) >> 62) & 3
    x = (turn - (quarter << 62)).double() * UNIT
    z = x * x
    sine = x + (x * z) * _horner(SINE, z)
    cosine = 1.0 - z * (0.5 - z * _horner(COSINE, z))
    odd, back = (quarter & 1) != 0, (quarter & 2) != 0
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    return torch.where(back, -cosine, cosine), torch.where(back, -sine, sine)


def _rounded(x: Tensor) -> Tensor:
    return x.round().long()  # half to even


def _multiples(m: Tensor, shift: int, modes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """cos and sin of 1 .. modes times the angle, each from the one before."""
    first, other = cos_sin(m.reshape(-1), shift)
    c, s = first, other
    for _ in range(modes):
        yield c, s
        c, s = c * first - s * other, s * first + c * other


def _whole(mask: Tensor, constant: int) -> Tensor:
    return torch.full((mask.numel(),), word(constant), dtype=torch.int64, device=mask.device)


@hot("triton_waves")
def waves(mask: Tensor, shift: int, scale: float, modes: int) -> Tensor:
    out = torch.empty((2 * modes, mask.numel()), dtype=torch.int64, device=mask.device)
    for j, (c, s) in enumerate(_multiples(mask, shift, modes)):
        out[j], out[modes + j] = _rounded(scale * c), _rounded(scale * s)
    return out


@hot("triton_waves")
def combine(
    opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor, shares: Tensor, constant: int
) -> Tensor:
    total, modes = _whole(opened, constant), len(cosine)
    for j, (first, second) in enumerate(_factors(opened, shift, scale, cosine, sine)):
        total += first * shares[j] + second * shares[modes + j]
    return total


@hot("triton_waves")
def coefficients(opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor) -> Tensor:
    modes = len(cosine)
    out = torch.empty((2 * modes, opened.numel()), dtype=torch.int64, device=opened.device)
    for j, (first, second) in enumerate(_factors(opened, shift, scale, cosine, sine)):
        out[j], out[modes + j] = first, second
    return out


def _factors(opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    numbers = [x.to(opened.device) for x in (cosine, sine)]
    for (c, s), a, b in zip(_multiples(opened, shift, len(cosine)), *numbers, strict=True):
        yield _rounded(scale * (a * c + b * s)), _rounded(scale * (a * s - b * c))


# Frequencies of one's own.


def _turned(m: Tensor, shift: int, frequencies: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """scales times cos and sin of whole multiples of the angles, rounded: [modes, N] each."""
    c, s = cos_sin(m.reshape(1, -1) * frequencies.to(m.device)[:, None], shift)
    factors = scales.to(m.device)[:, None]
    return _rounded(factors * c), _rounded(factors * s)


@hot("triton_waves")
def cosines(mask: Tensor, shift: int, frequencies: Tensor, scales: Tensor) -> Tensor:
    return torch.stack(_turned(mask, shift, frequencies, scales), 1)


@hot("triton_waves")
def add_cosines(
    opened: Tensor, shift: int, frequencies: Tensor, coefficients: Tensor, ups: Tensor, shares: Tensor, constant: int
) -> Tensor:
    first, second = _turned(opened, shift, frequencies, coefficients)
    terms = (first * shares[:, 0] + second * shares[:, 1]) << ups.to(opened.device)[:, None]
    return terms.sum(0) + word(constant)
