"""Kernels in Triton: comparison keys (see ``kernels.dcf``, whose keys these are, bit by bit).

Owns the walk through all levels in one launch. A row of lanes is a point of a key, or a key while it is made: each
level waits for the one before, so what there is to expand of a level is spread over the lanes of its row, and what is
to be loaded is asked for before. A number of a group is up to four words, two of 64 bits a number above 64 bits; what a
group lacks is 0.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.cuda_keys import BITS
from crypten_llm.kernels.cuda_limbs import top_of, word
from crypten_llm.kernels.ring import Comparison, Group
from crypten_llm.kernels.triton_chacha import ND_1, SIX_BY, block
from crypten_llm.kernels.triton_wide import subtract_wide
from crypten_llm.kernels.triton_words import flat, pack_rows, unpack_rows

_LANES = 32  # of a program


@triton.jit
def _pairs(x):
    """Eight words of 64 bits from sixteen of 32."""
    return (
        x[0].to(tl.uint64) | (x[1].to(tl.uint64) << 32), x[2].to(tl.uint64) | (x[3].to(tl.uint64) << 32),
        x[4].to(tl.uint64) | (x[5].to(tl.uint64) << 32), x[6].to(tl.uint64) | (x[7].to(tl.uint64) << 32),
        x[8].to(tl.uint64) | (x[9].to(tl.uint64) << 32), x[10].to(tl.uint64) | (x[11].to(tl.uint64) << 32),
        x[12].to(tl.uint64) | (x[13].to(tl.uint64) << 32), x[14].to(tl.uint64) | (x[15].to(tl.uint64) << 32),
    )  # fmt: skip


@triton.jit
def _block_of(s0, s1, counter):
    k0, k1, k2, k3 = s0.to(tl.uint32), (s0 >> 32).to(tl.uint32), s1.to(tl.uint32), (s1 >> 32).to(tl.uint32)
    second, third = tl.full((), ND_1, tl.uint32), tl.full((), SIX_BY, tl.uint32)
    zero = k0 * 0
    return _pairs(block(second, third, k0, k1, k2, k3, k0, k1, k2, k3, zero + counter, zero))


@triton.jit
def _one(x, which, at):
    """What the lane ``at`` of each row has, in all of them."""
    return tl.xor_sum(tl.where(which == at, x, x * 0), 1, keep_dims=True)


@triton.jit
def _part(w, which, at):
    return (
        _one(w[0], which, at), _one(w[1], which, at), _one(w[2], which, at), _one(w[3], which, at),
        _one(w[4], which, at), _one(w[5], which, at), _one(w[6], which, at), _one(w[7], which, at),
    )  # fmt: skip


@triton.jit
def _sixteen(w, v):
    return w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]


@triton.jit
def _expanded(s0, s1, SIZE: tl.constexpr):
    """Sixteen words that a seed makes, of which the first 4 + 3 SIZE count. Seeds: [B, 1], and so are the words."""
    if SIZE > 1:
        which = tl.arange(0, 2)[None, :]
        both = _block_of(s0, s1, which.to(tl.uint32))
        w, v = _part(both, which, 0), _part(both, which, 1)
    else:
        w = _block_of(s0, s1, tl.zeros((1, 1), tl.uint32))
        v = w
    return _sixteen(w, v)


@triton.jit
def _both_expanded(a0, a1, b0, b1, SIZE: tl.constexpr):
    """What two seeds make, spread over the lanes of a row (``_of_seed``)."""
    if SIZE > 1:
        which = tl.arange(0, 4)[None, :]
        is_first, counter = which < 2, (which & 1).to(tl.uint32)
    else:
        which = tl.arange(0, 2)[None, :]
        is_first, counter = which < 1, (which * 0).to(tl.uint32)
    return _block_of(tl.where(is_first, a0, b0), tl.where(is_first, a1, b1), counter)


@triton.jit
def _of_seed(words, second: tl.constexpr, SIZE: tl.constexpr):
    """As ``_expanded``, of the first seed or the second."""
    if SIZE > 1:
        which = tl.arange(0, 4)[None, :]
        w, v = _part(words, which, 2 * second), _part(words, which, 2 * second + 1)
    else:
        which = tl.arange(0, 2)[None, :]
        w = _part(words, which, second)
        v = w
    return _sixteen(w, v)


@triton.jit
def _residue(x, Q: tl.constexpr):
    """x < 2^32 modulo Q, without a division."""
    x = x - ((x * (4294967296 // Q)) >> 32) * Q
    return tl.where(x >= Q, x - Q, x)


@triton.jit
def _whole(x, Q: tl.constexpr):
    """A uniform word as a number of the group."""
    if Q > 0:
        x = _residue(_residue(x >> 32, Q) * (4294967296 % Q) + _residue(x & 0xFFFFFFFF, Q), Q)
    return x


@triton.jit
def _value(w, START: tl.constexpr, SIZE: tl.constexpr, Q: tl.constexpr):
    a = _whole(w[START], Q)
    b, c, d = a * 0, a * 0, a * 0
    if SIZE > 1:
        b = _whole(w[START + 1], Q)
    if SIZE > 2:
        c = _whole(w[START + 2], Q)
        d = _whole(w[START + (3 if SIZE > 3 else 2)], Q)
    if SIZE == 3:
        d = d * 0
    return a, b, c, d


@triton.jit
def _plus(x, y, WIDE: tl.constexpr):
    """Of numbers of two words each where WIDE."""
    a, b, c, d = x[0] + y[0], x[1] + y[1], x[2] + y[2], x[3] + y[3]
    if WIDE:
        b += (a < x[0]).to(tl.uint64)
        d += (c < x[2]).to(tl.uint64)
    return a, b, c, d


@triton.jit
def _minus(x, y, WIDE: tl.constexpr):
    a, b, c, d = x[0] - y[0], x[1] - y[1], x[2] - y[2], x[3] - y[3]
    if WIDE:
        b -= (x[0] < y[0]).to(tl.uint64)
        d -= (x[2] < y[2]).to(tl.uint64)
    return a, b, c, d


@triton.jit
def _either(bit, x, y):
    """x where the bit is 1, else y."""
    return (
        tl.where(bit != 0, x[0], y[0]), tl.where(bit != 0, x[1], y[1]),
        tl.where(bit != 0, x[2], y[2]), tl.where(bit != 0, x[3], y[3]),
    )  # fmt: skip


@triton.jit
def _none(x):
    return x * 0, x * 0, x * 0, x * 0


@triton.jit
def _read(at, place, ok, SIZE: tl.constexpr):
    a = tl.load(at + place * SIZE, ok, 0).to(tl.uint64, bitcast=True)
    b, c, d = a * 0, a * 0, a * 0
    if SIZE > 1:
        b = tl.load(at + place * SIZE + 1, ok, 0).to(tl.uint64, bitcast=True)
    if SIZE > 2:
        c = tl.load(at + place * SIZE + 2, ok, 0).to(tl.uint64, bitcast=True)
    if SIZE > 3:
        d = tl.load(at + place * SIZE + 3, ok, 0).to(tl.uint64, bitcast=True)
    return a, b, c, d


@triton.jit
def _reduced(x, keep, lift, Q: tl.constexpr, WIDE: tl.constexpr):
    """A sum, in the group. keep: of the highest word of a number; lift: a multiple of Q."""
    a, b, c, d = x
    if Q > 0:
        a = _residue(a + lift, Q)
        b, c, d = a * 0, a * 0, a * 0
    elif WIDE:
        b &= keep
        d &= keep
    else:
        a, b, c, d = a & keep, b & keep, c & keep, d & keep
    return a, b, c, d


@triton.jit
def _write(at, place, ok, x, SIZE: tl.constexpr):
    tl.store(at + place * SIZE, x[0].to(tl.int64, bitcast=True), ok)
    if SIZE > 1:
        tl.store(at + place * SIZE + 1, x[1].to(tl.int64, bitcast=True), ok)
    if SIZE > 2:
        tl.store(at + place * SIZE + 2, x[2].to(tl.int64, bitcast=True), ok)
    if SIZE > 3:
        tl.store(at + place * SIZE + 3, x[3].to(tl.int64, bitcast=True), ok)


@triton.jit(do_not_specialize=["lanes", "many", "levels", "last", "slots", "party", "width", "limbs", "keep", "lift"])
def _compare(
    seeds, corrections, values, leaves, flags, points, ends, slot_of, payload, out,
    lanes, many, levels, last, slots, party, width, limbs, keep, lift,
    SIZE: tl.constexpr, WIDE: tl.constexpr, Q: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[:, None]
    ok = lane < lanes
    key, point = lane // many, lane % many
    end, slot = tl.load(ends + point, ok, 0), tl.load(slot_of + point, ok, 0)
    s0 = tl.load(seeds + key * 2, ok, 0).to(tl.uint64, bitcast=True) & 0xFFFFFFFFFFFFFFFE
    s1 = tl.load(seeds + key * 2 + 1, ok, 0).to(tl.uint64, bitcast=True)
    keep, lift = keep.to(tl.int64).to(tl.uint64, bitcast=True), lift.to(tl.uint64)
    t = s0 * 0 + party.to(tl.uint64)
    sums, found = _none(s0), _none(s0)
    for level in range(last + 1):
        here, going = (end == level) & ok, (end > level) & ok
        row, place = key * levels + level, width - 2 - level
        shown = tl.load(points + lane * limbs + place // 64, going, 0).to(tl.uint64, bitcast=True)
        flag = tl.load(flags + row, going, 0).to(tl.uint64, bitcast=True)
        c0 = tl.load(corrections + row * 2, going, 0).to(tl.uint64, bitcast=True)
        c1 = tl.load(corrections + row * 2 + 1, going, 0).to(tl.uint64, bitcast=True)
        corrected = _read(values, row, going, SIZE)
        leaf = _read(leaves, key * slots + slot, here, SIZE)
        w = _expanded(s0, s1, SIZE)
        total = _plus(sums, _plus(_value(w, 4 + 2 * SIZE, SIZE, Q), _either(t, leaf, _none(t)), WIDE), WIDE)
        found = _either(here.to(tl.uint64), total, found)
        bit = (shown >> (place % 64).to(tl.uint64)) & 1
        side = _either(bit, _value(w, 4 + SIZE, SIZE, Q), _value(w, 4, SIZE, Q))
        sums = _plus(sums, _plus(side, _either(t, corrected, _none(t)), WIDE), WIDE)
        first, second = tl.where(bit != 0, w[2], w[0]), tl.where(bit != 0, w[3], w[1])
        s0 = (first & 0xFFFFFFFFFFFFFFFE) ^ tl.where(t != 0, c0, 0)
        s1 = second ^ tl.where(t != 0, c1, 0)
        t = (first ^ ((flag >> bit) & t)) & 1
    if party != 0:
        found = _minus(_none(t), found, WIDE)
    place = width - 1
    shown = tl.load(points + lane * limbs + place // 64, ok, 0).to(tl.uint64, bitcast=True)
    top = (shown >> (place % 64).to(tl.uint64)) & 1
    found = _either(top, _minus(_read(payload, key, ok, SIZE), found, WIDE), found)
    _write(out, lane, ok, _reduced(found, keep, lift, Q, WIDE), SIZE)


@triton.jit(do_not_specialize=["keys", "levels", "slots", "width", "limbs", "keep", "lift"])
def _make(
    seed0, seed1, masks, payload, slot_at, corrections, values, leaves, flags,
    keys, levels, slots, width, limbs, keep, lift,
    SIZE: tl.constexpr, WIDE: tl.constexpr, Q: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    key = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[:, None]
    ok = key < keys
    a0 = tl.load(seed0 + key * 2, ok, 0).to(tl.uint64, bitcast=True) & 0xFFFFFFFFFFFFFFFE
    a1 = tl.load(seed0 + key * 2 + 1, ok, 0).to(tl.uint64, bitcast=True)
    b0 = tl.load(seed1 + key * 2, ok, 0).to(tl.uint64, bitcast=True) & 0xFFFFFFFFFFFFFFFE
    b1 = tl.load(seed1 + key * 2 + 1, ok, 0).to(tl.uint64, bitcast=True)
    keep, lift = keep.to(tl.int64).to(tl.uint64, bitcast=True), lift.to(tl.uint64)
    ta, tb = a0 * 0, b0 * 0 + 1
    paid, apart = _read(payload, key, ok, SIZE), _none(a0)
    place = width - 1
    inverted = tl.load(masks + key * limbs + place // 64, ok, 0).to(tl.uint64, bitcast=True)
    inverted = (inverted >> (place % 64).to(tl.uint64)) & 1
    for level in range(levels + 1):
        slot = tl.load(slot_at + level)
        going = ok & (level < levels)
        place = width - 2 - level
        shown = tl.load(masks + key * limbs + place // 64, going, 0).to(tl.uint64, bitcast=True)
        both = _both_expanded(a0, a1, b0, b1, SIZE)
        v, w = _of_seed(both, 0, SIZE), _of_seed(both, 1, SIZE)
        apart_now = _minus(_value(w, 4 + 2 * SIZE, SIZE, Q), _value(v, 4 + 2 * SIZE, SIZE, Q), WIDE)
        due = _plus(_minus(apart_now, apart, WIDE), _either(inverted, paid, _none(ta)), WIDE)
        due = _reduced(_either(tb, _minus(_none(ta), due, WIDE), due), keep, lift, Q, WIDE)
        _write(leaves, key * slots + slot, ok & (slot >= 0), due, SIZE)
        bit = (shown >> (place % 64).to(tl.uint64)) & 1
        left_a, right_a = _value(v, 4, SIZE, Q), _value(v, 4 + SIZE, SIZE, Q)
        left_b, right_b = _value(w, 4, SIZE, Q), _value(w, 4 + SIZE, SIZE, Q)
        kept = _minus(_either(bit, right_a, left_a), _either(bit, right_b, left_b), WIDE)
        lost = _minus(_either(bit, left_b, right_b), _either(bit, left_a, right_a), WIDE)
        due = _plus(_minus(lost, apart, WIDE), _either(bit ^ inverted, paid, _none(ta)), WIDE)
        row = key * levels + level
        corrected = _reduced(_either(tb, _minus(_none(ta), due, WIDE), due), keep, lift, Q, WIDE)
        _write(values, row, going, corrected, SIZE)
        apart = _plus(_plus(apart, due, WIDE), kept, WIDE)
        c0 = (tl.where(bit != 0, v[0], v[2]) ^ tl.where(bit != 0, w[0], w[2])) & 0xFFFFFFFFFFFFFFFE
        c1 = tl.where(bit != 0, v[1], v[3]) ^ tl.where(bit != 0, w[1], w[3])
        flag = (((v[0] ^ w[0]) & 1) ^ bit ^ 1) | ((((v[2] ^ w[2]) & 1) ^ bit) << 1)
        tl.store(corrections + row * 2, c0.to(tl.int64, bitcast=True), going)
        tl.store(corrections + row * 2 + 1, c1.to(tl.int64, bitcast=True), going)
        tl.store(flags + row, flag.to(tl.int64, bitcast=True), going)
        first, second = tl.where(bit != 0, v[2], v[0]), tl.where(bit != 0, v[3], v[1])
        a0 = (first & 0xFFFFFFFFFFFFFFFE) ^ tl.where(ta != 0, c0, 0)
        a1 = second ^ tl.where(ta != 0, c1, 0)
        ta = (first ^ ((flag >> bit) & ta)) & 1
        first, second = tl.where(bit != 0, w[2], w[0]), tl.where(bit != 0, w[3], w[1])
        b0 = (first & 0xFFFFFFFFFFFFFFFE) ^ tl.where(tb != 0, c0, 0)
        b1 = second ^ tl.where(tb != 0, c1, 0)
        tb = (first ^ ((flag >> bit) & tb)) & 1


class _Walks(NamedTuple):
    """Of each threshold: its words, [K, A], the level at which it ends, and which of the leaves is there. slot_at: by
    level, [levels + 1], the leaf that is there, or -1. last: the lowest level at which one ends.
    """

    words: Tensor
    ends: Tensor
    slots: Tensor
    slot_at: Tensor
    last: int


@lru_cache(maxsize=256)
def _walks(comparison: Comparison, device: torch.device) -> _Walks:
    last, count = comparison.width - 1, ring.limbs(comparison.width)
    ends = [last - stop for stop in comparison.stops]
    leaves = [last - stop for stop in comparison.leaves]
    at = [leaves.index(level) if level in leaves else -1 for level in range(comparison.levels + 1)]
    words = [[word(number >> 64 * a) for a in range(count)] for number in comparison.thresholds]

    def there(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=device)

    return _Walks(there(words), there(ends), there([at[end] for end in ends]), there(at), max(ends, default=-1))


def _group(group: Group) -> tuple[tuple[int, int], tuple[int, bool, int]]:
    """What reduces a number, and what a group is at compile time."""
    q = group.modulus
    keep, lift = (1 << top_of(group.bits)) - 1, (2**BITS // q + 1) * q if q else 0
    return (keep - (keep >> 63 << 64), lift), (group.count * group.limbs, group.limbs > 1, q)


def compare_keys(comparison: Comparison, mask: Tensor, payload: Tensor, seed0: Tensor, seed1: Tensor) -> list[Tensor]:
    group, levels, count = comparison.group, comparison.levels, mask.shape[0]
    limbs, slots, device = mask.shape[-1], len(comparison.leaves), mask.device
    numbers, static = _group(group)
    corrections = torch.empty((count, levels, 2), dtype=torch.int64, device=device)
    values = torch.empty((count, levels * group.count, group.limbs), dtype=torch.int64, device=device)
    leaves = torch.empty((count, slots * group.count, group.limbs), dtype=torch.int64, device=device)
    flags = torch.empty((count, levels, 1), dtype=torch.int64, device=device)
    if count:
        keys = _LANES // (4 if group.count * group.limbs > 1 else 2)  # of a program, a row of lanes each
        _make[(triton.cdiv(count, keys),)](
            flat(seed0), flat(seed1), flat(mask), flat(payload), _walks(comparison, device).slot_at,
            corrections, values, leaves, flags,
            count, levels, slots, comparison.width, limbs, *numbers, *static, keys, num_warps=1,
        )  # fmt: skip
    packed = (pack_rows(rows, bits) for rows, bits in ((values, group.bits), (leaves, group.bits), (flags, 2)))
    return [corrections, *packed]


def compare(
    comparison: Comparison, seed: Tensor, common: list[Tensor], party: int, opened: Tensor, payload: Tensor
) -> Tensor:
    group, levels, slots = comparison.group, comparison.levels, len(comparison.leaves)
    count, many, limbs = opened.shape[0], len(comparison.thresholds), ring.limbs(comparison.width)
    out = torch.empty((count, many, group.count, group.limbs), dtype=torch.int64, device=opened.device)
    if not count or not many:
        return out
    corrections, packed_values, packed_leaves, packed_flags = common
    values, leaves = (
        unpack_rows(part, group.bits, size * group.count)
        for part, size in ((packed_values, levels), (packed_leaves, slots))
    )
    flags = unpack_rows(packed_flags, 2, levels)
    walks = _walks(comparison, opened.device)
    points = subtract_wide(opened[:, None], walks.words, 64 * limbs)
    numbers, static = _group(group)
    lanes, rows = count * many, _LANES // (2 if group.count * group.limbs > 1 else 1)
    _compare[(triton.cdiv(lanes, rows),)](
        flat(seed), flat(corrections), values, leaves, flags, points, walks.ends, walks.slots,
        flat(payload), out, lanes, many, levels, walks.last, slots, int(party), comparison.width, limbs,
        *numbers, *static, rows, num_warps=1,
    )  # fmt: skip
    return out
