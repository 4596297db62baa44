"""Arithmetic of eviction policies on engine ``wire``: sums, public coefficients, products and functions.

Owns the operations of ``eviction.operations`` that neither compare nor move rows, each with what is declared of it
(``operations``). "Local" ones send nothing where the shares' ring has room for the result; else one opening moves x to
64 bits. Shapes are those of ``eviction.operations.Operations``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.wire.handles import Handle, Picks, lifted, roomy, value
from crypten_llm.engines.wire.layers import sum_of_two, summed
from crypten_llm.engines.wire.numbers import ENOUGH, FACTOR, as_units, bits_for, times
from crypten_llm.engines.wire.operations import Domain, operation, unit
from crypten_llm.protocols import fits, lookup, products, smooth
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.ladder import normalized
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.insecure.tracked import Tracked, TrackedEngine


# Local: linear with public coefficients.


def rounding(value: torch.Tensor, bits: int) -> torch.Tensor:
    """How far float64 numbers are from multiples of 2^-bits."""
    return (value - (value * 2.0**bits).round() / 2.0**bits).abs()


def _gained(out: Tracked, x: Tracked) -> int:
    """Fractional bits of the public factor."""
    return out.secret.scale - x.secret.scale


@operation(bound=lambda engine, out, value: rounding(value.double(), out.secret.scale))
def public(engine: WireEngine, value: torch.Tensor) -> Secret:
    """Error: none for multiples of 2^-16, else half of that. Cost: none."""
    units, fraction = as_units(value, FACTOR)
    return lookup.public(engine.runtime, units, fraction, bits_for(value.abs().max().item()) + 1)


@operation(bound=summed)
def add(engine: WireEngine, x: Handle, y: Handle) -> Protocol[Secret]:
    """Error: none. Cost: none where the result fits their ring; else 1 round, see ``roomy``."""
    x, y = (yield from value(engine, x)), (yield from value(engine, y))
    return (yield from sum_of_two(engine, x, y, max(x.bits, y.bits) + 1))


def _scaled(engine: TrackedEngine, out: Tracked, x: Tracked, factor: float | torch.Tensor) -> torch.Tensor:
    factor = torch.as_tensor(factor, dtype=torch.float64)
    return factor.abs() * x.error + (x.value.abs() + x.error) * rounding(factor, _gained(out, x))


@operation(bound=_scaled)
def scale(engine: WireEngine, x: Handle, factor: float | torch.Tensor) -> Protocol[Secret]:
    """Error: none for factors that are multiples of 2^-16, else 2^-17 of x, or more where x has little room left.

    Cost: none where the result fits x's ring; else 1 round, see ``roomy``.
    """
    x, factor = (yield from value(engine, x)), torch.as_tensor(factor, dtype=torch.float64)
    growth = bits_for(factor.abs().max().item())
    x, units, fraction = yield from _with_units(engine, x, factor, growth, "scale")
    return Secret(times(x.share, units), x.scale + fraction, x.width, x.bits + growth)


@operation(bound=lambda engine, out, x, dim: x.error.sum(dim))
def total(engine: WireEngine, x: Handle, dim: int) -> Protocol[Secret]:
    """Error: none. Cost: none where the result fits x's ring; else 1 round, see ``roomy``."""
    x = yield from value(engine, x)
    growth = bits_for(x.shape[dim])
    x = yield from roomy(engine, x, growth, "total")
    return Secret(x.share.sum(dim), x.scale, x.width, x.bits + growth)


def _transformed(engine: TrackedEngine, out: Tracked, x: Tracked, matrix: torch.Tensor) -> torch.Tensor:
    matrix = matrix.double()
    return x.error @ matrix.abs() + (x.value.abs() + x.error) @ rounding(matrix, _gained(out, x))


@operation(bound=_transformed)
def transform(engine: WireEngine, x: Handle, matrix: torch.Tensor) -> Protocol[Secret]:
    """Error and Cost: as ``scale``, with the largest column sum of magnitudes as the factor."""
    x, matrix = (yield from value(engine, x)), matrix.double()
    growth = bits_for(matrix.abs().sum(0).max().item())
    one_hot = isinstance(x, Picks) and _is_one_hot(matrix)
    growth = 0 if one_hot else growth
    x, units, fraction = yield from _with_units(engine, x, matrix, growth, "transform")
    shape = (*x.shape[:-1], matrix.shape[1])

    def turned(t: torch.Tensor) -> torch.Tensor:
        if t.is_meta:
            return shape_only(shape)
        return engine.runtime.kernels.matmul_nn(t.reshape(-1, t.shape[-1]), units).view(shape)

    made = (Picks if one_hot else Secret)(turned(x.share), x.scale + fraction, x.width, x.bits + growth)
    if one_hot and x.opened is not None:
        made.opened = x.opened.map(turned)
    return made


@operation(bound=lambda engine, out, x, limit: x.error)
def within(engine: WireEngine, x: Handle, limit: float) -> Protocol[Secret]:
    """Error: none. Cost: none."""
    x = yield from value(engine, x)
    return type(x)(x.share, x.scale, x.width, min(x.bits, bits_for(limit) + 1))


def _with_units(
    engine: WireEngine, x: Secret, factor: torch.Tensor, growth: int, what: str
) -> Protocol[tuple[Secret, torch.Tensor, int]]:
    """x with room for the product, the factor's integers and their fractional bits."""
    room = x.width - (x.bits + growth + x.scale + 2) - 2
    units, fraction = as_units(factor, FACTOR if room < ENOUGH else min(FACTOR, room))
    return (yield from roomy(engine, x, growth + fraction, what)), engine.runtime.moved(units), fraction


def _is_one_hot(matrix: torch.Tensor) -> bool:
    return bool(((matrix == 0) | (matrix == 1)).all() and (matrix.sum(1) <= 1).all())


# Two secrets, and functions.


def _multiplied(engine: TrackedEngine, out: Tracked, x: Tracked, y: Tracked) -> torch.Tensor:
    """A unit of each factor, times the other."""
    f = engine.config.activation
    one, other = (side.error + (unit(f) if side.secret.scale > f else 0.0) for side in (x, y))
    return x.value.abs() * other + y.value.abs() * one + one * other


@operation(bound=_multiplied)
def multiply(engine: WireEngine, x: Handle, y: Handle) -> Protocol[Secret]:
    """Error: a unit of ``activation`` bits of each factor, times the other.

    Cost: 1 round; each factor in a ring of whole bytes and 128 dealer bits an element; dealer 256 bits for each
    element of the result.
    """
    f = engine.config.activation
    factors = (yield from value(engine, x)), (yield from value(engine, y))
    first, second = yield [Opening(v) if v.width == 64 and v.scale <= f else lifted(v, f) for v in factors]
    return products.multiply(engine.runtime, first, second)


def _sigmoid_bound(engine: TrackedEngine, out: Tracked, x: Tracked) -> torch.Tensor:
    """The fit, and its rounding."""
    fit = fits.stored("sigmoid")
    return x.error / 4 + fit.error + fits.rounding(fit, 22)


@operation(
    bound=_sigmoid_bound,
    domain=Domain("inputs", lambda c: fits.stored("sigmoid").low, lambda c: fits.stored("sigmoid").high),
)
def sigmoid(engine: WireEngine, x: Handle) -> Protocol[Secret]:
    """Error: that of the fit, 3e-6, and ``fits.rounding``. Cost: 1 round; dealer 16 * modes bytes an element."""
    x, fit = (yield from value(engine, x)), fits.stored("sigmoid")
    (wire,) = yield [Opening(x, ring=x.scale + fit.period, function=True)]
    return smooth.evaluate(engine.runtime, wire, fit, fraction=22, bits=1)


def _reciprocal_bound(engine: TrackedEngine, out: Tracked, x: Tracked, low: float, high: float) -> torch.Tensor:
    """A unit of ``activation`` bits of 1 / (2 x 4^k), which is 1/2 or more, with the fit and its rounding."""
    fit, least = fits.stored("reciprocal"), (x.value - x.error).clamp_min(low / 2)
    own = 2.2 * (unit(engine.config.activation) + fit.error + fits.rounding(fit, 22)) / least
    return x.error / (least * x.value.clamp(low, high)) + own


@operation(bound=_reciprocal_bound)
def reciprocal(engine: WireEngine, x: Handle, low: float, high: float) -> Protocol[Secret]:
    """4^k / (x 4^k) with the secret k that brings x to [1/4, 1).

    Error: 2e-4 of the result (a unit of ``activation`` bits of 1 / (2 x 4^k)), beside what x's own unit makes.
    Cost: 3 rounds: x, then x 4^k and 4^k, then the reciprocal; dealer material of ``normalize``, of 10 modes and of
    one product.
    Raises: ValueError unless 0 < low <= high; Overflow when x's ring does not hold ``high``.
    """
    if not 0 < low <= high:
        raise ValueError(f"reciprocal: from {low:g} to {high:g}; give 0 < low <= high")
    x, f, fit = (yield from value(engine, x)), engine.config.activation, fits.stored("reciprocal")
    top = bits_for(high) + x.scale + 1
    if top > x.width - 2 or top < 2:
        raise Overflow(f"reciprocal: values up to {high:g} at scale 2^{x.scale} do not fit a ring of {x.width} bits")
    (wire,) = yield [Opening(x, ring=top + 2, function=True)]
    raw = None if wire.public is None else wire.public.reshape(-1, 1)
    least, kept = max(0, bits_for(low) - 1 + x.scale), min(top, 26)
    mask = wire.mask.held.reshape(-1, 1)
    scaled, power, _ = normalized(engine.runtime, raw, mask, x.shape, top + 2, top, least, kept, base=4)
    doubled = Secret(scaled.share, kept - 1, scaled.width, 1)  # twice x 4^k / 2^top: 1/2 to 2
    size = min(kept - 1 + fit.period, scaled.width)
    unit_wire, power_wire = yield [Opening(doubled, ring=size, function=True), Opening(power, lifted=64)]
    inverse = smooth.evaluate(engine.runtime, unit_wire, fit, fraction=22, bits=2)
    (inverse_wire,) = yield [Opening(inverse, truncate=inverse.scale - f, lifted=64)]
    bits = 2 - bits_for(low)
    return products.multiply(engine.runtime, inverse_wire, power_wire, scale=f + top - 1 - x.scale, bits=bits)
