"""Kernels beside their twins: cosines at frequencies of their own, bits at places, rows chosen by bits, a field."""

import functools
import math
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import both, layouts, table_words, words

from crypten_llm.kernels import cpu
from crypten_llm.kernels import places as loops
from crypten_llm.kernels.integers import signed

EIGHTHS = [(k << 61) + step for k in range(8) for step in (-1, 0, 1)]
SIZES = [8, 16, 32, 64, 128, 256, 1024, 4096]  # on both sides of a whole word


def numbers(modes, seed=0):
    return torch.randn(modes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def angles(shift, count):
    """Every eighth of a turn and its neighbours, and random ones."""
    near = torch.tensor([signed(turn >> shift) for turn in EIGHTHS])
    return torch.cat([near, words(count, seed=shift)])[:count]


# Cosines.


@pytest.mark.parametrize("shift", [0, 5, 36, 63])
@pytest.mark.parametrize("modes", [0, 1, 2, 7])
@pytest.mark.parametrize("scale", [1.0, 2.0**13, 2.0**31])
def test_cosines_at_any_frequencies(shift, modes, scale):
    """Negative and huge ones too: angles are whole turns modulo one."""
    for frequencies in (torch.arange(modes) * 977 + 1, words(modes, seed=3)):
        scales = scale * 2.0 ** -torch.arange(modes, dtype=torch.float64)
        for count in (0, 1, 40):
            angle = angles(shift, count)
            assert both("cosines", angle, shift, frequencies, scales).shape == (modes, 2, count)
            ups = torch.arange(modes) * 9 % 64
            for constant in (0, -5, 3 << 62, -(1 << 70)):
                factors = numbers(modes) * scale
                both("add_cosines", angle, shift, frequencies, factors, ups, words(modes, 2, count), constant)


def test_cosines_are_what_their_name_says():
    """Of the angle times the frequency, in whole turns of 2^20."""
    turned, frequencies = torch.arange(-300, 300) * 1777, torch.tensor([1, 17, 939])
    found = cpu.cosines(turned, 44, frequencies, torch.tensor([2.0**30, 2.0**20, 2.0**10], dtype=torch.float64))
    turns = (turned * frequencies[:, None] % 2**20).double() / 2.0**20 * 2 * math.pi
    due = torch.stack([turns.cos(), turns.sin()], 1) * torch.tensor([2.0**30, 2.0**20, 2.0**10])[:, None, None]
    assert (found - due).abs().max() <= 0.501


def test_cosines_of_any_layout():
    for angle in layouts(words, 5, 8):
        for frequencies in layouts(words, 3):
            for scales in layouts(lambda *shape: numbers(math.prod(shape)) * 2**20, 3):
                dealt = both("cosines", angle, 4, frequencies, scales)
                both("add_cosines", angle, 4, frequencies, scales, torch.tensor([0, 1, 9]), dealt, 7)
    for shares in layouts(words, 3, 2, 8):
        for ups in layouts(lambda *shape: words(*shape) & 31, 3):
            both("add_cosines", words(8), 36, torch.tensor([3, 5, 8]), numbers(3) * 9, ups, shares, -7)


# Bits at secret places.


def chosen(many, size, seed=0):
    """Sets: nothing, everything, one place, every half, and random ones."""
    made = torch.rand(many, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    place = torch.arange(size)
    known = [place < 0, place >= 0, place == 0, place == size - 1, place < size // 2, place % 2 == 1]
    return torch.cat([torch.stack(known), made])[:many]


@pytest.mark.parametrize("size", SIZES)
def test_one_place_is_flipped(size):
    for count in (0, 1, 9):
        mine, places = table_words(8, count, size // 8), words(count, seed=size)
        theirs = both("flip_places", places, mine)
        bits = ((mine ^ theirs)[..., None] >> torch.arange(8) & 1).reshape(count, size)
        assert torch.equal(bits.nonzero(), torch.stack([torch.arange(count), places % size], 1))


@pytest.mark.parametrize("size", SIZES)
def test_parities_of_both_parties_find_the_place(size):
    """Every turn; the sum of both parties' is whether the turn less the place is in the set."""
    turns = torch.arange(size) if size <= 256 else torch.arange(size)[:: size // 61]
    turns = torch.cat([turns, turns[:5] - size, words(9, seed=size)])
    places, sets = words(len(turns), seed=1), chosen(3 if size > 256 else 7, size)
    mine = table_words(8, len(turns), size // 8)
    theirs = both("flip_places", places, mine)
    found = both("parities", mine, turns, sets) ^ both("parities", theirs, turns, sets)
    assert torch.equal(found.bool(), sets[:, (turns - places) % size].T)
    for many, count in ((0, 3), (2, 0)):
        assert both("parities", mine[:count], turns[:count], sets[:many]).shape == (count, many)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(SIZES[:6]), st.integers(0, 9), st.integers(0, 5), st.integers(0, 1000))
def test_parities_of_any_shape(size, count, many, seed):
    rows, turns = table_words(8, count, size // 8, seed=seed), words(count, seed=seed)
    both("parities", rows, turns, chosen(9, size, seed)[9 - many :])


@pytest.mark.parametrize("size", [32, 64, 128])
def test_bits_at_places_of_any_layout(size):
    for rows in layouts(lambda *shape: table_words(8, *shape), 6, size // 8):
        for turns in layouts(words, 6):
            for sets in layouts(lambda *shape: words(*shape) & 1 == 1, 3, size):
                both("parities", rows, turns, sets)
    for rows in layouts(lambda *shape: table_words(8, *shape), 6, size // 8)[:3]:
        for places in layouts(words, 6):
            both("flip_places", places, rows)


# Rows chosen by bits.


def choices(count, rows, seed=0):
    """Random bits, more than there are rows; the first of no rows, the second of all."""
    made = words(count, -(-rows // 64), seed=seed)
    made[:1], made[1:2] = 0, -1
    return made


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("columns", [1, 7, 40])
def test_rows_chosen_by_bits(rows, columns):
    """On both sides of the number of choices from which sums are computed first, and of the rows of a sum."""
    table = table_words(32, rows, columns, seed=rows)
    for count in (0, 1, 2, loops._WORTH_SUMMING - 1, loops._WORTH_SUMMING, loops._WORTH_SUMMING + 5):
        found = both("xor_rows", table, choices(count, rows))
        assert found.shape == (count, columns)
        if rows and count > 1:
            assert not found[0].any()
            assert found[1].tolist() == functools.reduce(operator.xor, table).tolist()


@pytest.mark.parametrize("count", [1, 20])
def test_rows_wider_than_what_is_summed_at_once(count):
    both("xor_rows", table_words(32, 9, 2 * loops._COLUMNS + 3), choices(count, 9))


def test_rows_of_any_layout():
    for table in layouts(lambda *shape: table_words(32, *shape), 70, 6):
        for count in (5, 20):
            for chosen_rows in layouts(words, count, 2):
                both("xor_rows", table, chosen_rows)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 140), st.integers(0, 9), st.integers(0, 40), st.integers(0, 1000))
def test_chosen_rows_of_any_shape(rows, columns, count, seed):
    both("xor_rows", table_words(32, rows, columns, seed=seed), choices(count, rows, seed))


# The field of 2^64 elements.


def test_products_in_the_field():
    """Edges beside edges, other layouts, shapes that broadcast."""
    first, second = words(7, 1, seed=1), words(1, 9, seed=2)
    found = both("multiply_field", first, second)
    assert torch.equal(found, both("multiply_field", second, first))
    assert torch.equal(found[1], second[0]), "a product with 1"
    for left in layouts(words, 3, 5):
        both("multiply_field", left, words(5, seed=3))
    assert both("multiply_field", words(0), words(0)).shape == (0,)


def test_it_is_a_field():
    """Products distribute over xor, squares are a sum's, and whatever is not 0 has an inverse: its power 2^64 - 2."""
    a, b, c = (words(20, seed=seed) for seed in (4, 5, 6))
    times = cpu.multiply_field
    assert torch.equal(times(a, b ^ c), times(a, b) ^ times(a, c))
    assert torch.equal(times(times(a, b), c), times(a, times(b, c)))
    assert torch.equal(times(a ^ b, a ^ b), times(a, a) ^ times(b, b))
    power, inverse = a, torch.ones_like(a)
    for _ in range(63):
        power = times(power, power)
        inverse = times(inverse, power)
    assert torch.equal(times(a, inverse), (a != 0).long())
