"""Kernels to read: comparison keys in Python's integers, one key and one point after the other.

Owns the twins of ``kernels.dcf``, with which they share no code. A key is a binary tree of seeds; a node has a seed of
128 bits, of which the lowest is zero, and a control bit. At a node off the mask's path the parties' seeds and bits are
equal, so their values cancel. Notation as in Figure 1 of Boyle et al. (EUROCRYPT 2021).
"""

import torch
from torch import Tensor

from crypten_llm.kernels.integers import numbers, wide
from crypten_llm.kernels.ring import Comparison, Group, key_sizes

BLOCK = 8  # words of 64 bits
SEED = 2  # words of a seed


def _packed(values: list[int], bits: int) -> list[int]:
    """Bytes of numbers one behind the other, the lowest bit first."""
    whole = sum(value << place * bits for place, value in enumerate(values))
    return list(whole.to_bytes((len(values) * bits + 7) // 8, "little"))


def _unpacked(data: list[int], bits: int, count: int) -> list[int]:
    whole = int.from_bytes(bytes(data), "little")
    return [whole >> place * bits & 2**bits - 1 for place in range(count)]


def _block(seed: int, counter: int) -> list[int]:
    """The words of 64 bits of a ChaCha20 block under the seed twice, nonce 0 (RFC 8439, section 2.3)."""
    key = [seed >> 32 * i & 2**32 - 1 for i in range(4)]
    start = [int.from_bytes(b"expand 16-byte k"[i : i + 4], "little") for i in range(0, 16, 4)]
    start = [*start, *key, *key, counter, 0, 0, 0]
    x = start.copy()

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for first, second, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[first] = (x[first] + x[second]) % 2**32
            mixed = x[third] ^ x[first]
            x[third] = (mixed << turn | mixed >> 32 - turn) % 2**32

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    words = [(a + b) % 2**32 for a, b in zip(x, start, strict=True)]
    return [low + (high << 32) for low, high in zip(words[::2], words[1::2], strict=True)]


def layout(group: Group) -> tuple[int, int, int, int]:
    """Where in a node's words the left child's value begins, the right child's, the leaf's; and where all end."""
    size = group.count * group.limbs
    return 2 * SEED, 2 * SEED + size, 2 * SEED + 2 * size, 2 * SEED + 3 * size


class Node:
    """What a seed makes: seed, control bit and value of the left child and of the right one, and a leaf's value."""

    def __init__(self, seed: int, group: Group) -> None:
        *starts, end = layout(group)
        words = [word for counter in range(-(-end // BLOCK)) for word in _block(seed, counter)]
        both = [words[SEED * side] + (words[SEED * side + 1] << 64) for side in (0, 1)]
        self.seeds = [seed - seed % 2 for seed in both]
        self.bits = [seed % 2 for seed in both]
        self.left, self.right, self.leaf = (self._value(words[start:], group) for start in starts)

    @staticmethod
    def _value(words: list[int], group: Group) -> list[int]:
        order = order_of(group)
        parts = [words[group.limbs * c : group.limbs * (c + 1)] for c in range(group.count)]
        return [sum(word << 64 * place for place, word in enumerate(part)) % order for part in parts]

    def value(self, side: int) -> list[int]:
        return self.right if side else self.left


def order_of(group: Group) -> int:
    return group.modulus or 2**group.bits


def compare_keys(comparison: Comparison, mask: Tensor, payload: Tensor, seed0: Tensor, seed1: Tensor) -> list[Tensor]:
    group, levels = comparison.group, comparison.levels
    payloads = numbers(payload)
    roots = zip(numbers(seed0), numbers(seed1), strict=True)
    keys = [
        _key(comparison, r, payloads[group.count * n : group.count * (n + 1)], list(pair))
        for n, (r, pair) in enumerate(zip(numbers(mask), roots, strict=True))
    ]
    (_, seeds_type), *sizes = key_sizes(comparison, len(keys))
    assert seeds_type == torch.int64
    seeds = wide((seed for key in keys for seed in key[0]), 64 * SEED, (len(keys), levels))
    packed = [
        [_packed([number for value in key[part] for number in value], bits) for key in keys]
        for part, bits in ((1, group.bits), (2, group.bits), (3, 2))
    ]
    rows = [torch.tensor(row, dtype=dtype).reshape(shape) for row, (shape, dtype) in zip(packed, sizes, strict=True)]
    return [seeds, *rows]


def _key(comparison: Comparison, r: int, payload: list[int], seeds: list[int]) -> tuple[list, list, list, list]:
    """By level the corrections: of the seed, the value, the leaf (if a comparison may stop there), the control bits."""
    group, width = comparison.group, comparison.width
    order, parts = order_of(group), range(group.count)
    stops = [width - 1 - stop for stop in comparison.leaves]
    inverted = r >> width - 1 & 1
    above, below = ([number * bit for number in payload] for bit in (inverted, 1 - inverted))
    seeds = [seed - seed % 2 for seed in seeds]
    controls, v = [0, 1], [0] * group.count  # v: party 0's sum on the path to r, less party 1's
    key: tuple[list, list, list, list] = ([], [], [], [])

    def correction(mine: list[int], theirs: list[int], due: list[int]) -> list[int]:
        """What the party with control bit 1 adds, so that v and these numbers make the difference that is due."""
        sign = -1 if controls[1] else 1
        return [sign * (due[c] - v[c] - mine[c] + theirs[c]) % order for c in parts]

    for level in range(comparison.levels + 1):
        first, second = (Node(seed, group) for seed in seeds)
        if level in stops:
            key[2].append(correction(first.leaf, second.leaf, above))
        if level == comparison.levels:
            return key
        bit = r >> width - 2 - level & 1
        lost = 1 - bit
        seed = first.seeds[lost] ^ second.seeds[lost]
        value = correction(first.value(lost), second.value(lost), below if bit else above)
        flags = [first.bits[side] ^ second.bits[side] ^ (side == bit) for side in (0, 1)]
        sign = -1 if controls[1] else 1
        v = [(v[c] + first.value(bit)[c] - second.value(bit)[c] + sign * value[c]) % order for c in parts]
        nodes = list(zip((first, second), controls, strict=True))
        seeds = [node.seeds[bit] ^ control * seed for node, control in nodes]
        controls = [node.bits[bit] ^ control * flags[bit] for node, control in nodes]
        key[0].append(seed)
        key[1].append(value)
        key[3].append([flags[0] + 2 * flags[1]])
    raise AssertionError("the last level is a leaf's")


def compare(
    comparison: Comparison, seed: Tensor, common: list[Tensor], party: int, opened: Tensor, payload: Tensor
) -> Tensor:
    group, width, order = comparison.group, comparison.width, order_of(comparison.group)
    seeds, values, leaves, flags = common
    counts = [comparison.levels * group.count, len(comparison.leaves) * group.count, comparison.levels]
    shares = []
    for n, (root, m) in enumerate(zip(numbers(seed), numbers(opened), strict=True)):
        rows = [part[n].tolist() for part in (values, leaves, flags)]
        corrections = [_unpacked(*row) for row in zip(rows, (group.bits, group.bits, 2), counts, strict=True)]
        whole = numbers(payload[n])
        for threshold, stop in zip(comparison.thresholds, comparison.stops, strict=True):
            point = (m - threshold) % 2**width
            found = _descend(comparison, point, stop, root, int(party), numbers(seeds[n]), corrections)
            signed = [-number if party else number for number in found]
            if point >> width - 1:
                signed = [whole[c] - number for c, number in enumerate(signed)]
            shares += [number % order for number in signed]
    return wide(shares, group.bits, (opened.shape[0], len(comparison.thresholds), group.count))


def _descend(
    comparison: Comparison, point: int, stop: int, root: int, control: int, seeds: list[int], corrections: list
) -> list[int]:
    """A party's sum, before its sign, of what the nodes give on the way to a point's bits above ``stop``."""
    group, width = comparison.group, comparison.width
    values, leaves, flags = corrections
    seed, sums, depth = root - root % 2, [0] * group.count, width - 1 - stop

    def add(value: list[int], correction: list[int], place: int) -> None:
        for c, number in enumerate(value):
            sums[c] += number + control * correction[place * group.count + c]

    for level in range(depth):
        node, side = Node(seed, group), point >> width - 2 - level & 1
        add(node.value(side), values, level)
        seed, bit = node.seeds[side], node.bits[side]
        if control:
            seed, bit = seed ^ seeds[level], bit ^ flags[level] >> side & 1
        control = bit
    add(Node(seed, group).leaf, leaves, comparison.leaves.index(stop))
    return sums
