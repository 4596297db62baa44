"""What engine ``wire`` hands out beside ``Secret``, and what is behind it: values that wait for an opening, or that are
more than one value.

Owns these handles, and the openings that operations have in common. Products of a norm's output wait until somebody
needs them (``Scaled``), so that all of them travel together.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch

from crypten_llm.engines.wire.numbers import ROOM, ROW_BITS, WireConfig, whole_bytes
from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire, as_secret

if TYPE_CHECKING:
    from crypten_llm.engines.wire.engine import WireEngine


Change = Callable[[torch.Tensor], torch.Tensor]  # linear


class Weight:
    """A model parameter: known to the owner in the clear, to the others by shape."""

    def __init__(self, value: torch.Tensor | None, shape: Sequence[int]) -> None:
        self.value, self.shape = value, torch.Size(shape)
        self.matrices: dict[
            tuple[Weight | None, float], products.OwnedMatrix
        ] = {}  # as an operand, by what is folded in


@dataclass
class OneHot:
    """The client's token ids; everybody else knows how many."""

    ids: torch.Tensor | None
    count: int
    vocab_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.count, self.vocab_size)


@dataclass
class Normed:
    """x / rms(x) as unit * root * sqrt(H) * gamma: ``unit`` [..., H] has norm 1/2 to 1, ``root`` [..., 1] makes up for
    the rest. ``gamma``: the norm's weight.

    narrow, whole: wires of unit and of unit * root, once opened. waiting: products that need the root.
    """

    unit: Secret
    root: Secret
    gamma: Weight
    narrow: Wire | None = None
    whole: Wire | None = None
    waiting: list[Scaled] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        return self.unit.shape

    @property
    def size(self) -> int:
        """H."""
        return self.unit.shape[-1]

    def fraction(self, config: WireConfig) -> int:
        """Fractional bits of what has norm 1: an element is near 1 / sqrt(H)."""
        return config.activation + round(math.log2(self.size) / 2)

    def _view(self, change: Callable[[Secret], Secret]) -> Normed:
        return Normed(change(self.unit), change(self.root), self.gamma)

    def permute(self, *order: int) -> Normed:
        assert order[-1] == len(order) - 1, "the normed dimension stays the last"
        return self._view(lambda part: part.permute(*order))

    def reshape(self, *shape: int) -> Normed:
        assert shape[-1] == self.size, "the normed dimension stays the last"
        return Normed(self.unit.reshape(*shape), self.root.reshape(*shape[:-1], 1), self.gamma)


class Scaled:
    """A product that waits: raw * root, element-wise, to be opened together with the others of its norm."""

    def __init__(self, raw: Secret, normed: Normed, bias: Weight | None) -> None:
        self.raw, self.normed, self.bias = raw, normed, bias
        self.value: Secret | None = None

    @property
    def shape(self) -> torch.Size:
        return self.raw.shape

    def reshape(self, *shape: int) -> Reshaped:
        return Reshaped(self, [("reshape", shape)])

    def permute(self, *order: int) -> Reshaped:
        return Reshaped(self, [("permute", order)])


class Reshaped:
    """A view of a ``Scaled`` that has not been computed yet."""

    def __init__(self, source: Scaled, steps: list[tuple[str, tuple[int, ...]]]) -> None:
        self.source, self.steps = source, steps

    @property
    def shape(self) -> torch.Size:
        return self.applied(torch.empty(self.source.shape, device="meta")).shape

    def applied(self, value: Any) -> Any:
        """The same view of ``value``, which has the source's shape."""
        for name, arguments in self.steps:
            value = getattr(value, name)(*arguments)
        return value

    def reshape(self, *shape: int) -> Reshaped:
        return Reshaped(self.source, [*self.steps, ("reshape", shape)])

    def permute(self, *order: int) -> Reshaped:
        return Reshaped(self.source, [*self.steps, ("permute", order)])


Handle = Secret | Normed | Scaled | Reshaped  # of one value, see ``value``


@dataclass
class Weights:
    """Softmax weights whose rows sum to between 1/4 and 1; ``mix`` divides by the sum.

    wires: what ``mix`` opened: the weights, and 1 / (2 sum) [..., 1].
    """

    weights: Secret
    wires: tuple[Wire, Wire] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.weights.shape


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


def narrow(x: Secret, scale: int) -> Opening:
    """``x`` as an exact wire with at most ``scale`` fractional bits."""
    return Opening(x, truncate=max(0, x.scale - scale))


def lifted(x: Secret, scale: int) -> Opening:
    """``x`` as a wire modulo 2^64 with at most ``scale`` fractional bits."""
    return Opening(x, truncate=max(0, x.scale - scale), lifted=64)


def lifted_from_bytes(x: Secret, scale: int) -> Opening:
    """As ``lifted``, opened in the fewest whole bytes that hold the declared |x|."""
    size = min(x.width, whole_bytes(x.bits + x.scale + 2))
    return Opening(x, ring=size, truncate=max(0, x.scale - scale), lifted=64)


# What is behind a handle.


def value(engine: WireEngine, x: Handle) -> Protocol[Secret]:
    """The shares behind a handle."""
    if isinstance(x, Secret):
        return x
    if isinstance(x, Normed):
        return (yield from whole(engine, x))
    if isinstance(x, Scaled):
        if x.value is None:
            yield from settle(engine, x.normed)
            assert x.value is not None, "a norm settles every product that waits for it"
        return x.value
    return x.applied((yield from value(engine, x.source)))


def awaited(x: Handle | Weights) -> Normed | None:
    """The norm that a handle waits for: it is a product, or a view of one, that has not been computed."""
    source = getattr(x, "source", x)
    return source.normed if isinstance(source, Scaled) and source.value is None else None


def settle(
    engine: WireEngine, normed: Normed, raw_bits: int | None = None, root_bits: int | None = None
) -> Protocol[None]:
    """Computes every product of this norm that waits: one round for all of them.

    raw_bits, root_bits: fractional bits of the two factors. By default what keys have room for: their opening drops
    all but ``key`` of these and of the rotation's bits, and has to leave room for scores.
    """
    waiting, normed.waiting = normed.waiting, []
    raw_bits, root_bits = (bits or engine.config.activation + 1 for bits in (raw_bits, root_bits))
    *wires, root = yield [*(lifted(item.raw, raw_bits) for item in waiting), lifted(normed.root, root_bits)]
    for item, wire in zip(waiting, wires, strict=True):
        item.value = products.multiply(engine.runtime, wire, root, bits=engine.config.linear_bits)
        add_bias(engine, item.value, item.bias)


def whole_wire(engine: WireEngine, x: Normed) -> Protocol[Wire]:
    """x / |x| as an exact wire: the root multiplied in. Cost: 2 rounds, once."""
    if x.whole is None:
        f = x.fraction(engine.config)
        unit, root = yield [lifted(x.unit, f), lifted(x.root, ROW_BITS)]
        product = products.multiply(engine.runtime, unit, root, bits=1)
        (x.whole,) = yield [narrow(product, f)]
    return x.whole


def whole(engine: WireEngine, x: Normed) -> Protocol[Secret]:
    """The norm's output itself, for what is no linear layer: its weight and sqrt(H) are multiplied in.

    Error: a unit of the normalised row, and half a unit of the weights, each times the other.
    Cost: 2 rounds, and of the owner's weight 8 bytes an element once; dealer the bits of the ring an element.
    """
    wire: Wire = yield from whole_wire(engine, x)
    gamma = yield from engine.matrix(x.gamma, scale=x.size**0.5)
    return products.times_owned(engine.runtime, wire, gamma, engine.config.linear_bits)


def add_bias(engine: WireEngine, x: Secret, bias: Weight | None) -> None:
    """x + bias, in its place."""
    if bias is not None:

        def words() -> torch.Tensor:
            assert bias.value is not None, "the owner has the bias"
            return (bias.value.double() * 2**x.scale).round().long()

        x.share = engine.runtime.plus(x.share, words)


# Room.


def alike(engine: WireEngine, values: list[Secret], bits: int, what: str) -> Protocol[list[Secret]]:
    """The same values at one scale, in rings with room for numbers below 2^bits; else ``roomy``."""
    made = []
    for x in values:
        made.append((yield from roomy(engine, x, max(0, bits - x.bits), what)))
    scale = max(x.scale for x in made)
    return [x.at_scale(scale) for x in made]


def roomy(engine: WireEngine, x: Secret, growth: int, what: str, width: int = 0) -> Protocol[Secret]:
    """x, or x opened to 64 bits where its ring has no room for ``growth`` bits more and an opening's offset.

    Error: none, or a unit of ``ROOM`` bits. Cost: none, or 1 round with x and 128 dealer bits an element.
    Raises: Overflow, with the name ``what``, where x does not fit its ring or the result 64 bits.
    """
    if x.bits + growth + x.scale + 2 <= x.width and width <= x.width:
        return x
    if x.bits + x.scale + 2 > x.width:
        raise Overflow(f"{what}: |x| < 2^{x.bits} at scale 2^{x.scale} does not fit a share valid modulo 2^{x.width}")
    (wire,) = yield [lifted_from_bytes(x, ROOM)]
    made = as_secret(engine.runtime, wire)
    if made.bits + growth + made.scale + 2 > 64:
        raise Overflow(f"{what}: a result below 2^{x.bits + growth} does not fit 64 bits at scale 2^{made.scale}")
    x.become(made)
    return x
