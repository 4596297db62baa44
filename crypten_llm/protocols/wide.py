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


@dataclass
class Opened:
    """x = public - mask, modulo what it was opened in. public: ``None`` at the dealer. mask: whole at the dealer."""

    public: Tensor | None
    mask: Parts

    @property
    def seen(self) -> Tensor:
        """The public part, at a party."""
        assert self.public is not None, "parties have opened it"
        return self.public


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Lifted:
    """x = public - mask + 2^size * unwrapped * bit modulo 2^bits, of a number opened modulo 2^size.

    public: signed words; unwrapped: words 0 or 1 (both ``None`` at the dealer). mask, bit: at a party limbs, its shares
    of the mask as an integer and of its top bit, the latter modulo 2^(bits - size); at the dealer words, the whole.
    """

    public: Tensor | None
    unwrapped: Tensor | None
    mask: Tensor
    bit: Tensor
    size: int
    bits: int

    @property
    def seen(self) -> Tensor:
        assert self.public is not None, "parties have opened it"
        return self.public

    def where_unwrapped(self, words: Tensor) -> Tensor:
        """Limbs, or zeros where the opened number says that its mask has not wrapped."""
        assert self.unwrapped is not None, "parties have opened it"
        return words * self.unwrapped[..., None]


def to_lift(runtime: Runtime, x: Secret) -> Opening:
    """The opening of x, |x| < 2^(width - 2), that ``lift`` goes on with. Cost: width bits an element each way."""
    Opening(x, lifted=x.width).check()
    raised = runtime.share(x.shape, lambda: runtime.plus(x.share, 1 << (x.width - 2)))
    return Opening(Secret(raised, x.scale, x.width, x.bits), function=True)


def lift(runtime: Runtime, wire: Wire, bits: int) -> Lifted:
    """What was opened by ``to_lift``, modulo 2^bits; local.

    Error: none. Cost: dealer, for n opened bits, 2 (bits - n) an element. Source: as ``opening.Opening``.
    """
    kernels, size, mask, more = runtime.kernels, wire.width, wire.mask, bits - wire.width

    def wrapped() -> Tensor:
        assert mask.client is not None, "the dealer knows both parts"
        return limbs_for(runtime, torch.stack([(mask.held < mask.client).long(), ring.top_bit(mask.held, size)]), more)

    dealt = runtime.deal((2, *wire.shape), wrapped, more).held
    if wire.public is None:
        return Lifted(None, None, mask.held, _top_bit(mask.held, size), size, bits)
    carry, bit = (kernels.widen(part, bits, False) if more <= 64 else _extended(part, bits) for part in dealt)
    own = kernels.subtract_wide(kernels.widen(mask.held, bits, False), kernels.shift_wide(carry, size, bits), bits)
    shown, unwrapped = kernels.unwrap(wire.public, size)
    return Lifted(shown, (unwrapped != 0).long(), own, bit, size, bits)


def _top_bit(mask: Tensor, size: int) -> Tensor:
    return mask if mask.is_meta else ring.top_bit(mask, size)


def _extended(words: Tensor, bits: int) -> Tensor:
    """Limbs with as many zeros above as a wider number has."""
    missing = ring.limbs(bits) - words.shape[-1]
    return words if not missing else torch.cat([words, words.new_zeros(*words.shape[:-1], missing)], -1)


def limbs_for(runtime: Runtime, words: Tensor, bits: int) -> Tensor:
    """Words as what ``Runtime.deal`` takes for that many bits: limbs above 64."""
    return words if bits <= 64 else runtime.kernels.widen(words, bits, True)


def lifted_share(runtime: Runtime, x: Lifted) -> Tensor:
    """This party's share of x, limbs modulo 2^bits."""
    kernels, bits = runtime.kernels, x.bits
    wrap = kernels.shift_wide(x.where_unwrapped(x.bit), x.size, bits)
    own = kernels.subtract_wide(wrap, x.mask, bits)
    shown = runtime.plus(torch.zeros_like(x.seen), x.seen)
    return kernels.add_wide(own, kernels.widen(shown, bits, True), bits)
