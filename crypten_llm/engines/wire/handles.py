"""What engine ``wire`` hands out beside ``Secret``, and what is behind it: values that wait for an opening, or that are
more than one value.

Owns these handles, and the openings that operations have in common. Products of a norm's output wait until somebody
needs them (``Scaled``), so that all of them travel together.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from crypten_llm.engines.wire.numbers import ROOM, ROW_BITS, whole_bytes
from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Opening, Overflow, Protocol, Secret, Wire, as_secret


class Weight:
    """A model parameter: known to the owner in the clear, to the others by shape."""

    def __init__(self, value, shape):
        self.value, self.shape = value, torch.Size(shape)
        self.matrices: dict = {}  # as an operand, by what is folded in


@dataclass
class OneHot:
    """The client's token ids; everybody else knows how many."""

    ids: torch.Tensor | None
    count: int
    vocab_size: int

    @property
    def shape(self):
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
    waiting: list["Scaled"] = field(default_factory=list)

    @property
    def shape(self):
        return self.unit.shape

    @property
    def size(self) -> int:
        """H."""
        return self.unit.shape[-1]

    def fraction(self, config) -> int:
        """Fractional bits of what has norm 1: an element is near 1 / sqrt(H)."""
        return config.activation + round(math.log2(self.size) / 2)

    def _view(self, change) -> "Normed":
        return Normed(change(self.unit), change(self.root), self.gamma)

    def permute(self, *order):
        assert order[-1] == len(order) - 1, "the normed dimension stays the last"
        return self._view(lambda part: part.permute(*order))

    def reshape(self, *shape):
        assert shape[-1] == self.size, "the normed dimension stays the last"
        return Normed(self.unit.reshape(*shape), self.root.reshape(*shape[:-1], 1), self.gamma)


class Scaled:
    """A product that waits: raw * root, element-wise, to be opened together with the others of its norm."""

    def __init__(self, raw: Secret, normed: Normed, bias: Weight | None):
        self.raw, self.normed, self.bias = raw, normed, bias
        self.value: Secret | None = None

    @property
    def shape(self):
        return self.raw.shape

    def reshape(self, *shape):
        return Reshaped(self, [("reshape", shape)])

    def permute(self, *order):
        return Reshaped(self, [("permute", order)])


class Reshaped:
    """A view of a ``Scaled`` that has not been computed yet."""

    def __init__(self, source: Scaled, steps: list):
        self.source, self.steps = source, steps

    @property
    def shape(self):
        return self.applied(torch.empty(self.source.shape, device="meta")).shape

    def applied(self, value) -> Any:
        """The same view of ``value``, which has the source's shape."""
        for name, arguments in self.steps:
            value = getattr(value, name)(*arguments)
        return value

    def reshape(self, *shape):
        return Reshaped(self.source, [*self.steps, ("reshape", shape)])

    def permute(self, *order):
        return Reshaped(self.source, [*self.steps, ("permute", order)])


@dataclass
class Weights:
    """Softmax weights whose rows sum to between 1/4 and 1; ``mix`` divides by the sum.

    wires: what ``mix`` opened: the weights, and 1 / (2 sum) [..., 1].
    """

    weights: Secret
    wires: tuple[Wire, Wire] | None = None

    @property
    def shape(self):
        return self.weights.shape


class Picks(Secret):
    """One-hot rows: each with at most one 1, so that a product with them is as large as what it picks.

    Once opened they are not opened again, nor is what is linear in them.
    """

    __slots__ = ()

    @classmethod
    def of(cls, x: Secret) -> "Picks":
        """The same shares, by the caller's word one-hot rows."""
        return cls(x.share, x.scale, x.width, x.bits)

    def reshape(self, *shape):
        made = super().reshape(*shape)
        made.opened = None if self.opened is None else self.opened.reshape(*shape)
        return made


# What to open.


def narrow(x: Secret, scale: int) -> Opening:
    """``x`` as a narrow wire with at most ``scale`` fractional bits."""
    return Opening(x, truncate=max(0, x.scale - scale))


def lifted(x: Secret, scale: int) -> Opening:
    """``x`` as a wire modulo 2^64 with at most ``scale`` fractional bits."""
    return Opening(x, truncate=max(0, x.scale - scale), lifted=x.scale > scale or x.width < 64)


def lifted_from_bytes(x: Secret, scale: int) -> Opening:
    """As ``lifted``, opened in the fewest whole bytes that hold the declared |x|."""
    size = min(x.width, whole_bytes(x.bits + x.scale + 2))
    return Opening(x, ring=size, truncate=max(0, x.scale - scale), lifted=True)


# What is behind a handle.


def value(engine, x) -> Protocol:
    """The shares behind a handle."""
    if isinstance(x, Secret):
        return x
    if isinstance(x, Normed):
        return (yield from whole(engine, x))
    if isinstance(x, Scaled):
        if x.value is None:
            yield from settle(engine, x.normed)
        return x.value
    return x.applied((yield from value(engine, x.source)))


def is_waiting(x) -> bool:
    """Whether a handle is a product, or a view of one, that has not been computed."""
    source = getattr(x, "source", x)
    return isinstance(source, Scaled) and source.value is None


def settle(engine, normed: Normed, raw_bits: int | None = None, root_bits: int | None = None) -> Protocol:
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


def whole_wire(engine, x: Normed) -> Protocol:
    """x / |x| as a narrow wire: the root multiplied in. Cost: 2 rounds, once."""
    if x.whole is None:
        f = x.fraction(engine.config)
        unit, root = yield [lifted(x.unit, f), lifted(x.root, ROW_BITS)]
        product = products.multiply(engine.runtime, unit, root, bits=1)
        (x.whole,) = yield [narrow(product, f)]
    return x.whole


def whole(engine, x: Normed) -> Protocol:
    """The norm's output itself, for what is no linear layer: its weight and sqrt(H) are multiplied in.

    Error: a unit of the normalised row, and half a unit of the weights, each times the other.
    Cost: 2 rounds, and of the owner's weight 8 bytes an element once; dealer the bits of the ring an element.
    """
    wire: Wire = yield from whole_wire(engine, x)
    gamma = yield from engine.matrix(x.gamma, scale=x.size**0.5)
    return products.times_owned(engine.runtime, wire, gamma, engine.config.linear_bits)


def add_bias(engine, x: Secret, bias: Weight | None) -> None:
    """x + bias, in its place."""
    if bias is not None:
        x.share = engine.runtime.plus(x.share, lambda: (bias.value.double() * 2**x.scale).round().long())


# Room.


def alike(engine, values: list[Secret], bits: int, what: str) -> Protocol:
    """The same values at one scale, in rings with room for numbers below 2^bits; else ``roomy``."""
    made = []
    for x in values:
        made.append((yield from roomy(engine, x, max(0, bits - x.bits), what)))
    scale = max(x.scale for x in made)
    return [x.at_scale(scale) for x in made]


def roomy(engine, x: Secret, growth: int, what: str, width: int = 0) -> Protocol:
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
