"""Secrets and wires: additive shares with a scale and a valid width, and what they are once opened behind a mask.

Owns the two forms in which protocols hand a secret to each other, and what is local between them.

A ``Secret`` holds x * 2^scale modulo 2^width. A ``Wire`` is the same secret after a masked opening (``opening``): a
public part minus a mask of which each party has its part, and where it was lifted a dealt bit beside it. It is linear
in secrets with public coefficients, and what a value is needed for follows from that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from crypten_llm.protocols.dealer.runtime import Parts, Runtime


class Overflow(AssertionError):
    """An operation whose result would not fit its ring; the message names it."""


class Secret:
    """Additive shares of integers x * 2^scale, valid modulo 2^width; at the dealer, a shape (torch's meta device).

    bits: |x| < 2^bits, declared by whoever made it, so that overflow can be refused before anything is sent. opened:
    the wire that it was opened as, where it is kept.
    """

    __slots__ = ("share", "scale", "width", "bits", "opened")

    def __init__(self, share: Tensor, scale: int, width: int, bits: int) -> None:
        self.share, self.scale, self.width, self.bits = share, scale, width, bits
        self.opened: Wire | None = None

    @property
    def shape(self) -> torch.Size:
        return self.share.shape

    def like(self, share: Tensor) -> Self:
        """Other shares of the same scale, width and bits."""
        return type(self)(share, self.scale, self.width, self.bits)

    def reshape(self, *shape: int) -> Self:
        return self.like(self.share.reshape(*shape))

    def permute(self, *order: int) -> Self:
        return self.like(self.share.permute(*order))

    def transpose(self, first: int, second: int) -> Self:
        return self.like(self.share.transpose(first, second))

    def __getitem__(self, index: Any) -> Self:
        return self.like(self.share[index])

    def __neg__(self) -> Self:
        return self.like(-self.share)

    def at_scale(self, scale: int) -> Self:
        """The same values with more fractional bits; what was valid modulo 2^w now is modulo that much more."""
        more = scale - self.scale
        if not more:
            return self
        return type(self)(self.share << more, scale, min(64, self.width + more), self.bits)

    def become(self, other: Secret) -> None:
        """Takes over ``other``'s shares of the same value."""
        self.share, self.scale, self.width, self.bits = other.share, other.scale, other.width, other.bits
        self.opened = None


@dataclass(slots=True)
class Wrap:
    """What a lifted wire adds where its mask has wrapped: ``coefficient``, 2^size or 0, times a dealt bit.

    coefficient: public, ``None`` at the dealer. bit: the top bit of the mask, shares modulo 2^(width - size).
    """

    coefficient: Tensor | None
    bit: Parts
    size: int

    def map(self, change: Callable[[Tensor], Tensor]) -> Wrap:
        return Wrap(None if self.coefficient is None else change(self.coefficient), self.bit.map(change), self.size)


@dataclass(slots=True)
class Wire:
    """An opened secret: x = public - mask, modulo 2^width, at ``scale``; of a lifted one, plus its ``wrap``.

    public: what both parties see (``None`` at the dealer). mask: at a party its share of the mask.
    """

    public: Tensor | None
    mask: Parts
    scale: int
    width: int
    bits: int
    wrap: Wrap | None = None

    @property
    def shape(self) -> torch.Size:
        return self.mask.shape

    @property
    def seen(self) -> Tensor:
        """The public part, at a party."""
        assert self.public is not None, "parties have opened it"
        return self.public

    def reshape(self, *shape: int) -> Wire:
        return self.map(lambda t: t.reshape(*shape))

    def transpose(self, first: int, second: int) -> Wire:
        return self.map(lambda t: t.transpose(first, second))

    def map(self, change: Callable[[Tensor], Tensor]) -> Wire:
        """The wire with ``change``, which must be linear, applied to each of its tensors."""
        public = None if self.public is None else change(self.public)
        wrap = None if self.wrap is None else self.wrap.map(change)
        return Wire(public, self.mask.map(change), self.scale, self.width, self.bits, wrap)


def masked(x: Wire) -> Tensor:
    """This party's part of x without the public one."""
    total = -x.mask.held
    if x.wrap is not None:
        assert x.wrap.coefficient is not None, "parties have opened it"
        total.addcmul_(x.wrap.coefficient, x.wrap.bit.held)
    return total


def as_secret(runtime: Runtime, wire: Wire) -> Secret:
    """The shares that a wire stands for; local."""
    return Secret(shares_of(runtime, wire), wire.scale, wire.width, wire.bits)


def shares_of(runtime: Runtime, x: Wire) -> Tensor:
    """Additive shares behind a wire, valid modulo its ring; local."""
    return runtime.share(x.shape, lambda: runtime.plus(masked(x), x.seen))


def joined(wires: list[Wire], dim: int) -> Wire:
    """Exact wires of one scale, one behind the other."""
    first = wires[0]
    publics: list[Any] = [wire.public for wire in wires]
    public = None if first.public is None else torch.cat(publics, dim)
    parts = [wire.mask for wire in wires]
    clients: list[Any] = [part.client for part in parts]
    client = None if parts[0].client is None else torch.cat(clients, dim)
    mask = Parts(torch.cat([part.held for part in parts], dim), client)
    return Wire(public, mask, first.scale, min(wire.width for wire in wires), first.bits)
