"""Bringing a positive secret of unknown size to [1/4, 1): the first half of 1/z and 1/sqrt(z).

Owns the comparison of one opened value with all powers of four. Which power it was stays secret: the parties get
shares of the scaled value and of the power's root.
"""

import numpy as np
import torch

from crypten_llm.kernels import dcf, ring
from crypten_llm.protocols.dealer.roles import PARTY0
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Overflow, Secret, Wire


def normalize(runtime, wire: Wire, top: int, segments: int, table: list[int]) -> tuple[Secret, Secret]:
    """(z * 4^k at scale ``top``, table[k]) for the secret k in 0 .. segments - 1 that brings the first to [1/4, 1).

    wire: z opened modulo its ring of n bits, with z * 2^scale in (0, 2^top), top <= n - 1 (``Opening(function=True)``).
    table: ``segments`` public integers; the second result has scale 0 (powers 2^k, or k itself, are what callers need).
    The integers z * 2^scale below 4^(-segments) 2^top keep k = segments - 1 and land below 1/4.
    The comparison looks at the top bits only: next to a power of four the first may miss [1/4, 1) by 2^-8 of itself.

    Error: none. Cost: no message; dealer about 33 (n - 1) bytes a value to party 1 and to party 0 (a comparison key).
    """
    assert len(table) == segments, f"{len(table)} table entries for {segments} segments"
    size = wire.width
    if top > size - 1:
        raise Overflow(f"a value of {top} bits needs a ring of {top + 1}, not {size}")
    if 2 * (segments - 1) > top:
        raise Overflow(f"{segments} segments do not fit a value of {top} bits: give at most {top // 2 + 1}")
    shape, count = wire.shape, wire.mask.numel()
    bits = max(abs(entry) for entry in table).bit_length()
    drop = max(0, top - 2 * segments - 6)
    levels = size - drop - 1
    half = (1 << levels) - 1
    mask = wire.mask.reshape(-1)
    keys = _deal_keys(runtime, mask, drop, levels, size)
    # v_w = [f beta_w] + dcf_w is the share of beta_w * (1{y < r} xor f), f = msb(r), beta = (1, r).
    flipped = runtime.deal(
        (count, 2), lambda: torch.stack([ring.top_bit(mask, size), ring.top_bit(mask, size) * mask], 1)
    )
    if size == 64:
        whole = mask
    else:
        whole = runtime.deal((count,), lambda: mask)
    if runtime.is_dealer:
        empty = shape_only(shape)
        return Secret(empty, top, size, 0), Secret(empty, 0, 64, bits)
    opened = wire.raw.reshape(-1)
    thresholds = torch.tensor(
        [1 << (top - 2 * j - drop) for j in range(1, segments)], dtype=torch.int64
    )  # k >= j below
    points = ring.low_bits(ring.shift_right(opened, drop)[:, None] - thresholds, size - drop)
    shares = dcf.evaluate(keys, int(runtime.role != PARTY0), (points & half).numpy().astype(np.uint64))
    below = torch.from_numpy(shares.view(np.int64)) + flipped[:, None, :]
    turned = ring.top_bit(points, size - drop)[..., None]
    constant = torch.stack([torch.ones_like(whole) if runtime.role == PARTY0 else torch.zeros_like(whole), whole], 1)
    below = below + turned * (constant[:, None, :] - 2 * below)
    # below[:, j - 1] shares 1{z < 2^(top - 2 j)} * (1, r); k steps from j - 1 to j there.
    powers = [4**j for j in range(segments)]
    power = _look_up(constant[:, 0], below[..., 0], powers)
    masked = _look_up(whole, below[..., 1], powers)  # shares of r * 4^k
    scaled = opened * power - masked
    entry = _look_up(constant[:, 0], below[..., 0], table)
    return Secret(scaled.view(shape), top, size, 0), Secret(entry.view(shape), 0, 64, bits)


def _look_up(first, below, table: list[int]):
    """Shares of table[k] times what ``first`` shares, from shares of the same at each step up to k."""
    steps = torch.tensor([high - low for low, high in zip(table, table[1:], strict=False)], dtype=torch.int64)
    return first * table[0] + (below * steps).sum(-1)


def _deal_keys(runtime, mask, drop: int, levels: int, size: int):
    """This party's comparison keys for the low bits of the mask; the dealer sends the common part to both."""
    count = mask.numel()
    seeds = [runtime.mask_of(party, (count, 2)) for party in (0, 1)]
    sizes = dcf.sizes(levels, count)

    def common_part():
        low = (ring.shift_right(mask, drop) & ((1 << levels) - 1)).numpy().astype(np.uint64)
        sign = 1 - 2 * ring.top_bit(mask, size)
        payload = torch.stack([sign, sign * mask], 1).numpy().view(np.uint64)
        keys = dcf.generate(low, payload, *(seed.numpy().view(np.uint64) for seed in seeds), levels)
        return [getattr(keys, name) for name in sizes]

    parts = runtime.deal_arrays(list(sizes.values()), common_part)
    return None if runtime.is_dealer else dcf.Keys(seeds[runtime.role].numpy().view(np.uint64), *parts)
