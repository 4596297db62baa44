"""``PrivateLlama`` as a program uses it: one private session, many requests, mistakes that do not end it."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hf_models import tiny
from transformers import AutoTokenizer

from crypten_llm import PrivateLlama
from crypten_llm.commands.cli import main
from crypten_llm.errors import ENDED, PartyError, UsageError
from crypten_llm.models import checkpoint
from crypten_llm.session import api
from crypten_llm.session.api import Detokenizer, Request
from crypten_llm.session.bench import Shape
from crypten_llm.session.generation import Progress, Step


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model with the shipped model's tokenizer."""
    folder, _ = tiny(tmp_path_factory.mktemp("api"), vocab_size=2048, num_hidden_layers=1, seed=3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint.SHIPPED / name, folder)
    return folder


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
            sent.add(sum(link.sent + link.received for link in private.party.transport._links.values()))
    assert tokens == expected
    sent.add(sum(link.sent + link.received for link in private.party.transport._links.values()))
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
        {"prompt": ["a", "b"]},
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


@pytest.mark.parametrize("prompts", [["a", "b"], ("a",), {"a": 1}])
def test_a_batch_of_prompts_is_one_clear_line(plain, prompts):
    with pytest.raises(UsageError, match=f"the prompt is a {type(prompts).__name__}; give one text, and one request"):
        plain.generate(prompts)


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


@pytest.fixture
def chatty(model, tmp_path):
    """The tiny model with a tokenizer that has a chat template."""
    folder = shutil.copytree(model, tmp_path / "chatty")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[answer]{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def test_chat(chatty, plain):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    with PrivateLlama.from_pretrained(str(chatty), engine="plain") as llama:
        reference = AutoTokenizer.from_pretrained(chatty)
        for arguments, messages in (({"prompt": PROMPT, "chat": True}, said[1:]), ({"messages": said}, said)):
            expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert Request(**arguments).ids(lambda: llama.tokenizer) == expected
            answer = llama.generate(**arguments, max_new_tokens=2)
            assert answer.token_ids == plain.generate(input_ids=expected, max_new_tokens=2).token_ids
        assert llama.encode(PROMPT) == plain.encode(PROMPT), "a prompt is asked as it is"
    for arguments in ({"prompt": PROMPT, "chat": True}, {"messages": said}):
        with pytest.raises(UsageError, match="the tokenizer has no chat template; ask without --chat"):
            plain.generate(**arguments)


def test_a_template_that_refuses_a_conversation(chatty):
    config = json.loads((chatty / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (chatty / "tokenizer_config.json").write_text(json.dumps(config))
    with PrivateLlama.from_pretrained(str(chatty), engine="plain") as llama:
        with pytest.raises(UsageError, match="template cannot be applied .roles must alternate"):
            llama.generate("a", chat=True)


def test_a_chat_template_that_is_not_applied_is_said(chatty, model, capsys):
    told = "the tokenizer has a chat template, which is not applied to the prompt; --chat applies it"
    for folder, options, said in ((chatty, [], True), (chatty, ["--chat"], False), (model, [], False)):
        command = ["generate", "--engine", "plain", "--model", str(folder), "--prompt", "a", "--max-new-tokens", "1"]
        assert main([*command, *options]) == 0
        assert (told in capsys.readouterr().err.splitlines()) == said


@pytest.fixture
def foreign(model, tmp_path):
    """A tokenizer in which two ids have changed their meaning."""
    folder = shutil.copytree(model, tmp_path / "foreign")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_tokenizer_of_another_model_is_refused(model, foreign, tmp_path):
    with PrivateLlama.from_pretrained(str(model), tokenizer=str(foreign), engine="plain") as llama:
        for ask in ({"prompt": "a"}, {"input_ids": [5]}):
            with pytest.raises(UsageError, match="the same ids stand for other tokens; .* with --tokenizer"):
                llama.generate(**ask, max_new_tokens=1)
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with PrivateLlama.from_pretrained(str(bare), tokenizer=str(foreign), engine="plain") as llama:
        assert llama.generate("a", max_new_tokens=1).text, "an owner without one announces none"


def refuses_requests(llama):
    with pytest.raises(UsageError, match="this session has ended, .* open another"):
        llama.generate(input_ids=[5], max_new_tokens=1)
    with pytest.raises(UsageError, match="this session has ended, .* open another"):
        llama.bench(Shape(16, 2, 1, 24))


def test_a_session_that_is_closed_while_a_stream_is_held(model):
    with PrivateLlama.from_pretrained(str(model), timeout=60, threads=1) as llama:
        processes = llama._children.processes
        events = llama.stream(input_ids=[5, 6, 7], max_new_tokens=20)
        next(event for event in events if isinstance(event, Step))
        with pytest.raises(UsageError, match="still being read"):
            llama.bench(Shape(16, 2, 1, 24))
    assert {rank: process.returncode for rank, process in processes.items()} == {0: 0, 2: 0}
    with pytest.raises(UsageError, match="this session has ended"):
        next(events)
    refuses_requests(llama)
    llama.close()


def test_a_session_that_ended_with_an_error_while_a_stream_is_held(model):
    with (
        pytest.raises(ZeroDivisionError),
        PrivateLlama.from_pretrained(str(model), timeout=60, threads=1) as llama,
    ):
        events = llama.stream(input_ids=[5, 6, 7], max_new_tokens=20)
        next(events)
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="this session has ended"):
        next(events)
    refuses_requests(llama)


class Listener:
    """In the place of the links: what the other parties hear when the session ends with an error."""

    def __init__(self):
        self.heard = []

    def abort(self, words):
        self.heard.append(words)


def asks_a_batch(llama):
    llama.generate(input_ids=[[1171, 1182], [1193, 1204]])


def asks_a_wrong_id(llama):
    llama.generate(input_ids=[5, 991171])


def opens_a_file(_):
    open("/nowhere/patients/1171")


def fails_otherwise(_):
    raise KeyError("1171")


def fails_as_another_session_does(_):
    raise PartyError("rank 0 (owner) stopped: 1171")


def lacks_a_package(_):
    raise ModuleNotFoundError("no 1171", name="1171")


def samples_what_overflowed(llama):
    with llama._guarded():
        raise UsageError("the token after 1171")


@pytest.mark.parametrize(
    "mistake",
    [
        *(asks_a_batch, asks_a_wrong_id, opens_a_file, fails_otherwise, fails_as_another_session_does),
        *(lacks_a_package, samples_what_overflowed),
    ],
)
def test_the_others_hear_nothing_of_what_the_client_knows(model, mistake):
    listener = Listener()
    with (
        pytest.raises((UsageError, OSError, KeyError, PartyError, ImportError)),
        PrivateLlama.from_pretrained(str(model), engine="plain") as llama,
    ):
        llama._transport = listener
        mistake(llama)
    assert listener.heard == [ENDED]


def test_the_others_hear_what_parties_say_of_each_other(model):
    listener = Listener()
    with (
        pytest.raises(PartyError),
        PrivateLlama.from_pretrained(str(model), engine="plain") as llama,
    ):
        llama._transport = listener
        with llama._guarded():
            raise PartyError("rank 2 (dealer) closed the connection")
    assert listener.heard == ["rank 2 (dealer) closed the connection"]


def test_a_missing_tokenizer_is_looked_for_once(model, monkeypatch):
    asked = []

    def missing(*arguments):
        asked.append(arguments)
        raise UsageError("no tokenizer")

    monkeypatch.setattr(checkpoint, "load_tokenizer", missing)
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        for _ in range(2):
            assert llama.generate(input_ids=[5, 6], max_new_tokens=2).text == ""
        assert not llama.has_tokenizer and len(asked) == 1
        with pytest.raises(UsageError, match="no tokenizer"):
            llama.generate(PROMPT)


def test_one_session_of_crypten_in_a_process(private, model):
    if private.protocol.engine != "crypten":
        pytest.skip("only CrypTen keeps its state in module globals")
    with pytest.raises(UsageError, match="already has a private session"):
        PrivateLlama.from_pretrained(str(model), engine="crypten")
    assert private.generate(input_ids=[5], max_new_tokens=1)


def test_ids_as_transformers_gives_them(plain):
    expected = plain.generate(PROMPT, max_new_tokens=2).token_ids
    ids = AutoTokenizer.from_pretrained(checkpoint.SHIPPED)(PROMPT, return_tensors="pt").input_ids
    assert plain.generate(input_ids=ids, max_new_tokens=2).token_ids == expected
    assert plain.generate(input_ids=ids[0].tolist(), max_new_tokens=2).token_ids == expected


def test_the_consumer_of_a_stream_is_not_in_inference_mode(plain):
    for _ in plain.stream(input_ids=[5], max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()


def test_unknown_settings_suggest_the_nearest(model):
    with pytest.raises(UsageError, match="unknown setting 'timeuot'; did you mean 'timeout'?"):
        PrivateLlama.from_pretrained(str(model), timeuot=3)
    with pytest.raises(UsageError, match="unknown setting 'precision'; did you mean 'precision_bits'?"):
        PrivateLlama.from_pretrained(str(model), precision=12)


def test_a_request_is_refused_without_a_model():
    with pytest.raises(UsageError, match="temperature"):
        Request("a", do_sample=True, temperature=-1.0)
    assert Request("a").plan(7) == api.Plan(7, 32, 128, False, "full")


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🙂 emoji 👩‍👩‍👧 family", "plain"])
def test_text_is_streamed_in_whole_characters(plain, text):
    ids = plain.tokenizer(text, add_special_tokens=False)["input_ids"]
    shown, detokenizer = [], Detokenizer(plain.tokenizer)
    for i, token in enumerate(ids):
        shown.append(detokenizer.push(token, i == len(ids) - 1))
        assert "\ufffd" not in shown[-1]
    assert "".join(shown) == detokenizer.text == plain.tokenizer.decode(ids)


def test_an_answer_cut_inside_a_character_says_so(plain):
    ids = plain.tokenizer("🙂", add_special_tokens=False)["input_ids"][:-1]
    detokenizer = Detokenizer(plain.tokenizer)
    shown = [detokenizer.push(token, i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(shown) == plain.tokenizer.decode(ids)
