"""``PrivateLlama`` as a program uses it: one private session, many requests, mistakes that do not end it."""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hf_models import with_tokenizer

from crypten_llm import PrivateLlama
from crypten_llm.errors import UsageError
from crypten_llm.session.api import Request
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Progress, Step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def plain(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        yield llama


@pytest.fixture(scope="module", params=["crypten", "wire"])
def private(model, request):
    with PrivateLlama.from_pretrained(str(model), engine=request.param, timeout=60, threads=1) as llama:
        yield llama


PROMPT = "The passkey is 4711."


def test_generate_equals_plain(private, plain):
    answer, expected = (llama.generate(PROMPT, max_new_tokens=3) for llama in (private, plain))
    assert answer.token_ids == expected.token_ids
    assert answer.text == expected.text == plain.tokenizer.decode(expected.token_ids, skip_special_tokens=True)
    assert answer.prompt_tokens == len(plain.encode(PROMPT))
    assert min(answer.seconds["load"], answer.seconds["prefill"], answer.seconds["per_token"]) > 0
    assert json.loads(json.dumps(answer.to_dict()))["online"]["rounds"] == answer.cost.rounds()


def dealer_agrees(result):
    """The dealer's own counters agree with what the parties saw on their links to it."""
    dealer = result.cost.ranks[-1]
    sent = sum(row["dealer_bytes_sent"] for row in dealer["table"])
    received = sum(row["dealer_bytes_received"] for entry in result.cost.ranks[:2] for row in entry["table"])
    assert dealer["rank"] == 2 and sent == received > 0


def test_each_request_is_counted_alone(private):
    request = {"input_ids": [5, 6, 7], "max_new_tokens": 2}
    first, second = private.generate(**request), private.generate(**request)
    assert first.cost.rounds() == second.cost.rounds() > 0
    assert first.cost.bytes_sent() == second.cost.bytes_sent()
    assert first.cost.dealer_bytes() == second.cost.dealer_bytes() > 0
    assert first.revealed == second.revealed
    dealer_agrees(second)
    # The table's rows add up to the totals.
    for phase in ("prefill", "decode"):
        rows = [row for row in second.cost.table() if row["phase"] == phase]
        assert sum(row["dealer_bytes"] for row in rows) == second.cost.dealer_bytes((phase,))
        assert max(second.cost.bytes_sent((phase,))) <= sum(row["bytes_sent"] for row in rows)


def test_a_stream_that_is_left_leaves_the_session_usable(private, plain):
    request = {"input_ids": [9, 8, 7, 6], "max_new_tokens": 3}
    for event in private.stream(**request):
        if isinstance(event, Step):
            break
    for event in private.stream(**request, hide_length=True, prefill_chunk=2):
        if isinstance(event, Progress):
            break
    answer = private.generate(**request)
    assert answer.token_ids == plain.generate(**request).token_ids
    dealer_agrees(answer)


def test_with_a_hidden_length_nothing_is_sent_while_tokens_are_read(private):
    request = {"input_ids": [9, 8, 7, 6], "max_new_tokens": 3}
    expected = private.generate(**request).token_ids
    tokens, sent = [], set()
    for event in private.stream(**request, hide_length=True):
        if isinstance(event, Step):
            tokens.append(event.token_id)
            sent.add(sum(link.sent.frames + link.received.frames for link in private.party.transport._links.values()))
    assert tokens == expected
    sent.add(sum(link.sent.frames + link.received.frames for link in private.party.transport._links.values()))
    assert len(sent) == 1


def test_events(private):
    events = list(private.stream(input_ids=[5, 6, 7], max_new_tokens=2, prefill_chunk=2))
    assert events[:2] == [Progress(2, 3), Progress(3, 3)]
    first, last = events[2:]
    assert (first.index, last.index, first.finish_reason, last.finish_reason) == (0, 1, None, "length")
    assert 0 < first.rounds < last.rounds and 0 < first.bytes_sent < last.bytes_sent
    assert [first.token_id, last.token_id] == private.result.token_ids


def test_mistakes_leave_the_session_usable(private):
    for mistake in (
        {"input_ids": [5000]},
        {"input_ids": [True]},
        {"input_ids": [5] * 64},
        {"input_ids": []},
        {"prompt": " "},
        {},
        {"prompt": "a", "input_ids": [5]},
        {"prompt": "a", "policy": "none"},
        {"prompt": ["a", 7]},
        {"prompt": []},
        {"prompt": ["a"], "batch_size": 0},
        {"prompt": 7},
        {"input_ids": [5], "chat": True},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": "hi"},
        {"prompt": "a", "messages": [{"role": "user", "content": "hi"}]},
    ):
        with pytest.raises(UsageError):
            private.generate(**mistake)
    with pytest.raises(UsageError, match="unknown argument 'max_new_token'; did you mean 'max_new_tokens'?"):
        private.generate("a", max_new_token=3)
    stream = private.stream(input_ids=[5], max_new_tokens=1)
    next(stream)
    with pytest.raises(UsageError, match="another stream of this session is still being read"):
        private.generate(input_ids=[5])
    stream.close()
    assert len(private.generate(input_ids=[5], max_new_tokens=1).token_ids) == 1


@pytest.mark.parametrize("prompt", [{"a": 1}, b"a", 7])
def test_what_is_no_prompt_is_one_clear_line(plain, prompt):
    with pytest.raises(UsageError, match=f"the prompt is a {type(prompt).__name__}; give a text, or a list of texts"):
        plain.generate(prompt)


def test_threads_that_ask_at_once_leave_the_session_usable(private, plain):
    request = {"input_ids": [9, 8, 7, 6], "max_new_tokens": 8}
    expected = plain.generate(**request).token_ids
    shape, together = Shape(16, 2, 1, 24, kv_len=8, steps=1), Barrier(4)

    def ask(which):
        together.wait(20)
        try:
            return private.bench(shape) if which == "bench" else private.generate(**request).token_ids
        except UsageError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        *answers, bench = pool.map(ask, ["generate"] * 3 + ["bench"])
    served = [answer for answer in answers if answer == expected]
    refused = [answer for answer in [*answers, bench] if isinstance(answer, str)]
    assert len(served) + len(refused) + isinstance(bench, tuple) == 4
    assert all("another stream of this session is still being read" in answer for answer in refused)
    assert private.generate(**request).token_ids == expected
    dealer_agrees(private.generate(**request))


def test_a_request_from_another_thread_while_a_stream_is_read(private, plain):
    request = {"input_ids": [9, 8, 7, 6], "max_new_tokens": 3}
    events = private.stream(**request)
    next(events)
    with ThreadPoolExecutor(1) as pool:
        for ask in (lambda: private.generate(**request), lambda: private.bench(Shape(16, 2, 1, 24))):
            with pytest.raises(UsageError, match="still being read"):
                pool.submit(ask).result()
    tokens = [event.token_id for event in events if isinstance(event, Step)]
    assert tokens == plain.generate(**request).token_ids == private.generate(**request).token_ids


def test_one_session_of_crypten_in_a_process(private, model):
    if private.protocol.engine != "crypten":
        pytest.skip("only CrypTen keeps its state in module globals")
    with pytest.raises(UsageError, match="already has a private session"):
        PrivateLlama.from_pretrained(str(model), engine="crypten")
    assert private.generate(input_ids=[5], max_new_tokens=1)


def test_the_consumer_of_a_stream_is_not_in_inference_mode(plain):
    for _ in plain.stream(input_ids=[5], max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()


def test_unknown_settings_suggest_the_nearest(model):
    with pytest.raises(UsageError, match="unknown setting 'timeuot'; did you mean 'timeout'?"):
        PrivateLlama.from_pretrained(str(model), timeuot=3)
    with pytest.raises(UsageError, match="unknown setting 'precision_bit'; did you mean 'precision_bits'?"):
        PrivateLlama.from_pretrained(str(model), precision_bit=12)


def test_a_request_is_refused_without_a_model():
    with pytest.raises(UsageError, match="temperature"):
        Request("a", do_sample=True, temperature=-1.0)
    assert Request("a").plan(7) == Plan(7, 32, 128, False, "full")
