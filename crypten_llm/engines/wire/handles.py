"""What engine ``wire`` hands out beside ``Secret``, and what is behind it: wires that several operations use, and rows
that wait to be opened.

Owns these handles, and the openings that operations have in common.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from crypten_llm.engines.wire.numbers import ROOM
from crypten_llm.protocols import embedding, products
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.points import Points
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire, as_secret

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine


Change = Callable[[torch.Tensor], torch.Tensor]  # linear


class Weight:
    """A model parameter: known to the owner in the clear, to the others by shape.

    name: of the layer whose weight it is, once that is known. width: of a norm, the widest ring of what the linear
    layers behind it give; 0 where there is none.
    """

    def __init__(self, value: torch.Tensor | None, shape: Sequence[int]) -> None:
        self.value, self.shape = value, torch.Size(shape)
        self.name, self.width = "", 0
        self.matrices: dict[Weight | None, products.OwnedMatrix] = {}  # as an operand, by the norm that is folded in
        self.table: embedding.OwnedTable | None = None  # as rows to look up
        self._words: dict[int, torch.Tensor] = {}  # as what is added, by fractional bits

    def words(self, scale: int) -> torch.Tensor:
        """At the owner: integers at ``scale``, made once."""
        if scale not in self._words:
            assert self.value is not None, "the owner has its weights"
            self._words[scale] = (self.value.double() * 2**scale).round().long()
        return self._words[scale]


@dataclass
class OneHot:
    """The client's token ids, and their bits on its device (``embedding.one_hot``); everybody else knows how many.

    points: of tokens that neither party knows, of which the bits are a part.
    """

    ids: torch.Tensor | None
    bits: torch.Tensor | None
    count: int
    vocab_size: int
    points: Points | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.count, self.vocab_size)


@dataclass
class Normed:
    """x / rms(x) as wire * sqrt(H) * gamma: ``wire`` [..., H], rows of length 1 or less. gamma: the norm's weight."""

    wire: Wire
    gamma: Weight

    @property
    def shape(self) -> torch.Size:
        return self.wire.shape

    @property
    def size(self) -> int:
        """H."""
        return self.wire.shape[-1]

    def __getitem__(self, index: Any) -> Normed:
        """Some of those along other dimensions than the normed one."""
        return Normed(self.wire.map(lambda t: t[index]), self.gamma)

    def permute(self, *order: int) -> Normed:
        assert order[-1] == len(order) - 1, "the normed dimension stays the last"
        return Normed(self.wire.map(lambda t: t.permute(*order)), self.gamma)

    def reshape(self, *shape: int) -> Normed:
        assert shape[-1] == self.size, "the normed dimension stays the last"
        return Normed(self.wire.reshape(*shape), self.gamma)


Handle = Secret | Normed  # of one value, see ``value``


@dataclass
class Weights:
    """Softmax weights whose rows sum to between 1/4 and 1; ``mix`` divides by the sum.

    flat: what the mask does not hide, one behind the other. shape: of all, [heads, M, N]. places: public, where among
    a head's M * N these are, the same for all heads; ``None`` for everywhere.
    wires: what ``mix`` opened: the weights, and 1 / (2 sum) [..., 1].
    """

    flat: Secret
    shape: torch.Size
    places: torch.Tensor | None = None
    wires: tuple[Wire, Wire] | None = None

    @property
    def dense(self) -> Secret:
        """All weights; zero is what the mask hides."""
        return self.flat.like(self.placed(self.flat.share))

    def placed(self, flat: torch.Tensor) -> torch.Tensor:
        """What is of the shape of ``flat``, where the weights are, and zeros."""
        if flat.is_meta:
            return shape_only(self.shape)
        if self.places is None:
            return flat.reshape(self.shape)
        heads = self.shape[:-2].numel()
        dense = flat.new_zeros(heads, self.shape[-2:].numel())
        dense[:, self.places] = flat.reshape(heads, -1)
        return dense.view(self.shape)


class Picks(Secret):
    """One-hot rows: each with at most one 1, so that a product with them is as large as what it picks.

    Once opened they are not opened again, nor is what is linear in them.
    """

    __slots__ = ()

    @classmethod
    def of(cls, x: Secret) -> Picks:
        """The same shares, by the caller's word one-hot rows."""
        return cls(x.share, x.scale, x.width, x.bits)

    def reshape(self, *shape: int) -> Self:
        made = super().reshape(*shape)
        made.opened = None if self.opened is None else self.opened.reshape(*shape)
        return made


# Cached keys and values: folded for products, in storage that grows.


class Rows:
    """Cached keys or values [kv_heads, N, head_dim]: folded wires, with the newest rows perhaps still to be opened.

    Rows that join are written behind the others, into storage with room to grow, so that a decode step does not copy
    the cache. Whoever joined last owns the free end; anybody else who joins to the same rows gets a copy.
    """

    def __init__(self, pending: Secret | None, before: Rows | None = None, values: bool = False) -> None:
        assert before is None or before.pending is None, "older rows are opened before newer ones join"
        self.pending: Secret | None = pending
        self.values: bool = values if before is None else before.values
        self.length: int = 0 if before is None else before.length
        self._storage: _Storage | None = None if before is None else before._storage
        self._new_shape = torch.Size(())
        self._scale = self._width = self._bits = 0
        self._joined: Rows | None = None  # the rows that these have become the newest of

    @classmethod
    def opened(cls, rows: products.Operand, values: bool) -> Rows:
        """Rows that have been opened already."""
        made = cls(None, values=values)
        made.settle(rows)
        return made

    @property
    def shape(self) -> torch.Size:
        heads, new, dim = self._new_shape if self.pending is None else self.pending.shape
        return torch.Size((heads, self.length + (0 if self.pending is None else new), dim))

    def behind(self, before: Rows) -> Rows:
        """Opened rows with these, which wait, behind them: what these were to be told, the result is told."""
        self._joined = before.joined_by(self.pending)
        return self._joined

    def joined_by(self, pending: Secret | None) -> Rows:
        """These rows with others behind them, which wait to be opened."""
        return Rows(pending, self)

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
        assert self._storage is not None, "rows are read once they have been opened"
        public, own = self._storage.read(self.length)
        return products.Operand(public, own, self._scale, self._width, self._bits)


class _Storage:
    """Room for rows of an ``Operand``, half as much again as needed."""

    def __init__(self, like: products.Operand, length: int, kept: int, before: _Storage | None) -> None:
        heads, _, dim = like.shape
        size = (heads, length + max(64, length // 2), dim)
        self.public = None if like.public is None else like.public.new_empty(size)
        self.own = like.own.new_empty(size)
        self._last: Callable[[], Rows | None] = lambda: None
        if before is not None:
            for mine, old in ((self.public, before.public), (self.own, before.own)):
                if mine is not None and old is not None:
                    mine[:, :kept] = old[:, :kept]

    def is_free(self, start: int, stop: int) -> bool:
        """Whether rows start .. stop - 1 may be written: there is room, and nobody alive has rows there."""
        last = self._last()
        return stop <= self.own.shape[1] and (last is None or last.length <= start)

    def write(self, rows: products.Operand, start: int, owner: Rows) -> None:
        self._last = weakref.ref(owner)
        self.own[:, start : owner.length] = rows.own
        if self.public is not None:
            assert rows.public is not None, "parties have opened their rows"
            self.public[:, start : owner.length] = rows.public

    def read(self, length: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        return None if self.public is None else self.public[:, :length], self.own[:, :length]


# What to open.


def exact(x: Secret, scale: int) -> Opening:
    """``x`` as an exact wire with at most ``scale`` fractional bits."""
    return Opening(x, truncate=max(0, x.scale - scale))


def lifted(x: Secret, scale: int) -> Opening:
    """``x`` as a wire modulo 2^64 with at most ``scale`` fractional bits, opened in the fewest bits that hold the
    declared |x|."""
    return Opening(x, max(0, x.scale - scale), ring=min(x.width, x.bits + x.scale + 2), lifted=64)


# What is behind a handle.


def value(engine: WireEngine, x: Handle) -> Protocol[Secret]:
    """The shares behind a handle; of a norm's output for what is no linear layer: its weight and sqrt(H) multiplied in.

    Error: of that, half a unit of the weights. Cost: none, but of the owner's weight 8 bytes an element once; dealer
    the bits of the ring an element.
    """
    if isinstance(x, Secret):
        return x
    gamma = yield from engine.matrix(x.gamma, scale=x.size**0.5)
    return products.times_owned(engine.runtime, x.wire, gamma, engine.config.bits_of(x.gamma.name))


def at(engine: WireEngine, x: Secret, scale: int) -> Secret:
    """x at that scale: with more bits, or with low bits dropped; local. Error: none, or a unit of that scale."""
    drop = x.scale - scale
    if drop <= 0:
        return x.at_scale(scale)
    return Secret(engine.runtime.drop(x.share, drop), scale, x.width - drop, x.bits)


def add_bias(engine: WireEngine, x: Secret, bias: Weight | None) -> None:
    """x + bias, in its place."""
    if bias is not None:
        x.share = engine.runtime.plus(x.share, lambda: engine.runtime.constant(bias.words(x.scale)))


# Room.


def alike(engine: WireEngine, values: list[Secret], bits: int, what: str) -> Protocol[list[Secret]]:
    """The same values at one scale, in rings with room for numbers below 2^bits; else ``roomy``."""
    wanted = [(x, max(0, bits - x.bits)) for x in values]
    yield from _widened(engine, [(x, growth) for x, growth in wanted if not _has_room(x, growth)], what)
    scale = max(x.scale for x in values)
    return [x.at_scale(scale) for x in values]


def roomy(engine: WireEngine, x: Secret, growth: int, what: str, width: int = 0) -> Protocol[Secret]:
    """x, or x opened to 64 bits where its ring has no room for ``growth`` bits more and an opening's offset.

    Error: none, or a unit of ``ROOM`` bits. Cost: none, or 1 round with x and 128 dealer bits an element.
    Raises: Overflow, with the name ``what``, where x does not fit its ring or the result 64 bits.
    """
    if width > x.width or not _has_room(x, growth):
        yield from _widened(engine, [(x, growth)], what)
    return x


def _has_room(x: Secret, growth: int) -> bool:
    return x.bits + growth + x.scale + 2 <= x.width


def _widened(engine: WireEngine, values: list[tuple[Secret, int]], what: str) -> Protocol[None]:
    """Each value opened to 64 bits, all in one round; with each, by how many bits what is made of it will grow."""
    for x, _ in values:
        if not _has_room(x, 0):
            raise Overflow(
                f"{what}: |x| < 2^{x.bits} at scale 2^{x.scale} does not fit a share valid modulo 2^{x.width}"
            )
    if not values:
        return
    wires = yield [lifted(x, ROOM) for x, _ in values]
    for (x, growth), wire in zip(values, wires, strict=True):
        made = as_secret(engine.runtime, wire)
        if not _has_room(made, growth):
            raise Overflow(f"{what}: a result below 2^{x.bits + growth} does not fit 64 bits at scale 2^{made.scale}")
        x.become(made)
