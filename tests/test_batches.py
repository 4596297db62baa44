"""Several prompts at once: each answer is the prompt's alone, and together they take the rounds of the longest."""

import itertools
import json

import pytest
import torch
from hf_models import with_template

from crypten_llm import PrivateLlama
from crypten_llm.errors import UsageError
from crypten_llm.session.batches import requests_of
from crypten_llm.session.prompted import Progress, Step
from crypten_llm.session.request import Request

MARGIN = 0.1  # of logits, between the chosen token and the next: many times what a private engine is off


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("batch"))


@pytest.fixture(scope="module")
def plain(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        yield llama


@pytest.fixture(scope="module", params=["wire", pytest.param("crypten", marks=pytest.mark.slow)])
def private(model, request):
    with PrivateLlama.from_pretrained(str(model), engine=request.param, timeout=60, threads=1) as llama:
        yield llama


def clear_ids(plain, length, new):
    """Ids of a prompt whose greedy answer has no close call, and that answer."""
    for seed in itertools.count(length):
        ids = torch.randint(3, 2048, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        found = plain.generate(input_ids=ids, max_new_tokens=new, logprobs=2)
        if min(step.top[0][1] - step.top[1][1] for step in found.logprobs) > MARGIN:
            return ids, found.token_ids
    raise AssertionError


SIZES = [
    [(9, 3, 128), (9, 3, 128)],
    [(9, 3, 128), (4, 2, 128)],
    [(3, 1, 128), (12, 4, 5), (7, 2, 2)],
    [(2, 5, 128), (11, 1, 3)],
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_answers_are_those_of_the_prompts_alone(private, plain, sizes):
    """sizes: of each prompt its tokens, those of the answer, and of a chunk."""
    made = [clear_ids(plain, tokens, new) for tokens, new, _ in sizes]
    requests = [
        Request(input_ids=ids, max_new_tokens=new, prefill_chunk=chunk)
        for (ids, _), (_, new, chunk) in zip(made, sizes, strict=True)
    ]
    beside = private.generate(requests)
    assert [found.token_ids for found in beside] == [expected for _, expected in made]
    assert {found.prompts for found in beside} == {len(sizes)}
    assert {found.finish_reason for found in beside} == {"length"}
    alone = [private.generate([request])[0] for request in requests]
    if private.protocol.engine == "wire":
        for phase in ("prefill", "decode"):
            rounds = [found.cost.rounds((phase,)) for found in alone]
            together = beside[0].cost.rounds((phase,))
            assert together < sum(rounds) or not min(rounds)
            # A chunk takes the same rounds whatever its size, and a step is a step: the longest decides.
            assert together == max(rounds), (phase, rounds)
        sent = sum(max(found.cost.bytes_sent()) for found in alone)
        assert 0.9 * sent < max(beside[0].cost.bytes_sent()) <= sent
    said = [entry["what"] for entry in beside[0].revealed]
    assert f"{len(sizes)} prompts at once" in said
    times = {entry["what"]: entry["times"] for entry in beside[0].revealed}
    assert times["logits of each generated token"] == sum(new for _, new, _ in sizes)
    lengths = [f"prompt length: {tokens} tokens" for tokens, _, _ in sizes]
    assert {what: times[what] for what in lengths} == {what: lengths.count(what) for what in lengths}


def test_two_prompts_take_the_rounds_of_one(private, plain):
    """By the meter of either party, to the round."""
    if private.protocol.engine != "wire":
        pytest.skip("only wire shares rounds")
    ids, expected = clear_ids(plain, 10, 4)
    one = private.generate(input_ids=ids, max_new_tokens=4)
    rounds = private.party.transport.meter.snapshot().online.rounds
    two = private.generate(input_ids=[ids, ids], max_new_tokens=4)
    assert private.party.transport.meter.snapshot().online.rounds == rounds > 0
    assert one.token_ids == expected and [found.token_ids for found in two] == [expected] * 2
    for rank in (0, 1):
        tables = [found.cost.ranks[rank]["table"] for found in (one, two[0])]
        assert len({sum(row["rounds"] for row in table) for table in tables}) == 1


def test_an_answer_that_ends_early_is_nobodys_burden(private, plain):
    """Its stop token ends it, and the steps of the others go on with less."""
    ids, tokens = clear_ids(plain, 8, 5)
    longer, _ = clear_ids(plain, 6, 5)
    assert tokens[1] not in tokens[:1]
    stopped = Request(input_ids=ids, max_new_tokens=5, eos_token_id=tokens[1], hide_length=False)
    other = Request(input_ids=longer, max_new_tokens=5, eos_token_id=[], hide_length=False)
    found = private.generate([stopped, other, stopped])
    assert [len(each.token_ids) for each in found] == [2, 5, 2]
    assert [each.finish_reason for each in found] == ["stop", "length", "stop"]
    hidden = private.generate(
        [stopped, other, Request(input_ids=ids, max_new_tokens=4, eos_token_id=tokens[1], hide_length=True)]
    )
    assert [each.token_ids for each in hidden] == [each.token_ids for each in found]
    said = [entry["what"] for entry in hidden[0].revealed]
    assert "upper bound of the answer's length: 4" in said and "number of generated tokens: 2" in said


def test_events_say_whose_they_are(plain):
    requests = [Request(input_ids=[5 + i] * (i + 2), max_new_tokens=i + 1, prefill_chunk=2) for i in range(5)]
    events = list(plain.stream(requests, batch_size=2))
    steps = [event for event in events if isinstance(event, Step)]
    results = plain.result
    assert [len(found.token_ids) for found in results] == [1, 2, 3, 4, 5]
    for place, found in enumerate(results):
        assert [step.token_id for step in steps if step.prompt == place] == found.token_ids
        assert [step.index for step in steps if step.prompt == place] == list(range(place + 1))
    assert [step.prompt for step in steps if step.prompt < 2] == [0, 1, 1]
    assert [event for event in events if isinstance(event, Progress)][:2] == [Progress(4, 5), Progress(5, 5)]
    assert [found.prompts for found in results] == [2, 2, 2, 2, 1]


def test_one_prompt_is_a_batch_of_one(plain):
    alone, (listed,) = plain.generate("a", max_new_tokens=3), plain.generate(["a"], max_new_tokens=3)
    assert alone.token_ids == listed.token_ids and listed.prompts == 1
    (row,) = [plain.generate(input_ids=[[5, 6]], max_new_tokens=3)]
    assert row.token_ids == plain.generate(input_ids=[5, 6], max_new_tokens=3).token_ids
    both = plain.generate(input_ids=torch.tensor([[5, 6], [7, 8]]), max_new_tokens=3)
    assert both[0].token_ids == row.token_ids
    said = [[{"role": "user", "content": text}] for text in ("a", "b")]
    assert [found.token_ids for found in plain.generate(messages=said, max_new_tokens=3)] == [
        plain.generate(messages=each, max_new_tokens=3).token_ids for each in said
    ]


def test_seeds_are_each_prompts_own(plain):
    sampled = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "seed": 5}
    found = plain.generate(["a", "b", "a"], **sampled)
    assert found[0].token_ids == found[2].token_ids == plain.generate("a", **sampled).token_ids
    assert found[1].token_ids == plain.generate("b", **sampled).token_ids


def test_a_batch_that_is_left_leaves_the_session_usable(private, plain):
    ids, expected = clear_ids(plain, 5, 3)
    for event in private.stream(input_ids=[ids, ids[:3]], max_new_tokens=6):
        if isinstance(event, Step):
            break
    assert private.generate(input_ids=ids, max_new_tokens=3).token_ids == expected


def test_mistakes_in_any_prompt_come_before_the_first_is_run(private):
    events = private.stream(input_ids=[[5, 6], [5000]], max_new_tokens=2, batch_size=1)
    with pytest.raises(UsageError, match="token id 5000 is not in the vocabulary"):
        next(events)
    for prompts, arguments, message in (
        ([], {}, "the list of prompts is empty"),
        (["a", Request("b")], {}, "a list of prompts holds texts alone, or Requests alone"),
        ([Request("b")], {"max_new_tokens": 2}, "a list of prompts holds texts alone, or Requests alone"),
        (["a", " "], {}, "the prompt is empty"),
        (["a"], {"max_new": 2}, "unknown argument 'max_new'"),
    ):
        with pytest.raises(UsageError, match=message):
            requests_of(prompts, arguments)
    with pytest.raises(UsageError, match="input_ids holds 2 prompts; a request is one"):
        Request(input_ids=[[5], [6]]).ids(lambda: None)
    with pytest.raises(UsageError, match="batch_size is 0; it must be 1 or more"):
        private.stream(["a"], batch_size=0)


ASKED = {"prompt": "The passkey is 4711.", "max_new_tokens": 8, "eos_token_id": []}


def test_stop_texts_and_logprobs(plain):
    whole = plain.generate(**ASKED, logprobs=2)
    stop = whole.text[3:5]
    cut = plain.generate(**ASKED, stop=["never there", stop], logprobs=0)
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)] and len(cut.token_ids) < 8
    assert [step.token_id for step in whole.logprobs] == whole.token_ids
    assert all(len(step.top) == 2 and step.top[0] == (step.token_id, step.logprob) for step in whole.logprobs)
    assert [step.top for step in cut.logprobs] == [()] * len(cut.token_ids)
    shown = "".join(event.text for event in plain.stream(**ASKED, stop=stop) if isinstance(event, Step))
    assert shown == cut.text
    printed = json.loads(json.dumps(whole.to_dict()))["logprobs"]
    assert printed[0]["token_id"] == whole.token_ids[0] and printed[0]["top"][0][0] == whole.token_ids[0]
    for wrong in (-1, True, 1.5):
        with pytest.raises(UsageError, match="logprobs is .*; it must be a number of tokens"):
            plain.generate("a", logprobs=wrong)


def test_a_hidden_length_hides_where_a_stop_text_ended_it(plain):
    whole = plain.generate(**ASKED)
    hidden = plain.generate(**ASKED, stop=whole.text[3:5], hide_length=True)
    assert hidden.text == whole.text[: whole.text.index(whole.text[3:5])] and hidden.finish_reason == "stop"
    said = [entry["what"] for entry in hidden.revealed]
    assert "upper bound of the answer's length: 8" in said
