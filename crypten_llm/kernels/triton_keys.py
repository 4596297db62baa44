"""Kernels in Triton: the way down a comparison key (see ``kernels.dcf`` and ``kernels.cuda_keys``).

Owns the walk of all points side by side, a lane each: nothing is branched on, and how far each goes is public.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels.ring import Group
from crypten_llm.kernels.triton_chacha import ND_1, SIX_BY, block

_POINTS = 32  # of a program: a warp


@triton.jit
def _residue(x, Q: tl.constexpr):
    """x < 2^32 modulo Q, without a division."""
    x = x - ((x * (4294967296 // Q)) >> 32) * Q
    return x - tl.where(x >= Q, Q, 0)


@triton.jit
def _word(x, y, j: tl.constexpr):
    """Word j of 64 bits of two blocks."""
    if j < 8:
        found = x[2 * j].to(tl.int64) | (x[2 * j + 1].to(tl.int64) << 32)
    else:
        found = y[2 * j - 16].to(tl.int64) | (y[2 * j - 15].to(tl.int64) << 32)
    return found


@triton.jit
def _low(a, b):
    """a + b and what is above 2^64."""
    total = a + b
    return total, (((a & b) | ((a | b) & ~total)) >> 63) & 1


@triton.jit(do_not_specialize=["party", "lanes", "many", "levels", "last", "width", "limbs", "slots"])
def _walk(
    seeds, points, ends, corrections, values, leaves, flags, places, out, party, lanes, many, levels, last, width,
    limbs, slots, COUNT: tl.constexpr, LIMBS: tl.constexpr, Q: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = COUNT * LIMBS
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < lanes
    n = at // many
    end = tl.load(ends + (at - n * many), ok, -1)
    s0, s1 = tl.load(seeds + 2 * n, ok, 0) & -2, tl.load(seeds + 2 * n + 1, ok, 0)
    t = tl.zeros((B,), dtype=tl.int64) + party
    second, third = tl.full((), ND_1, tl.uint32), tl.full((), SIX_BY, tl.uint32)
    for level in range(0, last + 1):
        k0, k1, k2, k3 = s0.to(tl.uint32), (s0 >> 32).to(tl.uint32), s1.to(tl.uint32), (s1 >> 32).to(tl.uint32)
        x = block(second, third, k0, k1, k2, k3, k0, k1, k2, k3, k0 * 0, k0 * 0)
        y = x
        if 4 + 3 * SIZE > 8:
            y = block(second, third, k0, k1, k2, k3, k0, k1, k2, k3, k0 * 0 + 1, k0 * 0)
        here, goes_on = ok & (level == end), ok & (level < end)
        place = width - 2 - level
        limb = tl.load(points + at * limbs + (place >> 6), goes_on, 0)
        bit = (limb >> (place & 63).to(tl.int64)) & 1
        right = bit != 0
        of_leaf = leaves + (n * slots + tl.load(places + level)) * SIZE
        of_level = n * levels + level
        for c in tl.static_range(COUNT):
            carry = tl.zeros((B,), dtype=tl.int64)
            for i in tl.static_range(LIMBS):
                side = tl.where(right, _word(x, y, 4 + SIZE + c * LIMBS + i), _word(x, y, 4 + c * LIMBS + i))
                own = tl.where(here, _word(x, y, 4 + 2 * SIZE + c * LIMBS + i), side)
                more = tl.load(of_leaf + c * LIMBS + i, here, 0)
                more |= tl.load(values + of_level * SIZE + c * LIMBS + i, goes_on, 0)
                to = out + at * SIZE + c * LIMBS + i
                total = tl.load(to, ok, 0)
                if Q:
                    upper = _residue((own >> 32) & 0xFFFFFFFF, Q) * (4294967296 % Q)
                    own = _residue(upper + _residue(own & 0xFFFFFFFF, Q), Q)
                total, first = _low(total, own)
                total, next_ = _low(total, more & -t)
                total, third_ = _low(total, carry)
                carry = first + next_ + third_
                tl.store(to, total, here | goes_on)
        flag = tl.load(flags + of_level, goes_on, 0)
        cw0 = tl.load(corrections + 2 * of_level, goes_on, 0)
        cw1 = tl.load(corrections + 2 * of_level + 1, goes_on, 0)
        head = tl.where(right, _word(x, y, 2), _word(x, y, 0))
        tail = tl.where(right, _word(x, y, 3), _word(x, y, 1))
        s0, s1 = (head & -2) ^ (cw0 & -t), tail ^ (cw1 & -t)
        t = (head ^ ((flag >> bit) & t)) & 1


@lru_cache(maxsize=256)
def _there(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def walked(
    seed: Tensor,
    points: list[Tensor],
    ends: tuple[int, ...],
    of_keys: list[Tensor],
    party: int,
    width: int,
    group: Group,
) -> Tensor:
    corrections, values, leaves, flags = (part.contiguous() for part in of_keys)
    (count, levels), many, device = corrections.shape[:2], len(ends), seed.device
    stops = sorted(set(ends))
    slots = [stops.index(level) if level in stops else 0 for level in range(ends[0] + 1)]
    out = torch.zeros((count, many, group.count, group.limbs), dtype=torch.int64, device=device)
    there = torch.stack(points, -1).contiguous()
    lanes = count * many
    _walk[(triton.cdiv(lanes, _POINTS),)](
        seed.contiguous(), there, _there(ends, device), corrections, values, leaves, flags,
        _there(tuple(slots), device), out, int(party), lanes, many, levels, ends[0], width, there.shape[-1],
        len(stops), group.count, group.limbs, group.modulus, _POINTS, num_warps=1,
    )  # fmt: skip
    return out
