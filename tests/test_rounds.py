"""Rounds that are shared: programs side by side take as many as the longest of them, and nothing of each other."""

import pytest
import torch
from hf_models import CASES, tiny
from test_wire_engine import load
from wire_parties import CLIENT, DEALER, OWNER, joined, run, share

import eviction
from crypten_llm.engines.wire.counted import CostEngine, Links
from crypten_llm.links.frames import HEADER
from crypten_llm.protocols import products, selection
from crypten_llm.protocols.comparison import ordered
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Rounds
from crypten_llm.protocols.secret import as_secret

BASES = [torch.arange(-3, 4), torch.arange(5), torch.full((11,), 2)]
PARTIES = (OWNER, CLIENT)


def powers(rounds, base, exponent: int):
    """base^exponent, whose factors are opened one after the other: as many rounds, of 8 bytes an element."""
    secret = share(rounds.runtime, base)
    wires = []
    for _ in range(exponent):
        wires += rounds.open(Opening(secret))
        secret = products.multiply(rounds.runtime, wires[0], wires[-1])
    return as_secret(rounds.runtime, wires[-1]) if wires else None


def power_programs(rounds, exponents):
    return [lambda base=base, n=n: powers(rounds, base, n) for base, n in zip(BASES, exponents, strict=False)]


def sent(outcome, party):
    """Sizes of the messages to the other party."""
    return [len(frame.payload) for frame in outcome.frames[party] if frame.target in PARTIES]


@pytest.mark.parametrize(
    "exponents", [(), (1,), (4, 4), (2, 5), (5, 2), (3, 0), (0, 3), (0, 0), (3, 1, 4)], ids=lambda n: f"{n}"
)
def test_programs_take_the_rounds_of_the_longest_and_one_message_each_way_for_each(exponents):
    def job(runtime):
        rounds = Rounds(runtime)
        found = rounds.side_by_side(power_programs(rounds, exponents))
        assert not rounds.is_shared
        return found, runtime.audit.messages, runtime.audit.draws

    outcome = run(job)
    (mine, *seen), (theirs, *_), _ = outcome.results
    for base, exponent, one, other in zip(BASES, exponents, mine, theirs, strict=False):
        assert one is other is None if exponent == 0 else torch.equal(joined(one, other), base**exponent)
    longest = max(exponents, default=0)
    assert len(mine) == len(exponents) and seen == [longest, sum(exponents)], (
        "a mask for each opening, in as many rounds"
    )
    # In round k what all programs open that take so many: 8 bytes an element.
    due = [8 * sum(len(b) for b, n in zip(BASES, exponents, strict=False) if n > k) for k in range(longest)]
    for party in PARTIES:
        assert outcome.traffic[party].online.rounds == longest and sent(outcome, party) == due
    # The dealer's: a product of masks for each opening.
    assert outcome.sent(DEALER, CLIENT) == 8 * sum(len(b) * n for b, n in zip(BASES, exponents, strict=False))


def largest(rounds, integers, count):
    """The one protocol that asks for several rounds itself."""
    x = share(rounds.runtime, integers, scale=13, bits=6)
    (wire,) = rounds.open(ordered(x, 20, "top"))
    return rounds.run(selection.top(rounds.runtime, wire, count, pairs_up_to=1))


def test_protocols_of_several_rounds_beside_each_other_give_what_they_give_alone():
    x = torch.tensor([[5, 3, 900, -4, 3, 77, 0, -900, 2]])

    def job(runtime, which):
        rounds = Rounds(runtime)
        programs = [lambda: largest(rounds, x, 3), lambda: powers(rounds, BASES[0], 4), lambda: largest(rounds, -x, 2)]
        chosen = [programs[place] for place in which]
        return rounds.side_by_side(chosen) if len(chosen) > 1 else [chosen[0]()]

    alone = [run(job, [place]) for place in range(3)]
    beside = run(job, [0, 1, 2])
    assert beside.cost()[0] == max(outcome.cost()[0] for outcome in alone) > 20
    for place, outcome in enumerate(alone):
        mine, theirs = ([found.results[party] for party in PARTIES] for found in (beside, outcome))
        assert torch.equal(joined(*(r[place] for r in mine)), joined(*(r[0] for r in theirs)))
    assert joined(*(beside.results[party][0] for party in PARTIES)).tolist() == [[1, 0, 1, 0, 0, 1, 0, 0, 0]]
    for source, target in ((OWNER, CLIENT), (CLIENT, OWNER), (DEALER, CLIENT), (DEALER, OWNER)):
        assert beside.sent(source, target) == sum(outcome.sent(source, target) for outcome in alone)


def test_what_was_under_way_before_goes_on():
    """A protocol that nobody waits for yet joins the rounds of the programs, and is done with them."""

    def later(runtime, integers):
        (wire,) = yield [Opening(share(runtime, integers))]
        (wire,) = yield [Opening(products.square(runtime, wire))]
        return as_secret(runtime, wire)

    def job(runtime):
        rounds = Rounds(runtime)
        running = rounds.start(later(runtime, BASES[2]))
        rounds.side_by_side(power_programs(rounds, (1, 2)))
        return rounds.finish(running)

    outcome = run(job)
    assert outcome.cost()[0] == 2
    assert torch.equal(joined(*outcome.results[:2]), BASES[2] ** 2)


def test_programs_within_programs_share_all_rounds():
    """What each returned, in order; the rounds are those of the longest way through, whoever began whom."""

    def job(runtime):
        rounds = Rounds(runtime)

        def within(*exponents):
            before = powers(rounds, BASES[0], 2)
            return before, rounds.side_by_side(power_programs(rounds, exponents)), powers(rounds, BASES[1], 1)

        programs = [lambda: within(2, 4), lambda: powers(rounds, BASES[2], 5), lambda: within(1, 3, 2)]
        (one, fours, after), fifth, (other, threes, later) = rounds.side_by_side(programs)
        assert not rounds.is_shared
        return one, *fours, after, fifth, other, *threes, later

    outcome = run(job)
    exponents = [(0, 2), (0, 2), (1, 4), (1, 1), (2, 5), (0, 2), (0, 1), (1, 3), (2, 2), (1, 1)]
    for (base, exponent), one, other in zip(exponents, *outcome.results[:2], strict=True):
        assert torch.equal(joined(one, other), BASES[base] ** exponent)
    for party in PARTIES:
        assert outcome.traffic[party].online.rounds == len(sent(outcome, party)) == 2 + 4 + 1


@pytest.mark.parametrize("place", [0, 1])
def test_a_program_within_a_program_that_raises_ends_all(place):
    def job(runtime):
        rounds, meter = Rounds(runtime), runtime.transport.meter
        programs = [lambda: between_rounds(rounds), lambda: powers(rounds, BASES[1], 9)]
        nested = [lambda: rounds.side_by_side(programs), lambda: powers(rounds, BASES[2], 9)]
        with meter.operation("all", kind="other"):
            with pytest.raises(Stopped):
                rounds.side_by_side(nested[::-1] if place else nested)
            assert meter.where.endswith("all") and not rounds.is_shared and not rounds._running
        return powers(rounds, BASES[0], 2)

    assert torch.equal(joined(*run(job).results[:2]), BASES[0] ** 2)


# Errors.


class Stopped(Exception):
    pass


def at_once(rounds):
    raise Stopped


def between_rounds(rounds):
    powers(rounds, BASES[0], 2)
    raise Stopped


def in_a_protocol(rounds):
    def fails(runtime):
        yield [Opening(share(runtime, BASES[0]))]
        raise Stopped

    rounds.run(fails(rounds.runtime))


@pytest.mark.parametrize("fails", [at_once, between_rounds, in_a_protocol])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_program_that_raises_ends_all_and_leaves_nothing_running(fails, place):
    def job(runtime):
        rounds, meter, left, begun = Rounds(runtime), runtime.transport.meter, [], []

        def endless(number):
            begun.append(number)
            with meter.phase(f"phase {number}"), meter.operation("step", kind="other"):
                try:
                    while True:
                        powers(rounds, BASES[1], 3)
                finally:
                    left.append((number, meter.where))

        programs = [lambda number=number: endless(number) for number in range(2)]
        programs.insert(place, lambda: fails(rounds))
        with meter.phase("outer"), meter.operation("all"):
            with pytest.raises(Stopped):
                rounds.side_by_side(programs)
            assert meter.where == "outer: all"
        assert left == [(number, f"phase {number}: step") for number in begun]
        assert len(begun) == (place if fails is at_once else 2)
        assert not rounds.is_shared and not rounds._running
        before = len(runtime.transport.frames)
        found = rounds.side_by_side(power_programs(rounds, (2, 1)))
        return found, [len(f.payload) for f in runtime.transport.frames[before:] if f.target in PARTIES]

    (mine, sizes), (theirs, _), _ = run(job).results
    assert [joined(one, other).tolist() for one, other in zip(mine, theirs, strict=True)] == [
        (BASES[0] ** 2).tolist(),
        BASES[1].tolist(),
    ]
    assert sizes == [8 * (7 + 5), 8 * 7]  # nothing of those that were ended


@pytest.mark.parametrize("role", [OWNER, CLIENT, DEALER])
def test_a_program_that_raises_at_one_role_ends_the_others_too(role):
    def job(runtime):
        rounds = Rounds(runtime)

        def program():
            powers(rounds, BASES[0], 2)
            if runtime.role == role:
                raise Stopped
            powers(rounds, BASES[0], 2)

        rounds.side_by_side([lambda: powers(rounds, BASES[1], 9), program])

    with pytest.raises(Stopped):
        run(job)


# Counters.


def counted_programs(rounds, meter, seen):
    """One program in one step, and one that changes its step between its openings."""

    def note(label):
        seen.append((label, meter.where))

    def first():
        with meter.phase("prefill"), meter.operation("layer 0", kind="scores"):
            found = powers(rounds, BASES[0], 4)
            note("prefill: layer 0")
        return found

    def second():
        with meter.phase("decode"):
            with meter.operation("layer 1", kind="mlp"):
                powers(rounds, BASES[1], 1)
                note("decode: layer 1")
                with meter.operation("norm", kind="norm"):
                    powers(rounds, BASES[1], 2)
                    note("decode: layer 1 norm")
            note("decode")
            powers(rounds, BASES[2], 2)

    return first, second


def test_bytes_are_counted_where_the_protocol_was_started():
    def job(runtime):
        rounds, meter, seen = Rounds(runtime), runtime.transport.meter, []
        with meter.phase("serve"), meter.operation("both", kind="batch"):
            before = list(meter._scopes)
            rounds.side_by_side(counted_programs(rounds, meter, seen))
            assert meter._scopes == before and meter.where == "serve: both"
        assert seen and all(label == where for label, where in seen)
        return {(row["phase"], row["kind"]): row for row in meter.table()}

    outcome = run(job)
    due = {("prefill", "scores"): 4 * 7, ("decode", "mlp"): 5, ("decode", "norm"): 2 * 5, ("decode", "other"): 2 * 11}
    for party in PARTIES:
        rows = outcome.results[party]
        for cell, count in due.items():
            assert rows[cell]["bytes_sent"] == rows[cell]["bytes_received"] == 8 * count, cell
            assert rows[cell]["rounds"] == 0
        shared = rows["serve", "batch"]  # which waits: rounds, and the headers of what they take
        assert (shared["rounds"], shared["bytes_sent"]) == (5, 5 * HEADER.size)
        assert sum(row["bytes_sent"] for row in rows.values()) == outcome.traffic[party].online.bytes_sent
    outcome.check_meter()
    dealt = {cell: row["dealer_bytes_received"] for cell, row in outcome.results[CLIENT].items()}
    # Products of masks are asked for in the step that multiplies; a frame of them is counted where it is waited for.
    assert sum(dealt.values()) == 8 * (4 * 7 + 3 * 5 + 2 * 11) + HEADER.size


def test_engine_cost_counts_programs_side_by_side():
    """Cell by cell: what is sent, received and dealt to both parties."""

    def job(engine):
        first, second = counted_programs(engine.rounds, engine.meter, [])
        with engine.meter.phase("serve"):
            engine.rounds.side_by_side([first, second])
        return {(row["phase"], row["kind"]): row for row in engine.meter.table()}

    outcome = run(job, engine=True)
    links = Links()
    engine = CostEngine(links)
    with engine.section("test"):
        job(engine)
    for party in PARTIES:
        counted = {(row["phase"], row["kind"]): row for row in links.meters[party].table()}
        for cell, row in outcome.results[party].items():
            names = ("rounds", "bytes_sent", "bytes_received")
            assert [row[name] for name in names] == [counted.get(cell, NOTHING)[name] for name in names], cell
        assert outcome.traffic[party].dealer.bytes_received == links.meters[party].snapshot().dealer.bytes_received


NOTHING = {"rounds": 0, "bytes_sent": 0, "bytes_received": 0}


# Prompts of a model.

TOKENS = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(7))
LONG, SHORT = ([9, 8, 1, 1, 1], 17), ([9, 8, 1], 17)  # chunks of the prompt, then decoded tokens; tokens of the prompt
OTHER = ([5, 4, 3, 1, 1], 12)
H2O, MPCACHE = "h2o(heavy=4,recent=4)", "mpcache(coarse=4,fine=2,least=0)"


def answer(model, ids, pieces, prompt: int, policy: str):
    """At the client the logits [V] after the prompt and after each decoded token."""
    engine, found, start = model.engine, [], 0
    cache = model.new_cache()
    cache.follow(eviction.parse(policy), prompt)
    for size in pieces:
        told = ids[start : start + size] if engine.rank == CLIENT or not engine.is_private else None
        start += size
        phase = "prefill" if start <= prompt else "decode"
        with engine.meter.phase(phase):
            out = model(engine.tokens(told, size, model.config.vocab_size), cache, seq_len=prompt)
            if start == prompt:
                cache.end_prompt()
            if start >= prompt:
                found.append(engine.open_to(out, CLIENT))
    return torch.cat(found) if found[0] is not None else None


def answers(engine, folder, requests):
    """The answers, the messages each way that they took, the online rounds and the bytes by (phase, kind)."""
    model = load(engine, folder)
    programs = [lambda i=i, r=r: answer(model, TOKENS[i], *r) for i, r in requests]
    taken, exchange, before = [], engine.runtime.exchange, engine.meter.snapshot().online
    with engine.section("answers"):
        engine.runtime.exchange = lambda pieces: (taken.append(len(pieces)), exchange(pieces))[1]
        found = engine.rounds.side_by_side(programs) if len(programs) > 1 else [programs[0]()]
    online = engine.meter.snapshot().online - before
    table = {(row["phase"], row["kind"]): row for row in engine.meter.table() if row["phase"] in ("prefill", "decode")}
    return found, len(taken), online, table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model"), **CASES["gqa"])[0]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((*LONG, "full"), (*LONG, "full")),
        ((*LONG, "full"), (*SHORT, "full")),
        ((*SHORT, "full"), (*OTHER, "full")),
        ((*LONG, H2O), (*SHORT, H2O)),
        ((*LONG, MPCACHE), (*OTHER, MPCACHE)),
        ((*OTHER, H2O), (*LONG, MPCACHE)),
        ((*LONG, "full"), (*LONG, MPCACHE)),
    ],
    ids=lambda request: f"{request[0]} {request[2]}",
)
def test_two_prompts_take_the_rounds_of_the_longer_and_give_the_logits_of_each(first, second, folder):
    requests = list(enumerate((first, second)))
    alone = [run(answers, folder, [request], engine=True) for request in requests]
    beside = run(answers, folder, requests, engine=True)
    for index, outcome in enumerate(alone):
        ((expected,), *_), ours = outcome.results[CLIENT], beside.results[CLIENT][0][index]
        assert ours.shape == expected.shape and expected.abs().max() > 3
        error = (ours - expected).abs()  # other masks round otherwise: two runs alone are as far from each other
        assert error.mean() < 1e-3 and error.max() < 6e-3
    for party in PARTIES:
        _, taken, online, cells = beside.results[party]
        messages, rounds = zip(*((o.results[party][1], o.results[party][2].rounds) for o in alone), strict=True)
        assert taken == max(messages)
        # Where only one of the parties sends (token ids, logits) the other's message is the other prompt's, if any.
        assert max(rounds) <= online.rounds <= taken
        if first[2] == second[2] and first[1] == second[1]:  # alike until the shorter ends
            assert online.rounds == max(rounds)
        for cell in dict.fromkeys(key for outcome in alone for key in outcome.results[party][3]):
            due = sum(payload(outcome.results[party][3].get(cell, NOTHING)) for outcome in alone)
            assert payload(cells[cell]) == due, cell
    links = Links()
    answers(CostEngine(links), folder, requests)
    for party in PARTIES:
        counted, real = links.meters[party].snapshot(), beside.traffic[party]
        assert (counted.online.rounds, counted.online.bytes_sent) == (real.online.rounds, real.online.bytes_sent)
        assert counted.dealer.bytes_received == real.dealer.bytes_received


def payload(row) -> int:
    """Bytes received of a (phase, kind), without the headers of the messages that it waited for."""
    return row["bytes_received"] - row["rounds"] * HEADER.size
