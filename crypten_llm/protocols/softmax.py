"""Softmax of whatever scores: exponents modulo 2^q - 1.

Owns ``weigh``. A score y, in units of which q / 2^b make a factor of two, is opened modulo 2^b, so only y
modulo that much is ever needed and nothing overflows. In Z_N with N = 2^q - 1 a power of two is a rotation, and 2^q is
1: the dealer's 2^(rho - r), r being the mask, is rotated by the public M to 2^(y + rho). The row's secret rotation rho
hides which power of two the row's sum is, so that this can be opened: K = k + rho. Rotated back by K, the top bits are
the row's weights, on a scale on which they add up to between 1/4 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.ladder import exponent
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire
from crypten_llm.protocols.wide import ResidueOpening, WideOpening

OPENED = 22  # b, bits of a score that are opened, unless told: its ring stands for q bits of exponent
MANTISSA = 14  # bits of what a power of two is multiplied by, in each of two factors
HEADROOM = 22  # bits between the largest sum of a row and the ring
LEAST = 8  # a row's sum without the dropped bits is 2^8 or more: its weights are as exact as that
EDGE = 2.0**-5  # in bits, more than the 2^-6 by which the comparison may be off
LOWEST_SUM = -58  # log2 of a row's sum of 2^y may be this, or somewhat more in small rings


@dataclass(frozen=True)
class Exponents:
    """The ring of exponents: q = ``size`` bits, a multiple of 4 from 68 to 512; ``opened``, b above, from 10 to 22. The
    rest follows, in bits (a score is ln 2 times as much).
    """

    size: int = 256
    opened: int = OPENED

    def __post_init__(self) -> None:
        if not 10 <= self.opened <= OPENED:
            raise Overflow(f"a score is opened in 10 to {OPENED} bits, not {self.opened}")
        if not 68 <= self.size <= 512 or self.size % 4:
            raise Overflow(f"the ring of exponents has a multiple of 4 bits from 68 to 512, not {self.size}")

    @property
    def low(self) -> int:
        """The lowest exponent is above minus this."""
        return 126 * (self.size - HEADROOM - 2 * MANTISSA) // 206

    @property
    def dropped(self) -> int:
        """Bits of a row's sum that the comparison does not see."""
        return max(0, LOWEST_SUM + 2 * MANTISSA + self.low - LEAST)

    @property
    def scores(self) -> tuple[float, float]:
        """In bits, from and to: what any score may be."""
        return 1.0 - self.low, self.sums[1]

    @property
    def sums(self) -> tuple[float, float]:
        """In bits, from and to: the log2 of a row's sum of 2^y, without the ends, which may count as beyond."""
        low, high = self.dropped + LEAST, self.size - HEADROOM
        return low + EDGE - 2 * MANTISSA - self.low, high - EDGE - 2 * MANTISSA - self.low


@dataclass
class Rows:
    """weights: shares [n]; a row adds up to between 1/4 and 1. beyond: two bits a row, opened: its sum is negative, or
    out of the domain.
    """

    weights: Secret
    beyond: Wire


def weigh(
    runtime: Runtime,
    scores: Tensor,
    drop: int,
    counts: Tensor,
    exponents: Exponents,
    fraction: int,
    width: int,
    seen: Tensor | None = None,
) -> Protocol[Rows]:
    """Softmax weights, up to their sum, of rows of ``counts`` scores, one behind the other.

    scores: shares [n] of y, valid modulo 2^(opened + drop), of which ``drop`` bits are dropped. counts: public
    int64 [R]. fraction, width: bits of the weights, and of their ring. seen: public words [n], 0 where a score is none:
    its weight is 0 then, whatever it is, and the sum is of the others.

    Reveals: openings behind fresh uniform masks: y; a row's sum, rotated by a secret rho, modulo 2^q - 1; that sum
    without rho and without its low bits; and K = k + rho modulo q, rho being K's mask, uniform and used for this row.
    Error: 2^-13 of a weight and a unit of ``fraction`` bits, in the domain: scores and rows' sums as ``exponents``
    says. Beyond it, of rows that come out wrong, ``beyond`` is set for those whose sum is too small or too large, and
    whose scores are between -low - 50 and low' - 16, where low' = q - low: none was missed in 20,000. A row whose only
    large score is d bits below low' is missed with probability about d 2^-d (measured: a half at 2, 1/15 at 6, 1/400 at
    12). What is outside of these counts modulo q, as another score, without a sign.
    Cost: 4 rounds. A score: ``exponents.opened`` bits each way; dealer q bits to the client. With w = q - dropped and b
    the bits of q - 1, a row: q + w + b + 2 bits each way; dealer 2 q bits to the client, and to both a comparison key
    of w - 5 levels at 16 + 1/4 bytes and b bits, and b bits for each second power of two from 2^(LEAST + 2) up (2.9
    kB).
    Source: ours; comparison keys of Boyle et al. (EUROCRYPT 2021).
    """
    kernels, q, rows, opened = runtime.kernels, exponents.size, counts.shape[0], exponents.opened
    total, counts = scores.shape[0], runtime.moved(counts)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rho = runtime.mask_below((rows,), q)
    (wire,) = yield [Opening(Secret(scores, 0, opened + drop, 0), drop, ring=opened + drop, function=True)]

    def turned(words: Tensor) -> Tensor:
        turns = rho.held.repeat_interleave(counts, output_size=total)
        return kernels.turned_exponents(wire.mask.held, turns, opened, q, words)

    dealt = runtime.deal_ones((total,), q, turned).held
    held: list[Tensor] = []  # 2^(y + rho), a party's shares, until its window is known

    def summed() -> Tensor:
        held.append(kernels.read_exponents(dealt, wire.seen, exponents.low, opened, q))
        if seen is not None:
            held[0] = held[0] * seen[:, None]
        return kernels.sum_ones(held[0], starts, q)

    limbs = ring.limbs(q)
    (sums,) = yield [WideOpening(runtime.share((rows, limbs), summed), (rows,), q, ones=True)]

    def back(words: Tensor) -> Tensor:
        turn = (q - rho.held) % q
        both = torch.stack([kernels.power_ones(turn, q), kernels.rotate_ones(sums.mask.held, turn, q)])
        return kernels.subtract_ones(both.view(-1, limbs), words.view(-1, limbs), q).view(words.shape)

    straight = runtime.deal_ones((2, rows), q, back).held
    narrow = q - exponents.dropped

    def public_frame() -> Tensor:
        found = kernels.subtract_ones(kernels.multiply_ones(sums.seen, straight[0], q), straight[1], q)
        return kernels.drop_wide(found, q, exponents.dropped, runtime.rounds_up)

    (sum_wire,) = yield [WideOpening(runtime.share((rows, ring.limbs(narrow)), public_frame), (rows,), narrow)]
    power, beyond = exponent(runtime, sum_wire.public, sum_wire.mask.held, narrow, LEAST, narrow - HEADROOM, q)
    power = runtime.plus(power, exponents.dropped)
    turn, beyond_wire = yield [
        ResidueOpening(power, rho, q),
        Opening(Secret(beyond, 0, 1, 1), function=True),
    ]

    def windowed() -> Tensor:
        turns = (q - width + fraction - 2 - turn.seen) % q
        found = kernels.window_ones(held[0], turns, starts, q, width, runtime.rounds_up)
        return found if seen is None else found * seen

    return Rows(Secret(runtime.share((total,), windowed), fraction, width, 0), beyond_wire)
