"""Conversations that the parties keep between requests: whose they are, what a turn then costs, and when they go."""

import itertools
import json
import threading
from time import monotonic

import pytest
from endpoints import Paced, client, endpoint, listening, opened, predicted, send, service, until
from hf_models import with_template
from starlette.testclient import TestClient

from crypten_llm import PrivateLlama, memory
from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import render_chat
from crypten_llm.serving.fair_queue import Caller, FairQueue
from crypten_llm.serving.job import Job
from crypten_llm.serving.kept import Held, Keeping, Kept
from crypten_llm.session.plan import Plan, Turn, check_turns
from crypten_llm.session.request import Request
from crypten_llm.session.spoken import Spoken

CHAT, PRICE = "/v1/chat/completions", "/v1/price"
TOLD = """{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
SAID = {"role": "user", "content": "The passkey is 4711."}
MORE = {"role": "user", "content": "What is it?"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def llama(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain", threads=1) as llama:
        yield llama


@pytest.fixture
def made(model):
    with service(opened(model)) as made:
        yield made


def ask(http, messages, **body):
    """The text of the answer, its usage, and what it cost."""
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, **body}
    if not body.get("stream"):
        answer = http.post(CHAT, json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found["choices"][0]["message"]["content"], found["usage"], found["crypten_llm"]
    answer = http.post(CHAT, json={**body, "stream_options": {"include_usage": True}})
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: {")]
    pieces = [json.loads(line) for line in lines]
    text = "".join(choice["delta"].get("content", "") for piece in pieces for choice in piece["choices"])
    return text, pieces[-1]["usage"], next(piece["crypten_llm"] for piece in pieces if "crypten_llm" in piece)


def then(*texts):
    """A conversation of these, the user's and the answers in turn."""
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def cached(usage):
    return usage["prompt_tokens_details"]["cached_tokens"]


def sample(made, name):
    return made.metrics.registry.get_sample_value(f"crypten_llm_{name}")


@pytest.mark.parametrize("together", [1, 8])
@pytest.mark.parametrize("body", [{"stream": True}, {"stream": True, "stop": "@@"}, {"hide_length": True}])
def test_turns_go_on_with_the_cache_and_answer_as_fresh_ones(model, llama, together, body):
    """With the answer in the cache, or up to the prompt where its length is hidden or a stop text may cut it."""
    keeps_answer = body == {"stream": True}
    with service(opened(model), together=together) as made:
        http, texts, before, saved = client(made), [SAID["content"]], 0, 0
        for number in range(3):
            text, usage, _ = ask(http, then(*texts), **body)
            (held,) = made.kept._held
            prompt = list(held.spoken.cached)[: usage["prompt_tokens"]]
            assert cached(usage) == before and (number == 0) == (before == 0)
            assert llama.tokenizer.decode(prompt) == render_chat(llama.tokenizer, then(*texts))
            fresh = llama.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
            assert fresh.text == text and len(fresh.token_ids) == usage["completion_tokens"]
            if not keeps_answer:
                assert llama.generate(messages=then(*texts), max_new_tokens=4).text == text
            more = usage["completion_tokens"] - 1 if keeps_answer else 0
            before, saved = usage["prompt_tokens"] + more, saved + before
            assert made.llama.party.kept[held.number].length == before == len(held.spoken.cached)
            texts += [text, f"{MORE['content']} {number}"]
        assert sample(made, "kept_conversations") == 1 and sample(made, "cached_prompt_tokens_total") == saved > 0


@pytest.fixture(scope="module")
def private(model):
    """Owner, client and dealer, which keep two conversations."""
    settings = {"engine": "wire", "progress": False}
    with service(opened(model, **settings), predict=predicted, engine="wire", keeping=Keeping(2)) as made:
        yield made


@pytest.mark.parametrize("body", [{"stream": True}, {}, {"stream": True, "public_system": True}])
def test_private_turns_cost_what_their_price_says(private, llama, body):
    """The oldest of three conversations is dropped at all parties, who go on with the others."""
    http, system = client(private), {"role": "system", "content": "Be brief."}
    text, usage, first = ask(http, [system, SAID], **body)
    is_public = any("public prefix" in entry["what"] for entry in first["revealed"])
    assert is_public == ("public_system" in body)
    messages = [system, SAID, {"role": "assistant", "content": text}, MORE]
    asked = {"messages": messages, "max_tokens": 4, "temperature": 0, **body}
    fresh = http.post(PRICE, json={**asked, "user": "another"}).json()
    price = http.post(PRICE, json=asked).json()
    assert fresh["cached_tokens"] == 0 < price["cached_tokens"]
    answer, again, facts = ask(http, messages, **body)
    assert cached(again) == price["cached_tokens"] >= usage["prompt_tokens"]
    held = private.kept._held[-1]
    prompt = list(held.spoken.cached)[: again["prompt_tokens"]]
    assert answer == llama.generate(input_ids=prompt, max_new_tokens=4, eos_token_id=None).text
    for name in ("rounds", "bytes_sent", "dealer_bytes"):
        assert price[name] == facts[name], name
    assert max(price["bytes_sent"]) < max(fresh["bytes_sent"]) and price["dealer_bytes"] < fresh["dealer_bytes"]
    said = [entry["what"] for entry in facts["revealed"]]
    assert f"conversation {held.number}, whose cache is kept" in said
    new = again["prompt_tokens"] - cached(again)
    assert f"prompt length: {new} tokens, after {cached(again)} that the cache holds" in said
    assert len(private.kept) == len(private.llama.party.kept) <= 2


def test_callers_do_not_share(made):
    keys = ["k" * 32, "l" * 32]
    app = endpoint(made, keys).app()
    one, other = (
        TestClient(app, base_url="http://localhost", headers={"Authorization": f"Bearer {key}"}) for key in keys
    )
    text, _, _ = ask(one, [SAID])
    messages = [SAID, {"role": "assistant", "content": text}, MORE]
    assert cached(ask(other, messages)[1]) == 0
    assert cached(ask(one, messages, user="another")[1]) == 0
    assert cached(ask(one, messages)[1]) > 0


def test_the_oldest_is_dropped(model):
    with service(opened(model), keeping=Keeping(2)) as made:
        http, texts = client(made), {}
        for user in "abc":
            texts[user], _, _ = ask(http, [SAID], user=user, max_tokens=1)
        until(lambda: not made.running)
        assert len(made.kept) == len(made.llama.party.kept) == 2 and sample(made, "kept_conversations") == 2
        for user, is_kept in (("c", True), ("a", False), ("b", False)):
            messages = [SAID, {"role": "assistant", "content": texts[user]}, MORE]
            assert (cached(ask(http, messages, user=user, max_tokens=1)[1]) > 0) == is_kept, user
        assert len(made.llama.party.kept) == 2


@pytest.mark.parametrize("more", [{"policy": "h2o"}, {"n": 2}])
def test_what_is_not_kept(made, more):
    ask(client(made), [SAID], **more)
    assert not len(made.kept) and not made.llama.party.kept


def test_off(model):
    with service(opened(model), keeping=Keeping(0)) as made:
        http = client(made)
        text, _, facts = ask(http, [SAID])
        assert not any(entry["what"].startswith("conversation") for entry in facts["revealed"])
        _, usage, _ = ask(http, [SAID, {"role": "assistant", "content": text}, MORE])
        assert cached(usage) == 0 and not made.llama.party.kept
    for refused in (dict(conversations=-1), dict(conversations=257), dict(minutes=0.0), dict(gigabytes=-1.0)):
        with pytest.raises(UsageError, match="must be"):
            Keeping(**refused)


def test_who_leaves_loses_the_conversation(model):
    paced = Paced(model)
    with service(paced) as made, listening(made) as address:
        http = client(made)
        paced.permit(1000)
        text, _, _ = ask(http, [SAID])
        until(lambda: len(made.kept) == 1)
        while paced.permits.acquire(blocking=False):
            pass
        messages = [SAID, {"role": "assistant", "content": text}, MORE]
        steps = paced.steps
        with send(address, CHAT, json.dumps({"messages": messages, "max_tokens": 9, "stream": True})):
            until(lambda: made.running)
            (job,) = made.running
            paced.permit(3)
            until(lambda: paced.steps == steps + 3)
            assert len(made.kept) == 0, "one that is gone on with is nobody else's"
        until(lambda: job.left)
        paced.permit(1000)
        until(lambda: not made.running)
        assert not len(made.kept) and not made.llama.party.kept
        assert cached(ask(http, messages)[1]) == 0


def test_a_newcomer_that_is_refused_loses_it_and_the_next_is_read_anew(made, monkeypatch):
    http = client(made)
    text, _, _ = ask(http, [SAID])
    messages = [SAID, {"role": "assistant", "content": text}, MORE]
    check, begin = memory.check, made.kept.begin

    def refusing(*given):
        raise UsageError("too large")

    def begun(*arguments):
        monkeypatch.setattr(memory, "check", refusing)
        return begin(*arguments)

    monkeypatch.setattr(made.kept, "begin", begun)
    refused = http.post(CHAT, json={"messages": messages, "max_tokens": 2})
    assert refused.status_code == 400 and "too large" in refused.json()["error"]["message"]
    monkeypatch.setattr(memory, "check", check)
    monkeypatch.setattr(made.kept, "begin", begin)
    assert not len(made.kept) and not made.llama.party.kept
    assert cached(ask(http, messages)[1]) == 0


def test_old_ones_make_room_for_a_request_that_would_not_fit(made, monkeypatch):
    http = client(made)
    for user in "ab":
        ask(http, [SAID], user=user)
    check = memory.check

    def tight(*given):
        if len(made.llama.party.kept) > 1:
            raise UsageError("too large")
        check(*given)

    asked = made.llama.prepare(Request(messages=[SAID], max_new_tokens=1))
    monkeypatch.setattr(memory, "check", tight)
    assert made.kept.begin(made.llama, asked, None) is asked
    assert len(made.kept) == 1 and made.kept.dropped() == [1]


def test_one_conversation_is_gone_on_with_once_at_a_time_beside_others(model):
    paced = Paced(model)
    with service(paced) as made:
        http, body = client(made), {"stream": True, "stop": "@@", "max_tokens": 20}
        paced.permit(1000)
        text, _, _ = ask(http, [SAID], **body)
        until(lambda: len(made.kept) == 1)
        while paced.permits.acquire(blocking=False):
            pass
        messages = [SAID, {"role": "assistant", "content": text}, MORE]
        found, threads = [], []
        try:
            for asked in ([SAID], messages, messages):
                begun, number = paced.begun, len(threads)
                threads.append(threading.Thread(target=lambda asked=asked: found.append(ask(http, asked, **body))))
                threads[-1].start()
                until(lambda number=number: len(made.queue) + len(made.running) == number + 1)
                while number and paced.begun == begun:
                    steps = paced.steps
                    paced.permit(1)
                    until(lambda steps=steps: paced.steps > steps)
        finally:
            paced.permit(1000)
            for thread in threads:
                thread.join(20)
        assert sorted(cached(usage) > 0 for _, usage, _ in found) == [False, False, True]
        assert max(facts["beside"] for _, _, facts in found) == 2
        longest = max(usage["prompt_tokens"] for _, usage, _ in found)
        both = [answer for answer, usage, _ in found if usage["prompt_tokens"] == longest]
        assert len(both) == 2 and len(set(both)) == 1 and len(made.kept) == 3


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_what_is_kept_is_bounded_in_time_and_memory_and_what_waits_is_not_dropped(llama):
    clock, queue = _Clock(), FairQueue(9)
    per = 2 * llama.config.num_key_value_heads * llama.config.head_dim * llama.party.engine.holds(1).cached
    asked = llama.prepare(Request(messages=[SAID], max_new_tokens=3, hide_length=True))
    tokens = len(asked.ids)
    room = (2 * tokens + 2 * 3) * per * llama.config.num_hidden_layers / 1e9
    kept = Kept(Keeping(9, minutes=1.0, gigabytes=room), queue, clock)

    def run(user):
        talk = kept.talk(llama, Caller("", user), [asked])
        begun = kept.begin(llama, asked, talk)
        result = llama.generate(messages=[SAID], max_new_tokens=3)
        if begun.turn:
            llama.party.kept[begun.turn.conversation] = type("Cache", (), {"length": tokens})()
        kept.end(llama, talk, result)
        return begun.turn

    turns = {user: run(user) for user in "abc"}
    assert all(turns.values()) and len(kept) == 2, "of three there is room for two"
    assert kept.dropped() == [turns["a"].conversation] and kept.dropped() == []
    assert set(llama.party.kept) == {turns["b"].conversation, turns["c"].conversation}
    small = Kept(Keeping(9, gigabytes=room / 4), queue, clock)
    talk = small.talk(llama, Caller(), [asked])
    assert small.begin(llama, asked, talk).turn is None, "alone it is more than may be kept"

    answered = {"role": "assistant", "content": llama.generate(messages=[SAID], max_new_tokens=3).text}
    more = llama.prepare(Request(messages=[SAID, answered, MORE], max_new_tokens=3, hide_length=True))
    talk = kept.talk(llama, Caller("", "b"), [more])
    assert talk.held.number == turns["b"].conversation and talk.asked.course.behind == Plan(tokens, 1)
    waits = object.__new__(Job)
    waits.talk = talk
    queue.put(Caller(), waits)
    assert kept.talk(llama, Caller("", "b"), [more]).held is None, "another has asked before"
    clock.now = 61.0
    kept.expire(llama)
    assert kept.dropped() == [turns["c"].conversation] and len(kept) == 1
    queue.discard(waits)
    kept.expire(llama)
    assert not len(kept) and not llama.party.kept


@pytest.mark.parametrize("same", [True, False])
def test_a_conversation_with_other_tools_is_another(tmp_path, same):
    """Though all that was said is alike, in tokens that are not the tokenizer's: its cache has the tools."""
    first, other = ([{"type": "function", "function": {"name": name}}] for name in ("now", "then"))
    kept, caller = Kept(Keeping(), FairQueue(9)), Caller()
    with PrivateLlama.from_pretrained(str(with_template(tmp_path, TOLD)), engine="plain", threads=1) as llama:
        asked = llama.prepare(Request(messages=[SAID], max_new_tokens=3, tools=first))
        talk = kept.talk(llama, caller, [asked])
        drawn = [llama.tokenizer("a")["input_ids"][-1]] * 2  # of a text that the tokenizer writes otherwise
        text = llama.tokenizer.decode(drawn)
        held = [*asked.ids, *drawn]
        spoken = Spoken.after(llama.tokenizer, talk.rendered, asked.ids, drawn, text, len(held))
        kept._held.append(Held(1, caller, spoken, 0, monotonic()))
        said = [SAID, {"role": "assistant", "content": text}, MORE]
        more = llama.prepare(Request(messages=said, max_new_tokens=3, tools=first if same else other))
        talk = kept.talk(llama, caller, [more])
    assert (talk.held is not None) == same


def test_turns_that_no_client_says():
    check_turns((), 2, (1,))
    check_turns((None, Turn(1), Turn(2)), 3, (3,))
    for turns, plans, running in (((Turn(1),), 2, ()), ((Turn(1), Turn(1)), 2, ()), ((Turn(1),), 1, (1,))):
        with pytest.raises(UsageError):
            check_turns(turns, plans, running)


def test_who_waits_for_an_answer_of_hidden_length_is_told_at_once_that_all_ends(model):
    paced, found = Paced(model), []
    with service(paced) as made:
        asked = {"messages": [SAID], "max_tokens": 90, "hide_length": True}
        waiter = threading.Thread(target=lambda: found.append(client(made).post(CHAT, json=asked)))
        waiter.start()
        until(lambda: paced.begun)
        made.stop()
        waiter.join(10)
        assert found and found[0].status_code == 503, "while its steps are still to be run"
        paced.permit(1000)
