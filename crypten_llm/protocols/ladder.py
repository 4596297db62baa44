"""How large an opened number is: between which powers of two, from one comparison key, without a message.

Owns two ladders of thresholds over a number that was opened modulo 2^w, w up to 256. ``exponent`` gives shares of k,
modulo a small number; ``normalized`` the number times the 4^k that brings it near one, and 2^k. Both look at a few bits
below a threshold only, so next to a power of two they may decide as if it were 2^-6 of itself away. And both tell, as
XOR shares from the same key, whether the number is where they are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.roles import Runtime
from crypten_llm.protocols.secret import Secret
from crypten_llm.protocols.wide import Opened
from crypten_llm.roles import CLIENT, OWNER

FINE = 6  # bits below a threshold that are compared


class _Ladder:
    """One key for each of ``rows`` numbers, and its points.

    width: of the ring of what was opened. low: the lowest bit that is looked at. bits: of a payload's numbers.
    modulus: of a payload of one number, 0 for two numbers modulo 2^bits.
    """

    def __init__(
        self, runtime: Runtime, opened: Opened, rows: int, width: int, low: int, bits: int, modulus: int
    ) -> None:
        self.runtime, self.opened, self.rows, self.width, self.low = runtime, opened, rows, width, low
        self.bits, self.modulus = bits, modulus
        self.levels = width - 1 - low
        self.mask = opened.mask.held.reshape(-1, opened.mask.held.shape[-1])

    def deal(self, payload: Callable[[], Tensor]) -> None:
        """payload: at the dealer, beta: words [rows, V]."""
        runtime, count, levels = self.runtime, self.rows, self.levels
        owner, client = (runtime.mask_of(party, (count, 2)) for party in (OWNER, CLIENT))
        words = 1 if self.modulus else 4
        numbers = 1 if self.modulus else 2

        def common() -> list[Tensor]:
            assert owner is not None and client is not None, "the dealer knows both seeds"
            kernels = runtime.kernels
            low = kernels.shift_wide(kernels.reduce_wide(self.mask, self.width - 1), -self.low, self.width - 1)
            made = kernels.compare_keys(low, payload(), owner, client, levels, self.modulus)
            seeds, values, leaves, flags = made
            return [seeds, self._packed(values), self._packed(leaves), kernels.pack(flags.long(), 2)]

        sizes = [
            ((levels, count, 2), torch.int64),
            ((ring.packed_size(levels * count * numbers, self.bits),), torch.uint8),
            ((ring.packed_size((levels + 1) * count * numbers, self.bits),), torch.uint8),
            ((ring.packed_size(levels * count, 2),), torch.uint8),
        ]
        self._seed = client if owner is None else owner
        self._common = runtime.deal_common(sizes, common)
        self._words, self._numbers = words, numbers

    def _packed(self, values: Tensor) -> Tensor:
        kernels = self.runtime.kernels
        if self.modulus:
            return kernels.pack(values, self.bits)
        return kernels.pack(_limbs(values.reshape(*values.shape[:-1], 2, 2), self.bits), self.bits)

    def _unpacked(self, data: Tensor, levels: int) -> Tensor:
        kernels, shape = self.runtime.kernels, (levels, self.rows, self._numbers)
        words = kernels.unpack(data, self.bits, shape)
        if self.modulus:
            return words
        full = words if words.ndim == 4 else words[..., None]
        if full.shape[-1] < 2:
            full = torch.cat([full, torch.zeros_like(full)], -1)
        return full.reshape(levels, self.rows, 4)

    def below(self, thresholds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """At a party: its shares of beta * 1{p < r} at p = M - t without the top bit, words [rows, K, V]; and that bit
        [rows, K].
        """
        kernels = self.runtime.kernels
        seeds, values, leaves, flags = self._common
        common = [
            seeds,
            self._unpacked(values, self.levels),
            self._unpacked(leaves, self.levels + 1),
            kernels.unpack(flags, 2, (self.levels, self.rows)).to(torch.uint8),
        ]
        stops = torch.tensor([max(self.low, t.bit_length() - 1 - FINE) for t in thresholds])
        points = _constants(thresholds, self.width)
        seen = self.opened.seen.reshape(-1, self.opened.seen.shape[-1])
        assert self._seed is not None, "a party has a seed of its own"
        return kernels.compare(self._seed, common, self.runtime.role, seen, self.width, points, stops, self.modulus)

    def top(self) -> Tensor:
        """At the dealer: the mask's top bit, words [rows]."""
        return self.mask[:, (self.width - 1) // 64] >> (self.width - 1) % 64 & 1


def _limbs(words: Tensor, bits: int) -> Tensor:
    """Numbers of two limbs as ``pack`` takes those of that many bits."""
    return words if bits > 64 else words[..., 0]


def _constants(numbers: Sequence[int], bits: int) -> Tensor:
    """Public integers as limbs [K, L]."""
    rows = [[_signed(n % (1 << bits) >> 64 * i & (2**64 - 1)) for i in range(ring.limbs(bits))] for n in numbers]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(numbers), -1)


def _signed(word: int) -> int:
    return word - 2**64 if word >> 63 else word


def exponent(
    runtime: Runtime, opened: Opened, rows: int, width: int, least: int, headroom: int, modulus: int
) -> tuple[Tensor, Tensor]:
    """Shares modulo ``modulus`` of the even k with z in [2^k, 2^(k + 2)), ``least`` for smaller ones: words [rows]; and
    XOR shares [rows, 2] of z being negative, and of it not being in [2^least, 2^(width - headroom)).

    opened: z modulo 2^width, limbs [rows, L], |z| < 2^(width - 1). modulus: even, so that parities are XOR shares.
    Error: z within 2^-6 of a power of two may count as on its other side. Cost: no message; dealer some 18 bytes a bit
    of the ring to each party for a modulus of 256, and 8 to the client.
    """
    assert modulus % 2 == 0, "parities are shares of bits where the modulus is even"
    key = _Ladder(runtime, opened, rows, width, least + 2 - FINE, (modulus - 1).bit_length(), modulus)
    key.deal(lambda: ((1 - 2 * key.top()) % modulus)[:, None])

    def corrected(words: Tensor) -> Tensor:
        return (key.top() - (words & 2**63 - 1)) % modulus

    flip = runtime.deal_table((rows,), 64, corrected)
    steps = [1 << j for j in range(least + 2, width - 1, 2)]
    checks = [0, 1 << least, 1 << (width - headroom)]
    made: list[Tensor] = []

    def below() -> Tensor:
        """Shares of 1{z < t}, [rows, K], once for both results."""
        if not made:
            assert flip is not None, "a party has its share"
            found, tops = key.below(steps + checks)
            value = found[..., 0] + (flip & 2**63 - 1)[:, None]
            made.append(torch.where(tops == 1, runtime.plus(torch.zeros_like(value), 1) - value, value) % modulus)
        return made[0]

    def power() -> Tensor:
        smaller = below()[:, : len(steps)]
        return runtime.plus(-2 * smaller.sum(1), least + 2 * len(steps)) % modulus

    def beyond() -> Tensor:
        negative, small, large = below()[:, len(steps) :].unbind(1)
        return torch.stack([negative, runtime.plus(small + large, 1)], 1) & 1

    return runtime.share((rows,), power), runtime.share((rows, 2), beyond)


def normalized(
    runtime: Runtime,
    opened: Opened,
    shape: Sequence[int],
    width: int,
    top: int,
    least: int,
    fraction: int,
    base: int = 2,
) -> tuple[Secret, Secret, Tensor]:
    """z 4^k / 2^top at ``fraction`` bits, and base^k, for the secret k that brings the first to [1/4, 1); and XOR shares
    [..., 2] of z being negative, and of z >= 2^(top - 1).

    opened: z in [2^least, 2^top), modulo 2^width with width > top, limbs. Smaller numbers end below 1/4, of which the
    caller must know better.
    Error: of the first a unit of ``fraction`` bits; next to a power of four it may miss [1/4, 1) by 2^-6 of itself.
    Cost: no message; dealer 2 (8 + width / 8) bytes a bit of the ring to each party, and width / 4 to the client.
    """
    kernels, rows = runtime.kernels, torch.Size(shape).numel()
    last = max(1, -(-(top - 2 - least) // 2))
    key = _Ladder(runtime, opened, rows, width, max(0, top - 2 * last - FINE), width, 0)
    limbs = ring.limbs(width)

    def payload(flip: Callable[[Tensor], Tensor]) -> Tensor:
        """(b, b r) for words b [rows] of the dealer's."""
        bits = kernels.widen(flip(key.top()), width, True)
        both = torch.stack([bits, kernels.multiply_wide(bits, key.mask, width)], 1)
        return both if limbs == 2 else torch.cat([both, torch.zeros_like(both)], -1)

    key.deal(lambda: payload(lambda f: 1 - 2 * f).reshape(rows, 4))
    flipped = runtime.deal((rows, 2), lambda: _limbs(payload(lambda f: f), width), width).held
    steps = [1 << (top - 2 * j) for j in range(1, last + 1)]
    checks = [0, 1 << (top - 1)]
    made: list[tuple[Tensor, Tensor]] = []

    def below() -> tuple[Tensor, Tensor]:
        """Shares of 1{z < t} (1, r), limbs [rows, K, 2, L], and of (1, r), limbs [rows, 2, L]; once."""
        if not made:
            found, tops = key.below(steps + checks)
            numbers = found.reshape(*found.shape[:-1], 2, 2)[..., :limbs]
            flips = (flipped if width > 64 else flipped[..., None])[:, None]
            value = kernels.add_wide(kernels.reduce_wide(numbers, width), flips, width)
            ones = kernels.widen(torch.full((rows,), runtime.plus(0, 1)), width, False)
            constant = torch.stack([ones, key.mask], 1)
            other = kernels.subtract_wide(constant[:, None].expand_as(value), value, width)
            made.append((torch.where(tops[..., None, None] == 1, other, value), constant))
        return made[0]

    def times(table: list[int], number: int) -> Tensor:
        """Shares of table[k] times 1 or r: limbs [rows, L]."""
        smaller, constant = below()
        apart = _constants([high - low for low, high in zip(table, table[1:], strict=False)], width)
        terms = kernels.multiply_wide(smaller[:, : len(steps), number], apart[None], width)
        return kernels.add_wide(kernels.sum_wide(terms, width)[:, 0], constant[:, number], width)

    def scaled() -> Tensor:
        powers = [4**j for j in range(last + 1)]
        seen = opened.seen.reshape(rows, -1)
        found = kernels.subtract_wide(kernels.multiply_wide(seen, times(powers, 0), width), times(powers, 1), width)
        return kernels.drop_wide(found, width, top - fraction, runtime.rounds_up).view(tuple(shape))

    def power() -> Tensor:
        return times([base**j for j in range(last + 1)], 0)[..., 0].reshape(tuple(shape))

    def beyond() -> Tensor:
        bits = below()[0][:, len(steps) :, 0, 0]
        return torch.stack([bits[:, 0], runtime.plus(bits[:, 1], 1)], 1).view(*shape, 2) & 1

    bits = (base**last).bit_length()
    assert bits + 2 <= width, "the ring holds the largest power"
    return (
        Secret(runtime.share(shape, scaled), fraction, width - top + fraction, 0),
        Secret(runtime.share(shape, power), 0, bits + 2, bits),
        runtime.share((*shape, 2), beyond),
    )
