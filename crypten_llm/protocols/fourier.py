"""Smooth functions of one opened value, as trigonometric sums. No message is sent here.

Owns the fits and their evaluation. A value opened modulo its period is M = x + r with r uniform over the whole
period, so M says nothing about x; and cos(w (M - r)) = cos(wM) [cos wr] + sin(wM) [sin wr] needs only shares of the
cosines and sines of the mask, which the dealer has. The function is fitted on its domain alone: outside, the sum is
bounded by its coefficients but otherwise meaningless, so a caller must guarantee the domain.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from crypten_llm.kernels.compiling import compiled
from crypten_llm.protocols.dealer.roles import PARTY0
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Secret, Wire

BLOCK = 1 << 14  # elements at a time, so that a block's shares stay in cache
_GRIDS = 3000


@dataclass(frozen=True)
class Fit:
    """f(x) for x in [low, high] as constant + sum over j of a_j cos(j w x) + b_j sin(j w x), w = 2 pi / 2^period.

    error: largest deviation on the domain, measured on a fine grid, before quantisation. norm: l2 norm of the
    coefficients, which ``rounding`` grows with. cosine, sine: [modes]. Outside the domain the sum goes on with its
    period: bounded, and of no use.
    """

    name: str
    low: float
    high: float
    period: int
    constant: float
    cosine: np.ndarray
    sine: np.ndarray
    error: float
    norm: float

    @property
    def modes(self) -> int:
        return len(self.cosine)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The sum in floating point: the plaintext twin."""
        angle = np.multiply.outer(np.asarray(x, dtype=np.float64), np.arange(1, self.modes + 1)) * (
            2 * math.pi / 2.0**self.period
        )
        return self.constant + np.cos(angle) @ self.cosine + np.sin(angle) @ self.sine


def fit(
    name: str, function, low: float, high: float, period: int, modes: int, even: bool = False, noise: float = 2.0**-26
) -> Fit:
    """The trigonometric sum with the least error including quantisation noise, over a range of ridge penalties.

    Least squares alone finds huge coefficients that cancel; they would multiply the rounding of the dealt shares.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    x = middle + half * np.cos(np.linspace(0, math.pi, _GRIDS))
    angle = np.outer(x, np.arange(1, modes + 1)) * (2 * math.pi / 2.0**period)
    columns = [np.ones((len(x), 1)), np.cos(angle)] + ([] if even else [np.sin(angle)])
    basis, target = np.concatenate(columns, 1), function(x)
    best = None
    for ridge in 10.0 ** np.arange(-14.0, -2.0):
        rows = np.concatenate([basis / math.sqrt(len(x)), ridge * np.eye(basis.shape[1])])
        right = np.concatenate([target / math.sqrt(len(x)), np.zeros(basis.shape[1])])
        solution = np.linalg.lstsq(rows, right, rcond=None)[0]
        error, norm = np.abs(basis @ solution - target).max(), np.linalg.norm(solution)
        if best is None or error + norm * noise < best[0]:
            best = (error + norm * noise, error, norm, solution)
    _, error, norm, solution = best
    sine = np.zeros(modes) if even else solution[modes + 1 :]
    return Fit(name, low, high, period, solution[0], solution[1 : modes + 1], sine, error, norm)


@dataclass(frozen=True)
class Target:
    """What a stored fit approximates, and how it was fitted."""

    function: Callable
    low: float
    high: float
    period: int
    modes: int
    even: bool = False
    noise: float = 2.0**-26

    def fit(self, name: str) -> Fit:
        return fit(name, self.function, self.low, self.high, self.period, self.modes, self.even, self.noise)


TARGETS = {
    "exp": Target(np.exp, -18.0, 0.2, 5, 17, noise=2.0**-31),
    "reciprocal": Target(lambda x: 1 / x, 0.5, 2.0, 2, 10),
    "inverse root": Target(lambda x: x**-0.5, 0.245, 1.01, 1, 10),
    "silu": Target(lambda x: x / 2 * np.tanh(x / 2), -12.0, 12.0, 5, 20, even=True),
    "sigmoid": Target(lambda x: 1 / (1 + np.exp(-x)), -12.0, 12.0, 5, 20),
}

# Both parties multiply their shares by numbers made of the coefficients, so one differing bit spoils everything; and
# the last bits of a least-squares solution depend on the processor. So the fits are made once and stored, as integers
# over 2^36. After a change of TARGETS: python -m crypten_llm.protocols.fourier
_STORED = Path(__file__).with_name("fits.json")
_UNIT = 2.0**-36


@functools.cache
def stored(name: str) -> Fit:
    """The fit of that name in ``TARGETS``."""
    entry, target = json.loads(_STORED.read_text("utf-8"))[name], TARGETS[name]
    constant, cosine, sine = entry["constant"] * _UNIT, *(np.array(entry[k]) * _UNIT for k in ("cosine", "sine"))
    norm = float(np.linalg.norm([constant, *cosine, *sine]))
    return Fit(name, target.low, target.high, target.period, constant, cosine, sine, entry["error"], norm)


def store() -> None:
    """Fits every target again."""
    entries = {}
    for name, target in TARGETS.items():
        made = target.fit(name)
        parts = {
            key: np.rint(getattr(made, key) / _UNIT).astype(np.int64).tolist() for key in ("constant", "cosine", "sine")
        }
        entries[name] = {"error": float(f"{made.error:.2g}"), **parts}
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    _STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def exponential() -> Fit:
    """exp on [-18, 0.2], period 32: exp(s / 2) for scores s within 36 of each other."""
    return stored("exp")


def reciprocal() -> Fit:
    """1/x on [1/2, 2], period 4."""
    return stored("reciprocal")


def inverse_root() -> Fit:
    """1/sqrt(x) on [1/4, 1], period 2."""
    return stored("inverse root")


def silu_even() -> Fit:
    """x/2 tanh(x/2) = silu(x) - x/2 on [-12, 12], period 32."""
    return stored("silu")


def sigmoid() -> Fit:
    """1 / (1 + exp(-x)) on [-12, 12], period 32."""
    return stored("sigmoid")


def rounding(function: Fit, fraction: int, dealt: int | None = None) -> float:
    """How far ``evaluate`` may be from the sum itself: each of its 2 * modes products has two factors rounded.

    With |cos| + |sin| <= sqrt 2, halves of a unit add up to modes / sqrt 2 units of the public factors and to
    sqrt(modes) norm / sqrt 2 of the dealt ones.
    """
    dealt = fraction if dealt is None else dealt
    units = function.modes * 2.0**-fraction + math.sqrt(function.modes) * function.norm * 2.0**-dealt
    return units / math.sqrt(2)


@compiled
def _cos_sin(m, shift):
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
def _mask_tables(r, shift, scale, out):
    """out[j, i] = scale * cos of (j + 1) r_i 2^shift / 2^64 turns, then the sines: what the dealer shares of a mask."""
    modes = out.shape[0] // 2
    for i in range(r.shape[0]):
        c1, s1 = _cos_sin(r[i], shift)
        c, s = c1, s1
        for j in range(modes):
            out[j, i] = np.int64(np.rint(scale * c))
            out[modes + j, i] = np.int64(np.rint(scale * s))
            c, s = c * c1 - s * s1, s * c1 + c * s1


@compiled
def _combine(m, shift, scale, cosine, sine, shares, out):
    """out_i += sum_j A_j [cos] + B_j [sin] with A_j = a_j cos + b_j sin, B_j = a_j sin - b_j cos of j turns of m_i."""
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
def _turned(cosine, sine, m):
    """Coefficients of f(x + shift) from those of f, for a shift of m / 2^64 turns."""
    c1, s1 = _cos_sin(m, 0)
    c, s = c1, s1
    a, b = np.empty_like(cosine), np.empty_like(sine)
    for j in range(cosine.shape[0]):
        a[j] = cosine[j] * c + sine[j] * s
        b[j] = sine[j] * c - cosine[j] * s
        c, s = c * c1 - s * s1, s * c1 + c * s1
    return a, b


def evaluate(
    runtime, wire: Wire, function: Fit, fraction: int, bits: int, shift: float = 0.0, dealt: int | None = None
) -> Secret:
    """function(x + shift) for x opened modulo its period (``Opening(function=True, ring=scale + period)``); local.

    fraction, dealt: bits of the public factors and of the dealt shares (alike by default), so the result has scale
    fraction + dealt and is valid modulo 2^64. bits: the declared bound of the result. shift: a public constant.

    Error: function.error on its domain, and ``rounding(function, fraction, dealt)`` everywhere.
    Cost: dealer 16 * modes bytes an element.
    Source: Fourier evaluation as in SHAFT (NDSS 2025) with a mask uniform over the whole period, which theirs is not.
    """
    assert wire.width == wire.scale + function.period, f"open {function.name} modulo 2^{wire.scale + function.period}"
    shape, count = wire.shape, wire.mask.numel()
    dealt = fraction if dealt is None else dealt
    modes, scale, turn = function.modes, 2.0**fraction, 64 - wire.width
    shift_turns = round(shift * 2.0 ** (64 - function.period)) % 2**64
    cosine, sine = _turned(function.cosine, function.sine, np.uint64(shift_turns))
    if wire.mask.is_meta:  # a dealer that only measures: blocks are for the cache, their bytes add up to the same
        runtime.deal((2 * modes, count))
        return Secret(shape_only(shape), fraction + dealt, 64, bits)
    flat_mask = wire.mask.reshape(-1)
    flat_raw = None if wire.raw is None else wire.raw.reshape(-1).numpy()
    constant = round(function.constant * 2.0 ** (fraction + dealt)) if runtime.role == PARTY0 else 0
    out = np.full(count, constant % 2**64, dtype=np.uint64).view(np.int64)  # the sum fits, its terms need not
    for start in range(0, count, BLOCK):
        part = slice(start, min(start + BLOCK, count))
        size = part.stop - part.start

        def tables(part=part, size=size):
            table = np.empty((2 * modes, size), dtype=np.int64)
            _mask_tables(flat_mask[part].numpy(), turn, 2.0**dealt, table)
            return torch.from_numpy(table)

        shares = runtime.deal((2 * modes, size), tables)
        if flat_raw is not None:
            _combine(flat_raw[part], turn, scale, cosine, sine, shares.numpy(), out[part])
    if runtime.is_dealer:
        return Secret(shape_only(shape), fraction + dealt, 64, bits)
    return Secret(torch.from_numpy(out).view(shape), fraction + dealt, 64, bits)


if __name__ == "__main__":
    store()
