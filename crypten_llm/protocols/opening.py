"""Masked openings: how a secret becomes a wire, and what else a protocol may ask to have sent.

Owns what the protocols exchange: x + r for a fresh uniform mask r. Everything a value is needed for, products,
lifting to wider rings, functions, comparisons, follows from that one opening.

Low bits of a ``Secret`` are dropped before it is opened, and locally: one party rounds its share up, the other down,
and what that leaves is valid modulo as many bits less (``Runtime.drop``). Opening x modulo 2^n gives M = x + r: an
*exact* wire, public part minus one mask, of which each party has its part. With |x| < 2^(n-2) it can be *lifted* to a
wider ring 2^w. An offset makes x non-negative; with the dealer's shares, modulo 2^(w-n), of the carry c of the mask's
two parts and of its top bit b,

    x  =  M - 2^(n-2) - (r0 + r1 - 2^n c) + 2^n (1 - msb(M)) b   modulo 2^w:

linear in two secrets with public coefficients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.links.meter import Cell
from crypten_llm.protocols.dealer.runtime import Parts, Piece, Runtime
from crypten_llm.protocols.secret import Overflow, Secret, Wire, Wrap


@dataclass(slots=True)
class Opening:
    """What to open: ``secret`` modulo 2^ring, of which ``truncate`` bits are dropped first; exact or lifted.

    lifted: to modulo 2^lifted, where that is more than what is opened; 0 is not. function: |x| may fill the ring,
    which is the period of a function, or the ring of what is meant modulo it.

    Reveals: x + r modulo 2^n for a fresh mask r uniform modulo 2^n, n = ring - truncate: a uniform value, to both.
    Error: rounding by less than one unit of the new scale, unbiased; none without truncation.
    Cost: n bits an element each way, packed; dealer, of a lifted wire alone, 2 (lifted - n) bits an element.
    Raises: Overflow when the declared |x| does not fit what is opened, or the share is not valid there.
    Source: a masked opening as in Ben-Efraim et al. (Turbospeedz, ACNS 2019); the wrap bit as in Escudero et al.
    (CRYPTO 2020), section 5.1; truncation of additive shares as in SecureML (S&P 2017), section 4.1, on a ring that
    loses the dropped bits, so that it never fails.

    The rounding follows from a party's own share and the bits of x that are dropped, so a party that learned the result
    of a single truncation exactly would learn something of those bits; M says nothing of them. Only logits are ever
    opened.
    """

    secret: Secret
    truncate: int = 0
    lifted: int = 0
    ring: int | None = None
    function: bool = False

    @property
    def size(self) -> int:
        """Bits that are opened."""
        return (self.ring or self.secret.width) - self.truncate

    @property
    def is_exact(self) -> bool:
        """Whether M = x + r is a wire as it is, modulo its own ring."""
        return self.lifted <= self.size

    def check(self) -> None:
        """Raises Overflow."""
        secret, truncate = self.secret, self.truncate
        size = (self.ring or secret.width) - truncate
        if size + truncate > secret.width:
            raise Overflow(f"a share valid modulo 2^{secret.width} cannot be opened modulo 2^{size + truncate}")
        if self.function and self.lifted:
            raise Overflow("an opening for a function is not lifted")
        least = 1 if self.function else 2
        if truncate < 0 or size < least:
            raise Overflow(
                f"cannot drop {truncate} bits of an opening of {size + truncate}: give 0 to {size + truncate - least}"
            )
        needs = secret.bits + secret.scale - truncate + 2
        if not self.function and needs > size:
            raise Overflow(
                f"|x| < 2^{secret.bits} at scale 2^{secret.scale - truncate} needs {needs} bits, but the opening "
                f"has {size}"
            )

    def prepare(self, runtime: Runtime, cell: Cell) -> tuple[Piece, Callable[[Tensor | None], Wire]]:
        """What travels, and what makes a wire of the sum."""
        self.check()
        size, share = self.size, self.secret.share
        shape = tuple(share.shape)
        mask = runtime.mask(shape, size)
        offset = 0 if self.lifted <= size else 1 << (size - 2)
        if self.truncate:
            share = runtime.drop(share, self.truncate)
        piece = Piece(shape, size, cell, share, mask.held, offset)
        return piece, partial(self._wire, runtime, mask)

    def _wire(self, runtime: Runtime, mask: Parts, public: Tensor | None) -> Wire:
        secret, size = self.secret, self.size
        scale = secret.scale - self.truncate
        if self.lifted <= size:
            return Wire(public, mask, scale, size, secret.bits)
        wrapped = runtime.deal((2, *mask.shape), lambda: _carry_and_top(mask, size), self.lifted - size)
        carry, bit = wrapped.map(lambda t: t[0]), wrapped.map(lambda t: t[1])
        whole = runtime.less(mask, carry, size)
        shown = coefficient = None
        if public is not None:
            shown, coefficient = runtime.kernels.unwrap(public, size)
        return Wire(shown, whole, scale, self.lifted, secret.bits, Wrap(coefficient, bit, size))


def _carry_and_top(mask: Parts, size: int) -> Tensor:
    """At the dealer: whether the two parts of a mask wrapped, and its top bit."""
    assert mask.client is not None, "the dealer knows both parts"
    return torch.stack([(mask.held < mask.client).long(), ring.top_bit(mask.held, size)])


@dataclass(slots=True)
class Message:
    """What one party sends the other as it is: it must hide what it carries itself, or be meant for the other's eyes.

    words: at the sender, of which the low ``bits`` travel. The other party is sent them in the place of a wire.
    """

    sender: int
    shape: tuple
    bits: int
    words: Tensor | None

    def prepare(self, runtime: Runtime, cell: Cell) -> tuple[Piece, Callable[[Tensor | None], Tensor | None]]:
        return Piece(self.shape, self.bits, cell, self.words, sender=self.sender), lambda words: words


class Request(Protocol):
    """What a protocol yields: an opening of any kind, or a message."""

    def prepare(self, runtime: Runtime, cell: Cell) -> tuple[Piece, Callable[[Tensor | None], Any]]:
        """What travels, and what makes of the sum, ``None`` at the dealer, what the protocol is sent."""
        ...
