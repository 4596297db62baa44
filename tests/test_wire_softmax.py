"""Softmax weights of rows of any kind against Python's: values, flags, costs and what travels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire_security import assert_uniform, cut
from wire_parties import CLIENT, DEALER, OWNER, joined, play, run, share

from crypten_llm.kernels.ring import packed_size
from crypten_llm.protocols.softmax import HEADROOM, LEAST, OPENED, Exponents, weigh

FRACTION, WIDTH = 18, 40
Q = Exponents()


def weighed(rows, exponents=Q, drop=12, seed=0, seen=None):
    """(weights of each row, [negative or not, outside or not] of each), of rows of scores in bits; the outcome.

    seen: of each score whether it is one, words 0 or 1.
    """
    unit = exponents.size / 2**OPENED
    counts = torch.tensor([len(row) for row in rows])
    scores = torch.tensor([y for row in rows for y in row], dtype=torch.float64)
    whole = (scores / unit).round().long() << drop

    def job(runtime):
        held = share(runtime, whole, width=OPENED + drop, bits=0).share
        made = play(runtime, weigh(runtime, held, drop, counts, exponents, FRACTION, WIDTH, seen))
        return made.weights, made.beyond

    outcome = run(job, seed=seed)
    (mine, flags), (theirs, _), (_, masks) = outcome.results
    assert mine.shape == theirs.shape == scores.shape and mine.width == WIDTH
    beyond = (flags.public - masks.mask.held) % 2
    assert beyond.shape == (len(rows), 2)
    return (joined(mine, theirs).double() / 2**FRACTION).split(counts.tolist()), beyond.tolist(), outcome


def check(rows, exponents=Q, **options):
    """Right to 2^-13 and a unit, on a scale on which a row adds up to between 1/4 and 1; no flags."""
    found, flags, _ = weighed(rows, exponents, **options)
    unit = exponents.size / 2**OPENED
    for row, weights, flag in zip(rows, found, flags, strict=True):
        exact = torch.tensor([round(y / unit) * unit for y in row], dtype=torch.float64)
        assert flag == [0, 0], row[:5]
        total = weights.sum().item()
        assert 1 / 4 * (1 - 2**-5) - len(row) * 2.0**-FRACTION <= total <= 1 + 2**-5 + len(row) * 2.0**-FRACTION
        power = round(exact.max().item())
        plain = 2 ** (exact - power)
        scale = total / plain.sum().item()  # a power of four, but for what is rounded
        scale = 2.0 ** round(math.log2(scale))
        error = (weights - plain * scale).abs()
        assert (error <= plain * scale * 2**-13 + 2.0**-FRACTION).all(), (row[:5], error.max())


def test_one_score_of_any_size():
    low, high = Q.sums
    check([[y] for y in np.linspace(low, high - 1, 90)])


def test_rows_of_many_scores_between_both_ends_of_the_domain():
    low, high = Q.scores[0], Q.sums[1]
    torch.manual_seed(0)
    rows = [(low + (high - 6 - low) * torch.rand(n)).tolist() for n in (1, 2, 3, 17, 40, 333)]
    rows = [[*row, 0.0] for row in rows]  # whose sum is large enough
    check([*rows, [low, -57.0], [low] * 200 + [high - 1], [high - 1.1, high - 1.1], [high - 8] * 200, [-57.9] * 2])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from([256, 208, 128, 512]), st.integers(0, 20), st.data())
def test_any_rows(size, drop, data):
    exponents = Exponents(size)
    (low, _), (least, most) = exponents.scores, exponents.sums
    score = st.floats(low + 1, most - 6)
    rows = data.draw(st.lists(st.lists(score, min_size=0, max_size=20), min_size=1, max_size=6), "rows")
    top = data.draw(st.floats(max(least + 1, low + 1), most - 6), "one that is large enough in each row")
    check([[*row, top] for row in rows], exponents, drop=drop, seed=size + drop)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from([256, 128]), st.integers(0, 12), st.data())
def test_scores_that_are_none_weigh_nothing(size, drop, data):
    """Whatever stands in their places, beyond the domain too: the others weigh as alone, and nothing is flagged."""
    exponents = Exponents(size)
    (low, _), (least, most) = exponents.scores, exponents.sums
    score, any_score = st.floats(low + 1, most - 6), st.floats(-500.0, 500.0)
    rows = data.draw(
        st.lists(st.lists(st.tuples(score, st.booleans(), any_score), max_size=12), min_size=1, max_size=5)
    )
    top = data.draw(st.floats(max(least + 1, low + 1), most - 6), "one that is large enough in each row")
    rows = [[*row, (top, True, 0.0)] for row in rows]
    seen = torch.tensor([int(is_one) for row in rows for _, is_one, _ in row])
    given_rows = [[y if is_one else other for y, is_one, other in row] for row in rows]
    found, flags, _ = weighed(given_rows, exponents, drop, size + drop, seen)
    alone, _, _ = weighed([[y for y, is_one, _ in row if is_one] for row in rows], exponents, drop, size + drop)
    for row, weights, expected, flag in zip(rows, found, alone, flags, strict=True):
        is_one = torch.tensor([one for _, one, _ in row])
        assert flag == [0, 0] and not weights[~is_one].any()
        exact = 2.0 ** torch.tensor([y for y, one, _ in row if one], dtype=torch.float64)
        for made in (weights[is_one], expected):
            error = (made / made.sum() - exact / exact.sum()).abs()
            assert (error <= 2**-12 * exact / exact.sum() + 8 * len(row) * 2.0**-FRACTION).all()


def test_sizes_of_rings():
    """In bits: what the domain of q = 256 is, but for as much as may count as beyond its ends."""
    assert (Q.scores[0], round(Q.scores[1]), *map(round, Q.sums)) == (-125.0, 80, -58, 80)
    assert Q.scores[1] == Q.sums[1] < 80 and Q.sums[0] > -58


@pytest.mark.parametrize("size", [128, 208, 256, 512])
def test_rows_beyond_the_domain_are_flagged(size):
    """A sum too small, too large, or far too large; and many scores that have wrapped."""
    exponents = Exponents(size)
    least, most = exponents.sums
    small = [[least - 2.0], [least - 4.0] * 3, [least - 20.0]]
    large = [[most + 0.5], [most - 1.0] * 4, [most + 10.0], [most - 6.0] * 200]
    _, flags, _ = weighed([[0.0], *small, [1.0, 2.0], *large, [3.0]], exponents)
    for place, flag in enumerate(flags):
        assert (flag == [0, 0]) == (place in (0, 4, 9)), (place, flag)


def test_close_to_the_ends_of_the_domain_nothing_is_flagged():
    least, most = Q.sums
    _, flags, _ = weighed([[least + 0.05], [most - 0.05], [least + 0.1, Q.scores[0]], [most - 1.1] * 2])
    assert flags == [[0, 0]] * 4


@pytest.mark.parametrize("counts", [[1], [3, 1, 20], [7] * 9])
@pytest.mark.parametrize("size", [68, 104, 128, 208, 256, 512])
def test_cost(counts, size):
    """4 rounds. A comparison key has a level for each bit from 2^4 to the top, and every second may be its last."""
    exponents = Exponents(size)
    n, rows, narrow = sum(counts), len(counts), size - exponents.dropped
    bits = (size - 1).bit_length()
    _, _, outcome = weighed([[0.0] * count for count in counts], exponents)
    sent = sum(packed_size(*part) for part in [(n, 22), (rows, size), (rows, narrow), (rows, bits), (2 * rows, 1)])
    levels, stops = narrow - 5, len({*range(LEAST + 2, narrow - 1, 2), narrow - HEADROOM})
    key = 16 * levels + sum(packed_size(*part) for part in [(levels, bits), (stops, bits), (levels, 2)])
    elements = packed_size(n, size) + packed_size(2 * rows, size)
    assert outcome.cost() == (4, sent, sent, rows * key, rows * key + elements)
    outcome.check_meter()


ROWS = 2048
INPUTS = {
    "equal": [[0.0, 0.0]] * ROWS,
    "small": [[-57.0, -125.0]] * ROWS,
    "large": [[78.0, 78.0]] * ROWS,
    "unlike": [[78.0, -125.0]] * ROWS,
    "rising": [[i / ROWS * 100 - 40, 3.0] for i in range(ROWS)],
}


@pytest.mark.parametrize("rows", INPUTS.values(), ids=INPUTS)
def test_what_travels_is_uniform(rows):
    """Scores in 22 bits, sums modulo 2^256 - 1 and without their low bits, the power of two modulo 256, flags."""
    _, _, outcome = weighed(rows)
    for role in (OWNER, CLIENT):
        first, sums, narrow, last = [frame.payload for frame in outcome.frames[role]]
        assert_uniform(first, OPENED, "scores")
        assert_uniform(sums, 64, "sums")
        assert_uniform(narrow, 56, "sums without their low bits")  # of 168: three words each
        power, flags = cut(last, [(ROWS, 8), (2 * ROWS, 1)])
        assert_uniform(power, 8, "powers")
        assert_uniform(flags, 1, "flags")


@pytest.mark.parametrize("rows", INPUTS.values(), ids=INPUTS)
def test_what_the_dealer_sends_does_not_depend_on_the_scores(rows):
    (_, _, outcome), (_, _, other) = weighed(rows), weighed(INPUTS["equal"])
    assert outcome.frames[DEALER] == other.frames[DEALER] and outcome.cost() == other.cost()
