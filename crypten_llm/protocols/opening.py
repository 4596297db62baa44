"""Secrets and wires: additive shares with a scale and a valid width, and their masked openings.

Owns the only message that the protocols exchange: x + r for a fresh uniform mask r. Everything a value is needed
for, products, truncation, lifting to 64 bits, functions, comparisons, follows from that one opening.

A ``Secret`` holds x * 2^scale modulo 2^width. Opening it modulo 2^ring with a truncation of t bits gives M, and

    x >> t  =  (M >> t) - (r >> t) + c * msb(r),   c = 2^(ring - t) * (1 - msb(M)),

up to one unit of rounding, unbiased, for |x| < 2^(ring - 2) (an offset of 2^(ring - 2) makes x non-negative). Modulo
2^(ring - t) the last term vanishes: a *narrow* wire, public part minus one mask. With the dealer's shares of r >> t
and msb(r), the whole of it holds modulo 2^64: a *lifted* wire, linear in two masks with public coefficients.
"""

import itertools
from dataclasses import dataclass, field

import numpy as np
import torch

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.roles import PARTY0
from crypten_llm.protocols.dealer.shapes import shape_only


class Overflow(AssertionError):
    """An operation whose result would not fit its ring; the message names it."""


class Secret:
    """Additive shares of integers x * 2^scale, valid modulo 2^width; at the dealer, a shape (torch's meta device).

    bits: |x| < 2^bits, declared by whoever made it, so that overflow can be refused before anything is sent.
    """

    __slots__ = ("share", "scale", "width", "bits", "opened")

    def __init__(self, share, scale: int, width: int, bits: int):
        self.share, self.scale, self.width, self.bits = share, scale, width, bits
        self.opened = None

    @property
    def shape(self):
        return self.share.shape

    def _like(self, share):
        return Secret(share, self.scale, self.width, self.bits)

    def reshape(self, *shape):
        return self._like(self.share.reshape(*shape))

    def permute(self, *order):
        return self._like(self.share.permute(*order))

    def transpose(self, first, second):
        return self._like(self.share.transpose(first, second))

    def __getitem__(self, index):
        return self._like(self.share[index])

    def __neg__(self):
        return self._like(-self.share)

    def become(self, other: "Secret") -> None:
        """Takes over ``other``'s shares of the same value."""
        self.share, self.scale, self.width, self.bits = other.share, other.scale, other.width, other.bits
        self.opened = None


@dataclass
class Wire:
    """An opened secret: x = public + sum of coefficient * mask, modulo 2^width, at ``scale``.

    public: what both parties see (``None`` at the dealer). masks: (coefficient, mask) pairs; a coefficient is the
    number -1 or a public tensor (``None`` at the dealer); a mask is this party's share, at the dealer the plain value.
    """

    public: torch.Tensor | None
    masks: list[tuple[object, torch.Tensor]]
    scale: int
    width: int
    bits: int
    raw: torch.Tensor | None = field(default=None, repr=False)  # M, for functions of the whole opening
    mask: torch.Tensor | None = field(default=None, repr=False)  # r: this party's part; the dealer's whole
    share1: torch.Tensor | None = field(default=None, repr=False)  # at the dealer: party 1's share of the first mask

    @property
    def shape(self):
        return self.masks[0][1].shape

    def reshape(self, *shape):
        return self._map(lambda t: t.reshape(*shape))

    def transpose(self, first, second):
        return self._map(lambda t: t.transpose(first, second))

    def _map(self, change):
        masks = [(change(c) if isinstance(c, torch.Tensor) else c, change(m)) for c, m in self.masks]
        public = None if self.public is None else change(self.public)
        share1 = None if self.share1 is None else change(self.share1)
        return Wire(public, masks, self.scale, self.width, self.bits, share1=share1)


@dataclass(frozen=True)
class Opening:
    """What to open: ``secret`` modulo 2^ring after which ``truncate`` bits are dropped; ``lifted`` or narrow.

    function: keep M and r for ``fourier`` or ``dcf``; no wire is made, and |x| may fill the ring (a period).
    """

    secret: Secret
    truncate: int = 0
    lifted: bool = False
    ring: int | None = None
    function: bool = False


def open_wires(runtime, openings: list[Opening]) -> list[Wire]:
    """Opens all in one round, one message each way.

    Reveals: x + r modulo 2^ring for a fresh mask r uniform modulo 2^ring: a uniform value, to both parties.
    Error: rounding by less than one unit of the new scale, unbiased; none without truncation.
    Cost: 1 round; ceil(ring / 8) bytes an element each way; dealer 8 bytes an element where bits are
    dropped or a narrower ring is lifted, and 8 more for lifting.
    Raises: Overflow when the declared |x| does not fit the ring, or the share is not valid there.
    Source: a masked opening as in Ben-Efraim et al. (Turbospeedz, ACNS 2019); truncation with a wrap bit as in
    Escudero et al. (CRYPTO 2020), section 5.1, here without the wrap bit where the narrower ring is enough.

    The rounding follows from M and the bits of x that are dropped, so whoever learned the result of a single
    truncation exactly, beside M, would learn something of those bits. Only logits are ever opened.
    """
    prepared = []
    for item in openings:
        size = item.ring or item.secret.width
        secret = item.secret
        if size > secret.width:
            raise Overflow(f"a share valid modulo 2^{secret.width} cannot be opened modulo 2^{size}")
        if item.function and (item.truncate or item.lifted):
            raise Overflow("an opening for a function drops no bits and is not lifted")
        if not 0 <= item.truncate <= max(0, size - 2):
            raise Overflow(f"cannot drop {item.truncate} bits of an opening of {size}: give 0 to {size - 2}")
        if not item.function and secret.bits + secret.scale > size - 2:
            raise Overflow(
                f"|x| < 2^{secret.bits} at scale 2^{secret.scale} needs {secret.bits + secret.scale + 2} bits, "
                f"but the opening has {size}"
            )
        prepared.append((item, size, runtime.mask(secret.shape, size), runtime.share1))
    sizes = [ring.packed_size(mask.numel(), size) for _, size, mask, _ in prepared]
    if runtime.is_dealer:
        runtime.overhear(sum(sizes))
        publics = [None] * len(prepared)
    else:
        publics = _exchange(runtime, prepared, sizes)
    return [_wire(runtime, *opened, public) for opened, public in zip(prepared, publics, strict=True)]


def _offset(item: Opening, size: int) -> int:
    return 0 if item.function or _is_exact(item, size) else 1 << (size - 2)


def _is_exact(item: Opening, size: int) -> bool:
    """Whether M = x + r is a wire as it is, modulo its own ring."""
    return not item.truncate and (size == 64 or not item.lifted)


def _exchange(runtime, prepared, sizes: list[int]):
    """M of each opening: our masked shares for theirs, in one message of these ``sizes`` each way."""
    ends = list(itertools.accumulate(sizes))
    message = np.empty(ends[-1] if ends else 0, dtype=np.uint8)
    mine = []
    for (item, size, mask, _), packed, end in zip(prepared, sizes, ends, strict=True):
        offset = _offset(item, size) if runtime.role == PARTY0 else 0
        mine.append(ring.hide(item.secret.share, mask, offset, size, message[end - packed : end]))
    theirs = runtime.exchange(torch.from_numpy(message)).numpy()
    return [
        ring.show(value, theirs[end - packed : end], size, item.secret.shape)
        for (item, size, _, _), value, packed, end in zip(prepared, mine, sizes, ends, strict=True)
    ]


def _wire(runtime, item: Opening, size: int, mask, share1, public) -> Wire:
    secret, cut = item.secret, item.truncate
    if item.function:
        return Wire(None, [(-1, mask)], secret.scale, size, secret.bits, raw=public, mask=mask)
    if _is_exact(item, size):  # each party has its share of the mask already
        return Wire(public, [(-1, mask)], secret.scale, size, secret.bits, public, mask, share1)
    shape = secret.shape
    masks = [(-1, runtime.deal(shape, lambda: ring.shift_right(mask, cut)))]
    share1 = runtime.share1
    shown = coefficient = None
    if public is not None:
        shown, coefficient = ring.cut(public, cut, 1 << (size - 2 - cut), size, item.lifted)
    width = size - cut
    if item.lifted:
        masks.append((coefficient, runtime.deal(shape, lambda: ring.top_bit(mask, size))))
        width = 64
    return Wire(shown, masks, secret.scale - cut, width, secret.bits, public, mask, share1)


def as_secret(runtime, wire: Wire) -> Secret:
    """The shares that a wire stands for; local. Of a lifted wire, valid modulo 2^64."""
    assert wire.public is not None or runtime.is_dealer, "what was opened for a function is no wire"
    if runtime.is_dealer:
        return Secret(shape_only(wire.shape), wire.scale, wire.width, wire.bits)
    share = wire.public.clone() if runtime.role == PARTY0 else torch.zeros_like(wire.public)
    for coefficient, mask in wire.masks:
        share += coefficient * mask
    return Secret(share, wire.scale, wire.width, wire.bits)
