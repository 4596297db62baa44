"""Kernels in torch's own operations: comparison keys (see ``kernels.dcf``, whose keys these are, bit by bit).

Owns a step of a level for all keys, or for all points of them, at a time. Every point is walked from the root; which
points end at which level is public. A number of a group is [..., count, limbs]: modulo 2^128 or 2^64 on the way, and in
a group modulo q a small signed integer, until it is reduced.
"""

from functools import lru_cache

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.cuda_choice import hot
from crypten_llm.kernels.cuda_limbs import LOW, cut, listed, minus, pack_rows, plus, unpack_rows, word
from crypten_llm.kernels.cuda_streams import words_of
from crypten_llm.kernels.ring import Comparison, Group

SEEDS = 4  # words of both children's seeds
BITS = 30  # sums of numbers modulo q are below 2^30 on the way, and above -2^30


# Numbers of a group.


def _residue(x: Tensor, q: int) -> Tensor:
    """x < 2^32 modulo q, without a division, whose time may depend on what it divides."""
    x = x - ((x * (2**32 // q)) >> 32) * q
    return x - q * (x >= q).long()


def reduced(x: Tensor, group: Group) -> Tensor:
    """A sum, in the group."""
    if group.modulus:
        return _residue(x + (2**BITS // group.modulus + 1) * group.modulus, group.modulus)
    return torch.stack(cut(list(x.unbind(-1)), group.bits), -1)


def _value(words: Tensor, start: int, group: Group) -> Tensor:
    """The number that a node's words from ``start`` on are."""
    size = group.count * group.limbs
    found = words[start : start + size].movedim(0, -1).unflatten(-1, (group.count, group.limbs))
    q = group.modulus
    if not q:
        return found
    high, low = (_residue(half, q) for half in (ring.shift_right(found, 32), found & LOW))
    return _residue(high * (2**32 % q) + low, q)


def _plus(a: Tensor, b: Tensor) -> Tensor:
    return a + b if a.shape[-1] == 1 else torch.stack(plus(a.unbind(-1), b.unbind(-1))[0], -1)


def _less(a: Tensor, b: Tensor) -> Tensor:
    return a - b if a.shape[-1] == 1 else torch.stack(minus(list(a.unbind(-1)), list(b.unbind(-1))), -1)


def _where(bit: Tensor, x: Tensor) -> Tensor:
    """A number where the bit is 1, else 0."""
    return x & -bit[..., None, None]


def _signed(x: Tensor, bit: Tensor) -> Tensor:
    """Minus the number where the bit is 1."""
    return torch.where(bit[..., None, None] != 0, _less(torch.zeros_like(x), x), x)


# Of both children of nodes, whose words are [W, ...].


def _side(words: Tensor, bit: Tensor, places: tuple[int, int]) -> Tensor:
    """The word at the first place, or at the second where the bit is 1."""
    return torch.where(bit != 0, words[places[1]], words[places[0]])


def _numbers(words: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The left child's, the right one's, and the leaf's."""
    size = group.count * group.limbs
    left, right, leaf = (_value(words, SEEDS + part * size, group) for part in range(3))
    return left, right, leaf


def _child(words: Tensor, bit: Tensor, cw: Tensor, flags: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A child's seed [..., 2] and control bit, corrected where its parent's control bit t is 1."""
    first, second = _side(words, bit, (0, 2)), _side(words, bit, (1, 3))
    control = (first ^ ((flags >> bit) & t)) & 1
    return torch.stack([first & ~1, second], -1) ^ (cw & -t[..., None]), control


def _bit(limbs: list[Tensor], place: int) -> Tensor:
    return (limbs[place >> 6] >> (place & 63)) & 1


@hot("triton_keys", 1)
def compare_keys(comparison: Comparison, mask: Tensor, payload: Tensor, seed0: Tensor, seed1: Tensor) -> list[Tensor]:
    group, width, levels = comparison.group, comparison.width, comparison.levels
    masks, stops = list(mask.unbind(-1)), {width - 1 - stop for stop in comparison.leaves}
    seeds = torch.stack([seed0, seed1])
    s = torch.stack([seeds[..., 0] & ~1, seeds[..., 1]], -1)
    t = torch.zeros_like(s[..., 0])
    t[1] = 1
    inverted, apart = _bit(masks, width - 1), torch.zeros_like(payload)  # party 0's sum on the path less party 1's
    corrections, values, leaves, controls = [], [], [], []
    for level in range(levels + 1):
        words = words_of(s, SEEDS + 3 * group.count * group.limbs)
        left, right, leaf = _numbers(words, group)
        if level in stops:
            due = _plus(_less(_less(leaf[1], leaf[0]), apart), _where(inverted, payload))
            leaves.append(reduced(_signed(due, t[1]), group))
        if level == levels:
            break
        bit = _bit(masks, width - 2 - level)
        goes = bit[:, None, None] != 0
        kept, lost = torch.where(goes, right, left), torch.where(goes, left, right)
        due = _plus(_less(_less(lost[1], lost[0]), apart), _where(bit ^ inverted, payload))
        values.append(reduced(_signed(due, t[1]), group))
        apart = _plus(_plus(apart, due), _less(kept[0], kept[1]))
        both = torch.stack([_side(words, 1 - bit, (0, 2)), _side(words, 1 - bit, (1, 3))], -1)
        cw = both[0] ^ both[1]
        cw[..., 0] &= ~1
        flags = ((words[0, 0] ^ words[0, 1]) & 1) ^ bit ^ 1
        flags = flags | ((((words[2, 0] ^ words[2, 1]) & 1) ^ bit) << 1)
        s, t = _child(words, bit, cw, flags, t)
        corrections.append(cw)
        controls.append(flags[:, None])
    sizes = ring.key_sizes(comparison, mask.shape[0])
    parts = [torch.stack(corrections, 1) if levels else mask.new_empty(sizes[0][0])]
    for rows, bits, (shape, dtype) in zip(
        (values, leaves, controls), (group.bits, group.bits, 2), sizes[1:], strict=True
    ):
        if rows:
            numbers = torch.stack(rows, 1)
            parts.append(pack_rows(numbers.flatten(1, -2), bits))
        else:
            parts.append(torch.empty(shape, dtype=dtype, device=mask.device))
    return parts


@lru_cache(maxsize=256)
def _thresholds(comparison: Comparison, device: torch.device) -> tuple[Tensor, tuple[int, ...], Tensor]:
    """By the level at which they end, the last first: words [A, K], these levels, and their places in that order."""
    width, levels = comparison.width, [comparison.width - 1 - stop for stop in comparison.stops]
    order = sorted(range(len(levels)), key=lambda k: -levels[k])
    words = [[word(comparison.thresholds[k] >> 64 * a) for k in order] for a in range(ring.limbs(width))]
    places = sorted(range(len(order)), key=lambda place: order[place])
    return (
        torch.tensor(words, dtype=torch.int64, device=device),
        tuple(levels[k] for k in order),
        torch.tensor(places, dtype=torch.int64, device=device),
    )


@hot("triton_keys", 1)
def compare(
    comparison: Comparison, seed: Tensor, common: list[Tensor], party: int, opened: Tensor, payload: Tensor
) -> Tensor:
    group, width, levels = comparison.group, comparison.width, comparison.levels
    count, many = opened.shape[0], len(comparison.thresholds)
    thresholds, ends, places = _thresholds(comparison, opened.device)
    if not count or not many:
        return torch.empty((count, many, group.count, group.limbs), dtype=torch.int64, device=opened.device)
    cw_seeds, packed_values, packed_leaves, packed_flags = common
    values, leaves = (
        unpack_rows(part, group.bits, size * group.count).view(count, size, 1, group.count, group.limbs)
        for part, size in ((packed_values, levels), (packed_leaves, len(comparison.leaves)))
    )
    flags = unpack_rows(packed_flags, 2, levels).view(count, levels, 1)
    points = minus([x[:, None] for x in listed(opened, ring.limbs(width))], list(thresholds))
    s = torch.stack([seed[:, 0] & ~1, seed[:, 1]], -1)[:, None].expand(count, many, 2)
    t = torch.full((count, many), int(party), dtype=torch.int64, device=opened.device)
    sums = torch.zeros((count, many, group.count, group.limbs), dtype=torch.int64, device=opened.device)
    slot, found = 0, list[Tensor]()
    for level in range(ends[0] + 1):
        words = words_of(s, SEEDS + 3 * group.count * group.limbs)
        left, right, leaf = _numbers(words, group)
        going = sum(end > level for end in ends)
        if going < s.shape[1]:
            corrected = _plus(leaf[:, going:], _where(t[:, going:], leaves[:, slot]))
            found.insert(0, _plus(sums[:, going:], corrected))
            slot += 1
        if not going:
            break
        words, t, sums = words[..., :going], t[:, :going], sums[:, :going]
        bit = _bit([x[:, :going] for x in points], width - 2 - level)
        side = torch.where(bit[..., None, None] != 0, right[:, :going], left[:, :going])
        sums = _plus(sums, _plus(side, _where(t, values[:, level])))
        s, t = _child(words, bit, cw_seeds[:, level, None], flags[:, level], t)
    total = torch.cat(found, 1)
    if party:
        total = _less(torch.zeros_like(total), total)
    top = _bit(points, width - 1)[..., None, None] != 0
    total = torch.where(top, _less(payload[:, None].expand_as(total), total), total)
    return reduced(total, group)[:, places]
