"""A token chosen on shares: the largest of a vocabulary, the largest few, and draws from a softmax by dealt noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire_security import cut
from test_wire_security import numbers as numbers_of
from test_wire_security import surprise as far
from wire_parties import CLIENT, DEALER, OWNER, check_cost, joined, key, open_wires, play, plus, run, share

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import KEEPING, WireConfig
from crypten_llm.kernels.ring import SIGNS, packed_size
from crypten_llm.protocols import gumbel, lookup, tournament
from crypten_llm.protocols.comparison import ordered
from crypten_llm.protocols.dealer.randomness import Stream
from crypten_llm.protocols.secret import Overflow, Secret

RING = KEEPING + 1
LIMIT = 2 ** (RING - 2)
UNIT = 2.0**-11  # of a compared logit


def opened(runtime, x):
    """Integers as opened for comparisons."""
    (wire,) = open_wires(runtime, [ordered(share(runtime, x, scale=11, width=RING, bits=12), KEEPING, "x")])
    return wire


def numbers(*shape, seed=0, distinct=True):
    generator = torch.Generator().manual_seed(seed)
    limit = LIMIT if distinct else 3
    return torch.randint(1 - limit, limit, shape, generator=generator)


# Where the largest is.


def place(runtime, x):
    return play(runtime, tournament.place_of_largest(runtime, opened(runtime, x)))


def few(runtime, x, count):
    return play(runtime, tournament.largest_few(runtime, opened(runtime, x), count))


def found(outcome, part=None):
    mine, theirs = (outcome.results[role] for role in (OWNER, CLIENT))
    return joined(mine, theirs) if part is None else joined(mine[part], theirs[part])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 700), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_place_of_the_largest_of_any_values(count, rows, distinct, seed):
    """Of equal values any is right."""
    x = numbers(rows, count, seed=seed, distinct=distinct)
    places = found(run(place, x))
    assert torch.equal(x.gather(1, places[:, None])[:, 0], x.amax(1))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_the_largest_few_of_any_values(data):
    count = data.draw(st.integers(1, 1600))
    k = data.draw(st.integers(1, min(count, 12)))
    x = numbers(count, seed=data.draw(st.integers(0, 99)), distinct=data.draw(st.booleans()))
    outcome = run(few, x, k)
    places, values = found(outcome, 0), found(outcome, 1)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(x[places], values) and len(set(places.tolist())) == k


@pytest.mark.parametrize("extreme", [0, 1 - LIMIT, LIMIT - 1])
def test_values_that_are_all_alike(extreme):
    x = torch.full((1, 301), extreme)
    assert 0 <= found(run(place, x)).item() < 301
    assert len(set(found(run(few, x[0], 5), 0).tolist())) == 5


def test_a_cut_into_blocks_is_among_what_was_tried():
    assert tournament.cuts(1500, 5) and not tournament.cuts(60, 5)


# What it costs.


def cost(rounds, online, dealer):
    return rounds, online, online, 0, dealer


def level(rows, count, width, tables):
    """Comparisons of 24 bits, then ranks, of which each has so many tables."""
    blocks, m = rows * -(-count // width), lookup.index_bits(width)
    pairs, ranks = blocks * width * (width - 1) // 2, blocks * (width - 1)
    compared = cost(1, packed_size(pairs, SIGNS), pairs * (2 * 2**6 + 32))
    return plus(compared, cost(1, packed_size(ranks, m), tables * ranks * 4 * 2**m))


def tournament_cost(rows, count):
    widths, left, due = tournament.plan(rows, count), count, []
    for number, width in enumerate(widths):
        is_first, is_last = number == 0, number + 1 == len(widths)
        due.append(level(rows, left, width, 1 + (not is_first) + (not is_last)))
        left = -(-left // width)
        if not is_last:
            again = rows * left
            due.append(cost(1, packed_size(again, RING) + packed_size(again, tournament.place_bits(count)), 0))
    return plus(cost(1, packed_size(rows * count, RING), 0), *due)


@pytest.mark.parametrize(("rows", "count"), [(1, 2), (1, 97), (3, 130), (1, 1100)])
def test_a_tournament_costs_what_is_declared(rows, count):
    check_cost(lambda runtime: place(runtime, numbers(rows, count)), tournament_cost(rows, count))


def test_a_vocabulary_takes_few_rounds_and_little_more_than_a_comparison_a_token():
    """Counted, not run: SmolLM2's, and one of 151,936."""
    for count, rounds in ((49_152, 21), (151_936, 27)):
        found = tournament_cost(1, count)
        assert found[0] == rounds and 160 * count < found[4] < 220 * count


# Nothing that is sent depends on what is compared.


def both(runtime, x):
    place(runtime, x[None])
    few(runtime, x, 4)
    gumbel.dealt(runtime, (1, len(x)), 0.7, 10, RING)


def test_traffic_depends_on_shapes_alone():
    inputs = numbers(1200), torch.zeros(1200, dtype=torch.int64), torch.arange(1200)
    outcomes = [run(both, x) for x in inputs]
    for outcome in outcomes[1:]:
        assert outcome.cost() == outcomes[0].cost()
        assert outcome.frames[DEALER] == outcomes[0].frames[DEALER]
        for role in (OWNER, CLIENT):
            sizes = [[len(frame.payload) for frame in seen.frames[role]] for seen in (outcome, outcomes[0])]
            assert sizes[0] == sizes[1] and len(sizes[0]) > 20


ROWS = 1024
SENT = [  # by each party, message by message: (words, bits of each)
    [(4 * ROWS, RING)],
    *[[(2 * ROWS, SIGNS)], [(2 * ROWS, 1)]],
    [(2 * ROWS, RING), (2 * ROWS, tournament.place_bits(4))],
    *[[(ROWS, SIGNS)], [(ROWS, 1)]],
]
DEALT = [  # to the client: tables of digits, of bits, of a rank's 1, and of that times a value or a place
    *[(2 * ROWS * 64, 16), (2 * ROWS * 32, 8), (2 * ROWS * 2, 32), (2 * ROWS * 2, 32)],
    *[(ROWS * 64, 16), (ROWS * 32, 8), (ROWS * 2, 32), (ROWS * 2, 32)],
]


@pytest.mark.parametrize("x", [torch.zeros(ROWS, 4).long(), numbers(ROWS, 4), torch.full((ROWS, 4), LIMIT - 1)])
def test_what_is_sent_and_dealt_is_uniform(monkeypatch, x):
    """Of two levels: every opening of each party and every word that the dealer gives the client."""
    monkeypatch.setattr(tournament, "plan", lambda rows, count: (2, 2))
    outcome = run(place, x, seed=9)
    for role in (OWNER, CLIENT):
        for frame, sizes in zip(outcome.frames[role], SENT, strict=True):
            for payload, (_, bits) in zip(cut(frame.payload, sizes), sizes, strict=True):
                values = numbers_of(payload, bits)
                counts = np.bincount((values & (2 ** min(bits, 5) - 1)).astype(int), minlength=2 ** min(bits, 5))
                assert far(counts) < 5, f"{bits} bits of role {role}"
    assert all(frame.target == CLIENT for frame in outcome.frames[DEALER])
    pieces = cut(b"".join(frame.payload for frame in outcome.frames[DEALER]), DEALT)
    for payload, (_, bits) in zip(pieces, DEALT, strict=True):
        if bits != 16:  # a word of digits has fields of 14 bits: tests of comparisons look at them
            assert far(np.bincount(np.frombuffer(payload, np.uint8), minlength=256)) < 5, f"dealt words of {bits} bits"


def test_dealt_noise_is_uniform():
    def job(runtime):
        gumbel.dealt(runtime, (1, 4096), 1.0, 10, RING)

    (frame,) = run(job, seed=2).frames[DEALER]
    values = numbers_of(frame.payload, RING)
    for shift in (0, 8, 17):
        assert far(np.bincount(((values >> shift) & 255).astype(int), minlength=256)) < 5


# Draws.


def surprise(ids: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Standard deviations of a chi-square beyond its mean, by Wilson and Hilferty."""
    counts = torch.bincount(ids.long(), minlength=len(probabilities)).double()
    expected, freedom = len(ids) * probabilities, len(counts) - 1
    chi = ((counts - expected) ** 2 / expected).sum().item()
    return ((chi / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))


LOGITS = torch.tensor([3.0, 2.5, 2.5, 1.0, 0.0, -0.5, 1.7, 2.9])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_plain_draws_from_the_softmax(temperature):
    engine, times = PlainEngine(), 20_000
    engine._stream = Stream(key(7, 0))
    drawn = engine.sample(LOGITS.expand(times, -1), temperature)
    assert surprise(drawn, (LOGITS.double() / temperature).softmax(0)) < 4


def test_a_wrong_temperature_would_be_seen():
    engine, times = PlainEngine(), 20_000
    engine._stream = Stream(key(7, 0))
    drawn = engine.sample(LOGITS.expand(times, -1), 1.2)
    assert surprise(drawn, LOGITS.double().softmax(0)) > 8


def test_noise_is_finite_at_both_ends():
    ends = gumbel.noise(torch.tensor([0, -1, 1 << 62, -(1 << 63)]))
    assert ends.isfinite().all() and (ends.abs() < gumbel.LARGEST).all()
    assert ends.argmax() == 1 and ends.argmin() == 0


class Choosing(WireEngine):
    """As parties run it where logits are compared."""

    def __init__(self, transport, runtime):
        super().__init__(transport, WireConfig.choosing(), runtime=runtime)


def logits_of(engine, x):
    """Shares of float logits in the ring in which the last layer gives them."""
    config = engine.config
    scale = config.row + config.weight
    words = (x.double() * 2.0**scale).round().long()
    made = share(engine.runtime, words, scale=scale, bits=config.logit_bits, width=config.logits_width)
    return Secret(made.share, scale, config.logits_width, config.logit_bits)


def drawn(engine, x, temperature):
    """Ids that the client learns, one for each row."""
    return engine.open_to(engine.sample(logits_of(engine, x), temperature), CLIENT)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_shares_draw_from_the_softmax(temperature):
    times = 4000
    ids = run(drawn, LOGITS.expand(times, -1), temperature, engine=Choosing, seed=5).results
    assert ids[OWNER] is None and ids[DEALER] is None
    assert surprise(ids[CLIENT], (LOGITS.double() / temperature).softmax(0)) < 4


def test_each_section_draws_anew():
    def job(engine):
        first = drawn(engine, LOGITS.expand(200, -1), 1.0)
        engine.runtime.begin("another")
        return first, drawn(engine, LOGITS.expand(200, -1), 1.0)

    first, second = run(job, engine=Choosing).results[CLIENT]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [1.0, 300.0, 4000.0])
def test_greedy_takes_a_logit_within_two_units_of_the_largest(size):
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(3))
    x = x / x.abs().max() * size
    x[:, 100:400] = x[:, :300] + UNIT  # many are close
    places = run(drawn, x, 0.0, engine=Choosing).results[CLIENT].long()
    assert (x.amax(1) - x.gather(1, places[:, None])[:, 0] < 2 * UNIT).all()


def test_the_best_logits_and_their_ids():
    x = torch.randn(1, 1500, generator=torch.Generator().manual_seed(4)) * 10

    def job(engine):
        return engine.open_to(engine.top_k(logits_of(engine, x), 7), CLIENT)

    ids, best = run(job, engine=Choosing).results[CLIENT]
    expected, exact = PlainEngine().top_k(x, 7)
    assert ids.long().tolist() == expected.tolist()
    torch.testing.assert_close(best, exact, atol=UNIT, rtol=0)


def test_noise_that_does_not_fit_is_refused():
    with pytest.raises(Overflow, match="sample: noise at temperature 200 and"):
        run(drawn, LOGITS[None], 200.0, engine=Choosing)
