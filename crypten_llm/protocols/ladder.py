"""Where an opened secret stands among public thresholds, by comparison keys. Nothing is opened here.

Owns three. ``below``: for every threshold, shares of a payload if the secret is below it, of zero if not. Of a secret
of unknown size, ``exponent`` gives shares of the even k with Z in [2^k, 2^(k + 2)), and ``normalize`` of 4^k Z in
[1/4, 1) and of 2^k; both also of flags that say whether Z is where that holds. The secret Z was opened as M = Z + r
modulo 2^width, r uniform there.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.ring import Comparison, Group
from crypten_llm.protocols.dealer.roles import Runtime
from crypten_llm.protocols.secret import Overflow
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
    steps = range(base + 2, width - 1, 2)
    low = max(0, base + 2 - FINE)
    powers = sorted({base, top, *steps})
    comparison = Comparison(
        width,
        (0, *(1 << power for power in powers)),
        (low, *(max(low, power - FINE) for power in powers)),
        Group.residues(q if q % 2 == 0 else 2 * q),
    )
    count = mask.shape[0]
    ones = torch.ones((count, 1, 1), dtype=torch.int64, device=runtime.device)
    found = below(runtime, comparison, raw, mask, lambda: ones, lambda: runtime.plus(torch.zeros_like(ones), 1))

    def smaller(power: int) -> Tensor:
        assert found is not None, "parties have compared"
        return found[:, 1 + powers.index(power), 0, 0]

    def share_of_k() -> Tensor:
        above = [runtime.plus(-smaller(step), 1) for step in steps]
        total = torch.stack(above).sum(0) if above else torch.zeros_like(smaller(base))
        return runtime.plus(2 * total, base) % q

    def share_of_flags() -> Tensor:
        assert found is not None, "parties have compared"
        outside = runtime.plus(smaller(base) + smaller(top), 1)
        return torch.stack([found[:, 0, 0, 0], outside], 1) & 1

    return runtime.share((count,), share_of_k), runtime.share((count, 2), share_of_flags)


def normalize(
    runtime: Runtime, raw: Tensor | None, mask: Tensor, width: int, top: int, segments: int, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares modulo 2^width of 4^k Z and of 2^k, limbs [R, L], for the k in 0 .. segments - 1 that brings Z 4^k to
    [2^(top - 2), 2^top); and of two flags by xor, words [R, 2], 0 or 1: Z is negative; Z is not below 2^limit.

    raw: M, limbs [R, L], ``None`` at the dealer. mask: what this role holds of r, as limbs. width: 65 to 128. Z is in
    (0, 2^top), top < width; a Z below 2^(top - 2 segments) keeps k = segments - 1.

    Reveals: nothing. Error: none but in k: a Z by at most 2^-FINE of it below a power of four, or below 2^limit, may
    count as not below it; of flags next to zero and 2^(width - 1) as ``exponent`` says.
    Cost: no message; dealer, to each party, a key of width - top + 2 segments + FINE - 3 levels (limit being above the
    lowest power) at 16 + 1/4 bytes and 2 width bits, and these again for each segment but one, and for the limit.
    Raises: Overflow where Z does not fit its ring, or the segments do not fit Z.
    """
    if not 64 < width <= 128:
        raise Overflow(f"a value is normalized in a ring of 65 to 128 bits, not {width}")
    if top > width - 1:
        raise Overflow(f"a value of {top} bits needs a ring of {top + 1}, not {width}")
    if 2 * (segments - 1) > top:
        raise Overflow(f"{segments} segments do not fit a value of {top} bits: give at most {top // 2 + 1}")
    kernels, count = runtime.kernels, mask.shape[0]
    ends = [top - 2 * j for j in range(1, segments)]
    stops = [max(0, end - FINE) for end in ends]
    low = min(stops, default=max(0, limit - FINE))
    comparison = Comparison(
        width,
        (0, 1 << limit, *(1 << end for end in ends)),
        (low, max(low, limit - FINE), *stops),
        Group(2, width),
    )

    def with_one(numbers: Tensor) -> Callable[[], Tensor]:
        """(1, number), or a party's share of both."""
        return lambda: torch.stack([runtime.plus(torch.zeros_like(numbers), one), numbers], 1)

    one = _limbs((1,), width)[0].to(runtime.device)
    found = below(runtime, comparison, raw, mask, lambda: torch.stack([one.expand_as(mask), mask], 1), with_one(mask))

    def weighed(base: int) -> Tensor:
        """Shares of base^k (1, r): [R, 2, L]."""
        assert found is not None, "parties have compared"
        apart = _limbs(tuple(base**j - base ** (j - 1) for j in range(1, segments)), width).to(runtime.device)
        steps = kernels.multiply_wide(found[:, 2:].transpose(1, 2), apart, width)
        return kernels.add_wide(kernels.sum_wide(steps, width)[:, :, 0], with_one(mask)(), width)

    def scaled() -> Tensor:
        assert raw is not None, "parties have opened it"
        both = weighed(4)
        return kernels.subtract_wide(kernels.multiply_wide(raw, both[:, 0], width), both[:, 1], width)

    def share_of_flags() -> Tensor:
        assert found is not None, "parties have compared"
        return torch.stack([found[:, 0, 0, 0], runtime.plus(found[:, 1, 0, 0], 1)], 1) & 1

    return (
        runtime.share(mask.shape, scaled),
        runtime.share(mask.shape, lambda: weighed(2)[:, 0]),
        runtime.share((count, 2), share_of_flags),
    )


@lru_cache(maxsize=64)
def _limbs(values: tuple[int, ...], bits: int) -> Tensor:
    """Public numbers as limbs [N, L]."""
    words = [value >> 64 * place & 2**64 - 1 for value in values for place in range(ring.limbs(bits))]
    signed = [word - (word >> 63 << 64) for word in words]
    return torch.tensor(signed, dtype=torch.int64).reshape(len(values), ring.limbs(bits))
