"""A conversation: turns go on with the cache, say what the template writes, and cost their own tokens alone."""

import dataclasses
import gc

import pytest
from hf_models import GOES_ON, tiny, with_template

from crypten_llm import PrivateLlama
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.models.tokenizer import render_chat
from crypten_llm.session.chat import Restart
from crypten_llm.session.plan import Turn
from crypten_llm.session.prompted import Progress, Step

MARGIN = 0.1  # of logits, between the chosen token and the next: many times what a private engine is off
SAID = ["The passkey is 4711.", "What is it?", "And again: what?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def plain(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        yield llama


@pytest.fixture(scope="module", params=["wire", pytest.param("crypten", marks=pytest.mark.slow)])
def private(model, request):
    with PrivateLlama.from_pretrained(str(model), engine=request.param, timeout=60, threads=1) as llama:
        yield llama


def asked_for(chat, result):
    """All ids that the model had seen when it began its last answer."""
    return chat._cached[: len(chat._cached) - len(result.token_ids) + 1]


def clear_texts(plain, count, system=None, **arguments):
    """Texts whose greedy answers have no close call, so that equality on other engines is not luck."""
    for number in range(60):
        texts = [f"{text} {number}" for text in SAID[:count]]
        chat = plain.chat(system, logprobs=2, **arguments)
        steps = [step for text in texts for step in chat.send(text).logprobs]
        chat.close()
        if min(step.top[0][1] - step.top[1][1] for step in steps) > MARGIN:
            return texts
    raise AssertionError("no texts with clear margins: choose another seed")


def restarts(events):
    return [event for event in events if isinstance(event, Restart)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_turns_go_on_with_the_cache_and_answer_as_without_one(plain, seed, system):
    """A random model answers in tokens that the tokenizer would not choose; the text is the template's all the same."""
    chat = plain.chat(system, max_new_tokens=7, do_sample=True, temperature=3.0, seed=seed)
    assert chat.system == system
    cached = 0
    for text in SAID:
        before = [*chat.messages, {"role": "user", "content": text}]
        assert restarts(chat.stream(text)) == []
        result = plain.result
        ids = asked_for(chat, result)
        assert plain.tokenizer.decode(ids) == render_chat(plain.tokenizer, before)
        assert result.cached_tokens == cached and result.prompt_tokens == len(ids) - cached
        alone = plain.generate(input_ids=ids, max_new_tokens=7, do_sample=True, temperature=3.0, seed=seed)
        assert alone.token_ids == result.token_ids
        assert chat.messages == [*before, {"role": "assistant", "content": result.text}]
        cached = len(ids) + len(result.token_ids) - 1
        assert plain.party.kept[chat._number].length == cached
    assert [turn.cached_tokens for turn in chat.results][1:] == sorted({t.cached_tokens for t in chat.results} - {0})
    chat.close()
    assert chat._number not in plain.party.kept


def test_ids_that_are_the_templates_own_are_used(plain):
    """Greedy answers of one token end before any ambiguity: ids are the tokenizer's of the whole text."""
    chat = plain.chat(max_new_tokens=1)
    for text in SAID:
        result = chat.send(text)
        rendered = render_chat(plain.tokenizer, chat.messages[:-1])
        expected = plain.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        own = expected == asked_for(chat, result)
        assert own or plain.tokenizer.decode(asked_for(chat, result)) == rendered


def test_private_turns_equal_plain_and_cost_their_own_tokens(private, plain):
    arguments = {"max_new_tokens": 2, "prefill_chunk": 16}
    texts = clear_texts(plain, 3, "Be brief.", **arguments)
    with private.chat("Be brief.", **arguments) as chat, plain.chat("Be brief.", **arguments) as expected:
        for text in texts:
            found, wanted = chat.send(text), expected.send(text)
            assert found.token_ids == wanted.token_ids
            assert (found.cached_tokens, found.prompt_tokens) == (wanted.cached_tokens, wanted.prompt_tokens)
        assert chat._cached == expected._cached
        # The same ids without a cache cost more: what is kept is not sent again.
        last = chat.results[-1]
        anew = private.generate(input_ids=asked_for(chat, last), **arguments)
        assert anew.token_ids == last.token_ids
        assert max(last.cost.bytes_sent(("prefill",))) < max(anew.cost.bytes_sent(("prefill",))) / 2
        assert last.cost.rounds(("prefill",)) < anew.cost.rounds(("prefill",))
        said = [entry["what"] for entry in last.revealed]
        tokens = f"prompt length: {last.prompt_tokens} tokens, after {last.cached_tokens} that the cache holds"
        assert tokens in said


def test_other_requests_between_the_turns_change_nothing(private, plain):
    texts = clear_texts(plain, 2, max_new_tokens=2)
    chats, others = ([llama.chat(max_new_tokens=2) for llama in (private, plain)] for _ in range(2))
    for text in texts:
        for pair in (chats, others):
            answers = [chat.send(text).token_ids for chat in pair]
            assert answers[0] == answers[1]
            private.generate(["a", "b"], max_new_tokens=1)
    assert chats[0].results[1].cached_tokens and others[0].results[1].cached_tokens
    for chat in (*chats, *others):
        chat.close()
    assert not private.party.kept


def test_an_answer_that_is_left_stays_as_far_as_it_was_read(private, plain):
    for llama in (private, plain):
        chat = llama.chat(max_new_tokens=9)
        seen = []
        for event in chat.stream(SAID[0]):
            if isinstance(event, Step):
                seen.append(event.text)
                if len(seen) == 3:
                    break
        gc.collect()
        assert chat.messages[-1] == {"role": "assistant", "content": "".join(seen)}
        left = chat.results[-1]
        assert left.finish_reason == "left" and len(left.token_ids) == 3
        assert "number of generated tokens: 3" in [entry["what"] for entry in left.revealed]
        assert llama.party.kept[chat._number].length == len(chat._cached) > 0
        follow = list(chat.stream(SAID[1]))
        assert restarts(follow) == [] and chat.results[-1].cached_tokens > 0
        chat.close()


def test_an_answer_that_is_left_during_its_prompt(private, plain):
    for llama in (private, plain):
        chat = llama.chat(max_new_tokens=3, prefill_chunk=4, logprobs=9)
        events = chat.stream(SAID[0])
        assert isinstance(next(events), Progress)
        events.close()
        assert chat.results[-1].finish_reason == "left"
        assert llama.generate("a", max_new_tokens=1).token_ids
        assert chat.messages == [{"role": "user", "content": SAID[0]}, {"role": "assistant", "content": ""}]
        assert restarts(chat.stream(SAID[1])) == []
        result = llama.result
        assert result.cached_tokens and llama.party.kept[chat._number].length == len(chat._cached)
        alone = llama.generate(input_ids=asked_for(chat, result), max_new_tokens=1, logprobs=9)
        same = dict(result.logprobs[0].top).items(), dict(alone.logprobs[0].top)
        near = [abs(value - same[1][token]) < 0.02 for token, value in same[0] if token in same[1]]
        assert len(near) >= 7 and all(near)
        chat.close()


OTHERWISE = GOES_ON.replace("[assistant]{% endif", "[answer]{% endif")
TRIMS = GOES_ON.replace("{{ m.content }}", "{{ m.content.replace('4711', '0') if not loop.last else m.content }}")


@pytest.mark.parametrize("template", [OTHERWISE, TRIMS], ids=["another mark", "changed later"])
def test_a_template_that_writes_earlier_turns_otherwise_begins_the_cache_anew(tmp_path, template):
    with PrivateLlama.from_pretrained(str(with_template(tmp_path, template)), engine="plain") as llama:
        chat = llama.chat(max_new_tokens=3)
        assert restarts(chat.stream(SAID[0])) == []
        held = len(chat._cached)
        events = list(chat.stream(SAID[1]))
        assert isinstance(events[0], Restart) and len(restarts(events)) == 1
        result, first = llama.result, events[0]
        assert result.cached_tokens == 0
        assert (first.cached, first.prompt_tokens) == (held, result.prompt_tokens)
        assert 0 < first.shared < held and first.seconds > 0
        assert str(first).startswith("the chat template writes the turns so far otherwise than the cache has them")
        assert f"the cache begins anew ({result.prompt_tokens} tokens to prefill, about " in str(first)
        alone = llama.generate(messages=chat.messages[:-1], max_new_tokens=3)
        assert alone.token_ids == result.token_ids


def test_an_answer_cut_at_a_stop_string_begins_the_cache_anew_and_the_rest_is_as_shown(plain):
    whole = plain.chat(max_new_tokens=6).send(SAID[0])
    stop = whole.text[2:4]
    chat = plain.chat(max_new_tokens=6, stop=stop)
    cut = chat.send(SAID[0])
    assert cut.text == whole.text[: whole.text.index(stop)] and cut.finish_reason == "stop"
    assert chat.messages[-1]["content"] == cut.text
    assert len(restarts(chat.stream(SAID[1]))) == 1


def test_a_new_conversation(plain):
    chat = plain.chat("Be brief.", max_new_tokens=3)
    first = [chat.send(text).token_ids for text in SAID[:2]]
    chat.reset(chat.system)
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert restarts(chat.stream(SAID[0])) == [] and plain.result.cached_tokens == 0
    assert [plain.result.token_ids, chat.send(SAID[1]).token_ids] == first
    chat.reset()
    assert chat.system is None and chat.messages == []


def test_what_cannot_be_a_chat(model, plain, tmp_path):
    for arguments, message in (
        ({"hide_length": True}, "hide_length hides nothing in a chat"),
        ({"policy": "h2o"}, "policy h2o cannot go on with the cache of an earlier turn: .*; chat with one of full, "),
        ({"policy": "none"}, "unknown policy 'none'"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperatur": 1}, "unknown argument 'temperatur'; did you mean 'temperature'?"),
        ({"messages": []}, "unknown argument 'messages'"),
    ):
        with pytest.raises(UsageError, match=message):
            plain.chat(**arguments)
    bare, _ = tiny(tmp_path / "bare", num_hidden_layers=1)
    with PrivateLlama.from_pretrained(str(bare), engine="plain") as llama:
        with pytest.raises(UsageError, match="no tokenizer"):
            llama.chat()
    with PrivateLlama.from_pretrained("shipped", engine="plain") as llama:
        with pytest.raises(UsageError, match="the tokenizer has no chat template"):
            llama.chat()


def test_a_turn_beyond_the_context_leaves_the_conversation_as_it_was(plain):
    chat = plain.chat(max_new_tokens=5)
    chat.send(SAID[0])
    messages = list(chat.messages)
    with pytest.raises(UsageError, match=r"the conversation has \d+ tokens and 5 more .* begin a new one \(/reset\)"):
        chat.send("word " * 400)
    assert chat.messages == messages
    assert restarts(chat.stream(SAID[1])) == [] and plain.result.cached_tokens


def test_parties_that_do_not_hold_the_same_cache_stop(plain):
    for turn in (Turn(99, 7), Turn(99)):
        if turn.cached_tokens:
            with pytest.raises(PartyError, match=r"\(client\) goes on after 7 tokens of a conversation, of which 0"):
                plain.party.cache(turn)
        else:
            assert plain.party.cache(turn).length == 0
    plain.party.forget(99)


def test_results_are_told_apart():
    assert dataclasses.replace(Restart(1, 2, 3), seconds=1.0).bytes_sent is None
    assert str(Restart(1, 2, 30)).endswith("the cache begins anew (30 tokens to prefill)")
    assert str(Restart(1, 2, 30, 1.5, 2_000_000)).endswith(
        "(30 tokens to prefill, about 1.5 s and 2.0 MB sent a party)"
    )
