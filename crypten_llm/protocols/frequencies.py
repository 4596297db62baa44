"""Fits of even functions by a few cosines whose frequencies are free.

Owns the search. A value opened modulo 2^n is M = x + r with any integer multiple of its angle 2 pi / 2^n as good as
the first: cos(k w (M - r)) needs shares of cos(k w r) and sin(k w r) for that k alone. So the frequencies are found
together with the coefficients, and the period, far longer than the domain, imposes nothing: half as many cosines
reach the same error as a series of multiples of one frequency.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PERIOD = 14  # of the argument, in bits: frequencies are whole turns in 2^PERIOD of it
_TURN = 2 * math.pi / 2.0**PERIOD
_GRID = 600
_STEPS = 200  # of the search, for one number of frequencies that are whole
_KEPT = 8  # sets of frequencies, some of them rounded
_LONGEST = 150.0  # a step of a frequency
_SHARPEN = 0.7  # how fast weights go where the error is large


@dataclass(frozen=True)
class CosineFit:
    """An even f(x) for |x| <= high as constant + sum over j of a_j cos(k_j w x), w = 2 pi / 2^period.

    frequencies: integers k, int64 [modes]. coefficients: a, float64 [modes], the largest first. error: largest
    deviation on the domain, measured on a fine grid.
    """

    name: str
    high: float
    constant: float
    frequencies: Tensor
    coefficients: Tensor
    error: float
    period: int = PERIOD

    @property
    def modes(self) -> int:
        return len(self.frequencies)

    def __call__(self, x: Tensor) -> Tensor:
        """The sum in floating point: the plaintext twin."""
        return (
            self.constant
            + _angles(x.double() * 2.0 ** (PERIOD - self.period), self.frequencies).cos() @ self.coefficients
        )


def _angles(x: Tensor, frequencies: Tensor) -> Tensor:
    """[...] to [..., modes]."""
    return x[..., None] * frequencies * _TURN


def search(name: str, function: Callable[[Tensor], Tensor], high: float, modes: int) -> CosineFit:
    """The fit of an even function on |x| <= high by ``modes`` cosines with the least largest error that is found.

    Two modes are tried first, near odd multiples of half a period of the domain; from the best of those three, and so
    on. Each time Gauss and Newton's steps (on the frequencies, the coefficients being those of least squares) go hand
    in hand with Lawson's weights, which grow where the error is large, until it is as large everywhere. At last the
    frequencies become whole, the slowest first: those near what was found are tried, the others sought again, and the
    ``_KEPT`` best go on. Nothing is drawn: the same machine finds the same fit.

    Source: variable projection (Golub and Pereyra, 1973, with Kaufman's step of 1975); weights of Lawson (1961).
    """
    # The half of the nodes of Chebyshev that a function which is even needs.
    x = high * torch.linspace(0, math.pi / 2, _GRID, dtype=torch.float64).cos()
    y = function(x)
    spacing = 0.95 * 2.0**PERIOD / (2 * high)
    found = torch.tensor([spacing, 3 * spacing], dtype=torch.float64)
    while True:
        _, found = _improve(x, y, found, 0)
        if len(found) == modes:
            break
        found = 0.97 * found  # more modes are denser ones
        found = torch.cat([found, (2 * found[-1] - found[-2])[None]])
    kept = [found]
    for whole in range(modes):
        tried = [_improve(x, y, start, whole + 1) for found in kept for start in _rounded(found, whole)]
        kept = [found for _, found in sorted(tried, key=lambda pair: pair[0])[:_KEPT]]
    weights = torch.full_like(x, 1 / len(x))
    least, solution = math.inf, torch.empty(0)
    for _ in range(_STEPS):
        _, tried_now, error = _solve(x, y, kept[0], weights)
        if error.abs().max() < least:
            solution, least = tried_now, error.abs().max().item()
        weights = _sharpened(weights, error)
    made = CosineFit(name, high, solution[0].item(), kept[0].long(), solution[1:], 0.0)
    fine = torch.linspace(0, high, 20 * _GRID, dtype=torch.float64)
    return replace(made, error=(made(fine) - function(fine)).abs().max().item())


def _rounded(frequencies: Tensor, place: int) -> list[Tensor]:
    """The same with whole numbers at ``place``: two above and two below."""
    tried = frequencies.repeat(4, 1)
    tried[:, place] = frequencies[place].floor() + torch.arange(-1.0, 3.0)
    return list(tried)


def _improve(x: Tensor, y: Tensor, start: Tensor, whole: int) -> tuple[float, Tensor]:
    """The least largest error, and the frequencies that have it; the first ``whole`` of them stay."""
    weights = torch.full_like(x, 1 / len(x))
    best, least, damping, now = start, math.inf, 1e-2, start.clone()
    for _ in range(_STEPS):
        basis, solution, error = _solve(x, y, now, weights)
        if error.abs().max() < least:
            best, least = now.clone(), error.abs().max().item()
        if whole < len(now):
            now, error, damping = _step(x, y, now, weights, (basis, solution, error), damping, whole)
        weights = _sharpened(weights, error)
    return least, best


def _step(
    x: Tensor,
    y: Tensor,
    now: Tensor,
    weights: Tensor,
    solved: tuple[Tensor, Tensor, Tensor],
    damping: float,
    whole: int,
) -> tuple[Tensor, Tensor, float]:
    """One damped step of the frequencies that are free, what its errors are, and how to damp the next."""
    basis, solution, error = solved
    root = weights.sqrt()[:, None]
    slopes = -_angles(x, now).sin() * x[:, None] * _TURN * solution[1:]
    slopes = slopes[:, whole:] * root
    orthogonal, _ = torch.linalg.qr(basis * root)
    slopes = slopes - orthogonal @ (orthogonal.T @ slopes)  # what the coefficients cannot make up for
    gram, right = slopes.T @ slopes, slopes.T @ (error * root[:, 0])
    before = (weights * error * error).sum()
    for _ in range(10):
        step = -torch.linalg.solve(gram + damping * gram.diagonal().diag(), right)
        if step.abs().max() < _LONGEST:
            moved = now.clone()
            moved[whole:] += step
            _, _, after = _solve(x, y, moved, weights)
            if (weights * after * after).sum() <= before:
                return moved, after, max(damping / 3, 1e-6)
        damping *= 4
    return now, error, damping


def _solve(x: Tensor, y: Tensor, frequencies: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The basis [points, 1 + modes], the coefficients of weighted least squares, and their errors."""
    basis = torch.cat([torch.ones(len(x), 1, dtype=torch.float64), _angles(x, frequencies).cos()], 1)
    root = weights.sqrt()[:, None]
    solution = torch.linalg.lstsq(basis * root, (y * root[:, 0])[:, None], driver="gelsd").solution[:, 0]
    return basis, solution, basis @ solution - y


def _sharpened(weights: Tensor, error: Tensor) -> Tensor:
    made = weights * (error.abs() / error.abs().max() + 1e-4) ** _SHARPEN
    return made / made.sum()
