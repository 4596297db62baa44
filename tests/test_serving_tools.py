"""Tools and JSON schemas at the endpoint: calls that can be run, in whole answers and in streams, and back again."""

import json

import pytest
import torch
from endpoints import client, opened, program, service
from hf_models import GOES_ON, with_template
from jsonschema import Draft202012Validator

from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.models.tokenizer import load, render_chat
from crypten_llm.serving.bodies import ChatBody, read
from crypten_llm.serving.calling import Calling
from crypten_llm.serving.calls import Reader
from crypten_llm.serving.tool_format import HERMES, ToolFormat, of_tokenizer
from crypten_llm.session.grammar import Grammars
from crypten_llm.session.prompted import Answer
from crypten_llm.session.sampling import Sampler, SamplingConfig
from crypten_llm.session.text import Detokenizer

CHAT = "/v1/chat/completions"
SAID = [{"role": "user", "content": "Weather?"}]
PLACE = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", 'a "b" {c}\\']}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PLACE}},
    {"type": "function", "function": {"name": "now"}},
]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}

CALLS = """{% if tools %}[tools]{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}[{{ m.role }}]
{%- if m.role == 'tool' %}{{ m.name }}={{ m.content }}{% else %}{{ m.content }}{% endif %}BODY</s>{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
ONE = """{"name": "{{ c.function.name }}", "KEY": {{ c.function.arguments | tojson }}}"""
TAGGED = CALLS.replace("BODY", f"{{% for c in m.tool_calls or [] %}}<call>\n{ONE}\n</call>{{% endfor %}}").replace(
    "KEY", "arguments"
)
BARE = CALLS.replace(
    "BODY",
    "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    f"{{% set c = m.tool_calls[0] %}}{ONE}{{% endif %}}",
).replace("KEY", "parameters")
SILENT = TAGGED.replace("<call>", "<pad>")  # a special token, which no answer's text shows
FORMATS = {
    TAGGED: ToolFormat("<call>\n", "\n</call><call>\n", "\n</call>"),
    BARE: ToolFormat("", None, "", "parameters"),
    SILENT: HERMES,
    GOES_ON: HERMES,
    "{{ raise_exception('no') }}": HERMES,
}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(load(SHIPPED))


@pytest.fixture(scope="module", params=[GOES_ON, TAGGED, BARE], ids=["none", "tagged", "bare"])
def made(request, tmp_path_factory):
    """Of each kind of template."""
    with service(opened(with_template(tmp_path_factory.mktemp("tools"), request.param, context=1000))) as made:
        yield made


@pytest.fixture
def http(made):
    return client(made)


def answered(http, **body):
    answer = http.post(CHAT, json={"messages": SAID, "max_tokens": 120, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(http, **body):
    """The message that the pieces make, as clients put it together, and why it ended."""
    answer = http.post(CHAT, json={"messages": SAID, "max_tokens": 120, "stream": True, **body})
    assert answer.status_code == 200, answer.text
    content, calls, reason = "", [], None
    for event in answer.text.split("\n\n"):
        if event.startswith("data: {"):
            (choice,) = json.loads(event.removeprefix("data: "))["choices"]
            delta, reason = choice["delta"], choice["finish_reason"]
            content += delta.get("content", "")
            for part in delta.get("tool_calls", []):
                if part["index"] == len(calls):
                    assert part["type"] == "function" and part["id"]
                    calls.append({"name": part["function"]["name"], "arguments": ""})
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return content, calls, reason


def check_call(call):
    arguments = json.loads(call["arguments"])
    if call["name"] == "weather":
        Draft202012Validator(PLACE).validate(arguments)
    else:
        assert call["name"] == "now" and arguments == {}


def of(**body):
    return read(json.dumps({"messages": SAID, **body}).encode(), ChatBody)


@pytest.mark.parametrize("template", FORMATS, ids=["tagged", "bare", "silent", "none", "refusing"])
def test_what_is_learned_of_a_template(tmp_path, template):
    assert of_tokenizer(load(with_template(tmp_path, template))) == FORMATS[template]


@pytest.mark.parametrize("shape", [HERMES, FORMATS[TAGGED], FORMATS[BARE]], ids=["hermes", "tagged", "bare"])
@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {},
        {"parallel_tool_calls": False},
    ],
    ids=["required", "named", "auto", "one"],
)
def test_whatever_the_logits_calls_can_be_run(grammars, shape, fields):
    """And they are read the same in pieces of any length."""
    made = Calling.of(of(tools=TOOLS, **fields), None)
    calling = Calling(shape, made.functions, made.is_due, made.many and shape.between is not None)
    grammar, counts = grammars.compiled(calling.grammar()), set()
    end, mark = 1, grammars._tokenizer.encode(shape.mark, add_special_tokens=False)
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        guide = grammar.guide([end])
        answer = Answer([], Sampler(SamplingConfig(), (), guide), (end,), Detokenizer(grammars._tokenizer), guide=guide)
        pieces = []
        for step in range(300):
            logits = 3 * torch.randn(2048, generator=generator)
            if seed % 2 and step < len(mark) + 2 and not calling.is_due:
                logits[mark[step - 2] if step > 1 else 300] = 50.0  # a call after some text
            logits[end] += 6 * (step > 40)
            pieces.append(answer.take(logits, step == 299)[0])
            if answer.finished:
                break
        assert answer.failed is None and answer.finished, answer.text.text
        reader, whole = Reader(shape, calling.leads), Reader(shape, calling.leads)
        content, calls = "", {}
        for part in [*(reader.read(piece) for piece in pieces), reader.read("", last=True)]:
            content += part.content
            for each in part.calls:
                calls.setdefault(each.index, {"name": each.name, "arguments": ""})["arguments"] += each.arguments
        found = whole.read(answer.text.text, last=True)
        assert content == found.content
        assert list(calls.values()) == [{"name": c.name, "arguments": c.arguments} for c in found.calls]
        assert calls or not calling.is_due
        assert shape.mark not in content and (not calling.is_due or not content)
        if not calls:
            assert content == answer.text.text
        for call in calls.values():
            check_call(call)
        counts.add(len(calls))
    assert max(counts) >= 1 and (calling.many or max(counts) == 1)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
def test_a_call(http, choice):
    asked = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    found = answered(http, **asked)
    message = found["message"]
    assert found["finish_reason"] == "tool_calls" and message["content"] is None
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    check_call(call["function"])
    content, calls, reason = streamed(http, **asked)
    assert (content, calls, reason) == ("", [call["function"]], "tool_calls")


def test_there_and_back(http, made):
    """A call, its result, and an answer that follows a schema; the model reads all of it."""
    asked = {"tools": TOOLS, "tool_choice": "required"}
    message = answered(http, **asked, parallel_tool_calls=False)["message"]
    (call,) = message["tool_calls"]
    said = [*SAID, message, {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    found = answered(http, messages=said, response_format=AS_SCHEMA)
    assert found["finish_reason"] == "stop"
    Draft202012Validator(SCHEMA).validate(json.loads(found["message"]["content"]))
    tokenizer = made.llama.tokenizer
    calling = Calling.of(of(messages=said, tools=TOOLS), tokenizer)
    body = of(messages=said, tools=TOOLS)
    read = render_chat(tokenizer, calling.messages(body.messages), calling.tools())
    for word in (
        "sunny",
        call["function"]["name"],
        '"of a city"',
        '"minimum": 1',
        *(t["function"]["name"] for t in TOOLS),
    ):
        assert word in read


def test_text_or_calls(http):
    """What is no call is text, whichever a random model comes to write."""
    for seed in range(3):
        asked = {"tools": TOOLS, "temperature": 1.5, "seed": seed, "max_tokens": 20}
        found = answered(http, **asked)
        content, calls, reason = streamed(http, **asked)
        assert (content or None) == (found["message"]["content"] or None) and reason == found["finish_reason"]
        assert [c["function"] for c in found["message"].get("tool_calls", [])] == calls


@pytest.mark.parametrize("format", [AS_SCHEMA, {"type": "json_object"}], ids=["schema", "object"])
def test_json(http, format):
    asked = {"response_format": format, "max_tokens": 30}
    found = answered(http, **asked)
    content, calls, reason = streamed(http, **asked)
    assert content == found["message"]["content"] and reason == found["finish_reason"] and not calls
    assert content.startswith("{")
    if format is AS_SCHEMA:
        Draft202012Validator(SCHEMA).validate(json.loads(content))


def test_json_or_a_call(http, made):
    """Where a call can be told from JSON: the answer is one or the other, as the model chooses."""
    asked = {"tools": TOOLS, "response_format": AS_SCHEMA}
    if of_tokenizer(made.llama.tokenizer).mark.startswith("{"):
        answer = http.post(CHAT, json={"messages": SAID, **asked})
        assert answer.status_code == 400 and "leave one out" in answer.json()["error"]["message"]
        return
    found = [answered(http, **asked, temperature=2.0, seed=seed)["message"] for seed in range(4)]
    for message in found:
        for call in message.get("tool_calls", []):
            check_call(call["function"])
        if message["content"]:
            Draft202012Validator(SCHEMA).validate(json.loads(message["content"]))
    assert all(bool(message["content"]) != bool(message.get("tool_calls")) for message in found)


REFUSED = [
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "none of the tools"),
    ({"tools": [*TOOLS, TOOLS[1]]}, "two tools are named now"),
    ({"tool_choice": "required"}, "there are no tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "not of its kind"),
    ({"tools": TOOLS * 100}, "not of its kind"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        "set type to object",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}]}, 'keys: ["not"]'),
    ({"tools": TOOLS, "stop": "x"}, "stop would cut"),
    ({"tools": TOOLS, "public_system": True}, "tools would stand in it"),
    ({"response_format": {"type": "json_schema"}}, "give json_schema.schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objct"}}}}, "Invalid type: objct"),
    ({"messages": [*SAID, {"role": "tool", "content": "x"}]}, "answers no call"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": "x",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                }
            ]
        },
        "the assistant's to make",
    ),
    (
        {
            "messages": [
                *SAID,
                {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "["}}]},
            ]
        },
        "arguments of a call of f",
    ),
]


@pytest.mark.parametrize("body, says", REFUSED, ids=[says for _, says in REFUSED])
def test_what_is_refused(http, body, says):
    """Streamed or not, before the first byte."""
    for stream in (False, True):
        answer = http.post(CHAT, json={"messages": SAID, "max_tokens": 8, "stream": stream, **body})
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert says in message and "\n" not in message


@pytest.mark.parametrize(
    "reveal, status, says", [("tokens", 400, "--reveal tokens does not"), ("top-2", 422, "none of the 2")]
)
def test_where_less_is_shown(tmp_path, reveal, status, says):
    with service(opened(with_template(tmp_path), reveal=reveal)) as made:
        http = client(made)
        body = {"messages": SAID, "max_tokens": 3, "response_format": {"type": "json_object"}}
        answer = http.post(CHAT, json=body)
        assert answer.status_code == status and says in answer.json()["error"]["message"]
        if status == 422:  # found out at a token, when the status of a stream was sent
            answer = http.post(CHAT, json={**body, "stream": True, "n": 2})
            assert says in json.loads(answer.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["message"]
        assert http.post(CHAT, json={"messages": SAID, "max_tokens": 2}).status_code == 200
        assert http.get("/health").json() == {"state": "Available", "reason": "", "waiting": 0, "running": 0}


def test_the_openai_package(tmp_path):
    import openai
    import pydantic

    class Answer(pydantic.BaseModel):
        ok: bool

    with program("--engine", "plain", "--model", with_template(tmp_path, TAGGED, context=1000), "--name", "tiny") as (
        served,
        url,
    ):
        served.read_until("requests are answered")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ai:
            asked = {"model": "tiny", "messages": SAID, "max_tokens": 60}
            parsed = ai.chat.completions.parse(**asked, response_format=Answer).choices[0].message.parsed
            assert isinstance(parsed, Answer)
            tools = {**asked, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
            message = ai.chat.completions.create(**tools).choices[0].message
            check_call(message.tool_calls[0].function.model_dump())
            with ai.chat.completions.stream(**tools) as stream:
                for _ in stream:
                    pass
                final = stream.get_final_completion().choices[0]
            assert final.finish_reason == "tool_calls"
            assert final.message.tool_calls[0].function.arguments == message.tool_calls[0].function.arguments
            result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
            again = {**asked, "messages": [*SAID, message.model_dump(exclude_none=True), result], "max_tokens": 2}
            assert ai.chat.completions.create(**again, tools=TOOLS).choices
            with pytest.raises(openai.BadRequestError, match="Invalid type"):
                ai.chat.completions.create(
                    **asked,
                    response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "objct"}}},
                )
