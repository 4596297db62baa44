"""Private generation on real parties equals ``plain`` token by token, and its counters and reveals are right."""

import socket

import party_jobs
import pytest
import torch
from hf_models import options, tiny
from parties import run

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links.transport import Transport
from crypten_llm.session.generation import agree
from crypten_llm.session.generation import run as generation_run
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Answer, Progress, Step
from crypten_llm.session.sampling import Sampler, SamplingConfig

IDS = torch.randint(3, 97, (40,), generator=torch.Generator().manual_seed(7)).tolist()
GREEDY, SAMPLED = {}, {"do_sample": True, "temperature": 0.7, "top_k": 20, "seed": 11}
MARGIN = 0.15  # of the logits, between the chosen token and the next: ten times what the private engine is off


def plan(tokens, new, **options):
    return {"prompt_tokens": tokens, "max_new_tokens": new, **options}


class Plain:
    """The reference: one process, engine ``plain``."""

    def __init__(self, folder):
        self.party = Party(PlainEngine())
        self.party.load(folder)

    def events(self, plan, ids, sampling=GREEDY, stop_ids=()):
        self.party.start_request()
        sampler, self.margins = Sampler(SamplingConfig(**sampling)), []

        def choose(logits):
            best = logits.topk(2).values
            self.margins.append((best[0] - best[1]).item())
            return sampler(logits)

        return list(generation_run(self.party, Plan(**plan), Answer(ids, choose, stop_ids)))

    def tokens(self, *request):
        return [event.token_id for event in self.events(*request) if isinstance(event, Step)]


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    folder, _ = tiny(tmp_path_factory.mktemp("gqa"), num_hidden_layers=1)
    return str(folder), Plain(folder)


def clear_prompt(plain, length, new, **options):
    """A prompt of this length whose greedy answer has no close call, so that equality is not luck."""
    for start in range(len(IDS) - length):
        ids = IDS[start : start + length]
        tokens = plain.tokens(plan(length, new, **options), ids)
        if min(plain.margins) > MARGIN:
            return ids, tokens
    raise AssertionError("no prompt with clear margins: choose another seed")


@pytest.mark.parametrize("model", [options("mha", "tied", "attention_bias"), options("mqa", "mlp_bias")])
def test_private_tokens_equal_plain(tmp_path, model):
    folder, _ = tiny(tmp_path, **model)
    ids, expected = clear_prompt(Plain(folder), 6, 3)
    outcome = run(party_jobs.generate, 2, str(folder), [(plan(6, 3), ids, GREEDY, ())])
    assert outcome[1][0]["tokens"] == expected


def test_three_compute_parties(gqa):
    folder, plain = gqa
    ids, expected = clear_prompt(plain, 4, 2)
    outcome = run(party_jobs.generate, 3, folder, [(plan(4, 2), ids, GREEDY, ())], parties=3)
    assert outcome[1][0]["tokens"] == expected
    assert outcome[0][0]["tokens"] == outcome[2][0]["tokens"] == []


def test_requests_of_one_session(gqa):
    """Chunked prefill, sampling, stop tokens and a hidden length, one after another on the same shares."""
    folder, plain = gqa
    ids, greedy = clear_prompt(plain, 9, 3)
    sampled = plain.tokens(plan(9, 2), ids, SAMPLED)
    assert sampled != greedy[:2]
    stop = (greedy[1],)
    assert greedy[0] not in stop
    requests = [
        (plan(9, 3), ids, GREEDY, ()),
        (plan(9, 3, chunk=5), ids, GREEDY, ()),
        (plan(9, 2), ids, SAMPLED, ()),
        (plan(9, 2), ids, SAMPLED, ()),
        (plan(9, 3), ids, GREEDY, stop),
        (plan(9, 3, hide_length=True), ids, GREEDY, stop),
    ]
    owner, client = run(party_jobs.generate, 2, folder, requests)
    whole, chunked, first, second, stopped, hidden = client
    assert whole["tokens"] == chunked["tokens"] == greedy
    assert first["tokens"] == second["tokens"] == sampled
    assert stopped["tokens"] == hidden["tokens"] == greedy[:2]
    assert stopped["finish_reason"] == hidden["finish_reason"] == "stop"
    assert whole["finish_reason"] == "length"

    # The counters start anew with each request: the same request costs the same.
    assert first["online"].rounds == second["online"].rounds
    assert first["online"].bytes_sent == second["online"].bytes_sent
    # A hidden length runs every step; what the others do does not depend on where the answer ended.
    embeddings = [row for row in hidden["table"] if row["kind"] == "embedding" and row["phase"] == "decode"]
    assert embeddings[0]["rounds"] == 2
    assert "stop or go" not in {row["kind"] for row in hidden["table"]}
    assert {row["phase"] for row in hidden["table"] if row["rounds"]} == {"prefill", "decode"}

    for mine in (owner, client):
        for outcome in mine:
            # The table holds all that the transport counted.
            assert sum(row["rounds"] for row in outcome["table"]) == outcome["online"].rounds
            assert sum(row["bytes_sent"] for row in outcome["table"]) == outcome["online"].bytes_sent
            received = sum(row["dealer_bytes_received"] for row in outcome["table"])
            assert received == outcome["dealer"].bytes_received
    # What one party sends online the other receives, and both list the same reveals.
    for mine, theirs in zip(owner, client, strict=True):
        assert mine["online"].bytes_sent == theirs["online"].bytes_received
        assert mine["online"].bytes_received == theirs["online"].bytes_sent
        assert mine["revealed"] == theirs["revealed"]
    # The last step has seen the whole cost.
    assert whole["last_step"].rounds == whole["online"].rounds
    assert whole["last_step"].bytes_sent == whole["online"].bytes_sent


DECLARED = {
    ("all", "architecture (config.json)"),
    ("all", "one power of four per RMSNorm, near the size of its input"),
    ("all", "prompt length: 5 tokens"),
    ("all", "request: at most 3 new tokens, prefill by 2, policy full"),
    ("client", "logits of each generated token"),
    ("all", "number of generated tokens: 2"),
    ("all", "upper bound of the answer's length: 3"),
}


@pytest.mark.parametrize("hide_length", [False, True])
def test_nothing_undeclared_is_revealed(gqa, hide_length):
    folder, plain = gqa
    ids, greedy = clear_prompt(plain, 5, 3)
    stop = (greedy[1],) if greedy[1] != greedy[0] else ()
    assert stop
    request = (plan(5, 3, chunk=2, hide_length=hide_length), ids, GREEDY, stop)
    revealed = run(party_jobs.generate, 2, folder, [request])[1][0]["revealed"]
    found = {(entry["to"], entry["what"]) for entry in revealed}
    assert found <= DECLARED
    length = "upper bound of the answer's length: 3" if hide_length else "number of generated tokens: 2"
    assert ("all", length) in found
    assert len(found) == 6 and all(entry["why"] for entry in revealed)
    logits = next(entry for entry in revealed if entry["to"] == "client")
    assert logits["times"] == (3 if hide_length else 2)


def test_events_in_order(gqa):
    _, plain = gqa
    events = plain.events(plan(9, 3, chunk=4), IDS[:9])
    assert events[:3] == [Progress(4, 9), Progress(8, 9), Progress(9, 9)]
    assert [event.index for event in events[3:]] == [0, 1, 2]
    assert [event.finish_reason for event in events[3:]] == [None, None, "length"]


@pytest.mark.parametrize("end", [0, 2, 5])
def test_with_a_hidden_length_every_step_is_alike(gqa, end):
    """Wherever the answer ends, each step draws a token."""
    _, plain = gqa
    plain.party.start_request()
    drawn, seen = [], []

    def choose(logits):
        drawn.append(logits)
        return 2 if len(drawn) == end + 1 else 7

    for event in generation_run(plain.party, Plan(5, 6, hide_length=True), Answer(IDS[:5], choose, (2,))):
        if isinstance(event, Step):
            seen.append(event)
    assert len(drawn) == 6
    assert [step.token_id for step in seen] == [7] * end + [2]
    assert [step.finish_reason for step in seen] == [None] * end + ["stop"]


@pytest.mark.parametrize(
    "message",
    [
        {"verb": "close"},
        {"stop": 1},
        {"stop": True},
        {"stop": []},
        {"stop": [1]},
        {"stop": [False]},
        {},
        ["stop"],
        None,
    ],
)
def test_another_message_than_the_agreement(message):
    ours, theirs = socket.socketpair()
    roles = ("owner", "client")
    owner, client = Transport(0, roles, {1: ours}, timeout=5), Transport(1, roles, {0: theirs}, timeout=5)
    client.send_json(0, message)
    with pytest.raises(PartyError, match=r"rank 1 \(client\) sent something else than .* the same version"):
        agree(Party(PlainEngine(), owner, 2), {0: None})
    owner.close(), client.close()


def test_an_abandoned_answer_ends_at_the_next_token(gqa):
    _, plain = gqa
    plain.party.start_request()
    answer = Answer(IDS[:5], Sampler(SamplingConfig()))
    seen = []
    for event in generation_run(plain.party, Plan(5, 8), answer):
        seen.append(event)
        answer.abandoned = len(seen) == 2
    assert len(seen) == 2


def test_a_prompt_that_does_not_fit_is_refused(gqa):
    _, plain = gqa
    config = plain.party.model.config
    assert Plan(60, 4).check(config)
    with pytest.raises(UsageError, match="shorten the prompt by 1 tokens or lower max_new_tokens"):
        Plan(60, 5).check(config)
    with pytest.raises(UsageError, match="the prompt is empty"):
        Plan(0, 4).check(config)
