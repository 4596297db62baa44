"""Engine ``wire`` for debugging: any handle can be shown to the client's role.

INSECURE by purpose. Owns the showing, and the list of what was shown; nothing of what is made of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.handles import Rows, Weights, value
from crypten_llm.engines.wire.keeping import contents
from crypten_llm.roles import CLIENT
from crypten_llm.session.reveal import RevealLog

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport
    from crypten_llm.protocols.secret import Secret
    from eviction.operations import Handle


class OpenedEngine(WireEngine):
    """``shown``: what was revealed. Opening a value early changes what is opened together, but no value."""

    name = "wire, opened"
    shown_dtype = torch.float64
    shown_bits, shown_factors = 64, (None, None)  # all there are, of what goes on being computed with
    shown_what = "queries, keys and choices"
    shown_why = "trace of an eviction policy: nothing is private"

    def __init__(self, transport: Transport, **options: Any) -> None:
        super().__init__(transport, **options)
        self.shown = RevealLog()

    @property
    def is_shown(self) -> bool:
        """Whether this role is the one that ``see`` shows values to."""
        return self.rank == CLIENT

    def settled(self, x: Handle) -> Secret:
        """The shares behind a handle that may have waited."""
        return self.rounds.run(value(self, x))

    def see(self, x: Handle) -> torch.Tensor | None:
        """The float64 value of a handle at the client, ``None`` elsewhere; softmax weights before their division."""
        if isinstance(x, Rows):
            x = self.rounds.run(contents(self, x))
        if isinstance(x, Weights):
            x = x.weights
        return self.shown.open_to_client(self, x, CLIENT, self.shown_what, self.shown_why)
