"""Cached keys and values of engine ``wire``: opened once, folded for products, in storage that grows.

Owns the storage and who may write to it, and the opening of new rows, which joins the next message.
"""

import weakref
from dataclasses import replace

import torch

from crypten_llm.engines.wire.values import lifted
from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Opening, Protocol, Secret, as_secret


class Rows:
    """Cached keys or values [kv_heads, N, head_dim]: folded wires, with the newest rows perhaps still to be opened.

    Rows that join are written behind the others, into storage with room to grow, so that a decode step does not copy
    the cache. Whoever joined last owns the free end; anybody else who joins to the same rows gets a copy.
    """

    def __init__(self, pending: Secret | None, before: "Rows | None" = None, values: bool = False):
        assert before is None or before.pending is None, "older rows are opened before newer ones join"
        self.pending = pending
        self.values = values if before is None else before.values
        self.length = 0 if before is None else before.length
        self._storage = None if before is None else before._storage
        self._scale = self._width = self._bits = 0
        self._joined: Rows | None = None  # the rows that these have become the newest of

    @classmethod
    def opened(cls, rows: products.Operand, values: bool) -> "Rows":
        """Rows that have been opened already."""
        made = cls(None, values=values)
        made.settle(rows)
        return made

    @property
    def shape(self):
        heads, new, dim = self._new_shape if self.pending is None else self.pending.shape
        return torch.Size((heads, self.length + (0 if self.pending is None else new), dim))

    def behind(self, before: "Rows") -> "Rows":
        """Opened rows with these, which wait, behind them: what these were to be told, the result is told."""
        self._joined = Rows(self.pending, before)
        return self._joined

    def settle(self, rows: products.Operand) -> None:
        """Takes over the opened rows."""
        if self._joined is not None:
            self._joined.settle(rows)
            return
        self.pending, self._new_shape = None, rows.shape
        self._scale, self._width, self._bits = rows.scale, rows.width, rows.bits
        start, self.length = self.length, self.length + rows.shape[1]
        if self._storage is None or not self._storage.is_free(start, self.length):
            self._storage = _Storage(rows, self.length, start, self._storage)
        self._storage.write(rows, start, owner=self)

    @property
    def is_new(self) -> bool:
        """Whether all of these are still to be opened."""
        return self.pending is not None and not self.length

    @property
    def operand(self) -> products.Operand:
        public, own = self._storage.read(self.length)
        return products.Operand(public, own, self._scale, self._width, self._bits)


class _Storage:
    """Room for rows of an ``Operand``, half as much again as needed."""

    def __init__(self, like: products.Operand, length: int, kept: int, before: "_Storage | None"):
        heads, _, dim = like.shape
        size = (heads, length + max(64, length // 2), dim)
        self.public = None if like.public is None else torch.empty(size, dtype=torch.int64)
        self.own = like.own.new_empty(size)
        self._last = lambda: None
        if before is not None:
            for mine, old in ((self.public, before.public), (self.own, before.own)):
                if mine is not None:
                    mine[:, :kept] = old[:, :kept]

    def is_free(self, start: int, stop: int) -> bool:
        """Whether rows start .. stop - 1 may be written: there is room, and nobody alive has rows there."""
        last = self._last()
        return stop <= self.own.shape[1] and (last is None or last.length <= start)

    def write(self, rows: products.Operand, start: int, owner: Rows) -> None:
        self._last = weakref.ref(owner)
        self.own[:, start : owner.length] = rows.own
        if self.public is not None:
            self.public[:, start : owner.length] = rows.public

    def read(self, length: int):
        return None if self.public is None else self.public[:, :length], self.own[:, :length]


def join(parts: list[Rows]) -> Rows:
    """Opened rows, one behind the other."""
    operands = [rows.operand for rows in parts]
    first = operands[0]
    assert all(operand.scale == first.scale for operand in operands), "rows have one scale"
    joined = products.Operand(
        None if first.public is None else torch.cat([operand.public for operand in operands], 1),
        torch.cat([operand.own for operand in operands], 1),
        first.scale,
        min(operand.width for operand in operands),
        max(operand.bits for operand in operands),
    )
    return Rows.opened(joined, parts[0].values)


def rearranged(operand: products.Operand, change) -> products.Operand:
    """The operand with ``change``, which must be linear, applied to each of its tensors."""
    public = None if operand.public is None else change(operand.public)
    return replace(operand, public=public, own=change(operand.own))


def opened(engine, rows: Rows) -> Protocol:
    """Opens new rows. Values are not needed at once: where they have bits to lose, a first opening brings them to their
    scale, and a second makes them rows.
    """
    c, x = engine.config, rows.pending
    if not rows.values:
        request = Opening(x, truncate=x.scale - c.key)
    else:
        if x.scale > c.value:
            (wire,) = yield [lifted(x, c.value)]
            x = as_secret(engine.runtime, wire)
        request = Opening(x, ring=min(x.width, c.mixed_width))
    (wire,) = yield [request]
    rows.settle(products.fold(engine.runtime, wire))


def settled(*parts: Rows) -> Protocol:
    """Waits until these rows have been opened; values may take two rounds."""
    while any(rows.pending is not None for rows in parts):
        yield []
