"""Exponents and flags of an opened value, with both parties' keys, against the plain ones."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import CLIENT, DEALER, OWNER, run

from crypten_llm.kernels.integers import wide
from crypten_llm.kernels.ring import Comparison, Group, key_sizes, packed_size
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.ladder import FINE, below, exponent


def opened(runtime, values: list[int], masks: list[int], width: int):
    """What a role holds of values opened behind these masks: M, or ``None``; and r, of which a party has the shape."""
    if runtime.role == DEALER:
        return None, wide((mask % 2**width for mask in masks), width, (len(masks),))
    raw = wide(((z + mask) % 2**width for z, mask in zip(values, masks, strict=True)), width, (len(masks),))
    return raw, torch.zeros_like(raw)


def exponents(values: list[int], masks: list[int], width: int, base: int, top: int, q: int):
    """(k modulo q, [negative, outside]) of each value; what each role sent."""

    def job(runtime):
        return exponent(runtime, *opened(runtime, values, masks, width), width, base, top, q)

    outcome = run(job)
    (mine, my_flags), (theirs, their_flags) = outcome.results[OWNER], outcome.results[CLIENT]
    assert all(((part >= 0) & (part < q)).all() for part in (mine, theirs)), "shares are reduced"
    assert all(((part == 0) | (part == 1)).all() for part in (my_flags, their_flags)), "flags' shares are bits"
    assert [tuple(part.shape) for part in outcome.results[DEALER]] == [(len(values),), (len(values), 2)]
    return ((mine + theirs) % q).tolist(), (my_flags ^ their_flags).tolist(), outcome


def edges(z: int, width: int, draw: random.Random) -> list[int]:
    """Masks at the ends of the ring, and where z wraps."""
    full = 2**width
    return [0, full - 1, full // 2, full // 2 - 1, -z, -z - 1, full // 2 - z, draw.getrandbits(width)]


def exponents_of(z: int, width: int, base: int) -> set[int]:
    """The exponents that may be found for z: its own, and the next where z is just below its power."""
    largest = base + 2 * len(range(base + 2, width - 1, 2))
    own = min(largest, max(base, (z.bit_length() - 1 - base) // 2 * 2 + base))
    power = 1 << own + 2
    return {own, own + 2} if own < largest and z >= power - (power >> FINE) else {own}


def check(values: list[int], masks: list[int], width: int, base: int, top: int, q: int) -> None:
    """Exponents are right modulo q, and so are flags, but as close to an end as is said."""
    found, flags, _ = exponents(values, masks, width, base, top, q)
    for z, mask, k, (negative, outside) in zip(values, masks, found, flags, strict=True):
        where = f"{z:x} in 2^{width} behind {mask % 2**width:x}"
        z %= 2**width
        signed = z - 2**width if z >> width - 1 else z
        if signed >= 0:
            assert k in {due % q for due in exponents_of(z, width, base)}, where
        near = 2 ** max(0, base + 2 - FINE)
        if -near <= signed < 0 or signed >= 2 ** (width - 1) - near:
            assert negative or outside, where
        else:
            assert negative == (signed < 0), where
        low, high = 2**base, 2**top
        if signed >= 0 and not (low - (low >> FINE - 2) <= z < low or high - (high >> FINE) <= z < high):
            assert outside == (not low <= z < high), where


RINGS = [  # width, base, top, q
    (168, 8, 146, 256),
    (120, 8, 98, 208),
    (168, 8, 145, 105),
    (64, 9, 40, 256),
    (65, 4, 60, 512),
    (424, 8, 402, 512),
    (20, 4, 16, 7),
    (12, 2, 9, 2),
]


@pytest.mark.parametrize(("width", "base", "top", "q"), RINGS)
def test_both_sides_of_every_power_behind_every_edge_of_a_mask(width, base, top, q):
    draw = random.Random(width)
    values = {0, 1} | {(1 << step) + apart for step in (base, base + 2, top, width - 2) for apart in (-1, 0, 1)}
    for step in range(base % 2, width - 1, 1 if width < 100 else 7):
        power = 1 << step
        values |= {power + apart for apart in (-1, 0, 1)}
        if step % 3 == 0:
            values |= {power - (power >> FINE) - 1, power - (power >> FINE - 2) - 1, power + (power >> 1)}
    pairs = [(z, mask) for z in sorted(values) for mask in edges(z, width, draw)]
    check(*map(list, zip(*pairs, strict=True)), width, base, top, q)


def told(values: list[int], width: int = 168, base: int = 8, top: int = 146) -> set[tuple[int, int]]:
    """The flags (negative, outside) that are found for values behind masks at the edges and random ones."""
    draw = random.Random(len(values))
    pairs = [(z, mask) for z in values for mask in edges(z, width, draw)]
    _, flags, _ = exponents(*map(list, zip(*pairs, strict=True)), width, base, top, 256)
    return set(map(tuple, flags))


def test_flags_of_valid_small_large_and_negative_values():
    draw = random.Random(1)
    valid = [1 << 8, (1 << 8) + 1, *(draw.getrandbits(j) | 1 << j for j in range(8, 146)), (1 << 146) - (1 << 140) - 1]
    small = [*range(0, 240, 7), 239]
    large = [1 << 146, *(draw.getrandbits(j) | 1 << j for j in range(146, 167)), (1 << 167) - 17]
    assert told(valid) == {(0, 0)}
    assert told(small) == {(0, 1)}
    assert told(large) == {(0, 1)}
    negative = told([-(1 << j) - draw.getrandbits(j) for j in range(5, 167)] + [-(1 << 167), -(1 << 167) + 1])
    assert negative and all(first for first, _ in negative)
    beside = told([(1 << j) + z for j in range(147, 167) for z in (1 << 8, 1 << 60, draw.getrandbits(140))])
    assert beside == {(0, 1)}
    assert all(any(pair) for pair in told([-1, -2, -15, -16, -17, (1 << 167) - 1])), "one flag or the other"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(8, 200), st.integers(2, 1000), st.integers(1, 40), st.integers(0, 10**6), st.data())
def test_any_value_of_any_ring(width, q, count, seed, data):
    base = data.draw(st.integers(0, width - 6))
    top = data.draw(st.integers(base + 1, width - 2))
    draw = random.Random(seed)
    values = [draw.getrandbits(draw.randrange(1, width + 1)) for _ in range(count)]
    check(values, [draw.getrandbits(width) for _ in range(count)], width, base, top, q)


def test_no_values():
    found, flags, _ = exponents([], [], 168, 8, 146, 256)
    assert (found, flags) == ([], [])


# Costs, and what is sent.


@pytest.mark.parametrize(("q", "bits"), [(256, 8), (208, 8), (105, 8), (512, 9)])
def test_an_exponent_costs_what_its_docstring_says(q, bits):
    """A key to each party, and nothing else: no message between them, nothing for the flags but a leaf or two."""
    width, base, top, rows = 168, 8, 146, 5
    *_, outcome = exponents([1 << 60] * rows, list(range(rows)), width, base, top, q)
    levels, leaves = width - base - 3 + FINE, len(range(base + 2, width - 1, 2))
    row = 16 * levels + packed_size(levels, bits) + packed_size(leaves, bits) + packed_size(levels, 2)
    assert outcome.cost() == (0, 0, 0, rows * row, rows * row)
    outcome.check_meter()
    assert levels == 163 and row / levels < {8: 17.8, 9: 18}[bits]


def test_costs_are_counted_from_shapes():
    class Material:
        def __init__(self):
            self.sent = [0, 0]

        def begin(self, label):
            pass

        def add(self, party, count):
            self.sent[party] += count

        def flush(self, party):
            pass

    material = Material()
    runtime = Counting(None, material)
    mask = shape_only((7, 3))
    made = exponent(runtime, None, mask, 168, 8, 146, 256)
    assert [tuple(part.shape) for part in made] == [(7,), (7, 2)]
    *_, outcome = exponents([1] * 7, [1] * 7, 168, 8, 146, 256)
    assert material.sent == list(outcome.cost()[3:])[::-1] or material.sent == list(outcome.cost()[3:])


def test_keys_do_not_depend_on_what_was_opened():
    one, other = (exponents([z] * 9, list(range(9)), 168, 8, 146, 256)[2] for z in (0, (1 << 167) - 1))
    assert [frame.payload for frame in one.frames[DEALER]] == [frame.payload for frame in other.frames[DEALER]]


# Payloads of more than a bit.


@pytest.mark.parametrize("group", [Group(2, 88), Group(2, 64), Group(1, 128), Group.residues(208)], ids=str)
@pytest.mark.parametrize("width", [30, 88, 140])
def test_a_payload_where_a_value_is_below(group, width):
    """Limbs of any group: shares of the payload, or of zero, for every threshold."""
    order = group.modulus or 2**group.bits
    draw = random.Random(width)
    steps = range(4, width - 1, 9)
    comparison = Comparison(width, tuple(1 << step for step in steps), (0,) * len(steps), group)
    values = [draw.getrandbits(draw.randrange(1, width)) for _ in range(11)]
    masks = [draw.getrandbits(width) for _ in values]
    payload = [[draw.randrange(order) for _ in range(group.count)] for _ in values]
    mine = [[draw.randrange(order) for _ in range(group.count)] for _ in values]

    def limbs(rows):
        return wide((value % order for row in rows for value in row), group.bits, (len(rows), group.count))

    def job(runtime):
        raw, mask = opened(runtime, values, masks, width)
        theirs = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(payload, mine, strict=True)]
        return below(
            runtime, comparison, raw, mask, lambda: limbs(payload), lambda: limbs([mine, theirs][runtime.role])
        )

    outcome = run(job)
    assert outcome.results[DEALER] is None
    sums = zip(*(outcome.results[role].flatten(0, 2).tolist() for role in (OWNER, CLIENT)), strict=True)
    found = [
        sum(limb % 2**64 << 64 * place for share in pair for place, limb in enumerate(share)) % order for pair in sums
    ]
    due = [
        row[c] * (z < 1 << step)
        for z, row in zip(values, payload, strict=True)
        for step in steps
        for c in range(group.count)
    ]
    assert found == due
    size = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in key_sizes(comparison, len(values)))
    assert outcome.cost() == (0, 0, 0, size, size)
