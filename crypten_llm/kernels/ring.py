"""The list of kernels: what a device must compute for the protocols, and nothing of who computes it.

Owns the signatures. ``cpu`` implements them in compiled loops, ``reference`` slowly and readably; a device of one's own
is one more file with these functions. All are exact and alike to the last bit on every device, because two parties
on different ones multiply their shares by what comes out. Tests hold each against its twin in ``reference``.

*Words* are int64 tensors, read as integers modulo 2^64. *Limbs* are words [..., L], the lowest first, of a number
modulo 2^bits or modulo 2^q - 1: L = ``limbs(bits)``, and what is above the number in the highest is zero, in arguments
and in results. Modulo 2^q - 1, with q from 64 to 512, 0 and 2^q - 1 are both zero, and both may be given. A result is
what is left when all that is above the lowest q bits has been added to them, again until nothing is: the number from 1
to 2^q - 1, or 0 if the sum or product of the arguments is 0 as an integer.

Shapes: N elements; a table's words are of 8, 16, 32 or 64 bits (``TABLE_WORDS``). No function changes its arguments,
but for those that say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

TABLE_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}  # how a table's words are held
DIGITS = 4  # of a comparison by digits
SIGNS = DIGITS + 1  # bits of the weighed sum of their signs
MANTISSA = 14  # bits of the mantissas of exponents


@dataclass(frozen=True)
class Group:
    """What a comparison's payload is: ``count`` numbers modulo 2^bits, bits at most 128; or, where ``modulus`` is
    given, one modulo that, from 2 to 2^16 - 1 (``residues``), where a 64-bit word taken modulo it is uniform but for
    2^-48. As a tensor: limbs [..., count, limbs], the lowest word first.
    """

    count: int
    bits: int
    modulus: int = 0

    @classmethod
    def residues(cls, modulus: int) -> "Group":
        assert 2 <= modulus < 2**16, f"a payload's modulus is from 2 to 2^16 - 1, not {modulus}"
        return cls(1, (modulus - 1).bit_length(), modulus)

    def __post_init__(self) -> None:
        assert 1 <= self.bits <= 128 and self.count * self.limbs <= 4, f"{self} does not fit a generator's two blocks"

    @property
    def limbs(self) -> int:
        return limbs(self.bits)


@dataclass(frozen=True)
class Comparison:
    """What comparison keys are for; public.

    Z is opened as M = Z + r modulo 2^width, and each Z - thresholds[k] is asked for its sign, its top bit modulo
    2^width. That is the top bit of the point p = M - thresholds[k], xor that of r, xor whether p < r in the bits below
    the top. The latter is decided without the lowest stops[k] bits: a number by at most 2^stops[k] below zero may
    count as not negative, and one by as much below 2^(width - 1) as negative.
    """

    width: int
    thresholds: tuple[int, ...]
    stops: tuple[int, ...]
    group: Group

    @cached_property
    def levels(self) -> int:
        """Bits that a key compares."""
        return self.width - 1 - min(self.stops, default=self.width - 1)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """The bits at which a comparison may stop, the highest first."""
        return tuple(sorted(set(self.stops), reverse=True))


class Bytes(Protocol):
    """A key stream."""

    def fill(self, count: int, over: Tensor | None = None) -> Tensor:
        """The next ``count`` bytes of the stream, xor as many of ``over``, in memory of their own: uint8."""


class Kernels(Protocol):
    """A module of kernels; see ``on``."""

    def KeyStream(self, key: bytes) -> Bytes:
        """ChaCha20 (RFC 8439) under a key of 32 bytes, with nonce 0 and Bernstein's counter of 64 bits, from 0."""

    # Matrix products modulo 2^64; of int32 by int32 modulo 2^32, in words whose upper halves count for nothing.

    def matmul_nt(self, x: Tensor, w: Tensor) -> Tensor:
        """x @ w.T: words [..., M, K] by words or int32 [..., N, K], or int32 by int32, to words [..., M, N]."""

    def matmul_nn(self, x: Tensor, w: Tensor) -> Tensor:
        """x @ w: words [..., M, K] by words or int32 [..., K, N], or int32 by int32, to words [..., M, N]."""

    # What travels.

    def pack(self, words: Tensor, bits: int) -> Tensor:
        """The low ``bits`` of each word, one behind the other: uint8 [ceil(N bits / 8)]. Above 64 bits: of limbs."""

    def unpack(self, data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
        """The inverse of ``pack``: words of ``shape`` modulo 2^bits, non-negative below 64 bits, and limbs
        [*shape, L] above 64; these may be the memory of ``data``.
        """

    def hide(self, share: Tensor, mask: Tensor, offset: int, bits: int) -> tuple[Tensor, Tensor]:
        """share + mask + offset modulo 2^bits, as words [N] and packed."""

    def show(self, value: Tensor, packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
        """What ``hide`` gave here, words [N], plus what it packed at the other party, modulo 2^bits."""

    def unwrap(self, opened: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """opened - 2^(bits - 2), and 2^bits where bit ``bits - 1`` is 0, else 0; for bits below 64."""

    # Numbers in limbs; bits > 64. Leading dimensions broadcast; limbs that an operand lacks are zero, and those above
    # the result's count for nothing.

    def hide_wide(self, share: Tensor, mask: Tensor, offset: int, bits: int, ones: bool) -> tuple[Tensor, Tensor]:
        """share + mask + offset, as limbs [N, L] and packed: modulo 2^bits, or modulo 2^bits - 1 where ``ones``."""

    def show_wide(self, value: Tensor, packed: Tensor, bits: int, ones: bool, shape: Sequence[int]) -> Tensor:
        """What ``hide_wide`` gave here, limbs [N, L], plus what it packed at the other party: limbs [*shape, L]."""

    def reduce_wide(self, words: Tensor, bits: int) -> Tensor:
        """Limbs of any number and of any words, modulo 2^bits."""

    def widen(self, words: Tensor, bits: int, signed: bool) -> Tensor:
        """Words [...], read from 0 to 2^64 - 1 or from -2^63 to 2^63 - 1, as limbs [..., L]."""

    def add_wide(self, a: Tensor, b: Tensor, bits: int) -> Tensor:
        """a + b modulo 2^bits."""

    def subtract_wide(self, a: Tensor, b: Tensor, bits: int) -> Tensor:
        """a - b modulo 2^bits."""

    def multiply_wide(self, a: Tensor, b: Tensor, bits: int) -> Tensor:
        """a b modulo 2^bits."""

    def sum_wide(self, a: Tensor, bits: int) -> Tensor:
        """Limbs [..., 1, L] of the sums modulo 2^bits of [..., H, L], H below 2^31."""

    def shift_wide(self, a: Tensor, count: int, bits: int) -> Tensor:
        """a 2^count modulo 2^bits; without its low -count bits where ``count`` is negative."""

    def drop_wide(self, a: Tensor, bits: int, count: int, up: bool) -> Tensor:
        """a / 2^count modulo 2^(bits - count), rounded up or down; 0 <= count < bits. Words [...] if that is at most 64
        bits, else limbs. Of two shares modulo 2^bits one is rounded up and one down: their sum is off by less than a
        unit, 0 on average, and by nothing where no bit was lost.
        """

    # Numbers x = public - mask modulo 2^bits that were opened in a narrower ring (``protocols.wide``): public is signed
    # words [...], mask limbs [..., L]. Other limbs here are of any words, and what is above the result counts for
    # nothing.

    def lift_mask(self, mask: Tensor, carry: Tensor, bit: Tensor, unwrapped: Tensor, size: int, bits: int) -> Tensor:
        """mask - 2^size (carry + unwrapped bit), limbs [..., L]; words mask [...], unwrapped [...], 0 or 1."""

    def dot_wide(self, words: Tensor, numbers: Tensor, bits: int) -> Tensor:
        """Limbs [..., L]: the sums over H of signed words [..., H] times numbers, limbs [..., H, L']."""

    def scale_lifted(
        self,
        public: Tensor,
        unwrapped: Tensor,
        mask: Tensor,
        own: Tensor,
        shown: Tensor,
        pairs: Tensor,
        wraps: Tensor,
        size: int,
        kept: int,
        bits: int,
    ) -> Tensor:
        """Limbs [..., H, L]: public own - mask shown + 2^kept pairs - 2^size unwrapped wraps.

        public, unwrapped: words [..., H], the latter 0 or 1; mask: limbs [..., H, L] or more; own, shown: limbs
        [..., L] or more; pairs, wraps: limbs [..., H, any].
        """

    # Modulo 2^q - 1, where a rotation of q bits is a product by a power of two. Leading dimensions broadcast.

    def add_ones(self, a: Tensor, b: Tensor, q: int) -> Tensor:
        """a + b."""

    def subtract_ones(self, a: Tensor, b: Tensor, q: int) -> Tensor:
        """a - b, as a + (2^q - 1 - b)."""

    def multiply_ones(self, a: Tensor, b: Tensor, q: int) -> Tensor:
        """a b."""

    def sum_ones(self, words: Tensor, starts: Tensor, q: int) -> Tensor:
        """Limbs [R, L]: the sums of words [N, L] from starts[j] up to starts[j + 1].

        starts: int64 [R + 1], from 0 to N; a stretch may be empty, and is shorter than 2^31.
        """

    def power_ones(self, exponents: Tensor, q: int) -> Tensor:
        """2^exponents, of any sign: int64 [...] to limbs [..., L]."""

    def rotate_ones(self, words: Tensor, turns: Tensor, q: int) -> Tensor:
        """words [..., L] times 2^turns, of any sign: int64 [...]."""

    # Exponents: a number X modulo 2^bits, bits at most 54, stands for q X / 2^bits = X_i + X_f / 2^e of them, where 2^e
    # is the smallest denominator, at most 2^20. mant(f) = round(2^MANTISSA 2^(f / 2^e)) for -2^e < f < 2^e.

    def turned_exponents(self, mask: Tensor, rotation: Tensor, bits: int, q: int, words: Tensor) -> Tensor:
        """words become mant(-r_f) 2^(rotation - r_i) - words, for r, the mask; they are returned.

        mask, rotation: int64 [N], rotation from 0 to q - 1. words: limbs [N, L].
        """

    def read_exponents(self, words: Tensor, opened: Tensor, low: int, bits: int, q: int) -> Tensor:
        """words become words mant(M_f) 2^(M_i + low), for M what was opened modulo 2^bits; they are returned.

        words: limbs [N, L], low: any integer. Of shares of what ``turned_exponents`` is asked for, with M = y + r, come
        shares of 2^(2 MANTISSA + q y / 2^bits + low + rotation) times 1 + d, |d| < 2^(1 - MANTISSA).
        """

    def window_ones(self, words: Tensor, turns: Tensor, starts: Tensor, q: int, bits: int, up: bool) -> Tensor:
        """The top ``bits``, below q and at most 64, of words [N, L] times 2^turns[j] in stretch j: words [N].

        With d = q - bits: x / 2^d, rounded up or down, modulo 2^bits. Of shares of V, 0 <= V < 2^q - 1, one rounded up
        and one down, the sum modulo 2^bits is V / 2^d + error, -1 <= error <= 1 - 2^-d: less than a unit by rounding,
        and 2^-d lost where the shares' sum passed 2^q - 1.
        """

    # Trigonometric sums: an angle is a word m times 2^shift, in units of 2^-64 turns.

    def waves(self, mask: Tensor, shift: int, scale: float, modes: int) -> Tensor:
        """Words [2 modes, N]: scale * cos of 1 .. modes times the angle, then the sines, rounded to nearest."""

    def combine(
        self, opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor, shares: Tensor, constant: int
    ) -> Tensor:
        """constant + sum over j of A_j shares[j] + B_j shares[modes + j], words [N].

        A_j = a_j cos + b_j sin and B_j = a_j sin - b_j cos of j angles, times ``scale`` and rounded; a, b = ``cosine``,
        ``sine``, float64 [modes]. shares: words [2 modes, N].
        """

    def coefficients(self, opened: Tensor, shift: int, scale: float, cosine: Tensor, sine: Tensor) -> Tensor:
        """Words [2 modes, N]: the A_j of ``combine``, then the B_j."""

    # The same where each mode has a frequency of its own, a whole number k_j; words [modes].

    def cosines(self, mask: Tensor, shift: int, frequencies: Tensor, scales: Tensor) -> Tensor:
        """Words [modes, 2, N]: scales_j, float64, times cos and sin of k_j times the angle, rounded to nearest."""

    def add_cosines(
        self,
        opened: Tensor,
        shift: int,
        frequencies: Tensor,
        coefficients: Tensor,
        ups: Tensor,
        shares: Tensor,
        constant: int,
    ) -> Tensor:
        """constant + sum over j of (A_j shares[j, 0] + B_j shares[j, 1]) 2^ups_j, words [N].

        A_j, B_j = coefficients_j times cos and sin of k_j times the angle, rounded; float64 coefficients [modes].
        shares: words [modes, 2, N]. ups: words [modes], 0 to 63.
        """

    # Bits at secret places: rows of P bits, 8 a byte, the lowest first; P is a power of two from 8 on.

    def flip_places(self, places: Tensor, words: Tensor) -> Tensor:
        """words uint8 [N, P / 8]: bit places_i modulo P of row i is flipped; they are overwritten, and returned."""

    def parities(self, words: Tensor, turns: Tensor, sets: Tensor) -> Tensor:
        """Words [N, S], 0 or 1: the parity of those bits p of words_i for which sets[s, (turns_i - p) modulo P].

        words: uint8 [N, P / 8]. turns: words [N]. sets: bool [S, P].
        """

    def xor_rows(self, table: Tensor, chosen: Tensor) -> Tensor:
        """int32 [T, H]: the xor of those rows v of the table for which bit v modulo 64 of chosen[t, v // 64] is set.

        table: int32 [V, H]. chosen: words [T, V / 64 rounded up], whose bits from V on count for nothing.
        """

    def multiply_field(self, a: Tensor, b: Tensor) -> Tensor:
        """a b in GF(2^64): words as polynomials over bits, modulo x^64 + x^4 + x^3 + x + 1. Shapes broadcast."""

    # Tables turned by a mask. words: [N, 2^m] of a table; they are overwritten, and returned.

    def turn_table(self, table: Tensor, places: Tensor, words: Tensor) -> Tensor:
        """words[i, V] becomes table[V - places_i] - words[i, V]; table: words [2^m]."""

    def read_table(self, words: Tensor, opened: Tensor, steps: Tensor) -> Tensor:
        """Words [N, K]: words[i, opened_i - steps_k]."""

    # Comparison by digits: r' is cut into ``DIGITS`` digits, and the sign of each is a field of a 16-bit word.

    def turn_signs(self, masks: Tensor, digit_bits: int, words: Tensor) -> Tensor:
        """words[i, v], [N, 2^digit_bits]: each field the sign of v against that digit of masks_i, less the field."""

    def read_signs(self, words: Tensor, points: Tensor, digit_bits: int) -> Tensor:
        """Words [N, T]: the sum of the fields at the digits of points [N, T], weighed 2^j."""

    def turn_bits(self, masks: Tensor, tops: Tensor, words: Tensor) -> Tensor:
        """words[i, t, C], [N, T, 2^m]: (1{C - masks_it < 0} xor tops_i) - words[i, t, C], of signed m-bit numbers."""

    def read_bits(self, words: Tensor, opened: Tensor, flips: Tensor, one: int) -> Tensor:
        """Words [N, T]: words[i, t, opened_it], or ``one`` less it where flips is 1."""

    # Comparison keys (see ``kernels.dcf``). Words above ``width`` bits of a mask or an opened value are ignored.

    def compare_keys(
        self, comparison: Comparison, mask: Tensor, payload: Tensor, seed0: Tensor, seed1: Tensor
    ) -> list[Tensor]:
        """What both parties' keys have in common, as ``key_sizes`` says.

        mask: r, limbs [N, A]. payload: of the group and below its modulus, [N, count, limbs]. seed0, seed1: words
        [N, 2], uniform, each known to one party and the dealer.
        """

    def compare(
        self, comparison: Comparison, seed: Tensor, common: list[Tensor], party: int, opened: Tensor, payload: Tensor
    ) -> Tensor:
        """This party's shares in the group of payload * 1{Z - thresholds[k] is negative}: [N, K, count, limbs].

        opened: M, limbs [N, A]. payload: this party's shares of it, reduced, [N, count, limbs].
        """


# Short arithmetic that torch does alike on every device.


def low_bits(x: Tensor, bits: int) -> Tensor:
    """x modulo 2^bits, as the non-negative representative (for 64 bits: x itself)."""
    return x if bits == 64 else x & ((1 << bits) - 1)


def shift_right(x: Tensor, count: int) -> Tensor:
    """Unsigned shift of 64-bit words."""
    return x if count == 0 else (x >> count) & ((1 << (64 - count)) - 1)


def top_bit(x: Tensor, bits: int) -> Tensor:
    """Bit ``bits - 1`` of each word, 0 or 1."""
    return (x >> (bits - 1)) & 1


def limbs(bits: int) -> int:
    """Words that hold a number of ``bits``."""
    return -(-bits // 64)


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``pack`` makes of ``count`` words."""
    return (count * bits + 7) // 8


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape of an element-wise result. torch's own function imports sympy on first use."""
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for place, size in enumerate(shape, len(result) - len(shape)):
            if size != 1:
                if result[place] not in (1, size):
                    raise ValueError(f"shapes {', '.join(str(tuple(shape)) for shape in shapes)} do not broadcast")
                result[place] = size
    return tuple(result)


def key_sizes(comparison: Comparison, count: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what both parties' keys for ``count`` values have in common, in the order they travel.

    Correction words of the seeds at every level, [N, levels, 2]; and, packed in a row of bytes a key, of the values at
    every level, of the leaves of each level where a comparison may stop, and of the control bits (left, then right).
    """
    levels, group = comparison.levels, comparison.group
    packed = ((levels * group.count, group.bits), (len(comparison.leaves) * group.count, group.bits), (levels, 2))
    return [
        ((count, levels, 2), torch.int64),
        *(((count, packed_size(numbers, bits)), torch.uint8) for numbers, bits in packed),
    ]


def on(device: torch.device | str) -> Kernels:
    """The kernels of a device."""
    kind = torch.device(device).type
    if kind == "cpu":
        from crypten_llm.kernels import cpu

        return cpu
    if kind == "cuda":
        from crypten_llm.kernels import cuda

        return cuda
    raise ValueError(f"there are no kernels for device {kind!r}; use 'cpu' or 'cuda'")
