"""Kernels in Triton: trigonometric sums (``kernels.ring`` says what each does).

Owns the operations of ``kernels.trigonometry``, one by one. They are launched without fused multiply-adds: with them
the last bit would be another than a processor's.
"""

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels.cuda_limbs import word
from crypten_llm.kernels.triton_words import flat

BLOCK = 128
UNIT = tl.constexpr(2 * math.pi / 2.0**64)
WHOLE = tl.constexpr(2.0**52)  # from here on a double has no fraction


@triton.jit
def _cos_sin(m, shift):
    """cos and sin of m 2^shift / 2^64 turns: polynomials of fdlibm (k_sin.c, k_cos.c) on an eighth of a turn."""
    turn = m.to(tl.uint64, bitcast=True) << shift.to(tl.uint64)
    quarter = (turn + (1 << 61)) >> 62
    x = (turn - (quarter << 62)).to(tl.int64, bitcast=True).to(tl.float64) * UNIT
    z = x * x
    p = 2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)
    p = 8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * p)
    sine = x + x * z * (-1.66666666666666324348e-01 + z * p)
    p = -2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)
    p = 4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 + z * p))
    cosine = 1.0 - z * (0.5 - z * p)
    odd, back = (quarter & 1) != 0, (quarter & 2) != 0
    c = tl.where(odd, -sine, cosine)
    s = tl.where(odd, cosine, sine)
    return tl.where(back, -c, c), tl.where(back, -s, s)


@triton.jit
def _double(bits):
    """The double of these bits: a number as an argument would be cut to a float."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _rounded(x):
    """To the nearest whole number, half to even: what is below 2^52 loses its fraction where 2^52 is added."""
    size = tl.abs(x)
    whole = tl.where(size < WHOLE, (size + WHOLE) - WHOLE, size)
    return tl.where(x < 0, -whole, whole).to(tl.int64)


@triton.jit(do_not_specialize=["shift", "scale", "n", "modes"])
def _waves(mask, shift, scale, out, n, modes, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = i < n
    c1, s1 = _cos_sin(tl.load(mask + i, ok, 0), shift)
    factor = _double(scale)
    c, s = c1, s1
    for j in range(modes):
        tl.store(out + j * n.to(tl.int64) + i, _rounded(factor * c), ok)
        tl.store(out + (modes + j) * n.to(tl.int64) + i, _rounded(factor * s), ok)
        c, s = c * c1 - s * s1, s * c1 + c * s1


@triton.jit(do_not_specialize=["shift", "scale", "n", "modes", "constant"])
def _combine(m, shift, scale, cosine, sine, shares, constant, out, n, modes, SUM: tl.constexpr, B: tl.constexpr):
    """``combine``, or the factors alone: ``coefficients``."""
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = i < n
    c1, s1 = _cos_sin(tl.load(m + i, ok, 0), shift)
    factor = _double(scale)
    c, s = c1, s1
    total = tl.zeros((B,), dtype=tl.int64) + constant
    for j in range(modes):
        a, b = tl.load(cosine + j), tl.load(sine + j)
        first, second = _rounded(factor * (a * c + b * s)), _rounded(factor * (a * s - b * c))
        to, other = j * n.to(tl.int64) + i, (modes + j) * n.to(tl.int64) + i
        if SUM:
            total += first * tl.load(shares + to, ok, 0) + second * tl.load(shares + other, ok, 0)
        else:
            tl.store(out + to, first, ok)
            tl.store(out + other, second, ok)
        c, s = c * c1 - s * s1, s * c1 + c * s1
    if SUM:
        tl.store(out + i, total, ok)


@triton.jit(do_not_specialize=["shift", "n"])
def _cosines(mask, shift, frequencies, scales, out, n, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    j = tl.program_id(1).to(tl.int64)
    ok = i < n
    c, s = _cos_sin(tl.load(mask + i, ok, 0) * tl.load(frequencies + j), shift)
    scale = tl.load(scales + j)
    tl.store(out + 2 * j * n + i, _rounded(scale * c), ok)
    tl.store(out + (2 * j + 1) * n + i, _rounded(scale * s), ok)


@triton.jit(do_not_specialize=["shift", "n", "modes", "constant"])
def _add_cosines(m, shift, frequencies, factors, ups, shares, constant, out, n, modes, B: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = i < n
    angle = tl.load(m + i, ok, 0)
    total = tl.zeros((B,), dtype=tl.int64) + constant
    for j in range(modes):
        c, s = _cos_sin(angle * tl.load(frequencies + j), shift)
        a, up = tl.load(factors + j), tl.load(ups + j)
        to = shares + 2 * j * n.to(tl.int64) + i
        term = _rounded(a * c) * tl.load(to, ok, 0) + _rounded(a * s) * tl.load(to + n, ok, 0)
        total += term << up
    tl.store(out + i, total, ok)


def _bits(scale: float) -> int:
    """Of a double, as a program takes it."""
    (bits,) = struct.unpack("<q", struct.pack("<d", scale))
    return bits


def _there(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.device).contiguous()


def waves(mask: Tensor, shift: int, scale: float, modes: int) -> Tensor:
    n = mask.numel()
    out = torch.empty((2 * modes, n), dtype=torch.int64, device=mask.device)
    if out.numel():
        _waves[(triton.cdiv(n, BLOCK),)](flat(mask), shift, _bits(scale), out, n, modes, BLOCK, enable_fp_fusion=False)
    return out


def combine(
    opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor, shares: Tensor, constant: int
) -> Tensor:
    out = torch.empty(opened.numel(), dtype=torch.int64, device=opened.device)
    _combined(opened, shift, scale, cosine, sine, shares.contiguous(), constant, out, True)
    return out


def coefficients(opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor) -> Tensor:
    out = torch.empty((2 * len(cosine), opened.numel()), dtype=torch.int64, device=opened.device)
    _combined(opened, shift, scale, cosine, sine, out, 0, out, False)
    return out


def _combined(
    opened: Tensor,
    shift: int,
    scale: float,
    cosine: Tensor,
    sine: Tensor,
    shares: Tensor,
    constant: int,
    out: Tensor,
    sums: bool,
) -> None:
    n, modes = opened.numel(), len(cosine)
    factors = _bits(scale), _there(cosine, opened), _there(sine, opened)
    if n:
        _combine[(triton.cdiv(n, BLOCK),)](
            flat(opened), shift, *factors, shares, word(constant), out, n, modes, sums, BLOCK, enable_fp_fusion=False
        )


def cosines(mask: Tensor, shift: int, frequencies: Tensor, scales: Tensor) -> Tensor:
    n, modes = mask.numel(), len(frequencies)
    out = torch.empty((modes, 2, n), dtype=torch.int64, device=mask.device)
    if out.numel():
        _cosines[(triton.cdiv(n, BLOCK), modes)](
            flat(mask), shift, _there(frequencies, mask), _there(scales, mask), out, n, BLOCK, enable_fp_fusion=False
        )
    return out


def add_cosines(
    opened: Tensor, shift: int, frequencies: Tensor, coefficients: Tensor, ups: Tensor, shares: Tensor, constant: int
) -> Tensor:
    n, modes = opened.numel(), len(frequencies)
    out = torch.empty(n, dtype=torch.int64, device=opened.device)
    factors = (_there(x, opened) for x in (frequencies, coefficients, ups))
    if n:
        _add_cosines[(triton.cdiv(n, BLOCK),)](
            flat(opened),
            shift,
            *factors,
            shares.contiguous(),
            word(constant),
            out,
            n,
            modes,
            BLOCK,
            enable_fp_fusion=False,
        )
    return out
