"""The list of kernels: what a device must compute for the protocols, and nothing of who computes it.

Owns the signatures. ``cpu`` implements them in compiled loops, ``reference`` slowly and readably; a device of one's own
is one more file with these functions. All are exact and alike to the last bit on every device, because two parties
on different ones multiply their shares by what comes out. Tests hold each against its twin in ``reference``.

*Words* are int64 tensors, read as integers modulo 2^64. Shapes: N elements; a table's words are of 8, 16, 32 or 64 bits
(``TABLE_WORDS``). No function changes its arguments, but for those that say so.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

TABLE_WORDS = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}  # how a table's words are held
DIGITS = 4  # of a comparison by digits
SIGNS = DIGITS + 1  # bits of the weighed sum of their signs


class Bytes(Protocol):
    """A key stream."""

    def fill(self, count: int) -> Tensor:
        """The next ``count`` bytes of the stream, in memory of their own: uint8."""


class Kernels(Protocol):
    """A module of kernels; see ``on``."""

    def KeyStream(self, key: bytes) -> Bytes:
        """AES-256 in counter mode from counter 0, under a key of 32 bytes."""

    # Matrix products modulo 2^64.

    def matmul_nt(self, x: Tensor, w: Tensor) -> Tensor:
        """x @ w.T: words [..., M, K] by words or int32 [..., N, K] to words [..., M, N]."""

    def matmul_nn(self, x: Tensor, w: Tensor) -> Tensor:
        """x @ w: words [..., M, K] by words or int32 [..., K, N] to words [..., M, N]."""

    # What travels.

    def pack(self, words: Tensor, bits: int) -> Tensor:
        """The low ``bits`` of each word, one behind the other: uint8 [ceil(N bits / 8)]."""

    def unpack(self, data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
        """The inverse of ``pack``: words of ``shape`` modulo 2^bits, non-negative below 64 bits; these may be the
        memory of ``data``.
        """

    def hide(self, share: Tensor, mask: Tensor, offset: int, bits: int) -> tuple[Tensor, Tensor]:
        """share + mask + offset modulo 2^bits, as words [N] and packed."""

    def show(self, value: Tensor, packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
        """What ``hide`` gave here, words [N], plus what it packed at the other party, modulo 2^bits."""

    def unwrap(self, opened: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """opened - 2^(bits - 2), and 2^bits where bit ``bits - 1`` is 0, else 0; for bits below 64."""

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

    def turned(self, cosine: Tensor, sine: Tensor, turns: int) -> tuple[Tensor, Tensor]:
        """Coefficients float64 [modes] of f(x + shift) from those of f, for a shift of turns / 2^64."""

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

    # Comparison keys (see ``kernels.dcf``).

    def compare_keys(self, alpha: Tensor, beta: Tensor, seed0: Tensor, seed1: Tensor, bits: int) -> list[Tensor]:
        """What both parties' keys for x < alpha with payload beta have in common: seeds, values, flags.

        alpha: words [N] below 2^bits. beta: words [N, 2]. seed0, seed1: words [N, 2].
        """

    def compare(self, seed: Tensor, common: list[Tensor], party: int, points: Tensor) -> Tensor:
        """This party's share of beta * 1{x < alpha} at K points of each of N keys: words [N, K, 2]; points [N, K]."""


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


def key_sizes(bits: int, count: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what both parties' keys for ``count`` comparisons have in common, in the order they travel:
    correction words of the seeds, of the values, and the left control bit and twice the right one.
    """
    return [
        ((bits, count, 2), torch.int64),
        ((bits + 1, count, 2), torch.int64),
        ((bits, count), torch.uint8),
    ]


def on(device: torch.device | str) -> Kernels:
    """The kernels of a device."""
    kind = torch.device(device).type
    if kind != "cpu":
        raise ValueError(f"there are no kernels for device {kind!r}; use 'cpu'")
    from crypten_llm.kernels import cpu

    return cpu
