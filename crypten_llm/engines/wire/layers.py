"""What a decoder layer does beside attention, on engine ``wire``: embedding, linear layers, norms, SwiGLU, residuals.

Owns these operations, each with what is declared of it (``operations``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.wire.handles import (
    Handle,
    Normed,
    OneHot,
    Scaled,
    Weight,
    add_bias,
    alike,
    awaited,
    lifted,
    narrow,
    settle,
    value,
    whole_wire,
)
from crypten_llm.engines.wire.numbers import ROW_BITS, SQUARES_BITS, SQUARES_SEGMENTS, WireConfig
from crypten_llm.engines.wire.operations import Domain, operation, unit
from crypten_llm.protocols import fits, products, smooth
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret, as_secret
from crypten_llm.protocols.smooth import normalize

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.insecure.tracked import Tracked, TrackedEngine


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _l1(x: torch.Tensor) -> float:
    """The largest sum of magnitudes along the last dimension."""
    return x.abs().sum(-1).max().item()


def _embedded(engine: TrackedEngine, out: Tracked, one_hot: Tracked, weight: Tracked) -> float:
    """The table's rounding."""
    return unit(engine.config.weight + 1)


@operation(bound=_embedded)
def embed(engine: WireEngine, one_hot: OneHot, weight: Weight) -> Protocol[Secret]:
    """Error: half a unit of the table. Cost: ``products.lookup``'s."""
    matrix = yield from engine.matrix(weight)
    return (yield from products.lookup(engine.runtime, one_hot.ids, one_hot.count, matrix, bits=6))


def linear_bound(c: WireConfig, x: torch.Tensor, weight: torch.Tensor) -> float:
    """One unit of x at the weights' scale, and the weights' rounding."""
    return unit(c.weight) * _l1(weight) + unit(c.weight + 1) * _l1(x)


def linear_of_norm_bound(
    c: WireConfig, row: torch.Tensor, root: torch.Tensor, folded: torch.Tensor, whole: bool
) -> float:
    """As ``linear_bound`` for unit rows by W * gamma * sqrt(H), ``folded``; the root rounded to the activations' scale,
    and multiplied into the product, itself rounded, or before it (``whole``).
    """
    f, top = c.activation + round(torch.tensor(float(row.shape[-1])).log2().item() / 2), _largest(root)
    rounded = unit(f) * _l1(folded) + unit(c.weight + 1) * (_l1(row) + row.shape[-1] * unit(f))
    if whole:
        slip = (unit(f) * (top + 1) + unit(ROW_BITS) * (_largest(row) + unit(f))) * _l1(folded)
        return slip + unit(c.weight + 1) * (top * _l1(row) + 1)
    product = _largest(row @ folded.T) + rounded
    return (top + unit(c.activation)) * (rounded + unit(c.activation)) + unit(c.activation) * product


@operation()
def linear(engine: WireEngine, x: Handle, weight: Weight, bias: Weight | None = None) -> Protocol[Secret | Scaled]:
    """Error: a unit of x, half a unit of the weights; after a norm also a unit of the product (``linear_bound``,
    ``linear_of_norm_bound``).

    Cost: 1 round, and one more after a norm.
    """
    c = engine.config
    if isinstance(x, Normed):
        return (yield from _linear_of_norm(engine, x, weight, bias))
    x = yield from value(engine, x)
    (wire,) = yield [narrow(x, c.weight)]
    matrix = yield from engine.matrix(weight)
    out = products.linear(engine.runtime, wire, matrix, c.linear_bits)
    add_bias(engine, out, bias)
    return out


def _linear_of_norm(engine: WireEngine, x: Normed, weight: Weight, bias: Weight | None) -> Protocol[Secret | Scaled]:
    """Unit rows times W * gamma * sqrt(H); the root is multiplied in later, or first where the output is large."""
    c, matrix = engine.config, (yield from engine.matrix(weight, x.gamma, x.size**0.5))
    if weight.shape[0] > 4 * x.size:
        wire = yield from whole_wire(engine, x)
        out = products.linear(engine.runtime, wire, matrix, c.linear_bits)
        add_bias(engine, out, bias)
        return out
    if x.narrow is None:
        (x.narrow,) = yield [narrow(x.unit, x.fraction(c))]
    raw = products.linear(engine.runtime, x.narrow, matrix, c.linear_bits)
    product = Scaled(raw, x, bias)
    x.waiting.append(product)
    return product


def _normed(engine: TrackedEngine, out: Tracked, x: Tracked, weight: Tracked, eps: float, scale: float) -> float:
    """One unit of x, which also turns the norm; the root's fit. Before the norm's weight."""
    c, fit = engine.config, fits.stored("inverse root")
    rms = x.value.square().mean(-1).sqrt().clamp_min(unit(c.activation)).min().item()
    relative = 2 * (fit.error + fits.rounding(fit, 22))
    largest = _largest(out.value)
    return unit(c.activation) / rms * (1 + largest) * 1.1 + relative * largest


@operation(
    bound=_normed,
    domain=Domain("sums of squares of hidden states", lambda c: c.square_sums[0], lambda c: c.square_sums[1]),
)
def rms_norm(engine: WireEngine, x: Handle, weight: Weight, eps: float, scale: float) -> Protocol[Normed]:
    """Error: a unit of x over its root mean square; the root is good to 1e-5. Cost: 3 rounds."""
    runtime, f, hidden = engine.runtime, engine.config.activation, x.shape[-1]
    x = yield from value(engine, x)
    (wire,) = yield [lifted(x, f)]
    x.become(as_secret(runtime, wire))  # the opening lifted the residual too
    top, segments = SQUARES_BITS, SQUARES_SEGMENTS
    total = products.sum_of_squares(runtime, wire, bits=top - 2 * f)
    total.share = runtime.plus(total.share, round(eps * hidden * 2**total.scale))
    (square,) = yield [Opening(total, ring=top + 1, function=True)]
    scaled, power = normalize(runtime, square, top, segments, [2**k for k in range(segments)])
    unit_wire, power_wire = yield [Opening(scaled, ring=top + 1, function=True), Opening(power)]
    root = smooth.evaluate(runtime, unit_wire, fits.stored("inverse root"), fraction=22, bits=2)
    row = products.multiply(runtime, wire, power_wire, scale=top // 2, bits=1)  # of norm below one
    return Normed(row, root, weight)


def _activated(engine: TrackedEngine, out: Tracked, gate: Tracked, up: Tracked) -> float:
    """The fit of silu, one unit of its value at 16 bits, and one of ``up``."""
    c, fit = engine.config, fits.stored("silu")
    slip = fit.error + fits.rounding(fit, 22) + unit(16)
    silu = torch.nn.functional.silu(gate.value)
    return slip * (_largest(up.value) + unit(c.activation + 2)) + unit(c.activation + 2) * _largest(silu)


@operation(
    bound=_activated, domain=Domain("gates", lambda c: fits.stored("silu").low, lambda c: fits.stored("silu").high)
)
def swiglu(engine: WireEngine, gate: Handle, up: Handle) -> Protocol[Secret]:
    """Error: the fit's, and a unit of 16 bits of silu and of ``up``. Cost: 2 rounds, and one where they wait."""
    runtime, f, function = engine.runtime, engine.config.activation + 2, fits.stored("silu")
    for x in (gate, up):
        if (normed := awaited(x)) is not None:
            yield from settle(engine, normed, f, ROW_BITS)
    gate, up = (yield from value(engine, gate)), (yield from value(engine, up))
    gate_wire, up_wire = yield [Opening(gate, ring=gate.scale + function.period, function=True), lifted(up, f)]
    activated = smooth.evaluate(runtime, gate_wire, function, fraction=22, bits=5)
    half = activated.scale - gate.scale - 1  # x / 2, valid where the gate's share is
    whole = Secret(
        activated.share + (gate.share << half), activated.scale, min(activated.width, gate.width + half), activated.bits
    )
    (whole_wire,) = yield [lifted(whole, 16)]
    return products.multiply(runtime, whole_wire, up_wire, bits=engine.config.linear_bits + 1)


def sum_of_two(engine: WireEngine, x: Secret, y: Secret, bits: int) -> Protocol[Secret]:
    """x + y below 2^bits."""
    x, y = yield from alike(engine, [x, y], bits, "add")
    return Secret(x.share + y.share, x.scale, min(x.width, y.width), bits)


def summed(engine: TrackedEngine, out: Tracked, x: Tracked, y: Tracked) -> torch.Tensor:
    """None but the terms' own."""
    return x.error + y.error


@operation(bound=summed)
def residual(engine: WireEngine, x: Handle, y: Handle) -> Protocol[Secret]:
    """As ``add``; the hidden state is declared below 2^residual_bits, however many layers are added up."""
    x, y = (yield from value(engine, x)), (yield from value(engine, y))
    return (yield from sum_of_two(engine, x, y, min(engine.config.residual_bits, max(x.bits, y.bits) + 1)))
