"""Comparisons of opened values with public thresholds, and what is done with the bits.

Owns ``Below``. x = M - r modulo 2^l is negative where its top bit is set: msb(M) xor msb(r) xor 1{M' < r'}, M' and r'
being the low l - 1 bits. M' and r' are cut into four digits. The dealer shares, for each digit of r', the table of
signs against every value of a digit of M', and the sum of signs times 8, 4, 2, 1 has the sign of the first digit that
differs. That sum has 5 bits: it is opened, and a table of 32 entries turns it into the bit. Two steps, a round between
them and some 100 bytes of the dealer's for 20 bits, where a comparison key (``dcf``) has no round and 700 bytes.

A difference of two opened values needs no opening: its mask is the difference of the masks. Several thresholds share
the digit tables.
"""

import numpy as np
import torch

from crypten_llm.kernels.compiling import compiled
from crypten_llm.protocols.dealer.roles import PARTY0
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Opening, Overflow, Secret, Wire

DIGITS = 4
SIGNS = DIGITS + 1  # bits of the weighed sum of signs
BLOCK = 1 << 14  # comparisons at a time
# Where the digits' signs lie in a word of 16 bits, lowest digit first: the sign of digit j counts 2^j modulo 2^SIGNS,
# so SIGNS - j bits of it are needed.
_WIDTHS = np.arange(SIGNS, SIGNS - DIGITS, -1)
_PLACES = np.concatenate([[0], np.cumsum(_WIDTHS)[:-1]])


@compiled
def _sign_tables(masks, digit_bits, widths, places, words):
    """words[i, v] becomes party 1's: each field the sign of v against that digit of r'_i, less party 0's field."""
    low = words.shape[1] - 1
    for i in range(words.shape[0]):
        for v in range(words.shape[1]):
            word, made = np.int64(words[i, v]), np.int64(0)
            for j in range(widths.shape[0]):
                digit = (masks[i] >> (digit_bits * j)) & low
                sign = np.int64(v > digit) - np.int64(v < digit)
                made |= ((sign - (word >> places[j])) & ((1 << widths[j]) - 1)) << places[j]
            words[i, v] = made


@compiled
def _read_signs(words, points, digit_bits, widths, places, out):
    """out[i, t] = this party's share of the sum of signs of points[i, t] against r'_i."""
    low = words.shape[1] - 1
    for i in range(words.shape[0]):
        for t in range(points.shape[1]):
            total = np.int64(0)
            for j in range(widths.shape[0]):
                word = np.int64(words[i, (points[i, t] >> (digit_bits * j)) & low])
                total += ((word >> places[j]) & ((1 << widths[j]) - 1)) << j
            out[i, t] = total


@compiled
def _bit_tables(masks, tops, words):
    """words[i, t, C] becomes party 1's share of 1{C - r < 0} xor msb(r'_i)."""
    size = words.shape[2]
    for i in range(words.shape[0]):
        for t in range(words.shape[1]):
            for v in range(size):
                below = ((v - masks[i, t]) & (size - 1)) >= size // 2
                words[i, t, v] = (np.int64(below) ^ tops[i]) - np.int64(words[i, t, v])


@compiled
def _read_bits(words, opened, flips, one, out):
    """out[i, t] = this party's share of the bit at C, or of one less it."""
    for i in range(words.shape[0]):
        for t in range(words.shape[1]):
            bit = np.int64(words[i, t, opened[i, t]])
            out[i, t] = one - bit if flips[i, t] else bit


class Below:
    """1{x < t} for an opened x and public integers t, in two steps.

    wire: x as a narrow wire modulo 2^l, [...]; |x - t| < 2^(l - 1) is the caller's word. ``signs`` [..., thresholds]
    is to be opened modulo its ring (``opening``), then ``bits`` gives the result.

    Reveals: nothing beside the opening of ``signs``, which is behind a fresh uniform mask.
    Error: none.
    Cost: 1 round and 1 byte a threshold each way for the opening; dealer 2 * 2^d bytes with d = ceil((l - 1) / 4),
    and 32 words of the result a threshold.
    Source: digit-wise comparison as in CrypTFlow2 (Rathee et al., CCS 2020, section 3.1), with the dealer's tables in
    place of oblivious transfer and a weighed sum of signs in place of a tree of products.
    """

    def __init__(self, runtime, wire: Wire, thresholds: list[int] = (0,)):
        assert len(wire.masks) == 1, "comparisons take narrow wires"
        self._runtime, self._wire, self._thresholds = runtime, wire, thresholds
        self._shape = (*wire.shape, len(thresholds))
        low = wire.width - 1
        self._digit_bits = max(1, -(-low // DIGITS))
        self._points = None
        if not runtime.is_dealer:
            moved = wire.public.reshape(-1, 1) - torch.tensor(list(thresholds), dtype=torch.int64)
            self._points = (moved & ((1 << low) - 1)).numpy(), ((moved >> low) & 1).numpy()
        self.signs = Secret(self._sum_of_signs(), 0, SIGNS, DIGITS)

    @property
    def opening(self) -> Opening:
        return Opening(self.signs, ring=SIGNS, function=True)

    def _blocks(self):
        count = self._wire.shape.numel()
        return [(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]

    def _mask(self, start, stop) -> np.ndarray:
        return self._wire.masks[0][1].reshape(-1)[start:stop].numpy()

    def _sum_of_signs(self):
        runtime, low = self._runtime, self._wire.width - 1
        out = None if runtime.is_dealer else np.empty(self._points[0].shape, dtype=np.int64)
        for start, stop in self._blocks():

            def tables(words, start=start, stop=stop):
                _sign_tables(self._mask(start, stop) & ((1 << low) - 1), self._digit_bits, _WIDTHS, _PLACES, words)
                return words

            words = runtime.deal_words((stop - start, 1 << self._digit_bits), np.uint16, tables)
            if out is not None:
                points = self._points[0][start:stop]
                _read_signs(words, points, self._digit_bits, _WIDTHS, _PLACES, out[start:stop])
        return self._tensor(out)

    def bits(self, opened: Wire, dtype) -> Secret:
        """1{x < t} [..., thresholds], as wide as ``dtype``; opened: what became of ``opening``."""
        runtime, low, many = self._runtime, self._wire.width - 1, len(self._thresholds)
        out = None if runtime.is_dealer else np.empty(self._points[0].shape, dtype=np.int64)
        one = np.int64(runtime.role == PARTY0)
        for start, stop in self._blocks():

            def tables(words, start=start, stop=stop):
                masks = opened.mask.reshape(-1, many)[start:stop].numpy()
                _bit_tables(masks, (self._mask(start, stop) >> low) & 1, words)
                return words

            words = runtime.deal_words((stop - start, many, 1 << SIGNS), dtype, tables)
            if out is not None:
                raw = opened.raw.reshape(-1, many)[start:stop].numpy()
                _read_bits(words, raw, self._points[1][start:stop], one, out[start:stop])
        return Secret(self._tensor(out), 0, 8 * np.dtype(dtype).itemsize, 1)

    def _tensor(self, out):
        if out is None:
            return shape_only(self._shape)
        return torch.from_numpy(out).view(self._shape)


def below(runtime, open_, wire: Wire, thresholds: list[int], dtype) -> Secret:
    """``Below`` in one call: 1 round. open_: opens openings, all in one round."""
    comparison = Below(runtime, wire, thresholds)
    (opened,) = open_(comparison.opening)
    return comparison.bits(opened, dtype)


def difference(x: Wire, y: Wire) -> Wire:
    """x - y as a narrow wire, for narrow wires of one ring, with broadcasting; local."""
    assert (x.width, x.scale) == (y.width, y.scale), "differences are of wires of one ring"
    public = None if x.public is None else x.public - y.public
    return Wire(public, [(-1, x.masks[0][1] - y.masks[0][1])], x.scale, x.width, max(x.bits, y.bits) + 1)


def bit_opening(bits: Secret) -> Opening:
    """0/1 bits opened modulo 2, for ``times_bits``: 1 byte an element."""
    return Opening(bits, ring=1, function=True)


def times_bits(runtime, bit: Wire, x: Wire) -> Secret:
    """b x for a bit opened modulo 2 (``bit_opening``) and a narrow wire x, with broadcasting; local.

    With b = B xor s: b x = B x + (1 - 2 B) s x, and the dealer shares s and s r. The result is valid where x is,
    whatever ring the bit's shares were in.

    Error: none. Cost: dealer 8 bytes a bit and 8 bytes an element of the result.
    """
    assert len(x.masks) == 1, "bits multiply narrow wires"
    shape, mask = np.broadcast_shapes(bit.shape, x.shape), x.masks[0][1]
    flip = runtime.deal(bit.shape, lambda: bit.mask)
    masked = runtime.deal(shape, lambda: bit.mask * mask)
    if runtime.is_dealer:
        return Secret(shape_only(shape), x.scale, x.width, x.bits)
    share = x.public - mask if runtime.role == PARTY0 else -mask
    total = bit.raw * share + (1 - 2 * bit.raw) * (x.public * flip - masked)
    return Secret(total, x.scale, x.width, x.bits)


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
