"""How far each operation of engine ``wire`` may be from ``plain`` on the same inputs.

Owns the declared bounds; ``debug-compare`` holds runs against them. A bound is the sum of what the plan in
``wire_engine`` rounds, each rounding by its largest possible error (one unit of an opening's scale, half a unit of a
constant), so it grows with the inputs it is given: floats as the parties' shares stand for them. It holds inside the
operation's domain only; ``outside`` names what has left it.
"""

import math

import torch

from crypten_llm.engines.wire.numbers import MIXED_BITS, ROOM, ROOT_FRACTIONS, ROW_BITS, SCATTERED, WireConfig
from crypten_llm.protocols import fourier

FLOAT = 2.0**-40  # of shown values, which are the doubles nearest to them


def _unit(bits: int) -> float:
    return 2.0**-bits


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _l1(x: torch.Tensor) -> float:
    """The largest sum of magnitudes along the last dimension."""
    return x.abs().sum(-1).max().item()


def embed(c: WireConfig) -> float:
    """The table's rounding."""
    return _unit(c.weight + 1)


def linear(c: WireConfig, x, weight) -> float:
    """One unit of x at the weights' scale, and the weights' rounding."""
    return _unit(c.weight) * _l1(weight) + _unit(c.weight + 1) * _l1(x)


def linear_of_norm(c: WireConfig, unit, root, folded, whole: bool) -> float:
    """As ``linear`` for unit rows by W * gamma * sqrt(H), ``folded``; the root rounded to the activations' scale, and
    multiplied into the product, itself rounded, or before it (``whole``).
    """
    f, top = c.activation + round(math.log2(unit.shape[-1]) / 2), _largest(root)
    rounded = _unit(f) * _l1(folded) + _unit(c.weight + 1) * (_l1(unit) + unit.shape[-1] * _unit(f))
    if whole:
        slip = (_unit(f) * (top + 1) + _unit(ROW_BITS) * (_largest(unit) + _unit(f))) * _l1(folded)
        return slip + _unit(c.weight + 1) * (top * _l1(unit) + 1)
    product = _largest(unit @ folded.T) + rounded
    return (top + _unit(c.activation)) * (rounded + _unit(c.activation)) + _unit(c.activation) * product


def rms_norm(c: WireConfig, x, expected) -> float:
    """One unit of x, which also turns the norm; the root's fit. Before the norm's weight."""
    rms = x.square().mean(-1).sqrt().clamp_min(_unit(c.activation)).min().item()
    fit = fourier.inverse_root()
    relative = 2 * (fit.error + fourier.rounding(fit, 22))
    return _unit(c.activation) / rms * (1 + _largest(expected)) * 1.1 + relative * _largest(expected)


def rotate(c: WireConfig, x) -> float:
    """The rounding of cosine and sine, and a unit of ``ROOM`` bits of x and of what it is turned with."""
    return _unit(c.rope) * _largest(x) + 2 * _unit(ROOM)


def rows(c: WireConfig) -> float:
    """One unit of a cached number."""
    return _unit(c.key)


def scores(c: WireConfig, keys) -> float:
    """One unit of the query."""
    return _unit(c.activation) * _l1(keys)


def softmax(c: WireConfig, expected, total) -> torch.Tensor:
    """Of each weight, divided by the row's sum: the fit of exp and a unit of 28 bits in each root, where the row's sum
    of exp(s - score_limit) is ``total`` [..., 1]; a unit of ``root`` bits after the row was scaled.
    """
    fit = fourier.exponential()
    slip = (fit.error + fourier.rounding(fit, *ROOT_FRACTIONS) + _unit(28)) / total.sqrt() + 2 * _unit(c.root)
    errors = 2 * expected.sqrt() * slip + slip**2
    return 1.1 * (errors + expected * errors.sum(-1, keepdim=True))


def mix(c: WireConfig, weights, expected) -> float:
    """One unit of the product, and of the reciprocal of the sum that it is divided by, with the reciprocal's fit.

    ``weights`` as they are before they are divided by their sum.
    """
    sums = weights.sum(-1)
    return 1.1 * (_unit(c.activation + 3) / sums.min().item() + inverse_sum() * sums.max().item() * _largest(expected))


def inverse_sum() -> float:
    """Of 1 / sum of a row's weights, relative to a sum of 1, the largest: a unit of ``ROW_BITS`` bits of half of it,
    and the reciprocal's fit."""
    fit = fourier.reciprocal()
    return 2 * (_unit(ROW_BITS) + fit.error + fourier.rounding(fit, 22))


def swiglu(c: WireConfig, gate, up) -> float:
    """The fit of silu, one unit of its value at 16 bits, and one of ``up``."""
    fit = fourier.silu_even()
    slip = fit.error + fourier.rounding(fit, 22) + _unit(16)
    return slip * (_largest(up) + _unit(c.activation + 2)) + _unit(c.activation + 2) * _largest(
        torch.nn.functional.silu(gate)
    )


def residual(c: WireConfig) -> float:
    """None."""
    return 0.0


# Of what policies compute: beside what their inputs' errors become, which ``compare_selection`` follows.


def mass(weights, queries, kept: int, scale: int) -> torch.Tensor:
    """Of sums of weights [G, M, N] by queries [M]: the reciprocal of the row's sum, its unit of ``kept`` bits after it
    was multiplied by the query's weight, and a unit of the result's ``scale``.
    """
    drawn = torch.einsum("gmn,m->gn", weights, queries.abs())
    return 1.1 * (inverse_sum() * drawn + 2 * _unit(kept) * weights.sum(1)) + _unit(scale)


def scattered(expected, count: int) -> torch.Tensor:
    """A unit of ``SCATTERED`` bits of each of ``count`` weights, whose sum is 1/4 or more when they are rounded."""
    return 4 * _unit(SCATTERED) * (1 + count * expected)


def sigmoid() -> float:
    """The fit, and its rounding."""
    fit = fourier.sigmoid()
    return fit.error + fourier.rounding(fit, 22)


def reciprocal(c: WireConfig, expected) -> torch.Tensor:
    """A unit of ``activation`` bits of 1 / (2 x 4^k), which is 1/2 or more, with the fit and its rounding."""
    fit = fourier.reciprocal()
    return 2.2 * (_unit(c.activation) + fit.error + fourier.rounding(fit, 22)) * expected


def domains(c: WireConfig) -> dict[str, tuple[str, float, float]]:
    """What is limited, from where to where, by the operation: beyond, its result is wrong without a word."""
    silu, sigmoid = fourier.silu_even(), fourier.sigmoid()
    return {
        "rms_norm": ("sums of squares of hidden states", *c.square_sums),
        "softmax": ("attention scores", c.score_limit - 36, c.score_limit),
        "softmax of a row": ("logarithms of a row's sum of exp(score)", *c.row_logarithms),
        "mix": ("mixed values of attention", -(2.0**MIXED_BITS), 2.0**MIXED_BITS),
        "swiglu": ("gates", silu.low, silu.high),
        "sigmoid": ("inputs", sigmoid.low, sigmoid.high),
    }


def outside(c: WireConfig, operation: str, seen: torch.Tensor) -> str:
    """What has left the domain of ``operation``, a key of ``domains``, or nothing.

    seen: what is limited there: of rms_norm sum x^2 + eps H, of softmax the scores without those masked, of its rows
    log(sum exp(s)), of mix its results, of others their inputs.
    """
    what, low, high = domains(c).get(operation, ("inputs", -math.inf, math.inf))
    least, most = seen.min().item(), seen.max().item()
    if low <= least and most <= high:
        return ""
    return f"{what} from {least:.3g} to {most:.3g}, its domain is {low:.3g} to {high:.3g}"
