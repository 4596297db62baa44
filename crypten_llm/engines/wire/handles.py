"""What engine ``wire`` hands out beside ``Secret``: values that wait for an opening, or that are more than one value.

Owns the shapes and views of these handles; what is computed from them is the operations'.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from crypten_llm.protocols.opening import Secret, Wire


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
