"""Comparison keys: the generator against OpenSSL, each kernel against its twin, shares against the plain comparison,
and what the correction words tell of a mask.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import both, layouts, wide_edges, wide_layouts, words

from crypten_llm.kernels import chacha, cpu, payloads, reference_keys, ring
from crypten_llm.kernels.integers import numbers, wide
from crypten_llm.kernels.ring import Comparison, Group

SCORES = Group.residues(256)
PAIR = Group(2, 88)
GROUPS = [SCORES, Group.residues(2), Group.residues(209), Group.residues(2**16 - 1), PAIR]
GROUPS += [Group(2, 64), Group(1, 1), Group(4, 63), Group(1, 65), Group(2, 128)]


# The generator.


def chacha_block(constants: list[int], key: list[int], counter: int) -> list[int]:
    """The ChaCha20 block with nonce 0, as RFC 8439 (section 2.3) writes it."""
    start = [*constants, *key, counter, 0, 0, 0]
    x = start.copy()

    def quarter(a, b, c, d):
        for first, second, third, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[first] = (x[first] + x[second]) % 2**32
            x[third] ^= x[first]
            x[third] = (x[third] << turn | x[third] >> (32 - turn)) % 2**32

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(a + b) % 2**32 for a, b in zip(x, start, strict=True)]


def words_of(text: bytes) -> list[int]:
    return np.frombuffer(text, "<u4").tolist()


@pytest.mark.parametrize("lanes", [1, 7, 16, 17, chacha.LANES])
def test_the_block_function_is_chacha20(lanes):
    """The compiled loop against a plain one, the plain one against OpenSSL; only the constant differs."""
    generator = np.random.default_rng(lanes)
    for counter in (0, 1, 2**32 - 1):
        key = generator.bytes(32)
        nonce = counter.to_bytes(4, "little") + bytes(12)
        stream = Cipher(algorithms.ChaCha20(key, nonce), None).encryptor().update(bytes(64))
        assert chacha_block(words_of(b"expand 32-byte k"), words_of(key), counter) == words_of(stream)
        keys = generator.integers(0, 2**32, (4, chacha.LANES), dtype=np.uint32)
        blocks = np.empty((16, chacha.LANES), np.uint32)
        chacha.block(keys.reshape(-1), np.uint32(counter), blocks.reshape(-1), lanes)
        for i in range(lanes):
            expected = chacha_block(words_of(b"expand 16-byte k"), 2 * keys[:, i].tolist(), counter)
            assert blocks[:, i].tolist() == expected


def test_the_published_vector_for_a_zero_key_of_128_bits():
    """draft-strombergson-chacha-test-vectors, TC1, 20 rounds."""
    blocks = np.empty((16, chacha.LANES), np.uint32)
    chacha.block(np.zeros(4 * chacha.LANES, np.uint32), np.uint32(0), blocks.reshape(-1), 1)
    assert blocks[:, 0].tobytes().hex().startswith("89670952608364fd00b2f90936f031c8e756e15dba04b8493d00429259b20f46")


@pytest.mark.parametrize(("count", "blocks"), [(1, 1), (8, 1), (9, 2), (16, 2)])
def test_a_seeds_words_are_those_of_its_blocks_in_order(count, blocks):
    seeds = np.random.default_rng(0).integers(0, 2**64, (2, chacha.LANES), dtype=np.uint64)
    key, x = np.empty(4 * chacha.LANES, np.uint32), np.empty(16 * chacha.LANES * blocks, np.uint32)
    chacha.expand(seeds, key, x, count, 3)
    for i in range(3):
        seed = int(seeds[0, i]) + (int(seeds[1, i]) << 64)
        due = [word for counter in range(blocks) for word in reference_keys._block(seed, counter)]
        assert [int(chacha.word_of(x, word, i)) for word in range(8 * blocks)] == due


# Numbers of a group.

MODULI = [2, 3, 105, 208, 255, 256, 257, 511, 512, 2**15, 2**16 - 1]


def pair(value: int) -> tuple[np.uint64, np.uint64]:
    return np.uint64(value % 2**64), np.uint64(value >> 64)


def number(found: tuple) -> int:
    return int(found[0]) + (int(found[1]) << 64)


@pytest.mark.parametrize("q", MODULI)
def test_residues_without_a_division(q):
    field, draw = payloads.field_of(Group.residues(q)), random.Random(q)
    edges = [
        0,
        1,
        q - 1,
        q,
        q + 1,
        2 * q,
        2**32 - 1,
        2**32,
        2**64 - 1,
        2**64,
        300 * 2**64,
        2**128 - 1,
        (2**128 - 1) // q * q,
    ]
    for value in [*edges, *(draw.getrandbits(bits) for bits in range(1, 129) for _ in range(20))]:
        assert number(payloads.reduced(*pair(value), field)) == value % q
    inside = sorted({0, 1 % q, q // 2, q - 1, *(draw.randrange(q) for _ in range(20))})
    for a, b in itertools.product(inside, repeat=2):
        assert number(payloads.total(*pair(a), *pair(b), field)) == (a + b) % q
        assert number(payloads.difference(*pair(a), *pair(b), field)) == (a - b) % q
    for a in inside:
        assert [number(payloads.signed(*pair(a), np.uint64(minus), field)) for minus in (0, 1)] == [a, -a % q]


def test_numbers_of_two_words():
    field = payloads.field_of(PAIR)
    for a, b in itertools.product(wide_edges(128), repeat=2):
        assert number(payloads.total(*pair(a), *pair(b), field)) == (a + b) % 2**128
        assert number(payloads.difference(*pair(a), *pair(b), field)) == (a - b) % 2**128
        assert number(payloads.signed(*pair(a), np.uint64(1), field)) == -a % 2**128
        assert number(payloads.reduced(*pair(a), field)) == a


@pytest.mark.parametrize("bits", range(1, 129))
def test_packed_numbers_of_any_width(bits):
    draw = random.Random(bits)
    values = [2**bits - 1, 0, 1, *(draw.getrandbits(bits) for _ in range(8))]
    rows = np.zeros((2, ring.packed_size(len(values), bits)), np.uint8)
    for place, value in enumerate(values):
        payloads.put(rows, 1, place * bits, *pair(value | (1 << bits) % 2**128), bits)
    assert not rows[0].any()
    assert rows[1].tobytes() == sum(v << i * bits for i, v in enumerate(values)).to_bytes(rows.shape[1], "little")
    assert [number(payloads.get(rows, 1, place * bits, bits)) for place in range(len(values))] == values


# What a key gives.


def negative(comparison: Comparison, r: int, m: int, k: int) -> int:
    """What the parties find: the sign of M - r - threshold without what is below the stop."""
    top, stop = comparison.width - 1, comparison.stops[k]
    point = (m - comparison.thresholds[k]) % 2**comparison.width
    below = (point % 2**top >> stop) < (r % 2**top >> stop)
    return (point >> top) ^ (r >> top & 1) ^ below


def payload_of(group: Group, count: int, seed: int = 0) -> torch.Tensor:
    order, draw = reference_keys.order_of(group), random.Random(seed)
    edges = [order - 1, 1 % order, 0, order // 2]
    values = (edges + [draw.randrange(order) for _ in range(count * group.count)])[: count * group.count]
    return wide(values, group.bits, (count, group.count))


def halves(payload: torch.Tensor, group: Group) -> list[torch.Tensor]:
    """Shares of a payload."""
    order, draw = reference_keys.order_of(group), random.Random(1)
    mine = [draw.randrange(order) for _ in numbers(payload)]
    theirs = [(whole - part) % order for whole, part in zip(numbers(payload), mine, strict=True)]
    return [wide(part, group.bits, payload.shape[:2]) for part in (mine, theirs)]


def check(comparison: Comparison, r: list[int], m: list[int], kernel, seed: int = 0) -> None:
    """Keys for masks r, evaluated at M by ``kernel(name, ...)``, give the payload where they must."""
    group, count, many = comparison.group, len(r), len(comparison.thresholds)
    payload, order = payload_of(group, count, seed), reference_keys.order_of(group)
    seeds = [words(count, 2, seed=2 * seed + party) for party in (0, 1)]
    common = kernel("compare_keys", comparison, wide(r, comparison.width, (count,)), payload, *seeds)
    assert [(part.shape, part.dtype) for part in common] == ring.key_sizes(comparison, count)
    opened = wide(m, comparison.width, (count,))
    shares = [
        kernel("compare", comparison, seeds[party], common, party, opened, whole)
        for party, whole in enumerate(halves(payload, group))
    ]
    assert all(share.shape == (count, many, group.count, group.limbs) for share in shares)
    assert all(value < order for share in shares for value in numbers(share)), "shares are reduced"
    found = [(a + b) % order for a, b in zip(*map(numbers, shares), strict=True)]
    wholes = numbers(payload)
    for n, k, c in itertools.product(range(count), range(many), range(group.count)):
        due = wholes[n * group.count + c] * negative(comparison, r[n], m[n], k)
        assert found[(n * many + k) * group.count + c] == due, f"mask {r[n]:x}, M {m[n]:x}, threshold {k}"


def on_processors(name, *arguments):
    return getattr(cpu, name)(*arguments)


def powers(width: int, base: int, fine: int, group: Group) -> Comparison:
    """Every other power of two, told to 2^-fine of itself, and zero."""
    steps = range(base, width - 1, 2)
    stops = [max(0, step - fine) for step in steps]
    return Comparison(width, (0, *(1 << step for step in steps)), (min(stops), *stops), group)


@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 3, 11])
def test_keys_are_their_twins(width, group):
    """Every stop of a narrow ring; thresholds at its edges and one beyond, and negative."""
    thresholds = [0, 1, 2 ** (width - 1), 2**width - 1, 2**width + 3, -1]
    comparison = Comparison(width, *zip(*itertools.product(thresholds, {0, width // 2, width - 1}), strict=True), group)
    draw = random.Random(width)
    r = [0, 2**width - 1, 2 ** (width - 1), *(draw.getrandbits(width) for _ in range(2))]
    m = [draw.getrandbits(width), 0, 2**width - 1, *(draw.getrandbits(width) for _ in range(2))]
    check(comparison, r, m, both)


@pytest.mark.parametrize(
    ("width", "group"), [(63, Group(2, 64)), (64, SCORES), (65, PAIR), (128, Group.residues(208)), (168, SCORES)]
)
def test_keys_of_wide_values_are_their_twins(width, group):
    """Bits of every limb, at points of M itself and of those that leave it high and low."""
    draw = random.Random(width)
    steps = sorted({1, width - 2, width // 2, *(step for step in (62, 63, 64, 127, 128) if step < width)})
    comparison = Comparison(
        width, (0, *(1 << step for step in steps)), (0, *(max(0, step - 3) for step in steps)), group
    )
    r = [draw.getrandbits(width) for _ in range(2)]
    check(comparison, r, [draw.getrandbits(width), (r[1] + (1 << steps[1])) % 2**width], both)


@pytest.mark.parametrize("group", [SCORES, Group.residues(105), Group(2, 64)], ids=str)
@pytest.mark.parametrize("width", [1, 2, 4])
def test_every_value_and_mask_of_a_small_ring(width, group):
    """All of them, at every threshold and stop: and a sign is wrong only where it is said."""
    ring_of = range(2**width)
    comparison = Comparison(width, *zip(*itertools.product(ring_of, range(width)), strict=True), group)
    r, m = zip(*itertools.product(ring_of, ring_of), strict=True)
    check(comparison, list(r), list(m), on_processors)
    half = 2 ** (width - 1)
    for z, mask, k in itertools.product(ring_of, ring_of, range(len(comparison.thresholds))):
        less = (z - comparison.thresholds[k] + half) % 2**width - half
        near = 2 ** comparison.stops[k]
        if comparison.stops[k] == 0 or not (-near <= less < 0 or less >= half - near):
            assert negative(comparison, mask, (z + mask) % 2**width, k) == (less < 0)


@pytest.mark.parametrize(
    ("width", "base", "group"),
    [
        (168, 8, SCORES),
        (120, 8, Group.residues(208)),
        (88, 10, PAIR),
        (64, 6, Group(2, 64)),
        (65, 3, SCORES),
        (256, 8, SCORES),
        (424, 8, Group.residues(512)),
    ],
    ids=str,
)
def test_every_power_on_both_sides_with_every_edge_of_a_mask(width, base, group):
    comparison = powers(width, base, 6, group)
    near = {0, 2**width - 1, 2 ** (width - 1), 2 ** (width - 1) - 1}
    for step in range(base, width - 1, max(2, width // 20)):
        near |= {(1 << step) + apart for apart in (-1, 0, 1, -(1 << step >> 6), -(1 << step >> 6) - 1)}
    draw = random.Random(width)
    r, m = [], []
    for z in sorted(near):
        full = 2**width
        for mask in (0, full - 1, full // 2, full // 2 - 1, -z % full, (-z - 1) % full, draw.getrandbits(width)):
            r.append(mask)
            m.append((z + mask) % full)
    check(comparison, r, m, on_processors)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.sampled_from(GROUPS), st.integers(0, 5), st.integers(0, 5), st.integers(0, 10**6))
def test_any_comparison(width, group, count, many, seed):
    draw = random.Random(seed)
    thresholds = [draw.choice([draw.getrandbits(width), 1 << draw.randrange(width)]) for _ in range(many)]
    stops = [draw.randrange(width) for _ in range(many)]
    r = [draw.getrandbits(width) for _ in range(count)]
    near = [draw.choice([0, *thresholds]) + draw.randrange(-3, 4) for _ in range(count)]
    m = [(mask + draw.choice([z, draw.getrandbits(width)])) % 2**width for mask, z in zip(r, near, strict=True)]
    check(Comparison(width, tuple(thresholds), tuple(stops), group), r, m, on_processors, seed)


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("many", [0, 1, 3])
def test_keys_and_points_of_every_number(count, many):
    """Fewer and more than are made, and evaluated, side by side."""
    assert chacha.LANES == 64
    draw = random.Random(count)
    r, m = ([draw.getrandbits(9) for _ in range(count)] for _ in range(2))
    kernel = both if count < 2 else on_processors
    check(Comparison(9, (1, 4, 100)[:many], (0, 2, 5)[:many], SCORES), r, m, kernel)


def test_more_points_than_lanes_for_one_key():
    thresholds = tuple(range(0, 1024, 7))
    assert len(thresholds) > chacha.LANES
    check(Comparison(10, thresholds, tuple(k % 9 for k in range(len(thresholds))), SCORES), [777], [123], both)


def test_what_is_above_a_value_is_ignored():
    comparison = powers(70, 60, 6, SCORES)
    draw = random.Random(0)
    r, m = ([draw.getrandbits(70) for _ in range(5)] for _ in range(2))
    seeds, payload = [words(5, 2, seed=party) for party in (0, 1)], payload_of(SCORES, 5)

    def found(above: int) -> list[torch.Tensor]:
        mask, opened = (wide((value | above << 70 for value in values), 128, (5,)) for values in (r, m))
        common = both("compare_keys", comparison, mask, payload, *seeds)
        return [*common, both("compare", comparison, seeds[1], common, 1, opened, payload)]

    assert all(torch.equal(*pair) for pair in zip(found(0), found(2**58 - 1), strict=True))


def test_keys_of_any_layout():
    comparison = powers(66, 60, 3, SCORES)
    for mask in wide_layouts(66, 4):
        for pairs in layouts(words, 4, 2):
            common = both("compare_keys", comparison, mask, payload_of(SCORES, 4), pairs, words(4, 2, seed=1))
    apart = [torch.stack([part, part], -1)[..., 0] for part in common]
    for opened in wide_layouts(66, 4, seed=1):
        for seed in layouts(words, 4, 2):
            both("compare", comparison, seed, apart, 1, opened, payload_of(SCORES, 4).expand(4, 1, 1))


# What travels, and what it tells.


def test_a_level_takes_as_many_bytes_as_are_said():
    """At 256 residues 16 + 1 + 1/4 bytes a level and one a stop; of two numbers of 88 bits 16 + 22 + 1/4, and 22."""
    for group, each in ((SCORES, 1), (PAIR, 22)):
        comparison = powers(168, 10, 6, group)
        assert comparison.levels == 163 and len(comparison.leaves) == 79
        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in ring.key_sizes(comparison, 1)]
        assert sizes == [16 * 163, each * 163, each * 79, 41]


def test_a_payload_fits_two_blocks():
    for wrong in ((5, 1), (3, 65), (1, 129), (1, 0)):
        with pytest.raises(AssertionError, match="does not fit a generator's two blocks"):
            Group(*wrong)
    for wrong in (0, 1, 2**16):
        with pytest.raises(AssertionError, match="a payload's modulus is from 2"):
            Group.residues(wrong)


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_no_word_of_a_node_serves_twice(group):
    left, right, leaf, end = reference_keys.layout(group)
    size = group.count * group.limbs
    assert (left, right - left, leaf - right, end - leaf) == (4, size, size, size) and end <= 16


EVERY = Comparison(41, (0,) * 41, tuple(range(41)), SCORES)  # a stop at every level


def guesses(common: list[torch.Tensor], masks: list[int]) -> float:
    """How many of the masks' bits are read off by: a bit is 1 if value and leaf corrections are one payload apart."""
    _, values, leaves, _ = common
    apart = (values.int() - leaves[:, :40].int()) % 256
    true = torch.tensor([[mask >> place & 1 for place in range(39, -1, -1)] for mask in masks])
    return float((((apart == 1) | (apart == 255)).int() == true).double().mean())


def made(kernel, count: int) -> tuple[list[torch.Tensor], list[int]]:
    draw = random.Random(3)
    masks = [draw.getrandbits(41) for _ in range(count)]
    seeds = [words(count + 4, 2, seed=party)[4:] for party in (0, 1)]  # without the edges, which are no random seeds
    return kernel.compare_keys(EVERY, wide(masks, 41, (count,)), torch.ones((count, 1, 1)).long(), *seeds), masks


def test_corrections_do_not_tell_the_mask(monkeypatch):
    """And they would if a leaf took its word from the left child's value, as the same reading then shows."""
    assert abs(guesses(*made(cpu, 200)) - 0.5) < 0.03  # 8,000 bits
    assert abs(guesses(*made(reference_keys, 12)) - 0.5) < 0.1
    layout = reference_keys.layout
    monkeypatch.setattr(
        reference_keys, "layout", lambda group: (*layout(group)[:2], layout(group)[0], layout(group)[3])
    )
    assert guesses(*made(reference_keys, 12)) > 0.98
