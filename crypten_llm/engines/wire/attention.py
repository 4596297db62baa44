"""Attention on engine ``wire``: rotated queries against cached keys, softmax, and the values that it mixes.

Owns these operations, each with what is declared of it (``operations``), and the cached rows that they read. ``mass``
is for eviction policies (``eviction.operations``), and reads what ``mix`` has opened.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.wire.handles import (
    Change,
    Handle,
    Picks,
    Rows,
    Weights,
    alike,
    exact,
    lifted,
    roomy,
    value,
)
from crypten_llm.engines.wire.numbers import DRAWN, FACTOR, ROOM, WireConfig, as_units, bits_for, times
from crypten_llm.engines.wire.operations import Domain, operation, unit
from crypten_llm.engines.wire.padding import Places
from crypten_llm.kernels import ring
from crypten_llm.protocols import fits, products, smooth
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire, as_secret, joined
from crypten_llm.protocols.softmax import MANTISSA, weigh

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.insecure.tracked import Tracked, TrackedEngine

Mask = torch.Tensor | Places | None


def _rotated(engine: TrackedEngine, out: Tracked, x: Tracked, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rounding of cosine and sine, and a unit of ``ROOM`` bits of x and of what it is turned with."""
    return unit(engine.config.rope) * x.value.abs().max() + 2 * unit(ROOM)


@operation(bound=_rotated)
def rotate(engine: WireEngine, x: Handle, cos: torch.Tensor, sin: torch.Tensor) -> Protocol[Secret]:
    """Error: a unit of ``rope`` bits, times the largest x, and of ``ROOM`` bits where x's ring was too small.

    Cost: none where the result fits x's ring; else 1 round, see ``roomy``.
    """
    p = engine.config.rope
    x = yield from roomy(engine, (yield from value(engine, x)), p, "rotate")
    half = x.shape[-1] // 2

    def share() -> torch.Tensor:
        cosine, sine = (turned_by(engine, table) for table in (cos, sin))
        turned = torch.cat([-x.share[..., half:], x.share[..., :half]], -1)
        return x.share * cosine + turned * sine

    return Secret(engine.runtime.share(x.shape, share), x.scale + p, x.width, x.bits)


def turned_by(engine: WireEngine, table: torch.Tensor) -> torch.Tensor:
    """A table of ``rotate``'s in integers, on the device; one that is so already."""
    whole = table.dtype == torch.int64
    return table if whole else engine.runtime.constant(_integers(table, engine.config.rope))


@lru_cache(maxsize=32)
def _integers(table: torch.Tensor, bits: int) -> torch.Tensor:
    """A table of ``rotate``'s, which a pass gives to all its layers: rounded once."""
    return (table.double() * 2**bits).round().long()


def rounded_rows(engine: TrackedEngine, out: Tracked, x: Tracked, values: bool = False) -> torch.Tensor:
    """One unit of a cached number, where bits are dropped."""
    scale = engine.config.value if values else engine.config.key
    return x.error + (unit(scale) if x.secret.scale > scale else 0.0)


@operation(bound=rounded_rows)
def rows(engine: WireEngine, x: Handle, values: bool = False) -> Protocol[Rows]:
    """Their one opening joins the next message.

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
    far, f = keys.value.abs() + keys.error, engine.config.key
    own = unit(f) if query.secret.scale > f else 0.0
    return query.value.abs() @ keys.error.transpose(1, 2) + (query.error + own) @ far.transpose(1, 2)


@operation(bound=_scored)
def scores(engine: WireEngine, query: Handle, keys: Rows, mask: Mask = None) -> Protocol[Secret]:
    """Right modulo their ring, which is all that softmax reads; a policy's are declared below 2^7.

    Error: a unit of the query. Cost: 1 round for a query that was not scored before; keys that wait come along.
    mask: public bool [M, N], repeated for all heads: entries that are false will not be read. Of padded rows all
    scores are computed.
    """
    c, query = engine.config, (yield from value(engine, query))
    if query.opened is None:
        yield from roomy(engine, query, 0, "scores", width=c.key_width + max(0, query.scale - c.key))
        (query.opened,) = yield [exact(query, c.key)]
    yield from settled(keys)
    operand = keys.operand
    scale = query.opened.scale + operand.scale
    room = min(query.opened.width, operand.width) - scale - 2
    visible = mask.expand(query.shape[0], *mask.shape) if isinstance(mask, torch.Tensor) else None
    drop = max(0, scale - c.score)
    return products.matmul(
        engine.runtime, query.opened, operand, transposed=True, bits=room, dropped=drop, visible=visible
    )


def _weighed(engine: TrackedEngine, out: Tracked, scores: Tracked, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A score's unit, which multiplies its weight, with the mantissas' rounding; a unit of ``attention`` bits after the
    row was scaled. Then a score's own error, and the largest of a row, which divides all of them.
    """
    errors = scores.error if mask is None else scores.error.masked_fill(~mask, 0.0)
    base = math.log(engine.softmax_base)
    score = engine.config.score
    rounded = errors + (unit(score) if scores.secret.scale > score else 0.0)
    turned = out.value * ((rounded + rounded.amax(-1, keepdim=True)) * base).expm1()
    expected = out.value + turned
    own = expected * 2 * unit(MANTISSA - 1) + 4 * unit(engine.config.attention) * (1.0 if mask is None else mask)
    own = 1.1 * (own + expected * own.sum(-1, keepdim=True))
    return turned + own


@operation(
    bound=_weighed,
    domain=Domain("attention scores", lambda c: c.scores[0], lambda c: c.scores[1]),
    row=Domain("logarithms of a row's sum of exp(score)", lambda c: c.row_logarithms[0], lambda c: c.row_logarithms[1]),
)
def softmax(engine: WireEngine, scores: Secret, mask: Mask = None) -> Protocol[Weights]:
    """Scores are exponents of ``softmax_base``. Error, Cost: ``softmax.weigh``'s, for what the mask does not hide."""
    c, shape = engine.config, scores.shape
    heads, rows, length = shape[:-2].numel(), shape[-2], shape[-1]
    seen = mask.seen.repeat(heads * rows) if isinstance(mask, Places) else None
    if not isinstance(mask, torch.Tensor):
        flat, counts = scores.share.reshape(-1), torch.full((heads * rows,), length, device=engine.runtime.device)
        places = None
    else:
        places = engine.runtime.moved(mask.reshape(-1).nonzero()[:, 0])
        flat = scores.share.reshape(heads, rows * length)[:, places].reshape(-1)
        counts = mask.sum(1).repeat(heads)
    drop = scores.scale - c.score
    if scores.width - drop < c.exponents.opened:
        raise Overflow(f"softmax: scores valid modulo 2^{scores.width - scores.scale} do not tell their exponents")
    if drop < 0:
        flat, drop = flat << -drop, 0
    found = yield from weigh(engine.runtime, flat, drop, counts, c.exponents, c.attention, c.mixed_width, seen)
    engine.checks.note_opened(found.beyond)
    return Weights(found.weights, shape, places)


def inverse_sum(config: WireConfig) -> float:
    """Of 1 / sum of a row's weights, relative to a sum of 1, the largest: a unit of ``inverse`` bits of half of it, and
    the reciprocal's fit."""
    fit = fits.stored("reciprocal")
    return 2 * (unit(config.inverse) + fit.error + fits.rounding(fit, 22))


def _mixed(engine: TrackedEngine, out: Tracked, weights: Tracked, values: Tracked) -> torch.Tensor:
    """One unit of the product, for a sum of weights of 1/4 or more, and of the reciprocal of the sum that it is divided
    by, with the reciprocal's fit.
    """
    own = 1.1 * (4 * unit(engine.config.mixed) + inverse_sum(engine.config) * out.value.abs().max())
    return own + weights.error @ (values.value.abs() + values.error) + weights.value @ values.error


@operation(
    bound=_mixed,
    domain=Domain("mixed values of attention", lambda c: -(2.0**c.mixed_bits), lambda c: 2.0**c.mixed_bits),
)
def mix(engine: WireEngine, weights: Weights, values: Rows) -> Protocol[Secret]:
    """Error: a unit of the result and of the reciprocal, for |results| below 2^``mixed_bits``."""
    c, runtime, inverse = engine.config, engine.runtime, fits.stored("reciprocal")
    (flat,) = yield [Opening(weights.flat, ring=c.mixed_width, function=True)]
    wire = flat.map(weights.placed)
    yield from settled(values)
    drop = c.attention + c.value - c.mixed
    mixed = products.matmul(runtime, wire, values.operand, transposed=False, bits=c.mixed_bits, dropped=drop)
    doubled = _row_sums(wire, wire.scale - 1, inverse.period)  # of twice the weights: 1/2 to 2
    total = smooth.evaluate(runtime, doubled, inverse, fraction=22, bits=2)
    size = c.divided_width
    mixed_wire, total_wire = yield [
        Opening(mixed, drop, lifted=size),
        Opening(total, total.scale - c.inverse, ring=total.scale + 4, lifted=size),
    ]
    weights.wires = wire, total_wire
    scale = c.mixed + c.inverse - 1  # the total's reciprocal is half of what is needed
    dropped = scale - c.attended
    return products.multiply(runtime, mixed_wire, total_wire, scale=scale, bits=c.mixed_bits, dropped=dropped)


def _drawn(engine: TrackedEngine, out: Tracked, weights: Tracked, queries: torch.Tensor) -> torch.Tensor:
    """The reciprocal of the row's sum, its unit of ``kept`` bits after it was multiplied by the query's weight, and a
    unit of the result's scale.
    """
    queries, wire = queries.double(), weights.secret.wires[0]
    kept = wire.width - wire.scale - bits_for(queries.abs().sum().item()) - 2
    far = weights.value + weights.error
    own = inverse_sum(engine.config) * torch.einsum("gmn,m->gn", far, queries.abs()) + 2 * unit(kept) * far.sum(1)
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
    units, fraction = as_units(queries, max(0, min(FACTOR, inverse.width - wire.width + keep - inverse.scale)))
    turned = as_secret(engine.runtime, inverse)
    units = engine.runtime.moved(units)
    turned = Secret(times(turned.share, units[:, None]), turned.scale + fraction, inverse.width, inverse.bits + growth)
    cut = max(0, turned.scale - keep)
    (turned_wire,) = yield [Opening(turned, cut, ring=wire.width + cut)]
    row = turned_wire.transpose(1, 2)
    half = products.matmul(engine.runtime, row, wire, transposed=False, bits=growth)
    drawn = Secret(half.share, half.scale - 1, half.width, growth + 1)
    (drawn_wire,) = yield [lifted(drawn, DRAWN)]
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
    """Opens new rows, in the ring of their products."""
    c, x = engine.config, rows.pending
    assert x is not None, "rows are opened once"
    scale, width = (c.value, c.mixed_width) if rows.values else (c.key, c.key_width)
    cut = max(0, x.scale - scale)
    (wire,) = yield [Opening(x, cut, ring=min(x.width, width + cut))]
    rows.settle(products.fold(engine.runtime, wire))


def settled(*parts: Rows) -> Protocol[None]:
    """Waits until these rows have been opened."""
    while any(rows.pending is not None for rows in parts):
        yield []
