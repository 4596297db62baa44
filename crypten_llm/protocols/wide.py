"""Openings of what is no word: numbers above 64 bits, modulo 2^q - 1, and modulo small numbers; and lifting to them.

Owns these requests (``rounds`` carries them as any other) and ``Lifted``, what a narrow opening stands for in a ring of
more than 64 bits. Such numbers are limbs [..., L], the lowest first (``kernels.ring``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.runtime import Parts, Piece, Runtime
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Secret, Wire

if TYPE_CHECKING:
    from crypten_llm.links.meter import Cell


@dataclass(slots=True)
class Opened:
    """x = public - mask, modulo what it was opened in. public: ``None`` at the dealer. mask: whole at the dealer."""

    public: Tensor | None
    mask: Parts

    @property
    def seen(self) -> Tensor:
        """The public part, at a party."""
        assert self.public is not None, "parties have opened it"
        return self.public


@dataclass(slots=True)
class WideOpening:
    """Shares of x modulo 2^bits, or 2^bits - 1 where ``ones``; bits > 64. share: limbs of ``shape``.

    Reveals: x + r for a fresh mask r uniform over the ring. Error: none. Cost: bits an element each way; no material.
    """

    share: Tensor
    shape: Sequence[int]
    bits: int
    ones: bool = False

    def prepare(self, runtime: Runtime, cell: Cell) -> tuple[Piece, Callable[[Tensor | None], Opened]]:
        """What travels, and what is made of the sum."""
        mask = (runtime.mask_ones if self.ones else runtime.mask)(self.shape, self.bits)
        modulus = (1 << self.bits) - 1 if self.ones else None
        piece = Piece(tuple(self.shape), self.bits, cell, self.share, mask.held, modulus=modulus)
        return piece, lambda public: Opened(public, mask)


@dataclass(slots=True)
class ResidueOpening:
    """Shares of x modulo a small number, behind a mask that was drawn before (``Runtime.mask_below``) and hides nothing
    else.

    Reveals: x + r for that mask. Error: none. Cost: as many bits each way as the modulus has; no material.
    """

    share: Tensor
    mask: Parts
    modulus: int

    def prepare(self, runtime: Runtime, cell: Cell) -> tuple[Piece, Callable[[Tensor | None], Opened]]:
        """What travels, and what is made of the sum."""
        bits = (self.modulus - 1).bit_length()
        piece = Piece(tuple(self.share.shape), bits, cell, self.share, self.mask.held, modulus=self.modulus)
        return piece, lambda public: Opened(public, self.mask)


@dataclass(slots=True)
class Lifted:
    """x = public - mask modulo 2^bits, of a number opened modulo 2^size behind r.

    Where the sum has not wrapped, which ``unwrapped`` says, the mask is r read as a signed number, r - 2^size b, b its
    top bit; where it has, r. So what is dealt times the mask is dealt times r and times b.

    public: signed words; unwrapped: words 0 or 1; both ``None`` at the dealer. mask: at a party limbs, its share of the
    mask; at the dealer r, words.
    """

    public: Tensor | None
    unwrapped: Tensor | None
    mask: Tensor
    size: int
    bits: int

    @property
    def seen(self) -> Tensor:
        """The public part, at a party."""
        assert self.public is not None, "parties have opened it"
        return self.public

    @property
    def where(self) -> Tensor:
        """``unwrapped``, at a party."""
        assert self.unwrapped is not None, "parties have opened it"
        return self.unwrapped

    @property
    def shape(self) -> torch.Size:
        return self.mask.shape if self.public is None else self.public.shape

    def top(self) -> Tensor:
        """At the dealer: b, words."""
        return ring.top_bit(self.mask, self.size)


def to_lift(runtime: Runtime, x: Secret) -> Opening:
    """The opening of x, |x| < 2^(width - 2), that ``lift`` goes on with. Cost: width bits an element each way."""
    Opening(x, lifted=x.width).check()
    raised = runtime.share(x.shape, lambda: runtime.plus(x.share, 1 << (x.width - 2)))
    return Opening(Secret(raised, x.scale, x.width, x.bits), function=True)


def lift(runtime: Runtime, wire: Wire, bits: int) -> Lifted:
    """What was opened by ``to_lift``, modulo 2^bits; local.

    Error: none for |x| up to 2^(n - 2), n being the bits that were opened; a larger one below three times that comes
    out as another, which is 2^(n - 2) or more in magnitude. Cost: dealer 2 (bits - n) bits an element.
    Source: as ``opening.Opening``.
    """
    kernels, size, mask, more = runtime.kernels, wire.width, wire.mask, bits - wire.width

    def wrapped() -> Tensor:
        assert mask.client is not None, "the dealer knows both parts"
        both = torch.stack([(mask.held < mask.client).long(), ring.top_bit(mask.held, size)])
        return as_dealt(runtime, both, more)

    dealt = as_limbs(runtime.deal((2, *wire.shape), wrapped, more).held, more)
    if wire.public is None:
        return Lifted(None, None, mask.held, size, bits)
    shown, wrap = kernels.unwrap(wire.public, size)
    unwrapped = (wrap != 0).long()
    return Lifted(shown, unwrapped, kernels.lift_mask(mask.held, dealt[0], dealt[1], unwrapped, size, bits), size, bits)


def lifted_share(runtime: Runtime, x: Lifted) -> Tensor:
    """This party's share of x, limbs modulo 2^bits."""
    kernels = runtime.kernels
    shown = kernels.widen(runtime.plus(torch.zeros_like(x.seen), x.seen), x.bits, True)
    return kernels.subtract_wide(shown, x.mask, x.bits)


def as_dealt(runtime: Runtime, words: Tensor, bits: int) -> Tensor:
    """Words as what ``Runtime.deal`` takes for that many bits: limbs above 64."""
    return words if bits <= 64 else runtime.kernels.widen(words, bits, True)


def as_limbs(dealt: Tensor, bits: int) -> Tensor:
    """What ``Runtime.deal`` gives for that many bits as limbs; up to 64 there is one, of which the low bits count."""
    return dealt if bits > 64 else dealt[..., None]
