"""Kernels for numbers in limbs: each is its readable twin to the last bit, at the edges, in any layout.

What is modulo 2^q - 1 is in ``test_kernels_ones``.
"""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import both, layouts, same, table_words, wide_layouts, wide_pairs, wide_words, words

from crypten_llm.kernels import cpu, ring
from crypten_llm.kernels.integers import numbers, wide

WIDTHS = [65, 66, 88, 103, 127, 128, 129, 139, 191, 192, 193, 256, 300, 512]
OF_TWO = ["add_wide", "subtract_wide", "multiply_wide", "add_ones", "subtract_ones", "multiply_ones"]
COUNTS = (0, 1, 2, 7, 33)


# What travels.


@pytest.mark.parametrize("bits", [*range(65, 130), *WIDTHS[7:]])
def test_limbs_of_every_width_travel(bits):
    for count in COUNTS:
        x, mask = wide_words(bits, count, seed=1), wide_words(bits, count, seed=2)
        packed = both("pack", x, bits)
        assert packed.numel() == ring.packed_size(count, bits)
        assert same(both("unpack", packed, bits, (count,)), x)
        for ones, offset in itertools.product((False, True), (0, 2 ** (bits - 2), 2**bits - 1, -1)):
            value, sent = both("hide_wide", x, mask, offset, bits, ones)
            theirs, arrived = both("hide_wide", mask, x, 0, bits, ones)
            shown = both("show_wide", value, arrived, bits, ones, (count,))
            assert same(shown, both("show_wide", theirs, sent, bits, ones, (count,))), "both parties see the same"
            modulus = 2**bits - ones
            for a, b, found in zip(numbers(x), numbers(mask), numbers(shown), strict=True):
                assert (found - 2 * (a + b) - offset) % modulus == 0


@pytest.mark.parametrize("bits", [65, 128, 208, 256])
@pytest.mark.parametrize("ones", [False, True])
def test_limbs_travel_in_any_layout(bits, ones):
    for x in wide_layouts(bits, 3, 5):
        packed = both("pack", x, bits)
        assert same(both("unpack", packed, bits, (3, 5)), x.contiguous())
        for mask in wide_layouts(bits, 3, 5, seed=1):
            value, sent = both("hide_wide", x, mask, 1, bits, ones)
        both("show_wide", value, sent, bits, ones, (3, 5))
        both("show_wide", value, sent, bits, ones, (15, 1))
    for start in (0, 1, 8):
        message = table_words(8, 400)[start : start + ring.packed_size(5, bits)]
        both("unpack", message, bits, (5, 1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_edge_hides_every_edge(bits):
    for ones in (False, True):
        for offset in (0, 2**bits - 2, 2**bits - 1):
            value, sent = both("hide_wide", *wide_pairs(bits), offset, bits, ones)
            both("show_wide", value, sent, bits, ones, (value.shape[0],))


def test_what_lies_above_a_number_does_not_travel():
    x = torch.full((3, 2), -1)
    assert same(cpu.pack(x, 65), both("pack", ring.low_bits(x, 64) & torch.tensor([-1, 1]), 65))


# Modulo 2^bits.


@pytest.mark.parametrize("bits", WIDTHS)
def test_arithmetic_at_every_pair_of_edges(bits):
    a, b = wide_pairs(bits)
    both("add_wide", a, b, bits)
    both("subtract_wide", a, b, bits)
    both("multiply_wide", a, b, bits)


@pytest.mark.parametrize("bits", [65, 88, 128, 139, 256])
def test_operands_of_other_widths(bits):
    """Narrower ones are zero-extended, wider ones cut."""
    for left, right in itertools.product((40, 64, 65, 128, 192, 300, bits), repeat=2):
        for name in ("add_wide", "subtract_wide", "multiply_wide"):
            found = both(name, wide_words(left, 12, seed=1), wide_words(right, 12, seed=2), bits)
            assert found.shape == (12, ring.limbs(bits))
        reduced = both("reduce_wide", wide_words(left, 12), bits)
        assert numbers(reduced) == [x % 2**bits for x in numbers(wide_words(left, 12))]


SHAPES = [
    ((), ()),
    ((1,), ()),
    ((), (4,)),
    ((0,), (1,)),
    ((3, 1), (1, 5)),
    ((3, 5), (5,)),
    ((3, 1), (3, 5)),
    ((2, 3, 1), (2, 1, 5)),
    ((2, 3, 5), (3, 1)),
    ((2, 1, 1), (2, 3, 5)),
    ((1, 1, 1), (2, 3, 5)),
    ((0, 3, 1), (3, 5)),
    ((3, 1), (3, 0)),
]


@pytest.mark.parametrize(("first", "second"), SHAPES)
@pytest.mark.parametrize("name", OF_TWO)
def test_leading_dimensions_broadcast(name, first, second):
    for bits in (103, 128):
        for one, other in ((first, second), (second, first)):
            found = both(name, wide_words(bits, *one, seed=1), wide_words(bits, *other, seed=2), bits)
            assert found.shape == (*ring.broadcast(first, second), 2)


def test_shapes_that_do_not_broadcast():
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(3,\) do not broadcast"):
        cpu.add_wide(wide_words(65, 2), wide_words(65, 3), 65)


@pytest.mark.parametrize("name", ["add_wide", "multiply_wide", "subtract_ones", "multiply_ones"])
def test_arithmetic_of_any_layout(name):
    for a in wide_layouts(103, 3, 5):
        for b in [*wide_layouts(103, 3, 5, seed=1), *wide_layouts(103, 5, seed=2)]:
            both(name, a, b, 103)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.integers(65, 300),
    st.lists(st.integers(0, 4), max_size=3),
    st.lists(st.booleans(), min_size=6, max_size=6),
    st.integers(0, 999),
)
def test_arithmetic_of_any_shape(bits, shape, single, seed):
    first = [1 if alone else size for size, alone in zip(shape, single, strict=False)]
    second = [1 if alone else size for size, alone in zip(shape, single[3:], strict=False)]
    a, b = wide_words(bits, *first, seed=seed), wide_words(bits, *second[seed % 2 :], seed=seed + 1)
    for name in OF_TWO:
        both(name, a, b, bits)
    for x in (a, b):
        both("reduce_wide", x, 65 + seed % 256)
        if x.dim() > 1:
            both("sum_wide", x, bits)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("signed", [False, True])
def test_words_are_widened(bits, signed):
    for x in [*layouts(words, 3, 4), words(0), words(2, 0, 3), words(1)[0]]:
        found = both("widen", x, bits, signed)
        expected = x.flatten().tolist() if signed else [value % 2**64 for value in x.flatten().tolist()]
        assert numbers(found) == [value % 2**bits for value in expected]


@pytest.mark.parametrize("bits", WIDTHS)
def test_shifts(bits):
    x = wide_words(bits, 3, 5)
    for count in {0, 1, 7, 31, 63, 64, 65, bits - 64, bits - 1, bits, bits + 70}:
        power = wide([2**count % 2**bits], bits, ())
        assert same(both("shift_wide", x, count, bits), both("multiply_wide", x, power, bits))
        both("shift_wide", x, -count, bits)
    for layout in wide_layouts(bits, 3, 5):
        both("shift_wide", layout, 40, bits)
    both("shift_wide", wide_words(bits, 0), 3, bits)
    both("shift_wide", wide_words(64, 5), 70, bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_drops(bits):
    """By every number of limbs and what lies beside, to limbs and to words."""
    x = torch.cat([wide_words(bits, 13), wide((2**bits - 2**count for count in range(bits)), bits, (bits,))])
    for count in {0, 1, 39, 40, 63, 64, 65, bits // 2, bits - 65, bits - 64, bits - 63, bits - 40, bits - 1}:
        if not 0 <= count < bits:
            continue
        for up in (False, True):
            found = both("drop_wide", x, bits, count, up)
            assert found.shape == ((x.shape[0],) if bits - count <= 64 else (x.shape[0], ring.limbs(bits - count)))
    for layout in wide_layouts(bits, 3, 5):
        both("drop_wide", layout, bits, 40, True)
    both("drop_wide", wide_words(bits, 0, 3), bits, 41, True)


def test_dropped_shares_are_a_dropped_number():
    """Off by less than a unit, by nothing where no bit is lost, and by nothing on average."""
    bits, count = 103, 40
    modulus, generator = 2 ** (bits - count), random.Random(1)
    values = [generator.getrandbits(bits - 1) for _ in range(400)] + [value << count for value in range(20)]
    shares = [generator.getrandbits(bits) for _ in values]
    first = cpu.drop_wide(wide(shares, bits, (len(values),)), bits, count, True)
    second = wide(((v - s) % 2**bits for v, s in zip(values, shares, strict=True)), bits, (len(values),))
    total = (first + cpu.drop_wide(second, bits, count, False)).tolist()
    errors = [
        (((found << count) - value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)) / 2**count
        for found, value in zip((found % modulus for found in total), values, strict=True)
    ]
    assert max(map(abs, errors)) < 1 and errors[-20:] == [0] * 20
    assert abs(sum(errors)) / len(errors) < 0.1  # a deviation of 0.4 each


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1,), (0,), (9,), (3, 7), (1, 576), (0, 4), (4, 0), (2, 3, 4)])
def test_sums(bits, shape):
    assert both("sum_wide", wide_words(bits, *shape), bits).shape == (*shape[:-1], 1, ring.limbs(bits))


def test_sums_of_any_layout_and_of_numbers_that_all_carry():
    for x in wide_layouts(103, 3, 5):
        both("sum_wide", x, 103)
    for bits in WIDTHS:
        full = wide([2**bits - 1], bits, (1,)).expand(1000, -1)
        assert numbers(both("sum_wide", full, bits)) == [2**bits - 1000]
