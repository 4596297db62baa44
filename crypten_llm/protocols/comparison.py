"""Comparisons of opened values with public thresholds, and what is done with the bits.

Owns ``below``. x = M - r modulo 2^l is negative where its top bit is set: msb(M) xor msb(r) xor 1{M' < r'}, M' and r'
being the low l - 1 bits. M' and r' are cut into four digits. The dealer shares, for each digit of r', the table of
signs against every value of a digit of M', and the sum of signs times 8, 4, 2, 1 has the sign of the first digit that
differs. That sum has 5 bits: it is opened, and a table of 32 entries turns it into the bit. Two steps, a round between
them and some 100 bytes of the dealer's for 20 bits, where a comparison key (``smooth``) has no round and 700 bytes.

A difference of two opened values needs no opening: its mask is the difference of the masks. Several thresholds share
the digit tables.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.ring import DIGITS, SIGNS, broadcast
from crypten_llm.protocols.dealer.runtime import Parts, Runtime
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire, shares_of

BLOCK = 1 << 14  # comparisons at a time
SIGN_WORD = 16  # bits of a word that holds the signs of all digits


def below(runtime: Runtime, wire: Wire, thresholds: Sequence[int], width: int) -> Protocol[Secret]:
    """1{x < t} for an opened x [...] and public integers t: [..., thresholds], shares of ``width`` bits.

    wire: x as a exact wire modulo 2^l; |x - t| < 2^(l - 1) is the caller's word.

    Reveals: one opening, of the weighed sum of signs, behind a fresh uniform mask.
    Error: none.
    Cost: 1 round and 5 bits a threshold each way for the opening; dealer 2 * 2^d bytes with d = ceil((l - 1) / 4),
    and 32 words of the result a threshold.
    Source: digit-wise comparison as in CrypTFlow2 (Rathee et al., CCS 2020, section 3.1), with the dealer's tables in
    place of oblivious transfer and a weighed sum of signs in place of a tree of products.
    """
    assert wire.wrap is None, "comparisons take exact wires"
    kernels, low, many = runtime.kernels, wire.width - 1, len(thresholds)
    digit_bits, shape = max(1, -(-low // DIGITS)), (*wire.shape, many)
    mask, points, tops = wire.mask.held.reshape(-1), None, None
    if wire.public is not None:
        limits = runtime.constant(_limits(tuple(thresholds)))
        moved = wire.public.reshape(-1, 1) - limits
        points, tops = ring.low_bits(moved, low), ring.top_bit(moved, wire.width)
    signs = []
    for part in runtime.blocks(mask.numel(), BLOCK):

        def signed(words: Tensor, part: slice = part) -> Tensor:
            return kernels.turn_signs(ring.low_bits(mask[part], low), digit_bits, words)

        words = runtime.deal_table((part.stop - part.start, 1 << digit_bits), SIGN_WORD, signed)
        if points is not None and words is not None:
            signs.append(kernels.read_signs(words, points[part], digit_bits))
    total = Secret(runtime.share(shape, lambda: torch.cat(signs).view(shape)), 0, SIGNS, DIGITS)
    (opened,) = yield [Opening(total, ring=SIGNS, function=True)]
    bits, raw = [], None if opened.public is None else opened.public.reshape(-1, many)
    for part in runtime.blocks(mask.numel(), BLOCK):

        def turned(words: Tensor, part: slice = part) -> Tensor:
            masks = opened.mask.held.reshape(-1, many)[part]
            return kernels.turn_bits(masks, ring.top_bit(mask[part], wire.width), words)

        words = runtime.deal_table((part.stop - part.start, many, 1 << SIGNS), width, turned)
        if raw is not None and tops is not None and words is not None:
            bits.append(kernels.read_bits(words, raw[part], tops[part], runtime.plus(0, 1)))
    return Secret(runtime.share(shape, lambda: torch.cat(bits).view(shape)), 0, width, 1)


@lru_cache(maxsize=64)
def _limits(thresholds: tuple[int, ...]) -> Tensor:
    return torch.tensor(thresholds, dtype=torch.int64)


def difference(x: Wire, y: Wire) -> Wire:
    """x - y as a exact wire, for exact wires of one ring, with broadcasting; local."""
    assert (x.width, x.scale) == (y.width, y.scale), "differences are of wires of one ring"
    public = None if x.public is None or y.public is None else x.public - y.public
    return Wire(public, Parts(x.mask.held - y.mask.held), x.scale, x.width, max(x.bits, y.bits) + 1)


def bit_opening(bits: Secret) -> Opening:
    """0/1 bits opened modulo 2, for ``times_bits``: 1 bit an element."""
    return Opening(bits, ring=1, function=True)


def times_bits(runtime: Runtime, bit: Wire, x: Wire) -> Secret:
    """b x for a bit opened modulo 2 (``bit_opening``) and a wire x, with broadcasting; local.

    With b = B xor s: b x = B x + (1 - 2 B) s x, and the dealer shares s, s r, and where x was lifted s times the bit
    that tells its mask's wrap. The result is valid where x is, whatever ring the bit's shares were in. Where b = 0 it
    is zero whatever the wire holds, so x need not be in its declared range there.

    Error: none. Cost: dealer the w bits of x's ring a bit, and an element of the result; w - n more where x was lifted
    from n bits.
    """
    shape, flipped, wrap = broadcast(bit.shape, x.shape), bit.mask.held, x.wrap
    flip = runtime.deal(bit.shape, lambda: flipped, x.width).held
    masked = runtime.deal(shape, lambda: flipped * x.mask.held, x.width).held
    wrapped = None if wrap is None else runtime.deal(shape, lambda: flipped * wrap.bit.held, x.width - wrap.size).held

    def share() -> Tensor:
        turned = x.seen * flip - masked
        if wrap is not None and wrapped is not None:
            assert wrap.coefficient is not None, "parties have opened it"
            turned += wrap.coefficient * wrapped
        return bit.seen * shares_of(runtime, x) + (1 - 2 * bit.seen) * turned

    return Secret(runtime.share(shape, share), x.scale, x.width, x.bits)


def ordered(x: Secret, precision: int, what: str) -> Opening:
    """The opening of x for comparisons at ``precision`` bits, of which one is for the difference and one its sign.

    Domain: |x| <= 2^bits - u with the unit u = 2^(bits + 1 - precision) to which x is rounded; all |x| < 2^bits where
    no bits are dropped. Beyond, x may be rounded up to 2^bits, and 2^bits - (-2^bits) reads as negative.
    Raises: Overflow when the declared |x| does not leave room for the sign of a difference.
    """
    ring = x.bits + x.scale + 2
    if ring > x.width:
        raise Overflow(
            f"{what}: the difference of two |x| < 2^{x.bits} at scale 2^{x.scale} does not fit a share valid modulo "
            f"2^{x.width}"
        )
    return Opening(x, ring=ring, truncate=max(0, ring - 1 - precision))
