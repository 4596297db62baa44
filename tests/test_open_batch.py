"""Requests that join while others run: each has the answer that it has alone, and what passed meanwhile as its cost."""

import itertools
import random
from contextlib import closing

import pytest
from hf_models import with_template
from test_batches import clear_ids

from crypten_llm import PrivateLlama, memory
from crypten_llm.errors import UsageError
from crypten_llm.session import scheduler
from crypten_llm.session.open_batch import Done, Joined, OpenBatch, Refused
from crypten_llm.session.prompted import Progress, Step
from crypten_llm.session.report import ledger
from crypten_llm.session.request import Request


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def plain(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        yield llama


@pytest.fixture(scope="module")
def wire(model):
    with PrivateLlama.from_pretrained(str(model), engine="wire", timeout=60, threads=1) as llama:
        yield llama


@pytest.fixture(params=["plain", "wire"])
def llama(request):
    return request.getfixturevalue(request.param)


def play(llama, arrivals, room=100, watch=lambda batch, event: None):
    """arrivals: at which pass each asked one wants in, those at 0 first. Events, and results by number of arrival."""
    waiting = [(when, number, asked) for number, (when, asked) in enumerate(arrivals)]
    order, passes, most = [], itertools.count(1), 0

    def more(inside):
        nonlocal most
        most, now = max(most, inside), next(passes)
        due = [each for each in waiting if each[0] <= now][: max(0, room - inside)]
        for each in due:
            waiting.remove(each)
        order.extend(number for _, number, _ in due)
        return [asked for _, _, asked in due]

    first = [each for each in waiting if each[0] == 0]
    waiting = waiting[len(first) :]
    order.extend(number for _, number, _ in first)
    batch = OpenBatch(llama, [asked for _, _, asked in first], more)
    events = []
    with closing(batch.run()) as running:
        for event in running:
            events.append(event)
            watch(batch, event)
    results = {order[event.place]: event.result for event in events if isinstance(event, Done)}
    assert most <= room
    return events, results


def test_answers_are_those_of_each_alone(llama, plain):
    draw = random.Random(f"{llama.protocol.engine}")
    arrivals, expected = [], {}
    for number in range(6):
        length, new = draw.randint(1, 12), draw.randint(1, 5)
        ids, answer = clear_ids(plain, length, new)
        hides, chunk = draw.random() < 0.3, draw.choice((2, 5, 128))
        request = Request(input_ids=ids, max_new_tokens=new, prefill_chunk=chunk, hide_length=hides, eos_token_id=[])
        arrivals.append((0 if number < 2 else draw.randint(1, 8), llama.prepare(request)))
        expected[tuple(ids), new] = answer
    arrivals.sort(key=lambda each: each[0])
    events, results = play(llama, arrivals, room=3)
    assert sorted(results) == list(range(6))
    for number, (_, asked) in enumerate(arrivals):
        assert results[number].token_ids == expected[tuple(asked.ids), asked.plan.max_new_tokens]
        assert results[number].finish_reason == "length" and 1 <= results[number].prompts <= 3
    assert max(found.prompts for found in results.values()) > 1
    places = [event.place for event in events if isinstance(event, Joined)]
    assert places == list(range(6)), "places are given in the order of joining"
    for place in places:  # a token at a time, and of one that hides its length all after its last
        mine = [event for event in events if getattr(event, "prompt", getattr(event, "place", None)) == place]
        assert isinstance(mine[0], Joined) and isinstance(mine[-1], Done)
        steps = [event for event in mine if isinstance(event, Step)]
        assert [step.index for step in steps] == list(range(len(steps)))
        assert [step.token_id for step in steps] == mine[-1].result.token_ids
        read = [event for event in mine if isinstance(event, Progress)]
        assert read[-1].done == read[-1].total


def test_a_pass_has_one_chunk_of_one_newcomer_and_the_rounds_of_one_token(wire, plain):
    """So a newcomer's prompt, however long, holds the others up for no more than that."""
    (short, answer), (long, _) = clear_ids(plain, 4, 8), clear_ids(plain, 40, 2)
    runs = wire.prepare(Request(input_ids=short, max_new_tokens=8, eos_token_id=[], hide_length=False))
    reads = wire.prepare(
        Request(input_ids=long, max_new_tokens=2, prefill_chunk=10, eos_token_id=[], hide_length=False)
    )
    events, results = play(wire, [(0, runs), (1, reads), (1, reads)])
    assert results[0].token_ids == answer
    steps = [event for event in events if isinstance(event, Step) and event.prompt == 0]
    rounds = [after.rounds - before.rounds for before, after in itertools.pairwise(steps)]
    assert len(set(rounds)) <= 2 and max(rounds) - min(rounds) <= 2, "a choice beside it, and nothing more"
    reading = [event.prompt for event in events if isinstance(event, Progress)]
    assert reading == [0, 1, 1, 1, 1, 2, 2, 2, 2], "one after the other"
    firsts = [place for place, event in enumerate(events) if isinstance(event, Step) and event.prompt == 0]
    between = [sum(isinstance(event, Progress) for event in events[a:b]) for a, b in itertools.pairwise(firsts)]
    assert max(between) == 1


def test_the_cost_of_each_is_what_passed_while_it_was_in(wire, plain):
    ids, _ = clear_ids(plain, 6, 4)
    asked = wire.prepare(Request(input_ids=ids, max_new_tokens=4, eos_token_id=[], hide_length=False))
    alone = wire.generate(input_ids=ids, max_new_tokens=4, eos_token_id=[], hide_length=False)
    _, one = play(wire, [(0, asked)])
    steps = 4  # of one open batch: after each the client says more than in a closed one, in the same message
    assert one[0].cost.rounds() - alone.cost.rounds() <= steps and one[0].prompts == 1
    assert one[0].cost.dealer_bytes() == alone.cost.dealer_bytes()
    _, apart = play(wire, [(0, asked), (8, asked)])
    assert len(apart) == 1, "the batch had ended before the second wanted in"
    _, both = play(wire, [(0, asked), (2, asked)])
    for number in (0, 1):
        assert both[number].prompts == 2
        assert one[0].cost.dealer_bytes() < both[number].cost.dealer_bytes() < 2 * one[0].cost.dealer_bytes()
        times = {entry["what"]: entry["times"] for entry in both[number].revealed}
        assert 4 < times["logits of each generated token"] < 8
    load = wire.party.load_reveals.as_list()
    listed = {entry["what"]: entry["times"] for entry in ledger(load, [both[0].revealed])}
    assert listed["architecture (config.json)"] == 1


def test_who_leaves_ends_at_the_next_token_and_the_others_go_on(llama, plain):
    ids, answer = clear_ids(plain, 5, 6)

    def ask(**settings):
        return llama.prepare(Request(input_ids=ids, max_new_tokens=6, eos_token_id=[], **settings))

    def watch(batch, event):
        if isinstance(event, Step) and event.prompt == 1 and event.index == 1:
            batch.leave(1)
        if isinstance(event, Joined) and event.place in (2, 3):
            batch.leave(event.place)  # before a token was drawn: also where the length is hidden

    arrivals = [(0, ask(hide_length=False)), (0, ask(hide_length=False)), (0, ask(hide_length=True)), (1, ask())]
    _, results = play(llama, arrivals, watch=watch)
    assert results[0].token_ids == answer and len(results[1].token_ids) == 2
    assert results[1].finish_reason == "left"
    assert len(results[2].token_ids) <= 1 and len(results[3].token_ids) <= 1
    assert llama.generate(input_ids=ids, max_new_tokens=6, eos_token_id=[]).token_ids == answer


def test_who_comes_does_not_wait_for_hidden_answers_that_nobody_reads(llama, plain):
    (ids, answer), (long, _) = clear_ids(plain, 5, 2), clear_ids(plain, 5, 12)
    hidden = llama.prepare(Request(input_ids=long, max_new_tokens=12, eos_token_id=[], hide_length=True))
    asked = llama.prepare(Request(input_ids=ids, max_new_tokens=2, eos_token_id=[], hide_length=False))
    passes = itertools.count()

    def more(inside):
        number = next(passes)
        if number == 1:
            batch.leave(0)  # it has drawn a token, and so runs on to its last
        return [asked] if number == 2 else []

    batch = OpenBatch(llama, [hidden], more)
    with closing(batch.run()) as running:
        ended = [event for event in running if isinstance(event, Done)]
    assert [event.place for event in ended] == [1, 0] and ended[0].result.token_ids == answer


def test_a_batch_that_is_left_leaves_the_session_usable(llama, plain):
    ids, answer = clear_ids(plain, 5, 6)
    asked = llama.prepare(Request(input_ids=ids, max_new_tokens=6, eos_token_id=[], hide_length=False))
    batch = OpenBatch(llama, [asked, asked], lambda inside: [asked] * (3 - inside))
    with closing(batch.run()) as running:
        for event in running:
            if isinstance(event, Step) and event.prompt == 1:
                with pytest.raises(UsageError, match="another stream of this session is still being read"):
                    llama.generate("a")
                break
    assert llama.generate(input_ids=ids, max_new_tokens=6, eos_token_id=[]).token_ids == answer


def test_a_newcomer_that_does_not_fit_is_refused_alone(llama, plain, monkeypatch):
    ids, answer = clear_ids(plain, 5, 3)
    asked = llama.prepare(Request(input_ids=ids, max_new_tokens=3, eos_token_id=[], hide_length=False))
    check, calls = memory.check, itertools.count()

    def refuse_the_second(*given):
        if next(calls) == 1:
            raise UsageError("too large")
        check(*given)

    monkeypatch.setattr(memory, "check", refuse_the_second)
    events, results = play(llama, [(0, asked), (1, asked), (1, asked)])
    assert [str(event.error) for event in events if isinstance(event, Refused)] == ["too large"]
    assert [found.token_ids for found in results.values()] == [answer] * 2


@pytest.mark.parametrize("stop, join", [((7,), ()), ((1,), ()), ((0, 0), ())])
def test_others_refuse_what_no_client_says(stop, join):
    """A place that nobody has, or one that has hidden its length and drawn a token."""

    class Answer:
        finished = abandoned = False

    class Transport:
        def announce(self, *_):
            return scheduler.Next(stop, join)

        def unexpected(self, rank, what):
            return RuntimeError(f"{rank} {what}")

    class Party:
        transport, client, peers = Transport(), 1, [1]

        def admit(self, plans, turns, inside, running):
            assert not plans and not turns and not running

    class Each:
        is_last, is_read = False, True
        answer = turn = None

        def __init__(self, hides):
            self.plan = type("Plan", (), {"hide_length": hides})

    inside = {0: Each(False), 1: Each(True)}
    if stop == (0, 0):
        assert scheduler._agree(Party(), inside, None)[0] == (0,)
        return
    with pytest.raises(RuntimeError, match="1 who ends and who joins"):
        scheduler._agree(Party(), inside, None)


def test_nobody_hears_of_a_batch_that_cannot_begin(llama, plain, monkeypatch):
    """One that does not fit this machine, and one while the parties do something else."""
    ids, answer = clear_ids(plain, 5, 3)
    asked = llama.prepare(Request(input_ids=ids, max_new_tokens=3, eos_token_id=[], hide_length=False))
    with monkeypatch.context() as patched:
        patched.setattr(memory, "check", lambda needed, what, device: (_ for _ in ()).throw(UsageError("too large")))
        with pytest.raises(UsageError, match="too large"):
            play(llama, [(0, asked)])
    with closing(llama.stream(input_ids=ids, max_new_tokens=3)) as stream:
        next(stream)
        with pytest.raises(UsageError, match="another stream of this session is still being read"):
            play(llama, [(0, asked)])
    assert play(llama, [(0, asked)])[1][0].token_ids == answer
