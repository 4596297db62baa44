"""What a decoder layer does beside attention, on engine ``wire``: embedding, linear layers, norms, SwiGLU, residuals.

Owns these operations, each with what is declared of it (``operations``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.wire.handles import Handle, Normed, OneHot, Weight, add_bias, alike, at, value
from crypten_llm.engines.wire.operations import Domain, operation, unit
from crypten_llm.protocols import embedding, products
from crypten_llm.protocols.activation import activate
from crypten_llm.protocols.norm import ROOT, unit_rows
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret

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
    return unit(engine.config.hidden + 1)


@operation(bound=_embedded)
def embed(engine: WireEngine, one_hot: OneHot, weight: Weight) -> Protocol[Secret]:
    """Error: half a unit of the table. Cost: ``embedding.look_up``'s."""
    table = yield from engine.table(weight)
    asked = one_hot.bits, one_hot.count, table, engine.sketches, one_hot.points
    return (yield from embedding.look_up(engine.runtime, *asked))


def linear_bound(scale: int, weight_scale: int, x: torch.Tensor, weight: torch.Tensor) -> float:
    """One unit of x, and the weights' rounding."""
    return unit(scale) * _l1(weight) + unit(weight_scale + 1) * (_l1(x) + x.shape[-1] * unit(scale))


@operation()
def linear(engine: WireEngine, x: Handle, weight: Weight, bias: Weight | None = None) -> Protocol[Secret]:
    """Error: a unit of x, and half a unit of the weights (``linear_bound``).

    Cost: none after a norm; else 1 round, x in a ring of ``attended_width`` or ``product_width`` bits.
    """
    c = engine.config
    if isinstance(x, Normed):
        matrix = yield from engine.matrix(weight, x.gamma)
        out = products.linear(engine.runtime, x.wire, matrix, c.bits_of(weight.name))
    else:
        x = yield from value(engine, x)
        scale, width = c.input_of(weight.name)
        (wire,) = yield [Opening(x, max(0, x.scale - scale), ring=width + max(0, x.scale - scale))]
        matrix = yield from engine.matrix(weight)
        out = products.linear(engine.runtime, wire, matrix, c.hidden_bits, dropped=wire.scale + matrix.scale - c.hidden)
    add_bias(engine, out, bias)
    return out


def _normed(engine: TrackedEngine, out: Tracked, x: Tracked, weight: Tracked, eps: float, scale: float) -> torch.Tensor:
    """Before the norm's weight, ``norm.unit_rows``'s; one unit of x, which also turns the norm."""
    c, size = engine.config, x.value.shape[-1]
    length = (x.value.square().sum(-1, keepdim=True) + eps * size).sqrt()
    moved = unit(c.hidden) / length * 1.1 if x.secret.scale > c.hidden else torch.zeros_like(length)
    own = 1.1 + 2.0 ** (c.row - ROOT - c.hidden_bits) * x.value.abs()
    return size**0.5 * (moved * (1 + out.value.abs()) + own * unit(c.row))


@operation(
    bound=_normed,
    domain=Domain("sums of squares of hidden states", lambda c: 0.0, lambda c: c.square_sums),
)
def rms_norm(engine: WireEngine, x: Handle, weight: Weight, eps: float, scale: float) -> Protocol[Normed]:
    """Of hidden states, and of heads, which no linear layer takes.

    Error: ``norm.unit_rows``'s in units of ``row`` bits, and a unit of ``hidden`` bits of x where it has more of them.
    Cost: ``norm.unit_rows``'s, and 1 round.
    """
    c = engine.config
    x = yield from value(engine, x)
    given = at(engine, x, c.hidden)
    given = Secret(given.share, c.hidden, min(given.width, c.hidden_width), min(given.bits, c.hidden_bits))
    width = weight.width or c.rotated_width
    found = yield from unit_rows(engine.runtime, given, eps, c.hidden_bits, c.row, width)
    if x.width < c.hidden_width:
        x.become(found.lifted)
    engine.checks.note(found.beyond)
    (wire,) = yield [Opening(found.unit)]
    return Normed(wire, weight)


def _activated(engine: TrackedEngine, out: Tracked, gate: Tracked, up: Tracked) -> float:
    """The fit of silu, one unit of its value at ``silu`` bits, and one of ``up``."""
    c = engine.config
    silu = torch.nn.functional.silu(gate.value)
    slip = c.gate.error + unit(c.silu)
    return slip * (_largest(up.value) + unit(c.up)) + unit(c.up) * _largest(silu)


@operation(
    bound=_activated,
    gates=Domain("gates", lambda c: -c.gate.bound(c.gates), lambda c: c.gate.bound(c.gates)),
    up=Domain("what gates are multiplied with", lambda c: -(2.0**c.up_bits), lambda c: 2.0**c.up_bits),
)
def swiglu(engine: WireEngine, gate: Handle, up: Handle) -> Protocol[Secret]:
    """Error: ``activation.activate``'s, a unit of ``silu`` bits of silu and one of ``up`` bits of ``up``.

    Cost: 3 rounds.
    """
    runtime, c = engine.runtime, engine.config
    gate, up = (yield from value(engine, gate)), (yield from value(engine, up))
    width = c.gated_width
    up_drop, up = up.scale - c.up, Secret(up.share, up.scale, up.width, min(up.bits, c.up_bits))
    running = engine.rounds.start(_opened(Opening(up, up_drop, ring=c.up + c.up_bits + 2 + up_drop, lifted=width)))
    half = Secret(gate.share, gate.scale + 1, gate.width, gate.bits)  # the same integers, read as gate / 2
    activated, _ = yield from activate(runtime, half, c.gate, c.gates)
    drop = activated.scale - c.silu
    (wire,) = yield [Opening(activated, drop, lifted=width)]
    assert running.is_done, "up was opened with the gate"
    return products.multiply(runtime, wire, running.result, dropped=c.silu + c.up - c.product)


def _opened(opening: Opening) -> Protocol:
    (wire,) = yield [opening]
    return wire


def sum_of_two(engine: WireEngine, x: Secret, y: Secret, bits: int) -> Protocol[Secret]:
    """x + y below 2^bits."""
    x, y = yield from alike(engine, [x, y], bits, "add")
    return Secret(x.share + y.share, x.scale, min(x.width, y.width), bits)


def summed(engine: TrackedEngine, out: Tracked, x: Tracked, y: Tracked) -> torch.Tensor:
    """None but the terms' own."""
    return x.error + y.error


def _carried(engine: TrackedEngine, out: Tracked, x: Tracked, y: Tracked) -> torch.Tensor:
    """A unit of ``hidden`` bits of what has more of them."""
    f = engine.config.hidden
    return x.error + y.error + unit(f) * sum(side.secret.scale > f for side in (x, y))


@operation(
    bound=_carried, domain=Domain("hidden states", lambda c: -(2.0**c.hidden_bits), lambda c: 2.0**c.hidden_bits)
)
def residual(engine: WireEngine, x: Handle, y: Handle) -> Protocol[Secret]:
    """x + y in the ring of hidden states. Error: a unit of ``hidden`` bits. Cost: none."""
    c = engine.config
    x = at(engine, (yield from value(engine, x)), c.hidden)
    y = at(engine, (yield from value(engine, y)), c.hidden)
    return Secret(x.share + y.share, c.hidden, min(x.width, y.width, c.hidden_width), c.hidden_bits)
