"""Material on its way from card to card of one host (``kernels.pipe``): no processor touches it.

Owns the two ends as a dealer and a party see them (``material``). Each piece takes whole units of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crypten_llm.protocols.dealer.material import CHANNEL

if TYPE_CHECKING:
    from crypten_llm.kernels.pipe import Inlet, Outlet
    from crypten_llm.links.meter import Meter

GATHERED = 1 << 20  # bytes of pieces that are written together


class Tapped:
    """At a party. check: waits until the device has done what was launched; raises where something never came."""

    window = 64 << 20

    def __init__(self, outlet: Outlet, meter: Meter, check: Callable[[], None]) -> None:
        self._outlet, self._meter, self._check = outlet, meter, check
        self.unit = outlet.unit

    def begin(self, label: str) -> None:
        """The next section, whatever its label: it is what comes next."""

    def read(self, count: int, counted: int | None = None) -> Tensor:
        """The next ``count`` bytes. That they never came is said by ``end``."""
        self._meter.count_received(CHANNEL, count if counted is None else counted)
        return self._outlet.read(count)

    def receive_ahead(self) -> bool:
        """It comes by itself."""
        return False

    def end(self) -> None:
        """Raises PartyError where the dealer's card did not write in time."""
        self._check()


class Pouring:
    """At the dealer, which waits only where a party's room is full."""

    def __init__(self, inlets: dict[int, Inlet]) -> None:
        self._inlets = inlets
        self.unit = next(iter(inlets.values())).unit
        self._pieces: dict[int, list[Tensor]] = {party: [] for party in inlets}
        self._bytes = dict.fromkeys(inlets, 0)

    def begin(self, label: str) -> None:
        pass

    def write(self, party: int, data: Tensor) -> None:
        pieces = self._pieces[party]
        pieces.append(data)
        if rest := -data.numel() % self.unit:
            pieces.append(torch.zeros(rest, dtype=torch.uint8, device=data.device))
        self._bytes[party] += data.numel() + rest
        if self._bytes[party] >= GATHERED:
            self.flush(party)

    def flush(self, party: int) -> None:
        pieces, self._pieces[party], self._bytes[party] = self._pieces[party], [], 0
        if pieces:
            self._inlets[party].write(torch.cat(pieces))

    def end(self) -> None:
        for party in self._inlets:
            self.flush(party)
