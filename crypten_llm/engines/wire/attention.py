"""Attention on engine ``wire``: rotated queries against cached keys, softmax, and the values that it mixes.

Owns these operations, each with what is declared of it (``operations``), and the cached rows that they read. ``mass``
is for eviction policies (``eviction.operations``), and reads what ``mix`` has opened.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.wire.handles import (
    Change,
    Handle,
    Picks,
    Rows,
    Weights,
    alike,
    lifted,
    lifted_from_bytes,
    narrow,
    roomy,
    value,
)
from crypten_llm.engines.wire.numbers import (
    DRAWN,
    FACTOR,
    MIXED_BITS,
    ROOM,
    ROOT_FRACTIONS,
    ROW_BITS,
    SPREAD_BITS,
    SPREAD_SEGMENTS,
    as_units,
    bits_for,
    times,
)
from crypten_llm.engines.wire.operations import Domain, operation, unit
from crypten_llm.kernels import ring
from crypten_llm.protocols import fits, products, smooth
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire, as_secret, joined
from crypten_llm.protocols.smooth import normalize

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.insecure.tracked import Tracked, TrackedEngine


def _rotated(engine: TrackedEngine, out: Tracked, x: Tracked, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rounding of cosine and sine, and a unit of ``ROOM`` bits of x and of what it is turned with."""
    return unit(engine.config.rope) * x.value.abs().max() + 2 * unit(ROOM)


@operation(bound=_rotated)
def rotate(engine: WireEngine, x: Handle, cos: torch.Tensor, sin: torch.Tensor) -> Protocol[Secret]:
    """Error: a unit of ``rope`` bits, times the largest x, and of ``ROOM`` bits where x's ring was too small.

    Cost: none where the result fits x's ring; else 1 round, see ``roomy``.
    """
    p = engine.config.rope
    x = yield from roomy(engine, (yield from value(engine, x)), p + 1, "rotate")
    half = x.shape[-1] // 2

    def share() -> torch.Tensor:
        cosine, sine = ((table.double() * 2**p).round().long() for table in (cos, sin))
        turned = torch.cat([-x.share[..., half:], x.share[..., :half]], -1)
        return x.share * cosine + turned * sine

    return Secret(engine.runtime.share(x.shape, share), x.scale + p, x.width, x.bits)


def rounded_rows(engine: TrackedEngine, out: Tracked, x: Tracked, values: bool = False) -> torch.Tensor:
    """One unit of a cached number, where bits are dropped."""
    scale = engine.config.value if values else engine.config.key
    return x.error + (unit(scale) if x.secret.scale > scale else 0.0)


@operation(bound=rounded_rows)
def rows(engine: WireEngine, x: Handle, values: bool = False) -> Protocol[Rows]:
    """Their one opening joins the next message; values take a second one where they have bits to lose.

    Error: a unit of ``key`` bits, of ``value`` bits for values, when they are opened.
    """
    x, scale = (yield from value(engine, x)), engine.config.value if values else engine.config.key
    row = Rows(x.at_scale(max(scale, x.scale)), values=values)
    engine.rounds.start(opened(engine, row))
    return row


@operation(bound=lambda engine, out, handles, dim: torch.cat([handle.error for handle in handles], dim))
def cat(engine: WireEngine, handles: list[Any], dim: int) -> Protocol[Secret | Rows]:
    """Error: none. Cost: that of ``add`` for values; of rows, 1 round where older ones have not been opened."""
    first, *others = handles
    if not isinstance(first, Rows):
        return (yield from _join(engine, handles, dim))
    assert dim == 1, "rows are joined along 1"
    if len(others) == 1 and others[0].is_new and first.pending is None:  # they wait, behind the cache's
        return others[0].behind(first)
    yield from settled(*handles)
    return join(handles)


def _join(engine: WireEngine, handles: list, dim: int) -> Protocol[Secret]:
    """``cat`` of values."""
    values: list[Secret] = []
    for x in handles:
        values.append((yield from value(engine, x)))
    bits = max(x.bits for x in values)
    values = yield from alike(engine, values, bits, "cat")
    share = torch.cat([x.share for x in values], dim)
    are_rows = all(isinstance(x, Picks) for x in values) and dim % share.ndim == share.ndim - 2
    made = (Picks if are_rows else Secret)(share, values[0].scale, min(x.width for x in values), bits)
    wires = [x.opened for x in values if x.opened is not None]
    if are_rows and len(wires) == len(values):
        made.opened = joined(wires, dim)
    return made


def _scored(engine: TrackedEngine, out: Tracked, query: Tracked, keys: Tracked) -> torch.Tensor:
    """One unit of the query."""
    far, f = keys.value.abs() + keys.error, engine.config.activation
    own = unit(f) if query.secret.scale > f else 0.0
    return query.value.abs() @ keys.error.transpose(1, 2) + (query.error + own) @ far.transpose(1, 2)


@operation(bound=_scored)
def scores(engine: WireEngine, query: Handle, keys: Rows) -> Protocol[Secret]:
    """Error: a unit of the query. Cost: 1 round for a query that was not scored before; keys that wait come along."""
    query = yield from value(engine, query)
    if query.opened is None:
        (query.opened,) = yield [narrow(query, engine.config.activation)]
    yield from settled(keys)
    operand = keys.operand
    room = min(query.opened.width, operand.width) - query.opened.scale - operand.scale - 2
    return products.matmul(engine.runtime, query.opened, operand, transposed=True, bits=min(6, room))


def _weighed(engine: TrackedEngine, out: Tracked, scores: Tracked, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The fit of exp and a unit of 28 bits in each root, where the row's sum of exp(s - score_limit) is ``total``; a
    unit of ``root`` bits after the row was scaled. Then a score's own error, which multiplies its weight, and the
    largest of a row, which divides all of them.
    """
    visible, errors = scores.value, scores.error
    if mask is not None:
        visible, errors = visible.masked_fill(~mask, -torch.inf), errors.masked_fill(~mask, 0.0)
    turned = out.value * (errors + errors.amax(-1, keepdim=True)).expm1()
    total = (visible - errors - engine.config.score_limit).exp().sum(-1, keepdim=True)
    expected, fit = out.value + turned, fits.stored("exp")
    slip = (fit.error + fits.rounding(fit, *ROOT_FRACTIONS) + unit(28)) / total.sqrt() + 2 * unit(engine.config.root)
    own = 2 * expected.sqrt() * slip + slip**2
    own = 1.1 * (own + expected * own.sum(-1, keepdim=True))
    return turned + (own if mask is None else own.masked_fill(~mask, 0.0))


@operation(
    bound=_weighed,
    domain=Domain("attention scores", lambda c: c.score_limit - 36, lambda c: c.score_limit),
    row=Domain("logarithms of a row's sum of exp(score)", lambda c: c.row_logarithms[0], lambda c: c.row_logarithms[1]),
)
def softmax(engine: WireEngine, scores: Secret, mask: torch.Tensor | None = None) -> Protocol[Weights]:
    """From roots exp((s - limit) / 2), so that one fit serves every row and no maximum is needed.

    The sum z of their squares says how large the row is. Each root is multiplied by the power of two that brings
    z to [1/4, 1), opened, and squared: weights whose sum is that, with the resolution that the row needs.

    Error: the fit's and a unit of 28 bits in each root, relative to the row's largest; a unit of ``root`` bits, for
    scores and rows in the domain.
    """
    c, runtime, fit = engine.config, engine.runtime, fits.stored("exp")
    half = Secret(scores.share, scores.scale + 1, scores.width, scores.bits)  # the same integers, read as s / 2
    (wire,) = yield [Opening(half, ring=half.scale + fit.period, function=True)]
    public, dealt = ROOT_FRACTIONS
    root = smooth.evaluate(runtime, wire, fit, public, bits=1, shift=-c.score_limit / 2, dealt=dealt)
    if mask is not None:
        root.share = times(root.share, mask.long())
    fraction, spread = 28, SPREAD_BITS  # z < 2^spread
    top = 2 * fraction + spread
    (root_wire,) = yield [lifted(root, fraction)]
    total = products.sum_of_squares(runtime, root_wire, bits=spread)
    (total_wire,) = yield [Opening(total, ring=top + 1, function=True)]
    powers = [2**k for k in range(SPREAD_SEGMENTS)]
    _, power = normalize(runtime, total_wire, top, SPREAD_SEGMENTS, powers)
    (power_wire,) = yield [Opening(power)]
    # root 2^k / 2^(spread / 2): the integers stay, their scale says it
    scaled = products.multiply(runtime, root_wire, power_wire, scale=fraction + spread // 2, bits=1)
    size = scaled.scale + scaled.bits + 2
    (scaled_wire,) = yield [Opening(scaled, ring=size, truncate=scaled.scale - c.root, lifted=64)]
    weights = products.square(runtime, scaled_wire)
    weights.bits = 0
    return Weights(weights)


def inverse_sum() -> float:
    """Of 1 / sum of a row's weights, relative to a sum of 1, the largest: a unit of ``ROW_BITS`` bits of half of it,
    and the reciprocal's fit."""
    fit = fits.stored("reciprocal")
    return 2 * (unit(ROW_BITS) + fit.error + fits.rounding(fit, 22))


def _mixed(engine: TrackedEngine, out: Tracked, weights: Tracked, values: Tracked) -> torch.Tensor:
    """One unit of the product, for a sum of weights of 1/4 or more, and of the reciprocal of the sum that it is divided
    by, with the reciprocal's fit.
    """
    own = 1.1 * (4 * unit(engine.config.activation + 3) + inverse_sum() * out.value.abs().max())
    return own + weights.error @ (values.value.abs() + values.error) + weights.value @ values.error


@operation(
    bound=_mixed,
    domain=Domain("mixed values of attention", lambda c: -(2.0**MIXED_BITS), lambda c: 2.0**MIXED_BITS),
)
def mix(engine: WireEngine, weights: Weights, values: Rows) -> Protocol[Secret]:
    """Error: a unit of the result and of the reciprocal, for |results| below 2^``MIXED_BITS``."""
    c, runtime, f, inverse = engine.config, engine.runtime, engine.config.activation + 3, fits.stored("reciprocal")
    (wire,) = yield [Opening(weights.weights, ring=min(weights.weights.width, c.mixed_width))]
    yield from settled(values)
    mixed = products.matmul(runtime, wire, values.operand, transposed=False, bits=MIXED_BITS)
    doubled = _row_sums(wire, wire.scale - 1, inverse.period)  # of twice the weights: 1/2 to 2
    total = smooth.evaluate(runtime, doubled, inverse, fraction=22, bits=2)
    mixed_wire, total_wire = yield [lifted(mixed, f), lifted(total, ROW_BITS)]
    weights.wires = wire, total_wire
    scale = f + ROW_BITS - 1  # the total's reciprocal is half of what is needed
    return products.multiply(runtime, mixed_wire, total_wire, scale=scale, bits=c.linear_bits)


def _drawn(engine: TrackedEngine, out: Tracked, weights: Tracked, queries: torch.Tensor) -> torch.Tensor:
    """The reciprocal of the row's sum, its unit of ``kept`` bits after it was multiplied by the query's weight, and a
    unit of the result's scale.
    """
    queries, wire = queries.double(), weights.secret.wires[0]
    kept = wire.width - wire.scale - bits_for(queries.abs().sum().item()) - 2
    far = weights.value + weights.error
    own = inverse_sum() * torch.einsum("gmn,m->gn", far, queries.abs()) + 2 * unit(kept) * far.sum(1)
    return torch.einsum("gmn,m->gn", weights.error, queries.abs()) + 1.1 * own + unit(out.secret.scale)


@operation(bound=_drawn)
def mass(engine: WireEngine, weights: Weights, queries: torch.Tensor) -> Protocol[Secret]:
    """Error: a unit of b = 22 - g bits of 1 / sum in each row, 2^g being the sum of queries or more; and a unit of
    ``DRAWN`` bits.

    ``mix`` has left the wires of weights and of 1 / sum. Cost: 2 rounds; for each of G * M rows 8 bytes each way
    and, where bits are dropped, as many less those of the dealer's; for each of G * N results the bits of the weights'
    ring, 7 bytes or 5, each way, and those and 16 bytes of the dealer's.
    """
    assert weights.wires is not None, "the weights' mass is asked for after ``mix``"
    wire, inverse = weights.wires  # inverse: of twice the sum
    growth = bits_for(queries.abs().sum().item())
    keep = wire.width - wire.scale - growth - 2
    if keep < 6:
        raise Overflow(f"mass: {len(queries)} queries of weight {queries.abs().sum():g} in all: give 2^16 at most")
    units, fraction = as_units(queries, max(0, min(FACTOR, 64 - wire.width + keep - inverse.scale)))
    turned = as_secret(engine.runtime, inverse)
    turned = Secret(times(turned.share, units[:, None]), turned.scale + fraction, 64, inverse.bits + growth)
    (turned_wire,) = yield [Opening(turned, truncate=max(0, turned.scale - keep))]
    row = turned_wire.transpose(1, 2)
    half = products.matmul(engine.runtime, row, wire, transposed=False, bits=growth)
    drawn = Secret(half.share, half.scale - 1, half.width, growth + 1)
    (drawn_wire,) = yield [lifted_from_bytes(drawn, DRAWN)]
    return as_secret(engine.runtime, drawn_wire)[:, 0]


def _row_sums(wire: Wire, scale: int, period: int) -> Wire:
    """The sums over the last dimension of a narrow wire, as one opened value modulo 2^(scale + period); local.

    scale: at which the sums are read, which need not be the wire's.
    """
    size = scale + period
    assert wire.width >= size, "the wire must cover the ring of its sum"
    summed = wire.mask.map(lambda t: t.sum(-1, keepdim=True))
    mask = summed.map(lambda t: ring.low_bits(t, size))
    raw = None if wire.public is None else ring.low_bits(wire.public.sum(-1, keepdim=True), size)
    return Wire(raw, mask, scale, size, 1)


# Cached keys and values: opened once, folded for products.


def join(parts: list[Rows]) -> Rows:
    """Opened rows, one behind the other."""
    operands = [rows.operand for rows in parts]
    first = operands[0]
    assert all(operand.scale == first.scale for operand in operands), "rows have one scale"
    publics: list[Any] = [operand.public for operand in operands]
    joined = products.Operand(
        None if first.public is None else torch.cat(publics, 1),
        torch.cat([operand.own for operand in operands], 1),
        first.scale,
        min(operand.width for operand in operands),
        max(operand.bits for operand in operands),
    )
    return Rows.opened(joined, parts[0].values)


def rearranged(operand: products.Operand, change: Change) -> products.Operand:
    """The operand with ``change``, which must be linear, applied to each of its tensors."""
    public = None if operand.public is None else change(operand.public)
    return replace(operand, public=public, own=change(operand.own))


def opened(engine: WireEngine, rows: Rows) -> Protocol[None]:
    """Opens new rows. Values are not needed at once: where they have bits to lose, a first opening brings them to their
    scale, and a second makes them rows.
    """
    c, x = engine.config, rows.pending
    assert x is not None, "rows are opened once"
    if not rows.values:
        request = Opening(x, truncate=x.scale - c.key)
    else:
        if x.scale > c.value:
            (wire,) = yield [lifted(x, c.value)]
            x = as_secret(engine.runtime, wire)
        request = Opening(x, ring=min(x.width, c.mixed_width))
    (wire,) = yield [request]
    rows.settle(products.fold(engine.runtime, wire))


def settled(*parts: Rows) -> Protocol[None]:
    """Waits until these rows have been opened; values may take two rounds."""
    while any(rows.pending is not None for rows in parts):
        yield []
