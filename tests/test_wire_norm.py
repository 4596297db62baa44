"""Rows divided by their length against Python's: values, flags, costs and what travels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire_security import assert_uniform, cut
from wire_parties import CLIENT, DEALER, OWNER, joined, play, run, share

from crypten_llm.kernels.ring import packed_size
from crypten_llm.protocols import fits
from crypten_llm.protocols.ladder import FINE
from crypten_llm.protocols.lookup import index_bits
from crypten_llm.protocols.norm import FACTORS, GUARD, ROOT, unit_rows
from crypten_llm.protocols.secret import Secret

SCALE, LIMIT, FRACTION = 16, 17, 18  # of hidden states, and of the result, as the engine takes them
EPS = 1e-5
RING = SCALE + LIMIT + 2


def normed(integers, eps=EPS, limit=LIMIT, scale=SCALE, fraction=FRACTION, width=63, seed=0):
    """(units of the result, the row as it was lifted, whether a flag is set), and the outcome."""

    def job(runtime):
        held = share(runtime, integers, scale, width=64, bits=0).share
        x = Secret(held, scale, scale + limit + 2, limit)
        made = play(runtime, unit_rows(runtime, x, eps, limit, fraction, width))
        return made.unit, made.lifted, made.beyond

    outcome = run(job, seed=seed)
    owner, client, dealer = outcome.results
    unit, lifted = (joined(mine, theirs) for mine, theirs in zip(owner[:2], client[:2], strict=True))
    assert owner[0].scale == fraction and owner[0].width >= width and dealer[0].shape == unit.shape == integers.shape
    flags = (owner[2] ^ client[2]) & 1
    assert flags.shape[:-1] == integers.shape[:-1]
    return unit, lifted, flags.any(-1), outcome


def check(integers, eps=EPS, scale=SCALE, fraction=FRACTION, **options):
    """Off by what is declared, and lifted exactly; nothing is flagged. Returns the errors in units."""
    unit, lifted, flags, _ = normed(integers, eps, scale=scale, fraction=fraction, **options)
    assert torch.equal(lifted, integers) and not flags.any()
    x = integers.double() / 2.0**scale
    added = round(eps * x.shape[-1] * 4.0**scale) / 4.0**scale
    exact = x / (x.square().sum(-1, keepdim=True) + added).sqrt()
    error = unit.double() - exact * 2**fraction
    assert (error.abs() < 1.1 + 2.0 ** (fraction - ROOT - LIMIT) * x.abs()).all()
    return error


def rows(log2_sums, size, seed=0):
    """Random rows whose sums of squares are these powers of two."""
    x = torch.randn((len(log2_sums), size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    lengths = torch.tensor([2.0 ** (power / 2) for power in log2_sums], dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True) * lengths[:, None] * 2**SCALE).round().long()


@pytest.mark.parametrize("size", [1, 3, 64, 576])
def test_rows_of_any_length(size):
    """From next to nothing, where eps is all there is, to the end of the domain; each power of two from below."""
    powers = [*np.arange(-30, 33, 0.5), *(power - 1e-3 for power in range(-9, 33)), 32.97]
    error = check(rows(powers, size))
    assert error.square().mean().sqrt() < 0.6 and abs(error.mean()) < 0.05


def test_rows_of_zeros_and_of_one_spike():
    x = torch.zeros(6, 576, dtype=torch.int64)
    for row, value in enumerate([0, 1, -1, 2**16, 2 ** (SCALE + 16), -int(1.39 * 2 ** (SCALE + 16))]):
        x[row, 5 * row] = value
    check(x)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([46, 58, 63]), st.floats(1e-9, 1e-2), st.data())
def test_any_shape_and_ring(size, count, width, eps, data):
    powers = data.draw(st.lists(st.floats(-20, 32.9), min_size=2 * count, max_size=2 * count))
    check(rows(powers, size, seed=count).view(2, count, size), eps, width=width, seed=size)


@pytest.mark.parametrize("times", [1.02, 1.5, 2.0, 2.99])
def test_rows_that_leave_the_domain_are_flagged(times):
    """By less than three times in what is largest, or in the length; those beside them are not."""
    spike = torch.zeros(1, 64, dtype=torch.int64)
    spike[0, 7] = int(times * 2 ** (SCALE + LIMIT))
    long = rows([2 * LIMIT - 1 + 2 * math.log2(times)], 64)
    fine = rows([32.9, 0.0, -8.0], 64)
    flags = normed(torch.cat([fine, spike, -spike, fine, long]))[2]
    assert flags.tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True]


@pytest.mark.parametrize("eps", [1e-12, EPS])
@pytest.mark.parametrize(
    ("count", "size", "width"), [(1, 1, 63), (3, 40, 46), (2, 576, 63), (1, 576, 46), (9, 2, 30), (1, 4096, 63)]
)
def test_cost(count, size, width, eps):
    """4 rounds; bits of an element and of a row as the docstring adds them up, each part packed by itself."""
    *_, outcome = normed(rows([0.0] * count, size), width=width, eps=eps)
    modes, n, top = fits.stored("inverse root").modes, count * size, 2 * (LIMIT + SCALE)
    squares, wide = top + 5 + max(1, (size - 1).bit_length()), width + LIMIT + SCALE + ROOT - FRACTION
    largest = -(-(top - 2 - max(1, math.floor(math.log2(eps * size)) + 2 * SCALE)) // 2)  # k of 2^k
    power, root = largest + 3, wide + 2 * FACTORS - ROOT
    sent = [(n, RING), (count, squares), (count, FACTORS + 1), (count, power), (count, wide)]
    elements = [(2 * n, max(wide, squares) - RING), (n, squares - RING - 1), (n, width + GUARD), (n, wide - RING)]
    terms = [(2 * modes * count, bits) for bits in (root, root, root - power)]
    row = [(count, squares), (2 * count, root - power), *terms]
    levels = squares - 1 - max(0, top - 2 * largest - FINE)
    stops = len({max(0, end - FINE) for end in [top - 1, *range(top - 2 * largest, top, 2)]})
    key = 16 * levels + sum(packed_size(2 * many, squares) for many in (levels, stops)) + packed_size(levels, 2)
    online = sum(packed_size(*part) for part in sent)
    client = count * key + sum(packed_size(*part) for part in elements + row)
    assert outcome.cost() == (4, online, online, count * key, client)
    outcome.check_meter()


COUNT = 1024
INPUTS = {
    "zeros": torch.zeros(COUNT, 2, dtype=torch.int64),
    "largest": torch.full((COUNT, 2), 2 ** (SCALE + 15)),
    "rising": torch.arange(2 * COUNT).view(COUNT, 2) << 20,
    "unlike": torch.tensor([[2 ** (SCALE + 16), 1]] * COUNT),
}


@pytest.mark.parametrize("integers", INPUTS.values(), ids=INPUTS)
def test_what_travels_is_uniform(integers):
    """Hidden states, sums of squares, the scaled sum and its power of two, the inverse root."""
    *_, outcome = normed(integers)
    squares = 2 * (LIMIT + SCALE) + 4 + index_bits(2) + 1
    for role in (OWNER, CLIENT):
        first, sums, scaled, roots = [frame.payload for frame in outcome.frames[role]]
        assert_uniform(first, RING, "hidden states")
        bits = {"sums": (sums, squares), "inverse roots": (roots, 63 + 33 + ROOT - FRACTION)}
        for what, (payload, size) in bits.items():
            digits = np.unpackbits(np.frombuffer(payload, np.uint8), bitorder="little")[: COUNT * size]
            for start in (0, size - 56):  # all of it, as what 56 bits hold
                part = digits.reshape(COUNT, size)[:, start : start + 56]
                assert_uniform(np.packbits(part.flatten(), bitorder="little").tobytes(), 56, what)
        period = 26 + fits.stored("inverse root").period
        left = (len(scaled) * 8 - COUNT * period) // COUNT
        for part, size in zip(cut(scaled, [(COUNT, period), (COUNT, left)]), (period, left), strict=True):
            assert_uniform(part, size, "the scaled sum, the power of two")


@pytest.mark.parametrize("integers", INPUTS.values(), ids=INPUTS)
def test_what_the_dealer_sends_does_not_depend_on_the_rows(integers):
    outcome, other = normed(integers)[-1], normed(INPUTS["zeros"])[-1]
    assert outcome.frames[DEALER] == other.frames[DEALER] and outcome.cost() == other.cost()
