"""Cached rows that the owner knows in the clear, on engine ``wire``: those of a public prefix.

Owns the one message in which they come to be rows like all others, and why it tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from crypten_llm.engines.wire.handles import Rows
from crypten_llm.errors import UsageError
from crypten_llm.kernels import ring
from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Message
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret
from crypten_llm.roles import OWNER

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine


LARGEST = 2.0**32
"""Keys and values count modulo their ring, as others do; below this they are exact before they are taken modulo it."""


def known_rows(engine: WireEngine, value: Tensor | None, shape: Sequence[int], values: bool = False) -> Rows:
    """Rows [kv_heads, N, head_dim] of which the owner has the float tensor ``value``, and the others the shape alone.

    An exact wire, as if it had been opened: public part K + r, modulo the ring in which rows are opened, and a mask r
    of which the owner's part is all and the client's part is zero. r comes from the owner's stream, is uniform and
    serves these rows alone; the client has no part of it, so K + r is uniform to it whatever K is. The owner knows K,
    so nothing of these rows is hidden from it. What is computed with them later reads the public part and each party's
    part of the mask, which add up to r, and products of r that the dealer deals afresh: it is right for any way in
    which r is shared, and its messages hide as much as with rows that were opened, since what hides them is drawn for
    them and has nothing to do with r.

    Reveals: to the client K + r, uniform. Error: half a unit of ``key`` bits, of ``value`` bits for values.
    Cost: no round, nothing of the dealer's; the owner sends the bits of the rows' ring an element, with the second
    message from now on: the first of a pass is the client's tokens, in which the owner has nothing to say.
    Raises: UsageError at the owner for what is no number.
    """
    c, runtime = engine.config, engine.runtime
    scale, width = (c.value, c.mixed_width) if values else (c.key, c.key_width)

    def words() -> Tensor:
        assert value is not None, "the owner knows these rows"
        if not value.abs().max() < LARGEST:  # nor NaN
            raise UsageError("the model overflows on the public prefix; leave it out (--public-prefix)")
        return runtime.moved((value.double() * 2**scale).round().long())

    known = Secret(runtime.input(OWNER, shape, words), scale, width, c.key_bits)
    rows = Rows(known, values=values)
    engine.rounds.start(_told(engine, rows, known, runtime.mask_of(OWNER, shape)))
    return rows


def _told(engine: WireEngine, rows: Rows, known: Secret, mask: Tensor | None) -> Protocol[None]:
    """mask: at the owner and the dealer."""
    runtime, width = engine.runtime, known.width
    drawn = runtime.held_by(OWNER, mask)
    hidden = None if drawn is None else ring.low_bits(known.share + drawn, width)
    yield []
    (received,) = yield [Message(OWNER, tuple(known.shape), width, hidden)]
    at_dealer = runtime.known_to_dealer(mask)
    own = known.share if at_dealer is None else ring.low_bits(at_dealer, width)
    public = hidden if received is None else received
    rows.settle(products.Operand(public, own, known.scale, width, known.bits))
