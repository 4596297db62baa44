"""Rows of the cache under an eviction policy on engine ``wire``: kept, dropped, made, or made coarser.

Owns the operations of ``eviction.operations`` that make rows from rows, each with what is declared of it
(``operations``); rows that are still to be opened are opened first. Shapes are those of
``eviction.operations.Operations``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.wire.arithmetic import scale as scaled
from crypten_llm.engines.wire.attention import rearranged, rounded_rows, settled
from crypten_llm.engines.wire.attention import rows as new_rows
from crypten_llm.engines.wire.choosing import opened_for
from crypten_llm.engines.wire.gathering import hot_wire
from crypten_llm.engines.wire.handles import Handle, Rows, roomy, value
from crypten_llm.engines.wire.numbers import PRECISION
from crypten_llm.engines.wire.operations import operation, unit
from crypten_llm.protocols import products
from crypten_llm.protocols.comparison import below, bit_opening, difference, ordered, times_bits
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret, shares_of

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.insecure.tracked import Tracked, TrackedEngine


@operation(bound=lambda engine, out, rows: rows.error)
def contents(engine: WireEngine, rows: Rows) -> Protocol[Secret]:
    """Error: none. Cost: none, or 1 round when the newest rows have not been opened."""
    yield from settled(rows)
    operand = rows.operand
    return Secret(engine.runtime.share(operand.shape, lambda: operand.own), operand.scale, operand.width, operand.bits)


@operation(bound=rounded_rows)
def fixed(engine: WireEngine, x: Handle, values: bool = False) -> Protocol[Rows]:
    """Error: a unit of ``key`` bits, of ``value`` bits for values.

    Cost: as new rows, with the next message: the bits of a ring an element each way, and those that are not dropped of
    the dealer's (of values 128, and a second opening). First 1 round where x's ring is too small for products.
    """
    c, x = engine.config, (yield from value(engine, x))
    scale, width = (c.value, c.mixed_width) if values else (c.key, c.key_width)
    if values or x.width - max(0, x.scale - scale) < width:
        x = yield from roomy(engine, x, 0, "fixed", width=max(x.scale, scale) - scale + width)
    return (yield from new_rows(engine, x.at_scale(max(scale, x.scale)), values))


@operation(bound=lambda engine, out, rows, index: engine.twin.take(rows.error, index))
def take(engine: WireEngine, rows: Rows, index: torch.Tensor) -> Protocol[Rows]:
    """Error: none. Cost: none, or 1 round when the newest rows have not been opened."""
    yield from settled(rows)
    kept = engine.runtime.moved(index)
    return Rows.opened(rearranged(rows.operand, lambda t: t[:, kept]), rows.values)


@operation(bound=lambda engine, out, rows, picks, size=1: engine.twin.keep(rows.error, picks.value, size))
def keep(engine: WireEngine, rows: Rows, picks: Secret, size: int = 1) -> Protocol[Rows]:
    """Error: none.

    Cost: 1 round with 7 bytes each way for each of the [G or 1, K, C] picks, once; dealer the bits of a ring for each
    of the [G, K * size, D] results, which are opened with the next message as new rows are.
    """
    yield from settled(rows)
    heads, length, dim = rows.operand.shape
    count, block = length // size, size * dim
    operand = rearranged(rows.operand, lambda t: t.reshape(heads, count, block))
    wire = yield from hot_wire(engine, picks, max(operand.width, engine.config.mixed_width))  # keys and values share it
    if wire.shape[0] != heads:
        operand = rearranged(operand, lambda t: t.transpose(0, 1).reshape(1, count, heads * block))
    kept = products.matmul(engine.runtime, wire, operand, transposed=False, bits=operand.bits)
    if wire.shape[0] != heads:
        kept = kept.reshape(-1, heads, block).permute(1, 0, 2)
    return (yield from new_rows(engine, kept.reshape(heads, -1, dim), rows.values))


@operation(bound=lambda engine, out, rows, hot: engine.twin.drop(rows.error, hot.value))
def drop(engine: WireEngine, rows: Rows, hot: Handle) -> Protocol[Rows]:
    """Each row moves up by one from the dropped one on: row j is row j + 1, or itself if the dropped one is later.

    Error: none. Cost: 1 round with 1 bit each way for each of [G or 1, N - 1]; dealer the bits of the rows' ring for
    each and for each of the [G, N - 1, D] results, which are opened with the next message as new rows are.
    """
    yield from settled(rows)
    hot, wire = (yield from value(engine, hot)), products.unfold(engine.runtime, rows.operand)
    later = (hot.share.sum(-1, keepdim=True) - hot.share.cumsum(-1))[..., :-1, None]
    (bit,) = yield [bit_opening(hot.like(later))]
    one, other = wire.map(lambda t: t[:, :-1]), wire.map(lambda t: t[:, 1:])
    moved = times_bits(engine.runtime, bit, difference(one, other))
    moved.share = moved.share + shares_of(engine.runtime, other)
    moved.bits = wire.bits
    return (yield from new_rows(engine, moved, rows.values))


def _coarse(engine: TrackedEngine, out: Tracked, rows: Tracked, bits: Any) -> torch.Tensor:
    """A level more or less next to a limit between two; a unit of the level's factor, and of the rows."""
    operand = rows.secret.operand
    x = Secret(operand.own, operand.scale, operand.width, operand.bits)
    near = rows.error + dropped(ordered(x, PRECISION, "coarse"))
    low, high = (engine.twin.coarse(rows.value + side * near, bits) for side in (-1, 1))
    most, scale = 2 ** (bits - 1) - 1, engine.config.value if rows.secret.values else engine.config.key
    return torch.maximum(high - out.value, out.value - low) + most * 2.0**-17 + unit(scale)


def dropped(opening: Opening) -> float:
    """How far an opened value may be from what was opened: less than a unit, where bits are dropped."""
    return 2.0 ** (opening.truncate - opening.secret.scale) if opening.truncate else 0.0


@operation(bound=_coarse)
def coarse(engine: WireEngine, rows: Rows, bits: int) -> Protocol[Rows]:
    """The number of levels' limits that lie below x is the level. Rows are held as others are: no memory is saved.

    Error: as ``top`` where x is next to a limit; a unit of ``key`` or ``value`` bits of the level.
    Cost: 3 rounds: x, then ``below``'s with 2^bits - 2 thresholds and words of 1 byte (2 from 7 bits on), then the
    level in as many and 128 bits of the dealer's; the rows are opened with the next message as new ones are.
    """
    most, runtime = 2 ** (bits - 1) - 1, engine.runtime
    wire = yield from opened_for(engine, (yield from contents(engine, rows)), "coarse")
    limits = [math.ceil((level + 0.5) / most * 2.0**wire.scale) for level in range(-most, most)]
    less = yield from below(runtime, wire, limits, 8 if bits < 7 else 16)
    level = Secret(runtime.plus(-less.share.sum(-1), most), 0, less.width, bits - 1)
    level = yield from roomy(engine, level, 0, "coarse", width=64)
    made = yield from scaled(engine, level, 1 / most)
    scale = engine.config.value if rows.values else engine.config.key
    return (yield from new_rows(engine, made.at_scale(max(scale, made.scale)), rows.values))
