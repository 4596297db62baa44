"""The endpoint's answers: what they say, in which shape, and what is refused."""

import json

import pytest
from endpoints import client, opened, service
from hf_models import with_template, with_tokenizer

from crypten_llm import PrivateLlama
from crypten_llm.serving import page

SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The passkey is 4711."}]
CHAT, TEXT, PRICE = "/v1/chat/completions", "/v1/completions", "/v1/price"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def made(model):
    with service(opened(model)) as made:
        yield made


@pytest.fixture
def http(made):
    return client(made)


@pytest.fixture(scope="module")
def llama(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain", threads=1) as llama:
        yield llama


def answered(http, path=CHAT, **body):
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(http, path=CHAT, **body):
    """The pieces, and the comments between them."""
    answer = http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-2] if event.startswith("data: ")]
    return pieces, [event for event in events if event.startswith(":")]


def unnumbered(revealed):
    """What is revealed of every request, without the conversation that this one is."""
    (own,) = [entry["what"] for entry in revealed if entry["what"].startswith("conversation ")]
    return [entry for entry in revealed if entry["what"] != own]


def test_a_conversation_is_answered_as_the_session_does(http, llama):
    found = answered(http, messages=SAID, max_tokens=5, model="tiny")
    result = llama.generate(messages=SAID, max_new_tokens=5)
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": result.text, "refusal": None}
    assert choice["finish_reason"] == result.finish_reason and choice["logprobs"] is None
    prompt, new = result.prompt_tokens, len(result.token_ids)
    usage = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    assert found["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}
    assert found["object"] == "chat.completion" and found["model"] == "tiny" and found["id"].startswith("chatcmpl-")
    facts = found["crypten_llm"]
    beside = {"what": "requests side by side", "to": "all", "times": 1}
    beside["why"] = "they share rounds; who joins and leaves when is public"
    shown = sorted(unnumbered(facts["revealed"]), key=lambda entry: entry["what"])
    assert shown == sorted([*result.revealed, beside], key=lambda entry: entry["what"])
    assert facts["engine"] == "plain" and facts["rounds"] == facts["beside"] == 0


def test_a_stream_says_the_same(http):
    asked = {"messages": SAID, "max_tokens": 5, "temperature": 0.9, "seed": 4}
    whole = answered(http, **asked)
    pieces, comments = streamed(http, **asked, stream_options={"include_usage": True})
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(choice["delta"].get("content", "") for piece in pieces for choice in piece["choices"])
    assert text == whole["choices"][0]["message"]["content"]
    reasons = [choice["finish_reason"] for piece in pieces for choice in piece["choices"]]
    assert reasons == [None] * (len(reasons) - 1) + [whole["choices"][0]["finish_reason"]]
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"] == whole["usage"]
    assert unnumbered(pieces[-2]["crypten_llm"]["revealed"]) == unnumbered(whole["crypten_llm"]["revealed"])
    prompt = whole["usage"]["prompt_tokens"]
    assert comments == [f": prefill {prompt} of {prompt}"] and len({piece["id"] for piece in pieces}) == 1


def test_texts_and_ids(http, llama):
    found = answered(http, TEXT, prompt=["The passkey", "is"], max_tokens=3, n=2)
    expected = [llama.generate(text, max_new_tokens=3).text for text in ("The passkey", "is") for _ in range(2)]
    assert [choice["text"] for choice in found["choices"]] == expected
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    prompts = len(llama.encode("The passkey")) + len(llama.encode("is"))
    assert found["usage"]["prompt_tokens"] == prompts and found["usage"]["completion_tokens"] == 12
    ids = llama.encode("The passkey")
    assert answered(http, TEXT, prompt=ids, max_tokens=3)["choices"][0]["text"] == expected[0]
    pieces, _ = streamed(http, TEXT, prompt=[ids, ids], max_tokens=3)
    for index in (0, 1):
        own = [c["text"] for piece in pieces for c in piece["choices"] if c["index"] == index]
        assert "".join(own) == expected[0]


def test_each_of_n_draws_for_itself_and_a_seed_repeats_them(http):
    asked = {"messages": SAID, "max_tokens": 8, "temperature": 1.5, "n": 3, "seed": 7}
    first, again = ([choice["message"]["content"] for choice in answered(http, **asked)["choices"]] for _ in range(2))
    assert first == again and len(set(first)) > 1


def test_stop_ends_before_its_text(http):
    whole = answered(http, messages=SAID, max_tokens=8)["choices"][0]["message"]["content"]
    stop = whole[len(whole) // 2 :][:3]
    choice = answered(http, messages=SAID, max_tokens=8, stop=stop)["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)] and choice["finish_reason"] == "stop"


def test_logprobs(http, llama):
    result = llama.generate(messages=SAID, max_new_tokens=3, logprobs=2)
    asked = {"messages": SAID, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
    content = answered(http, **asked)["choices"][0]["logprobs"]["content"]
    assert [each["logprob"] for each in content] == [step.logprob for step in result.logprobs]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [value for _, value in result.logprobs[0].top]
    assert content[0]["bytes"] in (None, list(content[0]["token"].encode()))
    pieces, _ = streamed(http, **asked)
    parts = [choice["logprobs"]["content"] for p in pieces for choice in p["choices"] if choice["logprobs"]]
    assert sum(parts, []) == content
    text = answered(http, TEXT, prompt="is", max_tokens=3, logprobs=1)["choices"][0]["logprobs"]
    assert text["text_offset"] == [0, len(text["tokens"][0]), len("".join(text["tokens"][:2]))]
    assert [max(top.values()) for top in text["top_logprobs"]] == text["token_logprobs"]


def test_parts_and_fields_that_ask_for_nothing(http):
    parts = [{"role": "user", "content": [{"type": "text", "text": "The passkey"}, {"type": "text", "text": " is"}]}]
    nothing = {"tools": [], "presence_penalty": 0, "response_format": {"type": "text"}, "store": False, "user": "x"}
    joined = [{"role": "user", "content": "The passkey is", "refusal": None}]
    same = [answered(http, messages=m, max_tokens=2, **nothing)["choices"] for m in (parts, joined)]
    assert same[0] == same[1]


REFUSED = [
    (CHAT, {"messages": []}, 400, "at least one|length >= 1"),
    (CHAT, {"messages": [{"role": "pope", "content": "x"}]}, 400, "pope"),
    (CHAT, {"messages": [{"role": "user"}]}, 400, "no content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image_url"),
    (CHAT, {"messages": SAID, "tools": [{"type": "function"}]}, 400, "function"),
    (CHAT, {"messages": SAID, "functions": [{"name": "f"}]}, 400, "functions is not supported"),
    (CHAT, {"messages": SAID, "response_format": {"type": "xml"}}, 400, "xml"),
    (CHAT, {"messages": SAID, "frequency_penalty": 0.5}, 400, "frequency_penalty"),
    (CHAT, {"messages": SAID, "flavour": 1}, 400, "unknown field `flavour`"),
    (CHAT, {"messages": SAID, "max_tokens": 0}, 400, "max_new_tokens is 0"),
    (CHAT, {"messages": SAID, "max_tokens": 1000}, 400, "context is 400"),
    (CHAT, {"messages": SAID, "max_tokens": 2, "max_completion_tokens": 3}, 400, "give one of them"),
    (CHAT, {"messages": SAID, "temperature": -1}, 400, "temperature is -1"),
    (CHAT, {"messages": SAID, "top_p": 0}, 400, "top_p is 0"),
    (CHAT, {"messages": SAID, "n": 17}, 400, "<= 16"),
    (CHAT, {"messages": SAID, "top_logprobs": 2}, 400, "logprobs"),
    (CHAT, {"messages": SAID, "policy": "mpcash"}, 400, "mpcache"),
    (CHAT, {"messages": SAID, "model": "gpt-4"}, 404, "no model 'gpt-4' here; it is 'tiny'"),
    (TEXT, {"prompt": ["a"] * 9, "n": 2}, 400, "18 answers"),
    (TEXT, {"prompt": {"a": 1}}, 400, "list of token ids"),
    (TEXT, {"prompt": [[]]}, 400, "list of token ids"),
    (TEXT, {"prompt": [5000]}, 400, "not in the vocabulary"),
    (TEXT, {"prompt": "a", "echo": True}, 400, "echo"),
    (PRICE, {"messages": SAID}, 400, "engine 'wire'"),
]


@pytest.mark.parametrize("path, body, status, says", REFUSED)
def test_what_is_refused(http, path, body, status, says):
    answer = http.post(path, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert any(word in error["message"] for word in says.split("|")), error["message"]


def test_what_is_no_body(http):
    assert http.post(CHAT, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert http.post(CHAT, content=b"[]", headers={"Content-Type": "application/json"}).status_code == 400
    assert http.post(CHAT, content=json.dumps({"messages": SAID})).status_code == 415
    large = http.post(CHAT, content=b" " * (17 << 20), headers={"Content-Type": "application/json"})
    assert large.status_code == 413
    assert http.get("/v1/nothing").status_code == 404 and http.get(CHAT).status_code == 405
    assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


def test_logprobs_where_the_client_is_shown_ids_alone(model):
    with service(opened(model, reveal="tokens")) as made:
        answer = client(made).post(CHAT, json={"messages": SAID, "logprobs": True})
        assert answer.status_code == 400 and "--reveal tokens does not show" in answer.json()["error"]["message"]


def test_a_model_without_a_chat_template(tmp_path):
    with service(opened(with_tokenizer(tmp_path))) as made:
        http = client(made)
        assert http.get("/v1/models").json()["data"][0]["chat"] is False
        assert "no chat template" in http.post(CHAT, json={"messages": SAID}).json()["error"]["message"]
        assert answered(http, TEXT, prompt="is", max_tokens=1)["choices"]


def test_models_health_and_metrics(http, made):
    (model,) = http.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["chat"] and model["context_length"] == 400
    assert http.get("/v1/models/tiny").json() == model and http.get("/v1/models/x").status_code == 404
    assert http.get("/health").json() == {"state": "Available", "reason": "", "waiting": 0, "running": 0}
    before = made.metrics.registry.get_sample_value("crypten_llm_completion_tokens_total")
    answered(http, messages=SAID, max_tokens=3)
    after = made.metrics.registry.get_sample_value("crypten_llm_completion_tokens_total")
    text = http.get("/metrics").text
    assert after - before == 3 and 'crypten_llm_state{crypten_llm_state="Available"} 1.0' in text


def test_keys(made):
    keys = ["k" * 32, "l" * 32]
    none, wrong, right = (
        client(made, keys, **headers)
        for headers in ({}, {"Authorization": f"Bearer {'m' * 32}"}, {"Authorization": f"Bearer {keys[1]}"})
    )
    for http in (none, wrong):
        answer = http.post(CHAT, json={"messages": SAID})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/metrics").status_code == http.get("/v1/models").status_code == 401
        assert http.get("/health").status_code == http.get("/").status_code == 200
    assert answered(right, messages=SAID, max_tokens=1)
    elsewhere = {"Host": "example.org", "Origin": "https://example.org"}
    assert right.get("/v1/models", headers=elsewhere).status_code == 200  # the key is enough


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://example.org"}, {"Host": "example.org"}, {"Origin": "null"}, {"Host": ""}]
)
def test_pages_of_others_may_not_ask(http, headers):
    assert http.post(CHAT, json={"messages": SAID}, headers=headers).status_code == 403
    assert http.get("/v1/models", headers=headers).status_code == 403


def test_the_page_brings_all_and_its_policy_allows_nothing_else(http):
    answer = http.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2 and "unsafe" not in policy
    text = answer.text
    assert text == page.TEXT and text.count("<script>") == text.count("<style>") == 1
    assert not any(
        word in text for word in ("http:", "https:", "src=", "url(", "@import", "innerHTML", " style=", " onclick=")
    )
