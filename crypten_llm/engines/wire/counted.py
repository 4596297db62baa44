"""Engine ``cost``: the program of engine ``wire``, counted instead of computed.

Owns what replaces the parties. It runs the dealer's program, which needs shapes alone, with links to parties that are
not there: they count, for both, what a transport would count, from the sizes that the protocols give their messages.
There is no second description of the computation, so none can drift; a test compares every counter with a real run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from crypten_llm import records
from crypten_llm.engines.base import Held
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.handles import Normed, OneHot, Weight
from crypten_llm.engines.wire.numbers import WORD, WireConfig
from crypten_llm.links.frames import HEADER
from crypten_llm.links.meter import Meter
from crypten_llm.links.transport import encode_json
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.material import FRAME
from crypten_llm.protocols.dealer.runtime import PARTIES, Piece
from crypten_llm.protocols.products import MANY, NARROW
from crypten_llm.roles import DEALER

if TYPE_CHECKING:
    from crypten_llm.links.meter import Cell


GO_ON = {"stop": False}


class Links:
    """The dealer's links, and the counters of the parties that would be at their ends.

    times: how often whatever is counted now happens. work: by (phase, kind), the words that a party multiplies and
    adds in the matrix products of layers and attention (``products``, and ``narrow`` of int32; not those with which a
    policy moves rows), and the dealer's material (``material``), in bytes. dealer_follows: else all material is on
    files, dealt before.
    """

    rank = DEALER

    def __init__(self, dealer_follows: bool = True) -> None:
        self._heard_by = 1 + dealer_follows
        self.meter = Meter()
        self.times = 1
        self._said: list[Any] = []

    @property
    def meter(self) -> Meter:
        return self._meter

    @meter.setter
    def meter(self, meter: Meter) -> None:
        self._meter = meter
        self.meters = [meter.twin() for _ in PARTIES]
        self.work: dict[Cell, Counter] = defaultdict(Counter)

    def say(self, message: Any) -> None:
        """What the program will hear next; after that, that the answer goes on."""
        self._said.append(message)

    def announce(self, source: int, peers: object, message: Any, kind: Any = dict, timeout: float | None = None) -> Any:
        """A public message of ``source`` to the other party, and the dealer, which hears what was said (``say``)."""
        if self._said:
            message = self._said.pop(0)
        elif message is None:
            message = records.convert(GO_ON, kind)
        size = HEADER.size + len(encode_json(message))
        self._count(source, messages=self._heard_by, sent=self._heard_by * size)
        self._count(1 - source, rounds=1, received=size)
        return message

    def passed(self, pieces: list[Piece]) -> None:
        """One message each way of these pieces, from a party that has something to send."""
        sizes = [sum(piece.sent_by(party) for piece in pieces) for party in PARTIES]
        whole = [size and HEADER.size + size for size in sizes]
        for party in PARTIES:
            cells: dict[Cell, list[int]] = {}
            for piece in pieces:
                counted = cells.setdefault(piece.cell, [0, 0])
                counted[0] += piece.sent_by(party) * self.times
                counted[1] += piece.sent_by(1 - party) * self.times
            sent, received = whole[party], whole[1 - party]
            self._count(party, "online", bool(received), bool(sent), sent, received, cells)

    def receive_material(self, party: int, frames: int, count: int) -> None:
        """``count`` bytes of material for ``party``, and the headers of as many frames as are now complete."""
        frames = frames if self._heard_by > 1 else 0
        self._count(party, "dealer", rounds=frames, received=frames * HEADER.size + count)
        self.note("material", count)

    def note(self, what: str, count: int) -> None:
        self.work[self.meter.cell][what] += count * self.times

    def _count(
        self,
        party: int,
        channel: str = "online",
        rounds: int = 0,
        messages: int = 0,
        sent: int = 0,
        received: int = 0,
        cells: dict[Cell, list[int]] | None = None,
    ) -> None:
        times = self.times
        counts = rounds * times, messages * times, sent * times, received * times
        self.meters[party].count(channel, *counts, 0.0, cells)


class _Material:
    """Material that is only measured, in the frames that a live dealer would send (see ``material.Sending``)."""

    def __init__(self, links: Links) -> None:
        self._links, self._filled = links, [0, 0]

    def begin(self, label: str) -> None:
        pass

    def add(self, party: int, count: int) -> None:
        frames, self._filled[party] = divmod(self._filled[party] + count, FRAME)
        self._links.receive_material(party, frames, count)

    def flush(self, party: int) -> None:
        if self._filled[party]:
            self._links.receive_material(party, 1, 0)
        self._filled[party] = 0

    def end(self) -> None:
        for party in PARTIES:
            self.flush(party)


class CostEngine(WireEngine):
    """``WireEngine`` over ``Links``. Each operation's work is what its ``WireEngine`` namesake makes a party do."""

    name = "cost"
    role = Counting

    def __init__(self, links: Links, config: WireConfig | None = None) -> None:
        material = _Material(links)
        there: Any = links  # stands for a transport
        super().__init__(there, config, material, self.role(links, material))
        self._links = links

    def holds(self, rank: int) -> Held:
        return Held(0, 0)

    def expect(self, verb: str, facts: dict, request: int) -> None:
        pass  # any request will do

    def embed(self, one_hot: OneHot, weight: Weight) -> Any:
        self._links.note("products", one_hot.count * weight.shape.numel())
        return super().embed(one_hot, weight)

    def linear(self, x: Any, weight: Weight, bias: Weight | None = None) -> Any:
        c = self.config
        bits = c.width_of(weight.name) if isinstance(x, Normed) else c.input_of(weight.name)[1]
        self._multiplied(bits, x.shape[:-1].numel(), weight.shape.numel())
        return super().linear(x, weight, bias)

    def scores(self, query: Any, keys: Any, mask: Any = None) -> Any:
        bits = self.config.key_width if query.shape[1] >= MANY else WORD
        self._multiplied(bits, query.shape[1], 2 * query.shape[0] * query.shape[2] * keys.shape[1])
        return super().scores(query, keys, mask)

    def mix(self, weights: Any, values: Any) -> Any:
        bits = self.config.mixed_width if weights.shape[1] >= MANY else WORD
        self._multiplied(bits, weights.shape[1], 2 * weights.shape[0] * weights.shape[2] * values.shape[-1])
        return super().mix(weights, values)

    def _multiplied(self, bits: int, rows: int, each: int) -> None:
        """``each`` products for each row. Of int32 few rows are bound by memory, of which half as much is read at the
        client and as much as ever at the owner.
        """
        if bits > NARROW:
            self._links.note("products", rows * each)
        elif rows < MANY:
            self._links.note("products", rows * each * 3 // 4)
        else:
            self._links.note("narrow", rows * each)
