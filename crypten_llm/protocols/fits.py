"""Fits of smooth functions by trigonometric sums, and what is stored of them.

Owns the fits. A function is fitted on its domain alone: outside, the sum is bounded by its coefficients but otherwise
meaningless, so a caller must guarantee the domain. Evaluating one on shares is ``smooth.evaluate``; what activations
are made of has free frequencies (``frequencies``), and is evaluated in ``activation``.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from crypten_llm.protocols.frequencies import PERIOD, CosineFit, search

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
    cosine: Tensor
    sine: Tensor
    error: float
    norm: float

    @property
    def modes(self) -> int:
        return len(self.cosine)

    def __call__(self, x: Tensor) -> Tensor:
        """The sum in floating point: the plaintext twin."""
        angle = _angles(x.double(), self.period, self.modes)
        return self.constant + angle.cos() @ self.cosine + angle.sin() @ self.sine


def _angles(x: Tensor, period: int, modes: int) -> Tensor:
    """[...] to [..., modes]."""
    return x[..., None] * torch.arange(1, modes + 1, dtype=torch.float64) * (2 * math.pi / 2.0**period)


def fit(
    name: str,
    function: Callable[[Tensor], Tensor],
    low: float,
    high: float,
    period: int,
    modes: int,
    noise: float = 2.0**-26,
) -> Fit:
    """The trigonometric sum with the least error including quantisation noise, over a range of ridge penalties.

    Least squares alone finds huge coefficients that cancel; they would multiply the rounding of the dealt shares.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    x = middle + half * torch.linspace(0, math.pi, _GRIDS, dtype=torch.float64).cos()
    angle = _angles(x, period, modes)
    columns = [torch.ones(len(x), 1, dtype=torch.float64), angle.cos(), angle.sin()]
    basis, target = torch.cat(columns, 1), function(x)
    best = None
    for ridge in 10.0 ** torch.arange(-14.0, -2.0, dtype=torch.float64):
        rows = torch.cat([basis / math.sqrt(len(x)), ridge * torch.eye(basis.shape[1], dtype=torch.float64)])
        right = torch.cat([target / math.sqrt(len(x)), torch.zeros(basis.shape[1], dtype=torch.float64)])
        solution = torch.linalg.lstsq(rows, right, driver="gelsd").solution
        error, norm = (basis @ solution - target).abs().max().item(), solution.norm().item()
        if best is None or error + norm * noise < best[0]:
            best = (error + norm * noise, error, norm, solution)
    assert best is not None
    _, error, norm, solution = best
    sine = solution[modes + 1 :]
    return Fit(name, low, high, period, solution[0].item(), solution[1 : modes + 1], sine, error, norm)


@dataclass(frozen=True)
class Target:
    """What a stored fit approximates, and how it was fitted."""

    function: Callable
    low: float
    high: float
    period: int
    modes: int
    noise: float = 2.0**-26

    def fit(self, name: str) -> Fit:
        return fit(name, self.function, self.low, self.high, self.period, self.modes, self.noise)


TARGETS = {
    # What a comparison key brings to [1/4, 1) may miss it by 2^-6 of itself.
    "reciprocal": Target(lambda x: 1 / x, 0.485, 2.06, 2, 10),
    "inverse root": Target(lambda x: x**-0.5, 0.2445, 1.02, 1, 10),
    "sigmoid": Target(torch.sigmoid, -12.0, 12.0, 5, 20),
}


@dataclass(frozen=True)
class EvenTarget:
    """What a stored fit at free frequencies approximates: an even function on |x| <= high, by whole turns in
    2^period.
    """

    function: Callable[[Tensor], Tensor]
    high: float
    modes: int
    period: int = PERIOD

    def fit(self, name: str) -> CosineFit:
        longer = 2.0 ** (PERIOD - self.period)  # the same fit, seen from where the period is the usual one
        made = search(name, lambda x: self.function(x / longer), self.high * longer, self.modes)
        return replace(made, high=self.high, period=self.period)


def _silu_even(x: Tensor) -> Tensor:
    """silu(2 x) - x."""
    return x * x.tanh()


def _gelu_even(x: Tensor) -> Tensor:
    """gelu(x) - x / 2."""
    return x / 2 * (x / math.sqrt(2)).erf()


def _gelu_tanh_even(x: Tensor) -> Tensor:
    """The same of the usual approximation."""
    return x / 2 * (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()


EVEN_TARGETS = {
    "silu": EvenTarget(_silu_even, 6.0, 7),
    "silu short": EvenTarget(_silu_even, 6.0, 7, 9),
    "gelu": EvenTarget(_gelu_even, 5.0, 4),
    "gelu tanh": EvenTarget(_gelu_tanh_even, 5.0, 4),
}

# Both parties multiply their shares by numbers made of the coefficients, so one differing bit spoils everything; and
# the last bits of a least-squares solution depend on the processor. So the fits are made once and stored, as integers
# over 2^36. After a change of targets: python -m crypten_llm.protocols.fits
_STORED = Path(__file__).with_name("fits.json")
_EVEN = "even "  # before the names of fits at free frequencies
_UNIT = 2.0**-36


@functools.cache
def stored(name: str) -> Fit:
    """The fit of that name in ``TARGETS``."""
    entry, target = _entry(name), TARGETS[name]
    constant = entry["constant"] * _UNIT
    cosine, sine = (torch.tensor(entry[part], dtype=torch.float64) * _UNIT for part in ("cosine", "sine"))
    norm = math.hypot(constant, *cosine.tolist(), *sine.tolist())
    return Fit(name, target.low, target.high, target.period, constant, cosine, sine, entry["error"], norm)


@functools.cache
def stored_even(name: str) -> CosineFit:
    """The fit of that name in ``EVEN_TARGETS``."""
    entry = _entry(_EVEN + name)
    coefficients = torch.tensor(entry["coefficients"], dtype=torch.float64) * _UNIT
    frequencies = torch.tensor(entry["frequencies"], dtype=torch.int64)
    target = EVEN_TARGETS[name]
    constant = entry["constant"] * _UNIT
    return CosineFit(name, target.high, constant, frequencies, coefficients, entry["error"], target.period)


def _entry(name: str) -> dict:
    return json.loads(_STORED.read_text("utf-8"))[name]


def store() -> None:
    """Fits every target again; half a minute."""
    entries: dict[str, dict[str, object]] = {}
    for name, target in TARGETS.items():
        made = target.fit(name)
        parts = {"cosine": _units(made.cosine), "sine": _units(made.sine)}
        entries[name] = {"error": float(f"{made.error:.2g}"), "constant": round(made.constant / _UNIT), **parts}
    for name, wanted in EVEN_TARGETS.items():
        even = wanted.fit(name)
        parts = {"frequencies": even.frequencies.tolist(), "coefficients": _units(even.coefficients)}
        entries[_EVEN + name] = {"error": float(f"{even.error:.2g}"), "constant": round(even.constant / _UNIT), **parts}
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
    _STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def _units(numbers: Tensor) -> list[int]:
    return (numbers / _UNIT).round().long().tolist()


def rounding(function: Fit, fraction: int) -> float:
    """How far ``evaluate`` may be from the sum itself: each of its 2 * modes products has two factors rounded.

    With |cos| + |sin| <= sqrt 2, halves of a unit add up to modes / sqrt 2 units of the public factors and to
    sqrt(modes) norm / sqrt 2 of the dealt ones.
    """
    return (function.modes + math.sqrt(function.modes) * function.norm) * 2.0**-fraction / math.sqrt(2)


if __name__ == "__main__":
    store()
