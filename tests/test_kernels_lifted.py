"""Kernels for numbers that were opened in a narrower ring: each is its readable twin to the last bit, in any layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import EDGES, both, layouts, same, wide_edges, wide_layouts, wide_words, words

from crypten_llm.kernels import cpu, ring
from crypten_llm.kernels.integers import numbers, wide

RINGS = [65, 66, 81, 98, 127, 128, 129, 139, 192, 200, 256, 300]


def bits_of(*shape, seed=0):
    return words(*shape, seed=seed) & 1


def dealt(bits, *shape, seed=0):
    """Limbs of any words, as the owner's share is: up to 64 bits one limb, of which more than those are set."""
    return words(*shape, ring.limbs(bits), seed=seed)


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("size", [2, 22, 35, 62, 63, 64])
def test_masks(bits, size):
    """Those of every size, in every ring that is wider, with a limb for each word that was dealt or one in all."""
    if size >= bits:
        return
    mask, more = ring.low_bits(words(40, seed=bits), min(size, 63)), bits - size
    found = both("lift_mask", mask, dealt(more, 40), dealt(more, 40, seed=1), bits_of(40), size, bits)
    assert found.shape == (40, ring.limbs(bits))
    for carry in (0, 1):
        for bit in (0, 1):
            given = [torch.full((40, ring.limbs(more)), 0) for _ in range(2)]
            given[0][:, 0], given[1][:, 0] = carry, bit
            unwrapped = bits_of(40, seed=2)
            plain = both("lift_mask", mask, *given, unwrapped, size, bits)
            due = [
                (r - (carry + u * bit) * 2**size) % 2**bits
                for r, u in zip(mask.tolist(), unwrapped.tolist(), strict=True)
            ]
            assert numbers(plain) == due


@pytest.mark.parametrize("bits", RINGS)
def test_sums_of_words_times_numbers_at_every_edge(bits):
    edges = wide_edges(bits)
    x = torch.tensor([edge for edge in EDGES for _ in edges])
    y = wide([value for _ in EDGES for value in edges], bits, (len(x),))
    both("dot_wide", x[:, None], y[:, None], bits)
    both("dot_wide", x, y, bits)
    for less in (1, 2):
        both("dot_wide", x, words(len(x), less), bits)
    both("dot_wide", x, wide_words(bits + 64, len(x)), bits)


@pytest.mark.parametrize("bits", [65, 98, 130])
def test_sums_of_any_layout(bits):
    for x in layouts(words, 3, 5):
        for y in wide_layouts(bits, 3, 5):
            found = both("dot_wide", x, y, bits)
            terms = cpu.multiply_wide(cpu.widen(x, bits, True), y, bits)
            assert same(found, cpu.sum_wide(terms, bits)[..., 0, :])
    assert both("dot_wide", words(0, 5), words(0, 5, 2), bits).shape == (0, ring.limbs(bits))


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize(("size", "kept"), [(35, 31), (22, 64), (62, 0), (2, 40)])
def test_products_of_a_lifted_number(bits, size, kept):
    shape = (3, 7)
    numbers_of = dict(mask=wide_words(bits, *shape), own=wide_words(bits, 3, seed=1), shown=wide_words(bits, 3, seed=2))
    pairs, wraps = dealt(max(1, bits - kept), *shape), dealt(max(1, bits - size), *shape, seed=1)
    both("scale_lifted", words(*shape), bits_of(*shape), *numbers_of.values(), pairs, wraps, size, kept, bits)
    wider = [wide_words(bits + 30, *shape), *(wide_words(bits, 3, seed=s) for s in (1, 2))]
    both("scale_lifted", words(*shape), bits_of(*shape), *wider, pairs, wraps, size, kept, bits)


def test_products_of_any_layout():
    bits, size, kept = 98, 35, 31
    for public in layouts(words, 3, 5):
        for mask in wide_layouts(bits, 3, 5):
            pairs = words(3, 1, 1).expand(3, 5, 1)
            own, shown = wide_words(bits, 3), wide_words(bits, 1, seed=1).expand(3, 2)
            both("scale_lifted", public, bits_of(3, 5), mask, own, shown, pairs, words(3, 5, 1), size, kept, bits)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(65, 320), st.integers(1, 9), st.integers(0, 6), st.integers(0, 10**6), st.data())
def test_any_shape_and_ring(bits, size, rows, seed, data):
    n = data.draw(st.integers(2, min(63, bits - 1)), "bits that were opened")
    kept = data.draw(st.integers(0, bits - 1), "bits that were not dealt")
    shape = (rows, size)
    both("dot_wide", words(*shape, seed=seed), dealt(bits, *shape, seed=seed), bits)
    mask = ring.low_bits(words(*shape, seed=seed), n)
    parts = [dealt(bits - n, *shape, seed=seed + part) for part in range(3)]
    lifted = both("lift_mask", mask, *parts[:2], bits_of(*shape), n, bits)
    own, shown = (wide_words(bits, rows, seed=seed + part) for part in range(2))
    pairs = dealt(bits - kept, *shape, seed=seed)
    both("scale_lifted", words(*shape), bits_of(*shape), lifted, own, shown, pairs, parts[2], n, kept, bits)
