"""The token that logits choose, on engine ``wire``: on shares, so that the client learns its id and no logit.

Owns the operations ``sample`` and ``top_k``; which of them is shown is for ``session.reveal`` to decide. Logits are
compared as rounded to ``KEEPING`` bits below their declared bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crypten_llm.engines.wire.handles import Handle, value
from crypten_llm.engines.wire.numbers import KEEPING
from crypten_llm.engines.wire.operations import operation
from crypten_llm.protocols import gumbel, tournament
from crypten_llm.protocols.comparison import ordered
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine


@operation()
def sample(engine: WireEngine, logits: Handle, temperature: float) -> Protocol[Secret]:
    """Error: logits below 2^b are rounded to units of 2^(b + 1 - ``KEEPING``), and what is taken is the largest of
    these: within two units of the largest. With noise, units are twice as large; they and the noise's own rounding move
    no probability by more than a factor of exp(3 units / temperature).

    Domain: temperature times ``gumbel.LARGEST`` below 2^b.
    Cost: 1 round with ``KEEPING`` + 1 bits a logit each way, and ``tournament.place_of_largest``'s; with noise as many
    bits of the dealer's.
    """
    x = yield from value(engine, logits)
    if temperature:
        x = _noisy(engine, x, temperature)
    (wire,) = yield [ordered(x, KEEPING, "sample")]
    return (yield from tournament.place_of_largest(engine.runtime, wire))


def _noisy(engine: WireEngine, x: Secret, temperature: float) -> Secret:
    """x + T G, below twice x's bound, at the scale at which it will be compared."""
    bits, width = x.bits + 1, KEEPING + 1
    scale = width - bits - 2
    drop = x.scale - scale
    if temperature * gumbel.LARGEST >= 1 << x.bits or drop < 0 or x.width - drop < width:
        raise Overflow(
            f"sample: noise at temperature {temperature:g} and |x| < 2^{x.bits} at scale 2^{x.scale} do not fit a "
            f"share valid modulo 2^{x.width}"
        )
    noise = gumbel.dealt(engine.runtime, x.shape, temperature, scale, width)
    return Secret(engine.runtime.drop(x.share, drop) + noise, scale, width, bits)


@operation()
def top_k(engine: WireEngine, logits: Handle, count: int) -> Protocol[tuple[Secret, Secret]]:
    """Error: as ``sample`` without noise; the logits are so rounded.

    Cost: 1 round with ``KEEPING`` + 1 bits a logit each way, and ``tournament.largest_few``'s.
    """
    x = (yield from value(engine, logits)).reshape(-1)
    (wire,) = yield [ordered(x, KEEPING, "top_k")]
    return (yield from tournament.largest_few(engine.runtime, wire, count))
