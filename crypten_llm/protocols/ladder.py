"""Where an opened secret stands among public thresholds, by comparison keys. Nothing is opened here.

Owns three. ``below``: for every threshold, shares of a payload if the secret is below it, of zero if not. ``exponent``:
of a positive secret of unknown size, shares of the even k with Z in [2^k, 2^(k + 2)), and of whether it is so.
``normalized``: the secret times the power of four that brings it near one. The secret Z was opened as M = Z + r modulo
2^width, r uniform there.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.ring import Comparison, Group
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.secret import Secret
from crypten_llm.roles import CLIENT, OWNER

FINE = 6  # a power of two is told from what is below it by more than 2^-FINE of itself


def below(
    runtime: Runtime,
    comparison: Comparison,
    raw: Tensor | None,
    mask: Tensor,
    payload: Callable[[], Tensor],
    share: Callable[[], Tensor],
) -> Tensor | None:
    """Shares in the comparison's group of payload * 1{Z < threshold}: limbs [N, K, count, limbs]; ``None`` at the
    dealer, as all that follows is a party's.

    raw: M, limbs [N, A], ``None`` at the dealer. mask: r, limbs of that shape, at the dealer (of a party its shape
    alone). payload: called by the dealer, the payload, limbs [N, count, limbs]. share: called by a party, its share.

    Reveals: nothing. Error: a Z by at most 2^stop below a threshold may count as not below it.
    Cost: no message; dealer, to each party, the bytes of ``kernels.ring.key_sizes``: 16 + 1/4 bytes a level, the
    payload's bits at every level, and these again for every different stop.
    Source: Boyle et al. (EUROCRYPT 2021); see ``kernels.dcf``.
    """
    count = mask.shape[0]
    owner, client = (runtime.mask_of(party, (count, 2)) for party in (OWNER, CLIENT))

    def made() -> list[Tensor]:
        assert owner is not None and client is not None, "the dealer knows both seeds"
        return runtime.kernels.compare_keys(comparison, mask, payload(), owner, client)

    common = runtime.deal_common(ring.key_sizes(comparison, count), made)
    if raw is None:
        return None
    seed = client if owner is None else owner
    assert seed is not None, "a party has a seed of its own"
    return runtime.kernels.compare(comparison, seed, common, runtime.role, raw, share())


def exponent(
    runtime: Runtime, raw: Tensor | None, mask: Tensor, width: int, base: int, top: int, q: int
) -> tuple[Tensor, Tensor]:
    """Shares of k modulo q, words [R], and of two flags by xor, words [R, 2], 0 or 1.

    k: the number of even distance from ``base`` with 2^k <= Z < 2^(k + 2), and ``base`` where Z is less; the largest is
    that below width - 1. Flags: Z is negative, its top bit modulo 2^width; Z is not in [2^base, 2^top). raw, mask: M
    and r as ``below`` takes them. q: of any number of bits below 16.

    A bit's shares modulo an even number have parities that are its shares by xor, so for an odd q the payload, and
    k's shares before the end, are modulo 2 q.

    Reveals: nothing. Error: a Z by at most 2^-FINE of a power of two below it may count as not below it, for k and for
    2^top, and by 2^(2 - FINE) for 2^base; a Z by at most 2^(base + 2 - FINE) below zero may have the second flag alone,
    and one by as much below 2^(width - 1) both.
    Cost: no message; dealer, to each party, a key of width - base - 3 + FINE levels at 16 + 1/4 bytes and the bits of
    q, and these again for each power.
    """
    comparison, powers, places = _exponents(width, base, top, q)
    count, last = mask.shape[0], base + 2 * len(places)
    ones = torch.ones((count, 1, 1), dtype=torch.int64, device=runtime.device)
    found = below(runtime, comparison, raw, mask, lambda: ones, lambda: runtime.plus(torch.zeros_like(ones), 1))

    def smaller(power: int) -> Tensor:
        assert found is not None, "parties have compared"
        return found[:, 1 + powers.index(power), 0, 0]

    def share_of_k() -> Tensor:
        assert found is not None, "parties have compared"
        passed = -found[:, runtime.constant(places), 0, 0].sum(1)
        return runtime.plus(2 * passed, last) % q

    def share_of_flags() -> Tensor:
        assert found is not None, "parties have compared"
        outside = runtime.plus(smaller(base) + smaller(top), 1)
        return torch.stack([found[:, 0, 0, 0], outside], 1) & 1

    return runtime.share((count,), share_of_k), runtime.share((count, 2), share_of_flags)


def normalized(
    runtime: Runtime,
    raw: Tensor | None,
    mask: Tensor,
    shape: Sequence[int],
    width: int,
    top: int,
    least: int,
    fraction: int,
    base: int = 2,
) -> tuple[Secret, Secret, Tensor]:
    """Z 4^k / 2^top at ``fraction`` bits, and base^k, for the secret k that brings the first to [1/4, 1); and a flag by
    xor, words [..., 1], 0 or 1: Z is not below 2^(top - 1).

    raw, mask: M and r as ``below`` takes them, one for each element of ``shape``; at a party mask is its share. Z is in
    [2^least, 2^top), top < width; smaller ones, zero included, end below 1/4, of which the caller must know better.

    Reveals: nothing. Error: of the first a unit of ``fraction`` bits. A Z by at most 2^-FINE of a power of four below
    it may count as not below it, and end below 1/4 by as much; so may the flag of one below 2^(top - 1).
    Cost: no message; dealer, to each party, a key as ``below`` says, of two numbers of ``width`` bits: width - e - 1 +
    FINE levels, 2^e being the lowest power, and a stop for each power of four below 2^top and for the flag.
    """
    kernels = runtime.kernels
    last = max(1, -(-(top - 2 - least) // 2))  # the largest k
    comparison = _fours(width, top, last)
    one = runtime.constant(_constants((1,), width)).expand(mask.shape[0], -1)
    payload: list[Tensor] = []  # (1, r), or a party's shares of it

    def share() -> Tensor:
        payload.append(torch.stack([runtime.plus(torch.zeros_like(one), one), mask], 1))
        return payload[0]

    found = below(runtime, comparison, raw, mask, lambda: torch.stack([one, mask], 1), share)

    def looked_up(base: int, count: int = 2) -> Tensor:
        """Shares of base^k (1, r), or of the first alone: limbs [N, count, L]."""
        assert found is not None, "parties have compared"
        apart = runtime.constant(_constants(_steps(base, last), width))
        terms = kernels.multiply_wide(found[:, 1:, :count].transpose(1, 2), apart, width)
        return kernels.add_wide(kernels.sum_wide(terms, width)[:, :, 0], payload[0][:, :count], width)

    def scaled() -> Tensor:
        assert raw is not None, "parties have opened it"
        both = looked_up(4)
        total = kernels.subtract_wide(kernels.multiply_wide(raw, both[:, 0], width), both[:, 1], width)
        return kernels.drop_wide(total, width, top - fraction, runtime.rounds_up).view(tuple(shape))

    def power() -> Tensor:
        return looked_up(base, 1)[:, 0, 0].reshape(tuple(shape))

    def flag() -> Tensor:
        assert found is not None, "parties have compared"
        return (runtime.plus(found[:, 0, 0, 0], 1) & 1).view(*shape, 1)

    bits = (base**last).bit_length()
    assert bits + 2 <= width, "the ring holds the largest power"
    return (
        Secret(runtime.share(shape, scaled), fraction, width - top + fraction, 0),
        Secret(runtime.share(shape, power), 0, bits + 2, bits),
        runtime.share((*shape, 1), flag),
    )


# What a step asks for again in every layer.


@lru_cache(maxsize=64)
def _exponents(width: int, base: int, top: int, q: int) -> tuple[Comparison, list[int], Tensor]:
    """What ``exponent`` compares with, the powers of two behind the first threshold, and where among the thresholds
    those are that k is counted by.
    """
    steps = range(base + 2, width - 1, 2)
    low = max(0, base + 2 - FINE)
    powers = sorted({base, top, *steps})
    comparison = Comparison(
        width,
        (0, *(1 << power for power in powers)),
        (low, *(max(low, power - FINE) for power in powers)),
        Group.residues(q if q % 2 == 0 else 2 * q),
    )
    return comparison, powers, torch.tensor([1 + powers.index(step) for step in steps], dtype=torch.int64)


@lru_cache(maxsize=64)
def _fours(width: int, top: int, last: int) -> Comparison:
    """What ``normalized`` compares with."""
    powers = [top - 2 * k for k in range(1, last + 1)]
    return Comparison(
        width,
        (1 << (top - 1), *(1 << power for power in powers)),
        tuple(max(0, power - FINE) for power in (top - 1, *powers)),
        Group(2, width),
    )


@lru_cache(maxsize=64)
def _steps(base: int, last: int) -> tuple[int, ...]:
    """What base^k grows by up to each k."""
    return tuple(base**k - base ** (k - 1) for k in range(1, last + 1))


@lru_cache(maxsize=64)
def _constants(numbers: tuple[int, ...], bits: int) -> Tensor:
    """Public integers as limbs [K, L]."""
    words = [[number >> 64 * place & 2**64 - 1 for place in range(ring.limbs(bits))] for number in numbers]
    return torch.tensor([[word - (word >> 63 << 64) for word in row] for row in words], dtype=torch.int64)
