"""Kernels to read: trigonometric sums in Python's numbers (``kernels.reference``).

Floats are those of the compiled loops, operation by operation: the last bit counts.
"""

import math
from collections.abc import Iterator

from torch import Tensor

from crypten_llm.kernels.integers import as_words, integers, signed

_SINE = [  # of fdlibm, k_sin.c and k_cos.c: x + x^3 (S1 + ...), 1 - x^2 (1/2 - x^2 (C1 + ...)), the highest power first
    1.58969099521155010221e-10,
    -2.50507602534068634195e-08,
    2.75573137070700676789e-06,
    -1.98412698298579493134e-04,
    8.33333333332248946124e-03,
    -1.66666666666666324348e-01,
]
_COSINE = [
    -1.13596475577881948265e-11,
    2.08757232129817482790e-09,
    -2.75573143513906633035e-07,
    2.48015872894767294178e-05,
    -1.38888888888741095749e-03,
    4.16666666666666019037e-02,
]


def _horner(coefficients: list[float], z: float) -> float:
    total = coefficients[0]
    for coefficient in coefficients[1:]:
        total = coefficient + z * total
    return total


def _cos_sin(m: int, shift: int) -> tuple[float, float]:
    """cos and sin of m 2^shift / 2^64 turns."""
    turn = m * 2**shift % 2**64
    quarter = (turn + 2**61) % 2**64 // 2**62
    x = float(signed(turn - quarter * 2**62)) * (2 * math.pi / 2.0**64)
    z = x * x
    sine, cosine = x + x * z * _horner(_SINE, z), 1.0 - z * (0.5 - z * _horner(_COSINE, z))
    return [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)][quarter]


def _multiples(m: int, shift: int, modes: int) -> Iterator[tuple[float, float]]:
    """cos and sin of 1 .. modes times the angle, each from the one before."""
    first = c, s = _cos_sin(m, shift)
    for _ in range(modes):
        yield c, s
        c, s = c * first[0] - s * first[1], s * first[0] + c * first[1]


def waves(mask: Tensor, shift: int, scale: float, modes: int) -> Tensor:
    columns = []
    for m in integers(mask):
        cosines, sines = [], []
        for c, s in _multiples(m, shift, modes):
            cosines.append(round(scale * c))
            sines.append(round(scale * s))
        columns.append(cosines + sines)
    return as_words((column[row] for row in range(2 * modes) for column in columns), (2 * modes, mask.numel()))


def combine(
    opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor, shares: Tensor, constant: int
) -> Tensor:
    modes, rows, results = len(cosine), shares.tolist(), []
    for i, m in enumerate(integers(opened)):
        total = constant
        for j, (c, s) in enumerate(_multiples(m, shift, modes)):
            a, b = cosine[j].item(), sine[j].item()
            total += round(scale * (a * c + b * s)) * rows[j][i]
            total += round(scale * (a * s - b * c)) * rows[modes + j][i]
        results.append(total)
    return as_words(results, (len(results),))


def coefficients(opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor) -> Tensor:
    modes, columns = len(cosine), []
    for m in integers(opened):
        waves = list(zip(_multiples(m, shift, modes), cosine.tolist(), sine.tolist(), strict=True))
        first = [round(scale * (a * c + b * s)) for (c, s), a, b in waves]
        columns.append(first + [round(scale * (a * s - b * c)) for (c, s), a, b in waves])
    return as_words((column[row] for row in range(2 * modes) for column in columns), (2 * modes, opened.numel()))


# Frequencies of one's own.


def cosines(mask: Tensor, shift: int, frequencies: Tensor, scales: Tensor) -> Tensor:
    values, scale = integers(mask), scales.tolist()
    pairs = [[_cos_sin(k * m, shift) for m in values] for k in integers(frequencies)]
    numbers = [round(scale[j] * pair[part]) for j, row in enumerate(pairs) for part in (0, 1) for pair in row]
    return as_words(numbers, (len(frequencies), 2, len(values)))


def add_cosines(
    opened: Tensor, shift: int, frequencies: Tensor, coefficients: Tensor, ups: Tensor, shares: Tensor, constant: int
) -> Tensor:
    modes = zip(integers(frequencies), coefficients.tolist(), integers(ups), shares.tolist(), strict=True)
    totals = [constant] * opened.numel()
    for k, a, up, (cosine, sine) in modes:
        for i, m in enumerate(integers(opened)):
            c, s = _cos_sin(k * m, shift)
            totals[i] += (round(a * c) * cosine[i] + round(a * s) * sine[i]) * 2**up
    return as_words(totals, (len(totals),))
