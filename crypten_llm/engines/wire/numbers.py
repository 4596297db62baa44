"""Numbers of engine ``wire``: fractional bits, declared bounds, and how many bits a value needs.

Owns the configuration that all parties agree on, the plan's fixed scales, and the arithmetic of widths. Nothing here
sees a share's contents or sends anything.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from crypten_llm.kernels.ring import broadcast

ROOT_FRACTIONS = 29, 32  # of public and dealt factors: the fit's coefficients are large, so the dealt ones count more
ROW_BITS = 19  # fractional bits of what is one number a row, where width allows
MIXED_BITS = 4  # softmax weights, whose sum is 1/4 to 1, times the values: |x| < 2^4 is declared
SQUARES_BITS = 58  # a hidden state's sum of squares, at twice the activation's fractional bits: below 2^58 is declared
SQUARES_SEGMENTS = 20  # powers of four below that to which such a sum may fall
SPREAD_BITS = 6  # a row's sum of exp(s - score_limit), over the scores of a softmax: below 2^6 is declared
SPREAD_SEGMENTS = 28  # powers of four below that to which such a sum may fall
PRECISION = 20  # bits of what is compared, with one for a difference; scores below 2^6 keep 13 fractional bits
KEEPING = 24  # the same for ``top``, which cuts among the many rows of a prompt that draw next to nothing
DRAWN = 24  # fractional bits of the attention that a row drew, where width allows
FACTOR = 16  # fractional bits of public factors that are no multiples of a larger unit
ENOUGH = 10  # the least of them for which a ring without room is left as it is
ROOM = 16  # fractional bits that are left of a value whose ring became too small
SHOWN = 16  # fractional bits of what is revealed
SHOWN_FACTORS = 24, 29  # of its two factors, where it is a product: what is dropped of it is more than a factor's unit
SCATTERED = 16  # fractional bits of softmax weights that go back to their rows


@dataclass(frozen=True)
class WireConfig:
    """Fractional bits and declared bounds; all parties must agree on them.

    activation, weight, key, value, rope, root (of softmax weights): fractional bits. *_bits: |x| < 2^bits is
    declared (an overflow is refused). score_limit: softmax sees scores in [score_limit - 36, score_limit], and errors
    grow as a row's largest falls (``attention.softmax``). What the mask hides may be anything.
    """

    activation: int = 14
    weight: int = 16
    key: int = 12
    value: int = 18
    rope: int = 13
    root: int = 16
    residual_bits: int = 11
    linear_bits: int = 8
    score_limit: float = 20.0

    @property
    def row_logarithms(self) -> tuple[float, float]:
        """Of a row's sum of exp(s), from and to, rounded inwards."""
        low, high = (SPREAD_BITS - 2 * SPREAD_SEGMENTS) * math.log(2), SPREAD_BITS * math.log(2)
        return self.score_limit + math.ceil(low), self.score_limit + math.floor(high)

    @property
    def square_sums(self) -> tuple[float, float]:
        """The sums of squares, eps and all, that a norm brings to [1/4, 1), from and to."""
        high = SQUARES_BITS - 2 * self.activation
        return 2.0 ** (high - 2 * SQUARES_SEGMENTS), 2.0**high

    @cached_property
    def mixed_width(self) -> int:
        """The ring of softmax weights and values, in which their product fits."""
        return 2 * self.root + self.value + MIXED_BITS + 2

    @cached_property
    def picks_width(self) -> int:
        """The ring of picks: what scattered weights need to be multiplied by values."""
        return self.mixed_width - 2 * self.root + SCATTERED


def whole_bytes(bits: int) -> int:
    """Rounded up to whole bytes: what is left over is room for sums."""
    return min(64, -(-bits // 8) * 8)


def bits_for(factor: float) -> int:
    """The smallest g with factor <= 2^g; exact, so that it is the same on every machine."""
    if factor == 0:
        return 0
    mantissa, exponent = math.frexp(factor)
    return exponent - (mantissa == 0.5)


def as_units(value: torch.Tensor, most: int) -> tuple[torch.Tensor, int]:
    """(integers, p) with value = integers / 2^p: exact with the smallest p up to ``most``, else rounded there."""
    value = value.double()
    for fraction in range(most + 1):
        scaled = value * 2.0**fraction
        if fraction == most or bool((scaled == scaled.round()).all()):
            break
    return scaled.round().long(), fraction


def times(share: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
    """Shares times public integers; at the dealer the shape."""
    if share.is_meta:
        return share.expand(broadcast(share.shape, integers.shape))
    return share * integers
