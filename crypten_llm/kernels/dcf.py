"""Comparison keys on processors: shares of a payload by the sign of a secret, from a key each and without a message.

Owns key generation (the dealer) and evaluation (the parties), batched over keys; what a key says and how it travels is
in ``kernels.ring``. It is the key of Boyle et al., "Function Secret Sharing for Mixed-Mode and Fixed-Point Secure
Computation" (EUROCRYPT 2021), Figure 1, with three changes. A comparison may stop at each of the announced levels,
which have a correction word for their leaves. Points M - t of one key are walked from where they leave M's own path,
which is walked once. And where the point is not below, the key gives f times the payload instead of 0, f the mask's
top bit: what leaves the path to a side is corrected to that side's value, so that a constant costs nothing.

A node's seed of 128 bits makes 64-bit words by the ChaCha20 block function, counters 0 and 1: both children's seeds,
two words each, the left child's value, the right one's, and the node's own as a leaf. No word serves twice: a leaf that
took its value from a child's would tell the mask's bits by the difference of two corrections. The control bit is the
lowest bit of a seed's first word, which is cleared in the seed.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels.chacha import LANES, ROWS, expand, word_of
from crypten_llm.kernels.compiling import compiled
from crypten_llm.kernels.payloads import (
    ONE,
    ZERO,
    Field,
    Number,
    Word,
    difference,
    field_of,
    get,
    plus,
    put,
    reduced,
    signed,
    total,
)
from crypten_llm.kernels.ring import Comparison, key_sizes

SEEDS = 4  # words of both children's seeds


@compiled
def _bit(numbers: np.ndarray, n: int, place: int | np.int64) -> Word:
    return (numbers[n, place >> 6] >> np.uint64(place & 63)) & ONE


# Of a node, whose words are a lane's column of ``x``.


@compiled
def _number(x: np.ndarray, word: int | np.int64, limbs: int, lane: int) -> Number:
    return word_of(x, word, lane), word_of(x, word + 1, lane) if limbs == 2 else ZERO


@compiled
def _child(
    x: np.ndarray, side: np.int64, lane: int, cw_low: Word, cw_high: Word, flags: Word, t: Word
) -> tuple[np.uint64, np.uint64, np.uint64]:
    """A child's seed and control bit, corrected where its parent's control bit t is 1."""
    first = word_of(x, 2 * side, lane)
    control = (first ^ ((flags >> np.uint64(side)) & t)) & ONE
    return (first & ~ONE) ^ (cw_low * t), word_of(x, 2 * side + 1, lane) ^ (cw_high * t), control


# Generation: lane 2 j + b is party b's node on the path of key j.


@compiled
def _apart(x: np.ndarray, word: int | np.int64, limbs: int, lane: int, other: int, field: Field) -> Number:
    """A lane's number less another's."""
    low, high = _number(x, word, limbs, lane)
    other_low, other_high = _number(x, word, limbs, other)
    low, high = reduced(low, high, field)
    other_low, other_high = reduced(other_low, other_high, field)
    return difference(low, high, other_low, other_high, field)


@compiled
def generate(
    masks: np.ndarray,
    payload: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    width: int,
    slots: np.ndarray,
    bits: int,
    field: Field,
    cw_seeds: np.ndarray,
    cw_values: np.ndarray,
    cw_leaves: np.ndarray,
    cw_flags: np.ndarray,
) -> None:
    """masks: uint64 [N, A]; payload: [N, count, limbs], reduced; first, second: [N, 2]. slots: of each level the place
    of its leaf, or -1, int64 [levels + 1]. The rest is written, bytes into zeros.
    """
    levels, count, limbs = cw_seeds.shape[1], payload.shape[1], payload.shape[2]
    size = count * limbs
    left, leaf = SEEDS, SEEDS + 2 * size
    key, x = np.empty(4 * LANES, np.uint32), np.empty(2 * ROWS * LANES, np.uint32)
    s, t = np.empty((2, LANES), np.uint64), np.empty(LANES, np.uint64)
    apart = np.empty((LANES // 2, count, 2), np.uint64)  # party 0's sum on the path less party 1's
    for start in range(0, masks.shape[0], LANES // 2):
        keys = min(LANES // 2, masks.shape[0] - start)
        apart[:] = ZERO
        for j in range(keys):
            s[0, 2 * j], s[1, 2 * j], t[2 * j] = first[start + j, 0] & ~ONE, first[start + j, 1], ZERO
            s[0, 2 * j + 1], s[1, 2 * j + 1], t[2 * j + 1] = second[start + j, 0] & ~ONE, second[start + j, 1], ONE
        for level in range(levels + 1):
            expand(s, key, x, leaf + size, 2 * keys)
            for j in range(keys):
                n, i = start + j, 2 * j
                minus, inverted = t[i + 1], _bit(masks, n, width - 1)
                bit = _bit(masks, n, width - 2 - level) if level < levels else ZERO
                keep, lose = np.int64(bit), 1 - np.int64(bit)
                below = bit ^ inverted  # what is lost is below where it is the left child
                for c in range(count):
                    due_low, due_high = payload[n, c, 0], payload[n, c, 1] if limbs == 2 else ZERO
                    low, high = apart[j, c, 0], apart[j, c, 1]
                    if slots[level] >= 0:
                        v, w = _apart(x, leaf + c * limbs, limbs, i + 1, i, field)
                        v, w = difference(v, w, low, high, field)
                        v, w = total(v, w, due_low * inverted, due_high * inverted, field)
                        v, w = signed(v, w, minus, field)
                        put(cw_leaves, n, (slots[level] * count + c) * bits, v, w, bits)
                    if level < levels:
                        v, w = _apart(x, left + lose * size + c * limbs, limbs, i + 1, i, field)
                        v, w = difference(v, w, low, high, field)
                        v, w = total(v, w, due_low * below, due_high * below, field)
                        low, high = total(low, high, v, w, field)
                        v, w = signed(v, w, minus, field)
                        put(cw_values, n, (level * count + c) * bits, v, w, bits)
                        v, w = _apart(x, left + keep * size + c * limbs, limbs, i, i + 1, field)
                        apart[j, c, 0], apart[j, c, 1] = total(low, high, v, w, field)
                if level == levels:
                    continue
                low = (word_of(x, 2 * lose, i) ^ word_of(x, 2 * lose, i + 1)) & ~ONE
                high = word_of(x, 2 * lose + 1, i) ^ word_of(x, 2 * lose + 1, i + 1)
                flags = ((word_of(x, 0, i) ^ word_of(x, 0, i + 1)) & ONE) ^ bit ^ ONE
                flags |= (((word_of(x, 2, i) ^ word_of(x, 2, i + 1)) & ONE) ^ bit) << ONE
                cw_seeds[n, level, 0], cw_seeds[n, level, 1] = low, high
                put(cw_flags, n, 2 * level, flags, ZERO, 2)
                for b in (i, i + 1):
                    s[0, b], s[1, b], t[b] = _child(x, keep, b, low, high, flags, t[b])


# Evaluation, a batch of keys at a time: their own paths first, then a lane for each point that leaves its key's.


@compiled
def _sum(
    x: np.ndarray,
    word: int | np.int64,
    limbs: int,
    lane: int,
    cws: np.ndarray,
    j: int,
    place: int | np.int64,
    c: int,
    t: Word,
    sums: np.ndarray,
) -> Number:
    """A lane's sum of its path's numbers, sums[lane, c], with another and, where t is 1, its correction."""
    low, high = _number(x, word + c * limbs, limbs, lane)
    low, high = plus(low, high, cws[j, place, c, 0] * t, cws[j, place, c, 1] * t)
    return plus(low, high, sums[lane, c, 0], sums[lane, c, 1])


@compiled
def _write(
    low: Word,
    high: Word,
    party: int,
    top: Word,
    payload: np.ndarray,
    bits: int,
    field: Field,
    n: int,
    k: int,
    c: int,
    out: np.ndarray,
) -> None:
    """The share that a party's sum is; where the point's top bit is set, what is left of the payload's share."""
    low, high = reduced(low, high, field)
    low, high = signed(low, high, np.uint64(party), field)
    if top:
        whole = payload[n, c, 1] if out.shape[3] == 2 else ZERO
        low, high = difference(payload[n, c, 0], whole, low, high, field)
    spare = ZERO if field[0] else np.uint64(64 * out.shape[3] - bits)
    if out.shape[3] == 2:
        out[n, k, c, 0], out[n, k, c, 1] = low, high & (~ZERO >> spare)
    else:
        out[n, k, c, 0] = low & (~ZERO >> spare)


@compiled
def _flags(packed: np.ndarray, n: int, level: int | np.int64) -> Word:
    return np.uint64(packed[n, level >> 2]) >> np.uint64(2 * (level & 3))


@compiled
def _subtract(opened: np.ndarray, n: int, thresholds: np.ndarray, k: int, points: np.ndarray, i: int) -> None:
    borrow = ZERO
    for a in range(opened.shape[1]):
        less = opened[n, a] - thresholds[k, a]
        points[i, a] = less - borrow
        borrow = np.uint64(opened[n, a] < thresholds[k, a]) | np.uint64(less < borrow)


@compiled
def _leaving(opened: np.ndarray, n: int, points: np.ndarray, i: int, top: int) -> int:
    """The highest bit below ``top`` in which a point differs from M, or -1."""
    place = top - 1
    while place >= 0:
        limb = place >> 6
        apart = (opened[n, limb] ^ points[i, limb]) << np.uint64(63 - (place & 63))
        if apart:
            while not apart >> np.uint64(63):
                apart <<= ONE
                place -= 1
            return place
        place = (limb << 6) - 1
    return -1


@compiled
def evaluate(
    seeds: np.ndarray,
    cw_seeds: np.ndarray,
    cw_values: np.ndarray,
    cw_leaves: np.ndarray,
    cw_flags: np.ndarray,
    party: int,
    opened: np.ndarray,
    payload: np.ndarray,
    width: int,
    thresholds: np.ndarray,
    stops: np.ndarray,
    slots: np.ndarray,
    bits: int,
    field: Field,
    out: np.ndarray,
) -> None:
    """opened: uint64 [N, A]; payload: [N, count, limbs]; thresholds: [K, A]; stops: int64 [K]. Written: out [N, K,
    count, limbs].
    """
    levels, many, count, limbs = cw_seeds.shape[1], out.shape[1], out.shape[2], out.shape[3]
    batch, size, leaves = min(LANES, seeds.shape[0]), count * limbs, slots.max() + 1
    left, leaf = SEEDS, SEEDS + 2 * size
    key, x = np.empty(4 * LANES, np.uint32), np.empty(2 * ROWS * LANES, np.uint32)
    s, t, sums = np.empty((2, LANES), np.uint64), np.empty(LANES, np.uint64), np.empty((LANES, count, 2), np.uint64)
    points, at = np.empty((LANES, opened.shape[1]), np.uint64), np.empty((LANES, 3), np.int64)  # key, point, level
    cws = np.empty((batch, levels + leaves, count, 2), np.uint64)  # of values by level, then of leaves
    # Along each key's own path: the child that is left aside, with its control bit; and the sums of what leaves the
    # path to it, by level, or ends at a leaf.
    aside, kept = np.empty((batch, levels, 2), np.uint64), np.empty((batch, levels + leaves, count, 2), np.uint64)
    for start in range(0, seeds.shape[0], LANES):
        keys = min(LANES, seeds.shape[0] - start)
        sums[:] = ZERO
        for j in range(keys):
            n = start + j
            s[0, j], s[1, j], t[j] = seeds[n, 0] & ~ONE, seeds[n, 1], np.uint64(party)
            for place in range(levels + leaves):
                for c in range(count):
                    if place < levels:
                        low, high = get(cw_values, n, (place * count + c) * bits, bits)
                    else:
                        low, high = get(cw_leaves, n, ((place - levels) * count + c) * bits, bits)
                    cws[j, place, c, 0], cws[j, place, c, 1] = low, high
        for level in range(levels + 1):
            end = levels + slots[level]
            expand(s, key, x, leaf + size, keys)
            for j in range(keys):
                if end >= levels:
                    for c in range(count):
                        low, high = _sum(x, leaf, limbs, j, cws, j, end, c, t[j], sums)
                        kept[j, end, c, 0], kept[j, end, c, 1] = low, high
                if level == levels:
                    continue
                n, bit = start + j, np.int64(_bit(opened, start + j, width - 2 - level))
                for c in range(count):
                    low, high = _sum(x, left + (1 - bit) * size, limbs, j, cws, j, level, c, t[j], sums)
                    kept[j, level, c, 0], kept[j, level, c, 1] = low, high
                    sums[j, c, 0], sums[j, c, 1] = _sum(x, left + bit * size, limbs, j, cws, j, level, c, t[j], sums)
                low, high, flags = cw_seeds[n, level, 0], cw_seeds[n, level, 1], _flags(cw_flags, n, level)
                one, other, control = _child(x, 1 - bit, j, low, high, flags, t[j])
                aside[j, level, 0], aside[j, level, 1] = one | control, other
                s[0, j], s[1, j], t[j] = _child(x, bit, j, low, high, flags, t[j])
        lanes, task, tasks = 0, 0, keys * many
        while lanes or task < tasks:
            while lanes < LANES and task < tasks:
                j, k = task // many, task % many
                n, i, task = start + j, lanes, task + 1
                _subtract(opened, n, thresholds, k, points, i)
                place = _leaving(opened, n, points, i, width - 1)
                leaves_path = place >= stops[k]
                level = width - 2 - place if leaves_path else levels + slots[width - 1 - stops[k]]
                for c in range(count):
                    low, high = kept[j, level, c, 0], kept[j, level, c, 1]
                    sums[i, c, 0], sums[i, c, 1] = low, high
                    if not leaves_path:
                        _write(low, high, party, _bit(points, i, width - 1), payload, bits, field, n, k, c, out)
                if leaves_path:
                    s[0, i], s[1, i], t[i] = aside[j, level, 0] & ~ONE, aside[j, level, 1], aside[j, level, 0] & ONE
                    at[i, 0], at[i, 1], at[i, 2] = j, k, level + 1
                    lanes += 1
            expand(s, key, x, leaf + size, lanes)
            going, lanes = lanes, 0
            for i in range(going):
                j, k, level = at[i, 0], at[i, 1], at[i, 2]
                n, to = start + j, lanes  # lanes that are done leave room, which the next points take
                if level == width - 1 - stops[k]:
                    for c in range(count):
                        low, high = _sum(x, leaf, limbs, i, cws, j, levels + slots[level], c, t[i], sums)
                        _write(low, high, party, _bit(points, i, width - 1), payload, bits, field, n, k, c, out)
                    continue
                bit = np.int64(_bit(points, i, width - 2 - level))
                for c in range(count):
                    low, high = _sum(x, left + bit * size, limbs, i, cws, j, level, c, t[i], sums)
                    sums[to, c, 0], sums[to, c, 1] = low, high
                low, high, flags = cw_seeds[n, level, 0], cw_seeds[n, level, 1], _flags(cw_flags, n, level)
                s[0, to], s[1, to], t[to] = _child(x, bit, i, low, high, flags, t[i])
                at[to, 0], at[to, 1], at[to, 2] = j, k, level + 1
                for a in range(points.shape[1]):
                    points[to, a] = points[i, a]
                lanes += 1


# What ``kernels.ring`` lists.


@lru_cache(maxsize=256)
def _public(comparison: Comparison) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds, uint64 [K, A], stops [K], and of each level the place of its leaf, or -1."""
    limbs = -(-comparison.width // 64)
    wrapped = [threshold % 2 ** (64 * limbs) for threshold in comparison.thresholds]
    words = [[threshold >> 64 * a & 2**64 - 1 for a in range(limbs)] for threshold in wrapped]
    slots = np.full(comparison.levels + 1, -1)
    for slot, stop in enumerate(comparison.leaves):
        slots[comparison.width - 1 - stop] = slot
    return np.array(words, np.uint64).reshape(-1, limbs), np.array(comparison.stops, np.int64), slots


def compare_keys(comparison: Comparison, mask: Tensor, payload: Tensor, seed0: Tensor, seed1: Tensor) -> list[Tensor]:
    group, (_, _, slots) = comparison.group, _public(comparison)
    parts = [torch.zeros(shape, dtype=dtype) for shape, dtype in key_sizes(comparison, mask.shape[0])]
    seeds, values, leaves, flags = parts
    generate(
        _unsigned(mask),
        _unsigned(payload),
        _unsigned(seed0),
        _unsigned(seed1),
        comparison.width,
        slots,
        group.bits,
        field_of(group),
        _unsigned(seeds),
        values.numpy(),
        leaves.numpy(),
        flags.numpy(),
    )
    return parts


def compare(
    comparison: Comparison, seed: Tensor, common: list[Tensor], party: int, opened: Tensor, payload: Tensor
) -> Tensor:
    group, (thresholds, stops, slots) = comparison.group, _public(comparison)
    seeds, values, leaves, flags = (part.contiguous() for part in common)
    out = torch.empty((opened.shape[0], len(stops), group.count, group.limbs), dtype=torch.int64)
    evaluate(
        _unsigned(seed),
        _unsigned(seeds),
        values.numpy(),
        leaves.numpy(),
        flags.numpy(),
        int(party),
        _unsigned(opened),
        _unsigned(payload),
        comparison.width,
        thresholds,
        stops,
        slots,
        group.bits,
        field_of(group),
        _unsigned(out),
    )
    return out


def _unsigned(words: Tensor) -> np.ndarray:
    return words.contiguous().numpy().view(np.uint64)
