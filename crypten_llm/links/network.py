"""A network between the parties, by its round trip and bandwidth: what a prediction assumes and `transport` emulates.

Owns the names of networks, the time that messages are on their way, and waiting for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from crypten_llm.errors import UsageError
from crypten_llm.links.sockets import is_local

if TYPE_CHECKING:
    from crypten_llm.links.link import Incoming, Link


@dataclass(frozen=True)
class Network:
    """A link to emulate: round trip time in milliseconds, bandwidth in Mbit/s per link and direction.

    For parties on one machine only: the send time travels in the header and is compared with the receiver's
    clock (CLOCK_MONOTONIC, shared by the processes of a machine). A message of n bytes may be read no earlier
    than rtt/2 + 8n/bandwidth after it was sent, nor before the link has passed on those sent earlier.
    """

    rtt_ms: float
    mbit: float

    def __post_init__(self) -> None:
        if not (0 <= self.rtt_ms < math.inf and 0 < self.mbit < math.inf):
            raise UsageError(
                f"network of {self.rtt_ms} ms and {self.mbit} Mbit/s is impossible: give a round trip time of 0 ms or "
                "more and a bandwidth above 0 Mbit/s"
            )

    def seconds(self, rounds: float, sent: float) -> float:
        """How long rounds and the bytes that one party sends in them are on their way."""
        return rounds * self.rtt_ms / 2e3 + sent * 8e-6 / self.mbit

    def check(self, links: Iterable[Link]) -> None:
        """Raises UsageError for a link to another machine, whose clock is another."""
        for link in links:
            if not is_local(link.sock):
                raise UsageError(
                    f"cannot emulate a network to {link.name} on another machine: drop the network setting, or run "
                    "every party on one machine"
                )

    def hold_back(self, frames: Sequence[Incoming], header: int) -> None:
        """Sleeps until this network would have delivered these frames, each of a link of its own; header: its bytes."""
        ready = 0
        for frame in frames:
            link, size = frame.link, header + frame.size
            link.line_free = max(link.line_free, frame.sent_at) + int(size * 8e3 / self.mbit)
            ready = max(ready, link.line_free + int(self.rtt_ms * 5e5))
        while (left := ready - time.monotonic_ns()) > 0:
            time.sleep(left / 1e9)


NETWORKS = {  # the settings usual in the field's papers, which range over 1-3 Gbit/s and 100-400 Mbit/s
    "lan": Network(rtt_ms=0.3, mbit=1000),
    "wan": Network(rtt_ms=40, mbit=200),
}


def parse_network(text: str) -> Network:
    """The `Network` that "lan", "wan" or "<round trip>ms,<Mbit/s>" (such as "20ms,100") names.

    Raises UsageError for anything else.
    """
    if text in NETWORKS:
        return NETWORKS[text]
    trip, comma, width = text.replace(" ", "").partition(",")
    try:
        if not (comma and trip.endswith("ms")):
            raise ValueError
        rtt_ms, mbit = float(trip.removesuffix("ms")), float(width)
    except ValueError:
        raise UsageError(
            f"network {text!r} is not known: give {', '.join(NETWORKS)} or '<round trip>ms,<Mbit/s>' such as '20ms,100'"
        ) from None
    return Network(rtt_ms, mbit)
