"""What engine ``wire`` hands out beside ``Secret``: values that wait for an opening, or that are more than one value.

Owns the shapes and views of these handles; what is computed from them is the engine's.
"""

from dataclasses import dataclass

import torch

from crypten_llm.protocols.opening import Secret, Wire


class Weight:
    """A model parameter: known to the owner in the clear, to the others by shape."""

    def __init__(self, value, shape):
        self.value, self.shape = value, torch.Size(shape)
        self.matrices: dict = {}  # as an operand, by the norm's weight that is folded in


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
    """x / rms(x) as unit * root * sqrt(H): ``unit`` [T, H] has norm 1/2 to 1, ``root`` [T, 1] makes up for the rest."""

    unit: Secret
    root: Secret
    gamma: Weight
    wires: dict

    @property
    def shape(self):
        return self.unit.shape


class Scaled:
    """A product that waits: raw * root, element-wise, to be opened together with others."""

    def __init__(self, raw: Secret, root: Secret, bias: Weight | None):
        self.raw, self.root, self.bias = raw, root, bias
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

    def applied(self, value):
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

    def _like(self, share):
        return Picks(share, self.scale, self.width, self.bits)

    def reshape(self, *shape):
        made = super().reshape(*shape)
        made.opened = None if self.opened is None else self.opened.reshape(*shape)
        return made
