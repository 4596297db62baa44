"""Kernels: each of the list is, to the last bit, its readable twin; on random words, at the edges, in any layout."""

import inspect
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import EDGES, both, layouts, same, table_words, words

from crypten_llm.kernels import cpu, cuda, reference, ring
from crypten_llm.kernels.integers import as_words, signed

WIDTHS = [1, 7, 8, 13, 31, 32, 33, 63, 64]
TABLES = sorted(ring.TABLE_WORDS)
LIST = {name: member for name, member in vars(ring.Kernels).items() if name[0] != "_"}


def broken(name, wrong):
    """A device all of whose kernels are right but one."""
    return SimpleNamespace(**{**vars(cpu), name: wrong})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda words, bits: cpu.pack(words, bits) ^ torch.tensor([0, 0, 1], dtype=torch.uint8), "differs from its"),
        (lambda words, bits: cpu.pack(words, bits)[:2], "differs from its twin"),
        (lambda words, bits: cpu.pack(words, bits).long(), "differs from its twin"),
        (lambda words, bits: torch.from_numpy(np.empty(3, dtype=np.uint8)), "differs from its twin"),
        (lambda words, bits: cpu.pack(words.zero_(), bits), "pack changed its words"),
        (lambda words, bits: words.view(torch.uint8)[:3], "pack returns its words"),
    ],
)
def test_what_is_wrong_with_a_kernel_is_found(wrong, message):
    with pytest.raises(AssertionError, match=message):
        both("pack", words(3), 8, kernels=[broken("pack", wrong)])


def test_memory_that_was_not_written_is_found():
    """Even where it happens to hold the right words at first: zeros."""

    def careless(words, bits):
        out = np.empty(16, dtype=np.uint8)
        if (out != 0x5A).any() and (out != 0xFF).any():
            out[:] = 0
        return torch.from_numpy(out)

    with pytest.raises(AssertionError, match="pack differs from its twin"):
        both("pack", torch.zeros(16, dtype=torch.int64), 8, kernels=[broken("pack", careless)])


@pytest.mark.parametrize("kernels", [cpu, cuda, reference], ids=["cpu", "cuda", "reference"])
def test_a_device_has_every_function_of_the_list(kernels):
    assert len(LIST) > 15
    for name, listed in LIST.items():
        expected = list(inspect.signature(listed).parameters)[1:]
        assert list(inspect.signature(getattr(kernels, name)).parameters) == expected, name
    fill = [list(inspect.signature(stream.fill).parameters) for stream in (ring.Bytes, kernels.KeyStream)]
    assert fill[0] == fill[1]


def test_every_function_of_the_list_is_held_against_its_twin():
    """By name, in a file like this; but for products, whose tests take both, and streams, which have state."""
    text = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_kernels*.py"))
    assert [name for name in LIST if f'both("{name}",' not in text] == ["KeyStream", "matmul_nt", "matmul_nn"]


def test_devices():
    assert ring.on("cpu") is cpu
    assert ring.on("cuda:1") is cuda
    with pytest.raises(ValueError, match="there are no kernels for device 'meta'; use 'cpu' or 'cuda'"):
        ring.on("meta")


# Matrix products.

PRODUCTS = pytest.mark.parametrize("name", ["matmul_nt", "matmul_nn"])
SMALL = pytest.mark.parametrize("small", [False, True], ids=["int64", "int32"])


def right_side(small, *shape, seed=1):
    return words(*shape, seed=seed, bound=2**31).int() if small else words(*shape, seed=seed)


def multiplied(name, small, batch, rows, depth, columns):
    shape = (columns, depth) if name == "matmul_nt" else (depth, columns)
    return both(name, words(*batch, rows, depth), right_side(small, *batch, *shape))


@PRODUCTS
@SMALL
def test_matrix_products_of_every_small_shape(name, small):
    """On both sides of every unrolled loop, and of the number of rows from which the right side is turned."""
    assert cpu._WORTH_TURNING in range(2, 9)
    for rows in range(10):
        for columns in range(10):
            for depth in range(10):
                multiplied(name, small, (), rows, depth, columns)


@PRODUCTS
@SMALL
@pytest.mark.parametrize("batch", [(), (1,), (2,), (0,), (2, 3)])
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 37, 19), (5, 8, 1), (3, 130, 67), (9, 33, 6), (0, 4, 3)])
def test_matrix_products_wrap_as_torch_does(name, small, batch, rows, depth, columns):
    found = multiplied(name, small, batch, rows, depth, columns)
    x, shape = words(*batch, rows, depth), (columns, depth) if name == "matmul_nt" else (depth, columns)
    w = right_side(small, *batch, *shape).long()
    assert torch.equal(found, x @ (w.transpose(-2, -1) if name == "matmul_nt" else w))


@PRODUCTS
@SMALL
@pytest.mark.parametrize("rows", [2, 8])
def test_matrix_products_of_any_layout(name, small, rows):
    for batch in ((), (3,)):
        shape = (*batch, 5, 6) if name == "matmul_nt" else (*batch, 6, 5)
        for x in layouts(words, *batch, rows, 6):
            for w in layouts(lambda *sizes: right_side(small, *sizes), *shape):
                both(name, x, w)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), max_size=2), *3 * [st.integers(0, 24)], st.booleans(), st.booleans())
def test_matrix_products_of_any_shape(batch, rows, depth, columns, small, transposed):
    multiplied("matmul_nt" if transposed else "matmul_nn", small, tuple(batch), rows, depth, columns)


@pytest.mark.parametrize("kernels", [cpu, cuda, reference], ids=["cpu", "cuda", "reference"])
def test_matrix_products_refuse_batches_that_differ(kernels):
    with pytest.raises(AssertionError, match="batches"):
        kernels.matmul_nn(words(2, 3, 4), words(3, 4, 5))


# What travels.


@pytest.mark.parametrize("bits", range(1, 65))
def test_words_of_every_width(bits):
    """Packed, unpacked, hidden and shown; counts around the words and bytes that they fill."""
    for count in (0, 1, 2, 7, 8, 9, 63, 64, 65):
        x, mask = words(count, seed=bits), words(count, seed=bits + 64)
        packed = both("pack", x, bits)
        assert packed.numel() == ring.packed_size(count, bits) == math.ceil(count * bits / 8)
        assert same(both("unpack", packed, bits, (count,)), ring.low_bits(x, bits))
        for offset in (0, 1 << max(0, bits - 2)):
            value, sent = both("hide", x, mask, offset, bits)
            assert same(value, ring.low_bits(x + mask + offset, bits)) and same(sent, both("pack", value, bits))
        theirs, packed = both("hide", mask, x, 0, bits)
        assert same(both("show", value, packed, bits, (count,)), ring.low_bits(value + theirs, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_what_travels_in_any_layout(bits):
    for x in layouts(words, 3, 4, 5):
        packed = both("pack", x, bits)
        assert same(both("unpack", packed, bits, (3, 4, 5)), ring.low_bits(x, bits))
        for mask in layouts(lambda *shape: words(*shape, seed=1), 3, 4, 5):
            value, sent = both("hide", x, mask, 1, bits)
        both("show", value, sent, bits, (3, 4, 5))
        both("show", value, sent, bits, (60, 1))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("start", [0, 1, 4])
def test_words_out_of_the_middle_of_a_message(bits, start):
    """Memory that is not aligned, and bits in the last byte that belong to nobody."""
    message = table_words(8, 200)
    for count in (1, 5, 13):
        both("unpack", message[start : start + ring.packed_size(count, bits)], bits, (count,))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 64), st.lists(st.integers(0, 7), max_size=3).map(tuple), st.integers(0, 1000))
def test_what_travels_of_any_shape(bits, shape, seed):
    x, mask = words(*shape, seed=seed), words(*shape, seed=seed + 1)
    value, packed = both("hide", x, mask, seed, bits)
    assert both("show", value, packed, bits, shape).shape == shape
    assert both("unpack", packed, bits, shape).shape == shape


@pytest.mark.parametrize("bits", [2, 3, 13, 34, 62, 63])
def test_unwraps(bits):
    for opened in layouts(words, 3, 4, 5):
        low = ring.low_bits(opened, bits)
        shown, wrap = both("unwrap", low, bits)
        assert torch.equal(shown + (1 << bits - 2), low)
        assert torch.equal(wrap != 0, ring.top_bit(low, bits) == 0)


@pytest.mark.parametrize("bits", range(1, 65))
def test_short_arithmetic(bits):
    x = torch.cat([torch.tensor(EDGES), words(20, seed=bits)])
    unsigned = [int(v) % 2**64 for v in x]
    low = ring.low_bits(x, bits)
    assert [int(v) % 2**64 for v in low] == [v % 2**bits for v in unsigned]
    assert [int(v) for v in ring.top_bit(low, bits)] == [v >> (bits - 1) & 1 for v in unsigned]
    assert [int(v) % 2**64 for v in ring.shift_right(x, bits - 1)] == [v >> (bits - 1) for v in unsigned]


# Trigonometric sums.

EIGHTHS = [(k << 61) + step for k in range(8) for step in (-1, 0, 1)]


def angles(shift, *shape):
    """Random, with every eighth of a turn and its neighbours in front."""
    x = words(*shape, seed=shift)
    near = torch.tensor([signed(turn >> shift) for turn in EIGHTHS])[: x.numel()]
    x.view(-1)[: len(near)] = near
    return x


def coefficients(modes):
    generator = torch.Generator().manual_seed(modes)
    return [torch.randn(modes, dtype=torch.float64, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("shift", [0, 5, 29, 63])
@pytest.mark.parametrize("modes", [0, 1, 2, 20])
@pytest.mark.parametrize("scale", [1.0, 2.0**22, 2.0**31])
def test_trigonometric_sums(shift, modes, scale):
    cosine, sine = coefficients(modes)
    for count in (0, 1, 40):
        angle = angles(shift, count)
        dealt = both("waves", angle, shift, scale, modes)
        assert dealt.shape == (2 * modes, count)
        for constant in (0, -5, 3 << 62, -(1 << 70)):
            both("combine", angle, shift, scale, cosine, sine, words(2 * modes, count), constant)
        assert both("coefficients", angle, shift, scale, cosine, sine).shape == (2 * modes, count)


def test_trigonometric_sums_of_any_layout():
    cosine, sine = coefficients(3)
    for angle in layouts(lambda *shape: angles(4, *shape), 5, 8):
        dealt = both("waves", angle, 4, 2.0**22, 3)
        both("combine", angle, 4, 2.0**22, cosine, sine, dealt, 7)
    for shares in layouts(words, 6, 8):
        for part in layouts(lambda *shape: coefficients(math.prod(shape))[0], 3):
            both("combine", angles(4, 8), 4, 2.0**22, part, sine, shares, 7)


# Tables.


@pytest.mark.parametrize("width", TABLES)
def test_tables_turned_by_a_mask(width):
    for bits in (0, 1, 3, 8):
        for count in (0, 1, 9):
            table, places = words(1 << bits, seed=bits), words(count, seed=bits + 1)
            mine = table_words(width, count, 1 << bits)
            theirs = both("turn_table", table, places, mine)
            assert torch.equal((mine + theirs)[:1, 0], table.to(mine.dtype)[-places[:1] % (1 << bits)])
            for steps in (words(0), torch.zeros(1, dtype=torch.int64), words(7, seed=3)):
                for given_words in (mine, theirs):
                    assert both("read_table", given_words, places, steps).shape == (count, len(steps))


@pytest.mark.parametrize("width", TABLES)
def test_tables_of_any_layout(width):
    for mine in layouts(lambda *shape: table_words(width, *shape), 6, 8)[:3]:
        for places in layouts(words, 6):
            for table in layouts(words, 8):
                both("turn_table", table, places, mine)
                both("read_table", mine, places, table)
    both("read_table", table_words(width, 1, 8).expand(6, 8), words(6), words(3))


# Comparisons by digits.


@pytest.mark.parametrize("digit_bits", [*range(1, 9), 16])
def test_signs_of_every_digit_width(digit_bits):
    """Every value of every digit against every mask's; the fields' sum is the sign of the first digit that differs."""
    low = min(63, ring.DIGITS * digit_bits)
    for count in (0, 1, 1 if digit_bits == 16 else 9):
        masks = ring.low_bits(words(count, seed=digit_bits), low)
        mine = table_words(16, count, 1 << digit_bits)
        theirs = both("turn_signs", masks, digit_bits, mine)
        near = masks[:, None] + torch.tensor([-1, 0, 1, 1 << digit_bits])
        points = ring.low_bits(torch.cat([near, words(count, 5)], 1), low)
        total = sum(both("read_signs", share, points, digit_bits) for share in (mine, theirs))
        found = as_words([signed(int(v), ring.SIGNS) for v in total.flatten()], total.shape)
        assert torch.equal(found.sign(), (points - masks[:, None]).sign())
    both("read_signs", table_words(16, 2, 1 << digit_bits), words(2, 0), digit_bits)


def test_signs_of_any_layout():
    for mine in layouts(lambda *shape: table_words(16, *shape), 6, 8)[:3]:
        for masks in layouts(words, 6):
            both("turn_signs", masks, 3, mine)
        for points in layouts(words, 6, 4):
            both("read_signs", mine, points, 3)


@pytest.mark.parametrize("width", TABLES)
@pytest.mark.parametrize("bits", range(1, ring.SIGNS + 1))
def test_bits_of_every_width(width, bits):
    for count, many in ((0, 3), (1, 1), (7, 3), (4, 0)):
        masks, tops = ring.low_bits(words(count, many, seed=bits), bits), words(count, seed=bits) & 1
        mine = table_words(width, count, many, 1 << bits)
        theirs = both("turn_bits", masks, tops, mine)
        opened = ring.low_bits(words(count, many, seed=width), bits)
        for flips in (torch.zeros_like(opened), torch.ones_like(opened), words(count, many, seed=9) & 1):
            shares = [both("read_bits", share, opened, flips, one) for share, one in ((mine, 1), (theirs, 0))]
            negative = ring.top_bit(opened - masks, bits)
            assert torch.equal(ring.low_bits(sum(shares), width), negative ^ tops[:, None] ^ flips)


def test_bits_of_any_layout():
    for mine in layouts(lambda *shape: table_words(32, *shape), 6, 4, 8)[:3]:
        for masks in layouts(lambda *shape: words(*shape) & 7, 6, 4):
            for tops in layouts(lambda *shape: words(*shape) & 1, 6):
                both("turn_bits", masks, tops, mine)
            for flips in layouts(lambda *shape: words(*shape) & 1, 6, 4):
                both("read_bits", mine, masks, flips, 1)
