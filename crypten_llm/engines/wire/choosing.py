"""Choices of eviction policies on engine ``wire``: what is the largest, and what follows from bits.

Owns the operations of ``eviction.operations`` that compare, and nothing of a protocol: those are in
``protocols.selection``, ``protocols.comparison`` and ``protocols.lookup``. Shapes are those of
``eviction.operations.Operations``.

Values are compared as rounded to ``PRECISION`` bits below their declared bound, for ``top`` to ``KEEPING``; ties go to
the lower index. A value closer to its bound than a unit of that rounding has left the domain of all comparisons
(``comparison.ordered``), and may count as the other extreme. Choices have no bound: both sides go on with that of
``wire``, and what it took instead of what ``plain`` takes is a tie or a mistake (``insecure.tracked``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from crypten_llm.engines.wire.handles import Handle, Picks, alike, roomy, value
from crypten_llm.engines.wire.numbers import KEEPING, PRECISION, whole_bytes
from crypten_llm.engines.wire.operations import operation, unit
from crypten_llm.kernels.ring import broadcast
from crypten_llm.protocols import lookup, selection
from crypten_llm.protocols.comparison import below, bit_opening, ordered, times_bits
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret, Wire

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine
    from crypten_llm.insecure.tracked import Tracked, TrackedEngine


# Up to so many candidates all pairs are compared. For one row of 256 scores that takes 3.4 MB and 3 rounds, the search
# 1.2 MB and 26 rounds (tests/test_wire_selection_cost.py); 23 rounds of a wide network (20 ms) take as long as 5.7 MB
# of it (100 Mbit/s), but rows share rounds and not bytes.
PAIRS = 256


def comparison(engine: WireEngine, x: Secret, what: str) -> Protocol[Opening]:
    """The opening of x for comparisons, with room for the sign of a difference."""
    x = yield from roomy(engine, x, 0, "comparison")
    return ordered(x, KEEPING if what == "top" else PRECISION, what)


def opened_for(engine: WireEngine, x: Secret, what: str) -> Protocol[Wire]:
    """x opened for comparisons, as a narrow wire. Cost: 1 round."""
    (wire,) = yield [(yield from comparison(engine, x, what))]
    return wire


@operation()
def top(engine: WireEngine, x: Handle, count: int) -> Protocol[Secret]:
    """Error: x is rounded to ``KEEPING`` bits below its declared bound 2^b, from which it is a unit, 2^(b + 1 -
    ``KEEPING``), or more away.

    Cost: 1 round and ``selection.top``'s.
    """
    x = yield from value(engine, x)
    if not 0 <= count <= x.shape[-1]:
        raise ValueError(f"top: the {count} largest of {x.shape[-1]} values; give 0 to {x.shape[-1]}")
    if count in (0, x.shape[-1]):
        return lookup.public(engine.runtime, torch.full(x.shape, int(count > 0)))
    wire = yield from opened_for(engine, x, "top")
    return (yield from selection.top(engine.runtime, wire, count, PAIRS))


@operation()
def best(engine: WireEngine, x: Handle, count: int) -> Protocol[Secret]:
    """Error: x is rounded to ``PRECISION`` bits below its declared bound 2^b, from which it is a unit, 2^(b + 1 -
    ``PRECISION``), or more away; beyond ``PAIRS`` values as ``top``.

    Cost: 1 round and ``selection.best``'s; beyond ``PAIRS`` values that of top and picks.
    """
    x = yield from value(engine, x)
    if count == 0 or x.shape[-1] == 1 or x.shape[-1] > PAIRS:
        return (yield from picks(engine, (yield from top(engine, x, count)), count))
    wire = yield from opened_for(engine, x, "best")
    return Picks.of((yield from selection.best(engine.runtime, wire, count)))


def exact(engine: TrackedEngine, out: Tracked, *given: Tracked) -> torch.Tensor:
    """None."""
    return torch.zeros_like(out.value)


@operation(bound=exact)
def picks(engine: WireEngine, bits: Handle, count: int) -> Protocol[Secret]:
    """Error: none. Cost: ``selection.picks``'s."""
    bits = yield from value(engine, bits)
    return Picks.of((yield from selection.picks(engine.runtime, bits, count)))


def _largest(engine: TrackedEngine, out: Tracked, x: Tracked, dim: int) -> torch.Tensor:
    return x.error.amax(dim) + (unit(out.secret.scale) if out.secret.scale < x.secret.scale else 0.0)


@operation(bound=_largest)
def largest(engine: WireEngine, x: Handle, dim: int) -> Protocol[Secret]:
    """Error: as ``best``. Cost: 1 round and ``selection.largest``'s. The result is valid modulo its ring alone."""
    x = yield from roomy(engine, (yield from value(engine, x)), 0, "comparison")
    dim = dim % len(x.shape)
    x = x.permute(*(d for d in range(len(x.shape)) if d != dim), dim)
    wire = yield from opened_for(engine, x, "largest")
    return (yield from selection.largest(engine.runtime, wire))


@operation()
def above(engine: WireEngine, x: Handle, threshold: float) -> Protocol[Secret]:
    """Error: as ``best``; the threshold is rounded down to that unit.

    Cost: 2 rounds; the opening of x, and ``below``'s with words of 4 bytes.
    """
    wire = yield from opened_for(engine, (yield from value(engine, x)), "above")
    end = 1 << (wire.width - 2)
    limit = min(max(math.floor(threshold * 2.0**wire.scale) + 1, -end), end)
    less = (yield from below(engine.runtime, wire, [limit], selection.BIT))[..., 0]
    return less.like(engine.runtime.plus(-less.share, 1))


def _chosen(engine: TrackedEngine, out: Tracked, bits: Tracked, x: Tracked, y: Tracked) -> torch.Tensor:
    return torch.where(bits.value > 0.5, x.error, y.error)


@operation(bound=_chosen)
def choose(engine: WireEngine, bits: Handle, x: Handle, y: Handle) -> Protocol[Secret]:
    """y + bits (x - y). Error: none.

    Cost: 1 round; x - y in a ring of l bits, in whole bytes, and 1 bit each way; dealer l bits a bit and for each
    element of the result.
    """
    bits, x, y = (yield from value(engine, bits)), (yield from value(engine, x)), (yield from value(engine, y))
    most = max(x.bits, y.bits)
    x, y = yield from alike(engine, [x, y], most + 2, "choose")
    shape, scale, width = broadcast(x.shape, y.shape), x.scale, min(x.width, y.width)
    one, other = x.share.expand(shape), y.share.expand(shape)
    apart = Secret(one - other, scale, width, most + 1)
    size = min(width, whole_bytes(most + scale + 3))
    bit, wire = yield [bit_opening(bits), Opening(apart, ring=size)]
    chosen = times_bits(engine.runtime, bit, wire)
    return Secret(chosen.share + other, scale, size, most)
