"""The settings of engine ``crypten``, the ranges in which its functions are right with them, and how a model is held
against these.

Owns ``CryptenConfig``, ``domains``, and the public scales that bring hidden states into a norm's range. CrypTen itself
checks nothing: beyond, its exponential, reciprocal and inverse root give some other number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crypten_llm.engines.domain import Calibration, Limit, Reached

if TYPE_CHECKING:
    from crypten_llm.session.calibration import Ranges

MASKED = 64.0  # subtracted from scores that may not be seen: exp(-64) is below any unit, and exp is wild below -512
LONGEST = 2**14  # scores of a row: z / sqrt(N), z in [1, N], is where ten steps of the reciprocal are good to 1e-4
INVERSE_ROOT = (0.043, 173.0)  # where five steps of it are good to 1e-4
TARGET = 2.7  # the middle of that on a logarithmic scale


@dataclass(frozen=True)
class CryptenConfig:
    """Settings that change results.

    precision_bits: fractional bits f of every secret. CrypTen's truncation is wrong by 2^(64-2f) with probability
        |x| 2^(2f-64) an element, so fewer bits trade resolution for rarer wild values.
    exp_iterations: k squarings of exp(x) = (1 + x / 2^k)^(2^k). Relative error x^2 / 2^(k+1) from the limit and
        2^k u from the rounding of x / 2^k: the sum is least near k = f / 2, which 0 stands for.
    rsqrt_iterations: Newton steps of the inverse square root; 5 are good to 1e-4 on [0.043, 173].
    reciprocal_iterations: Newton steps of the softmax denominator's reciprocal; 10 are good to 1e-4 on [0.0011, 254].
    """

    precision_bits: int = 15
    exp_iterations: int = 0
    rsqrt_iterations: int = 5
    reciprocal_iterations: int = 10

    @property
    def squarings(self) -> int:
        """k."""
        return self.exp_iterations or self.precision_bits // 2


def domains(config: CryptenConfig) -> dict[str, Limit]:
    """What is limited, by what the owner measures (``session.calibration``).

    Inside, each function's error is what the engine's method declares. exp(x) is wild from x = -2^(k + 1) on, and no
    better than 1 + x / 2^k allows from -2^k on.
    """
    exponents, products = 2.0**config.squarings, 2.0 ** (62 - 2 * config.precision_bits)
    return {
        "rms_norm": Limit("scaled mean squares of hidden states", *INVERSE_ROOT),
        "softmax below": Limit("attention scores less the largest of their row", -exponents, 0.0),
        "softmax hidden": Limit("masked attention scores less the largest seen", -math.inf, MASKED),
        "swiglu gates": Limit("gates", -exponents, exponents),
        "swiglu product": Limit("gates times what they are multiplied with", -products, products),
        "linear": Limit("results of linear layers", -products, products),
        "residual": Limit("hidden states", -products, products),
    }


def calibrate(config: CryptenConfig, ranges: Ranges) -> Calibration:
    """The norms' scales, and what numbers then reach."""
    scales = norm_scales(ranges)
    scaled = [scales[name] * mean_square for name, range in ranges.mean_square.items() for mean_square in range]
    seen = {**ranges.limited, "rms_norm": (_least(scaled), -_least([-value for value in scaled]))}
    reached = [Reached(limit, *seen[name]) for name, limit in domains(config).items() if name in seen]
    return Calibration("crypten", scales, reached)


def norm_scales(ranges: Ranges) -> dict[str, float]:
    """A power of four for each norm weight's name, such that scale * mean(x^2) is near ``TARGET``."""
    return {name: _scale(*range) for name, range in ranges.mean_square.items()}


def _least(values: list[float]) -> float:
    """The least of them, and no number where one is none."""
    return math.nan if any(math.isnan(value) for value in values) else min(values)


def _scale(low: float, high: float) -> float:
    middle = math.sqrt(max(low, 1e-12) * max(high, 1e-12))
    if not 0 < middle < math.inf:
        return 1.0  # the model is refused
    return 4.0 ** round(math.log(TARGET / middle, 4))  # its root is what multiplies the hidden states
