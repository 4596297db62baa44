"""Comparisons of opened values, tables and bit products, against integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import joined, open_wires, play, reconstruct, run, share, signed

from crypten_llm.protocols import lookup, selection
from crypten_llm.protocols.comparison import below, bit_opening, difference, ordered, times_bits
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Overflow


def less_than(x, thresholds, width, word=32):
    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, x, width=64, bits=width - 2), ring=width)])
        return play(runtime, below(runtime, wire, thresholds, word))

    outcome = run(job)
    assert outcome.results[0].width == word
    return signed(sum(result.share for result in outcome.results[:2]), word)


@pytest.mark.parametrize("width", [3, 4, 5, 6, 9, 13, 17, 21, 22, 30, 33, 41])
@pytest.mark.parametrize("word", [8, 64])
def test_below_at_the_edges_of_every_ring(width, word):
    """Zero, neighbours of the thresholds, the largest magnitudes; several thresholds on one set of tables."""
    top = 2 ** (width - 2) - 1
    x = torch.tensor(sorted({v for v in (0, 1, -1, top, -top, top // 2, -top // 2, top // 3) if abs(v) <= top}))
    thresholds = sorted({0, 1, -1, top // 2, -(top // 2), top, -top})
    found = less_than(x, thresholds, width, word)
    assert torch.equal(found, (x[:, None] < torch.tensor(thresholds)).long())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(4, 45), st.data())
def test_below_any_threshold(width, data):
    number = st.integers(1 - 2 ** (width - 2), 2 ** (width - 2) - 1)
    x, t = torch.tensor(data.draw(st.lists(number, min_size=1, max_size=9))), data.draw(number)
    assert torch.equal(less_than(x, [t], width)[:, 0], (x < t).long())


def test_more_comparisons_than_one_block():
    x = torch.arange(-9000, 9000)
    assert torch.equal(less_than(x, [17], 20)[:, 0], (x < 17).long())


def test_a_truncated_opening_is_compared_as_it_was_rounded():
    x = torch.arange(-40, 40) * 2**9 + 3

    def job(runtime):
        (wire,) = open_wires(runtime, [ordered(share(runtime, x, scale=10, bits=6), 9, "x")])
        assert wire.width == 10
        return play(runtime, below(runtime, difference(wire, wire), [0, 1], 8))

    assert torch.equal(reconstruct(run(job)), torch.tensor([0, 1]).expand(80, 2))


@pytest.mark.parametrize(("scale", "bits"), [(14, 8), (20, 6), (30, 3), (10, 0)])
@pytest.mark.parametrize("name", ["pairs", "search", "tournament", "largest"])
def test_both_extremes_of_the_declared_domain(name, scale, bits):
    """A unit of the rounding inside the bound, exact multiples of it and not: the order is right in every run."""
    precision, bound = 20, 2 ** (bits + scale)
    unit = max(1, 2 ** (bits + 1 - precision + scale))
    high = bound - unit
    x = torch.tensor([[-high, high, 3 * unit - high, high - 2 * unit - unit // 2, 0, high // 2, -high, high]])
    x = torch.cat([x, torch.zeros(1, 12, dtype=torch.int64)], 1)  # more than two blocks of a tournament

    def job(runtime):
        (wire,) = open_wires(runtime, [ordered(share(runtime, x, scale, bits=bits), precision, "x")])
        if name == "largest":
            return play(runtime, selection.largest(runtime, wire))
        if name == "tournament":
            return play(runtime, selection.top(runtime, wire, 1, 256))
        return play(runtime, selection.top(runtime, wire, 3, 256 if name == "pairs" else 4))

    ones = {"pairs": [1, 3, 7], "search": [1, 3, 7], "tournament": [1]}
    for seed in range(4):  # rounding is by chance
        found = reconstruct(run(job, seed=seed))
        if name == "largest":
            assert found.tolist() == [high // unit]
        else:
            assert found.nonzero()[:, 1].tolist() == ones[name]


@pytest.mark.parametrize(("n", "pairs_up_to"), [(256, 300), (257, 300), (127, 4), (128, 4)])
@pytest.mark.parametrize("count", [2, -1])
def test_counts_on_both_sides_of_the_words_they_fill(n, pairs_up_to, count):
    """Ranks up to n - 1 by pairs, counts up to n by search: all values but the first alike, so all of them come up."""
    x, count = torch.zeros(1, n, dtype=torch.int64), count % n
    x[0, 0] = -1

    def job(runtime):
        (wire,) = open_wires(runtime, [ordered(share(runtime, x, 0, bits=4), 5, "x")])
        return play(runtime, selection.top(runtime, wire, count, pairs_up_to))

    assert reconstruct(run(job)).nonzero()[:, 1].tolist() == list(range(1, count + 1))


def test_values_without_room_for_a_sign_are_refused():
    with pytest.raises(Overflow, match=r"top: the difference of two \|x\| < 2\^6 at scale 2\^10 does not fit .* 2\^17"):
        run(lambda runtime: ordered(share(runtime, torch.ones(1).long(), scale=10, bits=6, width=17), 20, "top"))


@pytest.mark.parametrize("width", [8, 16, 32, 64])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_tables(width, size):
    """Every value of the ring, and one-hot vectors of it."""
    x, table = torch.arange(2**size), (torch.arange(2**size) * 37 + 5) % 100

    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, x, bits=size), ring=size, function=True)])
        return lookup.read(runtime, wire, table, width), lookup.one_hot(runtime, wire, torch.tensor([0, 1]))

    owner, client, _ = run(job).results
    assert torch.equal(joined(owner[0], client[0]) % 2**8, table % 2**8)
    assert torch.equal(joined(owner[1], client[1]), torch.eye(2**size, dtype=torch.int64)[:, :2])


def test_more_words_of_tables_than_one_block():
    size = 8
    x = torch.arange((lookup.BLOCK >> size) + 9) % 2**size
    table = (torch.arange(2**size) * 37 + 5) % 100

    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, x, bits=size), ring=size, function=True)])
        return lookup.read(runtime, wire, table, 64)

    assert torch.equal(reconstruct(run(job)), table[x])


@pytest.mark.parametrize("width", [8, 32, 64])
def test_bits_times_numbers(width):
    """Whatever ring the bits' shares are in; a bit for each row."""
    bits, x = torch.tensor([[0], [1], [1], [0]]), torch.arange(-10, 10).reshape(4, 5)

    def job(runtime):
        held = share(runtime, bits, width=width, bits=1)
        bit, wire = open_wires(runtime, [bit_opening(held), Opening(share(runtime, x, width=30, bits=10))])
        return times_bits(runtime, bit, wire)

    assert torch.equal(reconstruct(run(job)), bits * x)
