"""Where an opened secret stands among public thresholds, by comparison keys. Nothing is opened here.

Owns two. ``below``: for every threshold, shares of a payload if the secret is below it, of zero if not. ``exponent``:
of a positive secret of unknown size, shares of the even k with Z in [2^k, 2^(k + 2)), and of whether it is so. The
secret Z was opened as M = Z + r modulo 2^width, r uniform there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.ring import Comparison, Group
from crypten_llm.protocols.dealer.roles import Runtime
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
