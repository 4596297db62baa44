"""Cached rows in memory that stays where it is, with room for more: a decode step is then the same at every length.

Owns these rows, and the public places among them. Rows that are not there yet are zeros, whose scores are computed and
whose weights are multiplied by zero: what a step costs follows from the room, and not from the rows in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

from crypten_llm.engines.wire.handles import Rows
from crypten_llm.protocols import products

if TYPE_CHECKING:
    from crypten_llm.protocols.dealer.runtime import Runtime
    from crypten_llm.protocols.secret import Secret


class Places:
    """Which of ``size`` places hold rows, and which takes the next one; public, the same for all heads and layers.

    seen: int64 [size], 1 where a step's query sees a row, its own among them. next: int64 [1]. Both on the device.
    """

    def __init__(self, runtime: Runtime, size: int) -> None:
        self._runtime, self.size = runtime, size
        self.seen = torch.zeros(size, dtype=torch.int64, device=runtime.device)
        self.next = torch.zeros(1, dtype=torch.int64, device=runtime.device)

    def put(self, length: int, unseen: range = range(0)) -> None:
        """For a step behind as many rows, of which some are not seen."""
        assert length < self.size, f"{self.size} places hold no row {length + 1}"
        places = torch.arange(self.size)
        seen = (places <= length) & ((places < unseen.start) | (places >= unseen.stop))
        self.seen.copy_(self._runtime.moved(seen.long()))
        self.next.fill_(length)

    def repeat(self, *times: int) -> Self:
        """The same for more queries: a mask of one row, as the model repeats it."""
        return self


class PaddedRows(Rows):
    """Keys or values [kv_heads, size, head_dim] with room for rows to come."""

    def __init__(self, places: Places, shape: torch.Size, values: bool) -> None:
        super().__init__(None, values=values)
        self._places, self._shape = places, torch.Size((shape[0], places.size, shape[2]))
        self._operand: products.Operand | None = None

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def is_new(self) -> bool:
        return False

    @property
    def operand(self) -> products.Operand:
        assert self._operand is not None, "rows are read once there are any"
        return self._operand

    def fill(self, rows: products.Operand) -> None:
        """Begins with these rows, and with zeros behind them."""
        self.pending = None
        if self._operand is None:
            public: Any = None if rows.public is None else rows.public.new_zeros(self._shape)
            own = rows.own.new_zeros(self._shape)
        else:
            public, own = self._operand.public, self._operand.own
        self._operand = products.Operand(public, own, rows.scale, rows.width, rows.bits)
        count = rows.shape[1]
        for part, given in ((public, rows.public), (own, rows.own)):
            if part is not None and given is not None and not part.is_meta:
                part[:, :count] = given
                part[:, count:] = 0

    def taken(self, count: int) -> products.Operand:
        """The first rows, in memory of their own."""
        whole = self.operand
        public, own = (
            part if part is None or part.is_meta else part.clone()
            for part in (None if whole.public is None else whole.public[:, :count], whole.own[:, :count])
        )
        assert own is not None, "every role holds a part"
        return products.Operand(public, own, whole.scale, whole.width, whole.bits)

    def joined_by(self, pending: Secret | None) -> Rows:
        assert self.pending is None, "older rows are opened before newer ones join"
        self.pending = pending
        return self

    def settle(self, rows: products.Operand) -> None:
        """Puts the opened row in its place."""
        self.pending, whole = None, self.operand
        assert (rows.scale, rows.width) == (whole.scale, whole.width), "rows have one scale and one ring"
        for part, given in ((whole.public, rows.public), (whole.own, rows.own)):
            if part is not None and given is not None and not part.is_meta:
                part.index_copy_(1, self._places.next, given)
