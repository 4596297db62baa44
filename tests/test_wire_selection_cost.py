"""Rounds and bytes of selection: measured against what each docstring declares, and against engine ``cost``."""

from collections import Counter

import pytest
import torch
from wire_parties import CLIENT, DEALER, OWNER, check_cost, open_wires, play, plus, run, share

from crypten_llm.engines.wire.choosing import PAIRS
from crypten_llm.engines.wire.counted import CostEngine, Links
from crypten_llm.engines.wire.numbers import PRECISION
from crypten_llm.kernels.ring import SIGNS, packed_size
from crypten_llm.protocols import lookup, selection
from crypten_llm.protocols.comparison import below, bit_opening, ordered, times_bits
from crypten_llm.protocols.opening import Opening
from eviction.operations import Choice

BITS, SCALE = 6, 13  # |x| < 2^6 with 13 fractional bits: 20 bits and a sign, opened without truncation
RING = 21
DIGITS = 2 * 2**5  # bytes of a comparison's digit tables


def cost(rounds, online, dealer):
    """(rounds, owner to client, client to owner, dealer to owner, dealer to client)."""
    return rounds, online, online, 0, dealer


def compared(count, word=1, thresholds=1):
    return cost(1, packed_size(count * thresholds, SIGNS), count * (DIGITS + 32 * word * thresholds))


def by_pairs(n, table, rows=1):
    """Rows of n values: pairs, then ranks, whose table has entries of ``table`` bytes."""
    size, count = lookup.index_bits(n), rows * n
    rank = cost(1, packed_size(count, size), count * 2**size * table)
    return plus(compared(rows * n * (n - 1) // 2, 1 if n <= 256 else 2), rank)


def by_search(n):
    """One row: 7 iterations of 3 bits for values below 2^20, the rank counted, ties resolved."""
    word, size = (1 if n < 128 else 2), lookup.index_bits(n + 1)
    due = [opened(1)] * 7  # tau, for each
    for thresholds in [7] * 6 + [3]:
        reached = cost(1, packed_size(thresholds, size), thresholds * 2**size * 8)
        due += [compared(n, word, thresholds), reached]
    ring = lookup.index_bits(4 * n) + 2
    last = -(-(ring - 1) // 4)
    places = cost(2, packed_size(n, ring) + packed_size(n, SIGNS), n * (2 * 2**last + 32 * 4))
    return plus(*due, opened(1), compared(n, 4, 2), places)


def wire_of(runtime, x):
    return open_wires(runtime, [ordered(share(runtime, x, scale=SCALE, bits=BITS), PRECISION, "top")])[0]


def on(function, *shape, **options):
    x = torch.arange(torch.Size(shape).numel()).reshape(shape) * 7 % 5
    return lambda runtime: play(runtime, function(runtime, wire_of(runtime, x), **options))


def picks(n, count):
    bits = (torch.arange(n) < count).long()[None]
    return lambda runtime: play(runtime, selection.picks(runtime, share(runtime, bits, width=32, bits=1), count))


def bit_product(runtime):
    wire = wire_of(runtime, torch.ones(5, 4, dtype=torch.int64))
    ones = share(runtime, torch.ones(5, 1, dtype=torch.int64), width=8, bits=1)
    times_bits(runtime, *open_wires(runtime, [bit_opening(ones)]), wire)


def read(runtime):
    (opened,) = open_wires(runtime, [Opening(share(runtime, torch.arange(9), bits=4), ring=4, function=True)])
    lookup.read(runtime, opened, torch.arange(16), 16)


def opened(count):
    return cost(1, packed_size(count, RING), 0)


def flipped(count):
    """As many bits opened, each multiplied by one value."""
    return cost(1, packed_size(count, 1), 2 * packed_size(count, RING))


COSTS = {
    "below": (on(below, 60, thresholds=[0], width=8), plus(opened(60), compared(60))),
    "below several": (
        on(below, 60, thresholds=[0, 5, 9], width=32),
        plus(opened(60), compared(60, 4, 3)),
    ),
    "read": (read, cost(1, packed_size(9, 4), 9 * 16 * 2)),
    "times bits": (
        bit_product,
        plus(opened(20), cost(1, packed_size(5, 1), packed_size(5, RING) + packed_size(20, RING))),
    ),
    "top by pairs": (
        on(selection.top, 1, 20, count=3, pairs_up_to=PAIRS),
        plus(opened(20), by_pairs(20, 4)),
    ),
    "top by pairs of many": (
        on(selection.top, 1, 300, count=3, pairs_up_to=300),
        plus(opened(300), by_pairs(300, 4)),
    ),
    "best": (on(selection.best, 1, 20, count=3), plus(opened(20), by_pairs(20, 8))),
    "top by search": (
        on(selection.top, 1, 100, count=3, pairs_up_to=PAIRS // 4),
        plus(opened(100), by_search(100)),
    ),
    "top by search of many": (on(selection.by_search, 1, 900, count=300), plus(opened(900), by_search(900))),
    "all": (on(selection.top, 1, 20, count=20, pairs_up_to=PAIRS), opened(20)),
    "none": (on(selection.top, 1, 20, count=0, pairs_up_to=PAIRS), opened(20)),
    "picks": (picks(20, 5), cost(1, packed_size(20, 4), 20 * 2**4 * 8)),
    "picks of one": (picks(20, 1), cost(1, packed_size(20, 1), 20 * 2 * 8)),
    "picks of all": (picks(20, 20), cost(0, 0, 0)),
    "largest": (
        on(selection.largest, 6, 8),
        plus(
            opened(48),
            *[plus(compared(6 * n), flipped(6 * n)) for n in (4, 2, 1)],
            *[opened(6 * n) for n in (4, 2)],
        ),
    ),
    "tournament": (  # 40 values in 5 blocks, their largest found, the blocks' bits opened and composed
        on(selection.by_tournament, 1, 40),
        plus(
            opened(40),
            by_pairs(8, 4, rows=5),
            cost(1, packed_size(40, RING), packed_size(5, RING)),
            opened(5),
            by_pairs(5, 4),
            cost(1, packed_size(5, RING), packed_size(40, RING)),
        ),
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_is_the_declared_one(name):
    check_cost(*COSTS[name])


def test_search_is_cheaper_than_pairs_from_where_it_is_used():
    """The figures beside ``PAIRS``, for one row of scores."""
    pairs, search = by_pairs(PAIRS, 4), by_search(PAIRS)
    total = [sum(found[1:]) / 1e6 for found in (pairs, search)]
    assert pairs[0] + 1 == 3 and search[0] + 1 == 26
    assert total == pytest.approx([3.44, 1.17], abs=0.005)


# The engine's operations, as they run and as engine ``cost`` counts them.


def secret(engine, *shape, bits=5):
    value = torch.arange(torch.Size(shape).numel()).reshape(shape) % 11 / 8.0
    handle = engine.secret(value if engine.rank == OWNER else None, shape, OWNER)
    handle.bits = bits
    return handle


def attend(engine):
    held = [engine.rows(secret(engine, 2, 26, 8), values=values) for values in (False, True)]
    scores = engine.scores(secret(engine, 2, 3, 8), held[0])
    picked = Choice(torch.tensor([0, 1]), engine.best(engine.total(scores[..., 2:8], 1), 2), 2, 4)
    weights = engine.scatter_weights(picked, engine.softmax(engine.gather_scores(picked, scores)), 26)
    engine.mix(weights, held[1])
    return engine.mass(weights, torch.ones(3))


def evict(engine):
    held = engine.rows(secret(engine, 2, 20, 8), values=True)
    kept = engine.keep(held, engine.picks(engine.top(secret(engine, 1, 20), 6), 6))
    dropped = engine.drop(kept, engine.top(secret(engine, 2, 6), 1))
    return engine.take(engine.cat([dropped, engine.take(held, torch.tensor([3]))], 1), torch.tensor([0, 5]))


def summarise(engine):
    keys = engine.contents(engine.rows(secret(engine, 2, 16, 8))).reshape(2, 4, 4, 8)
    summary = engine.add(engine.scale(engine.largest(keys, 2), 0.6), engine.scale(keys[:, :, 0], 0.3))
    return engine.scores(secret(engine, 2, 1, 8), engine.fixed(summary))


PROGRAMS = {
    "attend": attend,
    "evict": evict,
    "summarise": summarise,
    "search": lambda engine: engine.top(secret(engine, 2, PAIRS + 44), 100),
    "tournament": lambda engine: engine.top(secret(engine, 2, 90), 1),
    "gather": lambda engine: engine.gather(engine.best(secret(engine, 2, 9), 2), secret(engine, 2, 9, 5)),
    "multiply": lambda engine: engine.multiply(secret(engine, 4, 5), secret(engine, 4, 1)),
    "choose": lambda engine: engine.choose(engine.above(secret(engine, 9), 0.5), *2 * [secret(engine, 9)]),
    "functions": lambda engine: [engine.sigmoid(secret(engine, 9)), engine.reciprocal(secret(engine, 9), 1, 30)],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_engine_cost_counts_what_the_parties_count(name):
    real = run(PROGRAMS[name], engine=True)
    links = Links()
    engine = CostEngine(links)
    with engine.section("test"):
        PROGRAMS[name](engine)
    for party in (OWNER, CLIENT):
        found, expected = links.meters[party].snapshot(), real.traffic[party]
        for channel in ("online", "dealer"):
            counts = [
                Counter({field: getattr(getattr(seen, channel), field) for field in ("bytes_sent", "bytes_received")})
                for seen in (found, expected)
            ]
            assert counts[0] == counts[1], channel
        assert found.online.rounds == expected.online.rounds
    assert real.results[DEALER] is not None


def test_rounds_of_one_choice_of_clusters():
    """MPCache's two levels: coarse clusters, those that are opened up, their fine ones, scores, weights back."""

    def job(engine):
        likeness, coarse = secret(engine, 2, 30), secret(engine, 2, 15)
        scores, weights = secret(engine, 2, 3, 240), engine.softmax(secret(engine, 2, 3, 48))
        before = engine.meter.snapshot().online.rounds
        chosen = engine.best(coarse, 7)
        inner = engine.gather(chosen, likeness.reshape(2, 15, 2)).reshape(2, 14)
        parts = [engine.transform(chosen, torch.eye(15).repeat_interleave(2, 1) * mask) for mask in masks()]
        wide = engine.cat([part.reshape(2, 7, 1, 30) for part in parts], 2).reshape(2, 14, 30)
        picks = engine.gather(engine.best(inner, 6), wide)
        choice = Choice(torch.zeros(0, dtype=torch.int64), picks, 0, 8)
        engine.gather_scores(choice, scores)
        engine.scatter_weights(choice, weights, 240)
        return engine.meter.snapshot().online.rounds - before

    assert run(job, engine=True).results[CLIENT] == 10


def masks():
    even = torch.arange(30) % 2 == 0
    return even.float(), (~even).float()
