"""Activations of any size from one opening: silu and gelu.

Owns ``activate``. With x' = x / unit opened modulo its ring, M = x' + r, two things follow without another opening.

Near zero, f(x) - x / 2 is even, and a few cosines at free frequencies (``frequencies``): of each, shares of the cosine
and the sine of its angle of r. Far from zero the sum is garbage, and f(x) is x or 0.

Which of these holds: j = (M >> 14) - (r >> 14), modulo P positions, has x' in (j - 1, j + 1). The dealer XOR-shares the
unit vector at (r >> 14) modulo P, P bits, and the parity of a party's bits at those places p for which (M >> 14) - p is
in a public set is its XOR share of whether j is in the set: any predicate of j, from the same bits, and nothing is
compared. Two are needed, *inside* (|j| <= J) and *right* (j > J), and f(x) = inside (f(x) near zero) + right x. Next to
a boundary both forms of f hold, so it does not matter on which side j falls. A third tells the caller that x has come
near the end of the P positions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols import fits
from crypten_llm.protocols.comparison import bit_opening, times_bits
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.frequencies import CosineFit
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire, shares_of

FRACTION = 14  # bits of x', of what is opened of f(x), and of a position, unless told
SCALE, WIDTH = 16, 28  # of the result then
_UP = SCALE - FRACTION  # bits that a result has more than is opened
_ABOVE = WIDTH - SCALE  # of the result's ring before the point
LEAST = 32  # positions
MARGIN = 2  # positions at either end that are near it
_FINEST = 12  # fractional bits of the sum of cosines are twice ``fraction``, or twice this
_GUARD = 1  # bits of a word beyond what its coefficient's size asks for
BLOCK = 1 << 14  # elements at a time


@dataclass(frozen=True)
class Activation:
    """One function f, and how it is cut.

    name: in ``fits.EVEN_TARGETS`` that of f(x) - x / 2 as a function of x', whose period is that of the ring in which
    x' is opened. function: the plaintext twin. times,
    halvings: x = unit * x' with unit = times / 2^halvings. last: J, the last position inside. middle, bits:
    |f(x) - middle| < 2^bits for all |x| <= (J + 1) unit, errors included. fraction: bits of x' and of what is opened of
    f(x).
    """

    name: str
    function: Callable[[Tensor], Tensor]
    times: int
    halvings: int
    last: int
    middle: float
    bits: int
    fraction: int = FRACTION

    @property
    def unit(self) -> float:
        return self.times / 2.0**self.halvings

    @property
    def fit(self) -> CosineFit:
        return fits.stored_even(self.name)

    @property
    def opened(self) -> int:
        """Bits of f(x) - middle that are opened."""
        return self.bits + self.fraction + 2

    @property
    def ring(self) -> int:
        """Bits in which x' is opened: the period of the cosines."""
        return self.fraction + self.fit.period

    @property
    def scale(self) -> int:
        """Fractional bits of the result."""
        return self.fraction + _UP

    @property
    def width(self) -> int:
        """Bits of the result's ring: what x' leaves of ``_ABOVE`` before the point."""
        return self.scale + min(_ABOVE, self.fit.period + (self.times.bit_length() - 1) - self.halvings)

    @property
    def summed(self) -> int:
        """Fractional bits of the sum of cosines."""
        return 2 * max(self.fraction, _FINEST)

    def bound(self, positions: int = 256) -> float:
        """``activate`` computes f(x) for |x| <= this, without raising a flag."""
        return (positions // 2 - MARGIN - 1) * self.unit

    def positions(self, largest: float) -> int:
        """The fewest positions for which |x| <= ``largest`` raises no flag.

        Raises: Overflow where they leave the result's ring.
        """
        positions = LEAST
        while not self.bound(positions) >= largest:  # nor NaN
            positions *= 2
            self.reach(positions)
        return positions

    def reach(self, positions: int) -> int:
        """|x| < 2^reach for all that so many positions tell apart.

        Raises: Overflow where that does not fit the result's ring, and for a number that is no number of positions.
        """
        if positions < LEAST or positions & (positions - 1):
            raise Overflow(f"{self.name}: {positions} positions; give a power of two from {LEAST} on")
        bits = (math.ceil(positions // 2 * self.unit) - 1).bit_length()
        if bits + self.scale > self.width - 1:
            raise Overflow(
                f"{self.name}: |x| < 2^{bits}, which {positions} positions reach, at scale 2^{self.scale} does not "
                f"fit a share valid modulo 2^{self.width}"
            )
        return bits

    @property
    def error(self) -> float:
        """How far ``activate`` may be from f: beside the fit's error each mode's two products have two factors rounded,
        and the sum is rounded to ``fraction`` bits; or what the form far from zero lacks at J units.
        """
        modes = _modes(self.name, self.summed)
        rounded = sum(2.0**-mode.public + abs(mode.coefficient) * 2.0**-mode.dealt for mode in modes)
        end = torch.tensor([-self.last * self.unit], dtype=torch.float64)
        return max(self.fit.error + rounded / math.sqrt(2) + 2.0**-self.fraction, self.function(end).abs().item())

    def sets(self, positions: int) -> Tensor:
        """Which j, modulo ``positions``, are inside, right, and near the end: bool [3, positions]."""
        return _sets(self.last, positions)


@functools.cache
def _sets(last: int, positions: int) -> Tensor:
    j = torch.arange(positions)
    j = torch.where(j < positions // 2, j, j - positions)
    return torch.stack([j.abs() <= last, j > last, j.abs() >= positions // 2 - MARGIN])


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


SILU = Activation("silu", torch.nn.functional.silu, 2, 0, 5, 6.0, 3)
SILU_SHORT = Activation("silu short", torch.nn.functional.silu, 2, 0, 5, 6.0, 3, fraction=9)
GELU = Activation("gelu", _gelu, 1, 0, 4, 2.4, 2)
GELU_TANH = Activation("gelu tanh", _gelu_tanh, 1, 0, 4, 2.4, 2)


@dataclass(frozen=True)
class _Mode:
    """One cosine. Its two products are the rounded public factor, ``public`` fractional bits, and the dealt one, of
    ``dealt``; both roundings weigh alike in the sum. up: what the product lacks of the sum's fractional bits, and so
    the bits that its dealt words are narrower by: the smaller the coefficient, the more.
    """

    coefficient: float
    public: int
    dealt: int
    up: int


@functools.cache
def _modes(name: str, summed: int) -> list[_Mode]:
    coefficients = fits.stored_even(name).coefficients.tolist()
    sizes = [math.frexp(a)[1] for a in coefficients]  # |a| < 2^size
    modes = []
    for a, size in zip(coefficients, sizes, strict=True):
        up = max(0, sizes[0] - size - _GUARD)
        dealt = (summed - up + size) // 2
        modes.append(_Mode(a, summed - up - dealt, dealt, up))
    return modes


@functools.cache
def _tables(name: str, summed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each mode the public factor, what the dealt one is multiplied by, and ``up``."""
    modes = _modes(name, summed)
    factors = torch.tensor([mode.coefficient * 2.0**mode.public for mode in modes], dtype=torch.float64)
    scales = torch.tensor([2.0**mode.dealt for mode in modes], dtype=torch.float64)
    return factors, scales, torch.tensor([mode.up for mode in modes])


def activate(
    runtime: Runtime, x: Secret, activation: Activation, positions: int = 256
) -> Protocol[tuple[Secret, Secret]]:
    """f(x) at 16 fractional bits, valid modulo 2^28, from x' = x / unit; and whether x is near the end of its domain.

    These, and all that follows, with the 14 fractional bits that an activation has unless it says so; else ``scale``
    and ``width`` of it. x: x' at 14 fractional bits or more, of which the others are dropped, valid modulo 2^28 after
    that, which is its ``ring``. positions: P, a power of two from 32 on. The second result is the flag of each element,
    0 or 1 modulo 2, so its shares are words 0 or 1 whose xor it is; it costs nothing.

    Domain: f(x) is right for -P/2 <= x' <= P/2 - 1. The flag is 0 for all |x'| <= P/2 - 3 and 1 for all |x'| from
    P/2 - 2 to P/2 + 2; between these it is either. Beyond, x' is read modulo P, and what has jumped over those values
    raises no flag.
    Reveals: x' + r, then f(x) + r and two bits xor s: uniform values, to both.
    Error: below ``activation.error``, 9e-4 for silu and 4.4e-4 for gelu; measured at most 4e-4 and 2.6e-4, root mean
    square 1.1e-4 and 6e-5. Beyond J + 1 units nothing but what x or 0 lacks there: 6e-5 and 1.5e-6 at most, and 2e-9
    of x where silu's x is 20.
    Cost: 2 rounds; 49 bits an element each way (silu), 48 (gelu); dealer P bits and 503 (silu) or 352 (gelu): 94.9 and
    76 bytes with 256 positions.
    Raises: Overflow where P positions leave the result's ring, or the share is not valid where it is opened.
    Source: SHAFT (NDSS 2025) for cosines of a masked value, with free frequencies; one-hot vectors of the mask as in
    Attrapadung et al. (PoPETs 2022), XOR-shared, for the intervals.
    """
    bits = activation.reach(positions)
    fraction, result = activation.fraction, activation.width - _UP
    truncate = x.scale - fraction
    (wire,) = yield [Opening(x, truncate=truncate, ring=activation.ring + truncate, function=True)]
    near = _near(runtime, wire, activation)
    bits_of = _bits(runtime, wire, runtime.constant(activation.sets(positions)), fraction)
    cut = activation.summed - fraction
    opened, chosen = yield [Opening(near, truncate=cut, lifted=result), bit_opening(bits_of[..., :2])]
    inside = times_bits(runtime, chosen.map(lambda t: t[..., 0]), _shifted(opened, activation.middle))
    whole = dataclasses.replace(
        wire, width=min(wire.width, result + activation.halvings)
    )  # what the result needs of x'
    right = times_bits(runtime, chosen.map(lambda t: t[..., 1]), whole)
    share = (inside.share << activation.halvings) + right.share * activation.times
    up = _UP - activation.halvings
    return Secret(share << up, activation.scale, activation.width, bits), bits_of[..., 2]


def _near(runtime: Runtime, wire: Wire, activation: Activation) -> Secret:
    """f(x) - middle by cosines, which holds inside; at ``summed`` fractional bits. Dealer: the words of each mode."""
    kernels, fit, summed = runtime.kernels, activation.fit, activation.summed
    modes, fraction = _modes(activation.name, summed), activation.fraction
    width, turn = activation.opened + summed - fraction, 64 - activation.ring
    tables = (fit.frequencies, *_tables(activation.name, summed))
    frequencies, factors, scales, ups = (runtime.constant(table) for table in tables)
    constant = runtime.plus(0, round((fit.constant - activation.middle) * 2.0**summed))
    mask, raw, blocks = wire.mask.held.reshape(-1), None, []
    if wire.public is not None:
        raw = wire.public.reshape(-1)
    for part in runtime.blocks(mask.numel(), BLOCK):
        words = []
        for j, mode in enumerate(modes):

            def turned(part: slice = part, one: slice = slice(j, j + 1)) -> Tensor:
                return kernels.cosines(mask[part], turn, frequencies[one], scales[one])[0]

            words.append(runtime.deal((2, part.stop - part.start), turned, width - mode.up).held)
        if raw is not None:
            shares = torch.stack(words)
            blocks.append(kernels.add_cosines(raw[part], turn, frequencies, factors, ups, shares, constant))

    def share() -> Tensor:  # and x / 2
        half = activation.times << (summed - fraction - activation.halvings - 1)
        return torch.cat(blocks).view(wire.shape) + half * shares_of(runtime, wire)

    return Secret(runtime.share(wire.shape, share), summed, width, activation.bits)


def _bits(runtime: Runtime, wire: Wire, sets: Tensor, fraction: int) -> Secret:
    """Whether j is in each of ``sets``, bool [S, P], modulo 2: [...] to [..., S]. Dealer: P bits an element."""
    kernels, size, shape = runtime.kernels, sets.shape[1] // 8, (*wire.shape, len(sets))
    places, turns, blocks = ring.shift_right(wire.mask.held.reshape(-1), fraction), None, []
    if wire.public is not None:
        turns = ring.shift_right(wire.public.reshape(-1), fraction)
    for part in runtime.blocks(places.numel(), BLOCK):

        def flipped(words: Tensor, part: slice = part) -> Tensor:
            return kernels.flip_places(places[part], words)

        words = runtime.deal_table((part.stop - part.start, size), 8, flipped)
        if turns is not None and words is not None:
            blocks.append(kernels.parities(words, turns[part], sets))
    return Secret(runtime.share(shape, lambda: torch.cat(blocks).view(shape)), 0, 1, 1)


def _shifted(wire: Wire, number: float) -> Wire:
    """The wire of x + number; local."""
    public = None if wire.public is None else wire.public + round(number * 2.0**wire.scale)
    return dataclasses.replace(wire, public=public)
