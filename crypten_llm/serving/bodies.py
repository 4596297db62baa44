"""The bodies of requests as OpenAI's interface has them, each read once into a type that bounds it.

Owns which fields there are: those that are followed, those that change nothing, and those that would and are not
followed, which are refused unless they ask for nothing. A field that is none of these is refused too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from crypten_llm import records
from crypten_llm.records import Extract, Malformed, Record, Word
from crypten_llm.serving.refusals import Refusal

Choices = Annotated[int, Meta(ge=1, le=16)]
Best = Annotated[int, Meta(ge=0, le=20)]
Name = Annotated[str, Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
# What asks for nothing, by the field; every other value would be left out in silence.
NEUTRAL: dict[str, tuple] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
}


class StreamOptions(Extract, frozen=True):
    """include_usage: a last piece with the number of tokens."""

    include_usage: bool = False


class Body(Record, frozen=True, kw_only=True):
    """What both kinds of request have. top_k, min_p, repetition_penalty, policy and hide_length are fields of
    ``session.request.Request`` that OpenAI's interface has not.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: Choices | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    policy: Annotated[str, Meta(max_length=1000)] | None = None
    hide_length: bool | None = None
    user: Word | None = None  # whose turn it is in the queue

    # They change nothing of an answer.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    # Refused unless NEUTRAL.
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None


class Part(Extract, frozen=True):
    type: str
    text: str | None = None


class Called(Extract, frozen=True):
    """A function and, as JSON, what it is called with."""

    name: Name
    arguments: str

    @property
    def given(self) -> dict[str, Any]:
        """The arguments. Raises Refusal where they are no JSON object."""
        try:
            return records.decode(self.arguments, dict[str, Any])
        except Malformed as error:
            raise Refusal(400, f"the arguments of a call of {self.name} are {error}") from None


class Call(Extract, frozen=True):
    id: Word
    function: Called
    type: Literal["function"] = "function"


class Message(Extract, frozen=True):
    """Of a conversation; answers come back with fields that say nothing, which are passed over."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: Word | None = None

    @property
    def text(self) -> str:
        """Raises Refusal for what is no text."""
        if self.tool_calls and self.role != "assistant":
            raise Refusal(400, f"a message of the {self.role} has tool_calls, which are the assistant's to make")
        if self.content is None and not self.tool_calls:
            raise Refusal(400, f"a message of the {self.role} has no content; give a text")
        if self.content is None:
            return ""
        if isinstance(self.content, str):
            return self.content
        for part in self.content:
            if part.type != "text" or part.text is None:
                raise Refusal(400, f"a message has a part of type {part.type[:40]!r}; text is all that is supported")
        return "".join(part.text or "" for part in self.content)


class Function(Extract, frozen=True):
    """parameters: a JSON schema of what it is called with; not given, it is called with nothing."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Extract, frozen=True):
    function: Function
    type: Literal["function"] = "function"


class Named(Extract, frozen=True):
    name: str


class Chosen(Extract, frozen=True):
    """The one function that is to be called."""

    function: Named
    type: Literal["function"] = "function"


class Schema(Extract, frozen=True, rename={"content": "schema"}):
    name: str | None = None
    content: dict[str, Any] | None = None


class Format(Record, frozen=True):
    """What an answer is: any text, a JSON object, or the JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @property
    def schema(self) -> dict[str, Any] | None:
        """Of the answer, if it has to be JSON. Raises Refusal where one is announced and not given."""
        if self.type != "json_schema":
            return {"type": "object"} if self.type == "json_object" else None
        if self.json_schema is None or self.json_schema.content is None:
            raise Refusal(400, "response_format is a json_schema without one; give json_schema.schema")
        return self.json_schema.content


class ChatBody(Body, frozen=True, kw_only=True):
    """Of /v1/chat/completions. public_system: as in ``Request``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Best | None = None
    public_system: bool = False

    tools: Annotated[list[Tool], Meta(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Chosen | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None

    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class TextBody(Body, frozen=True, kw_only=True):
    """Of /v1/completions. prompt: a text, token ids, or several of either. public_prefix: as in ``Request``."""

    prompt: Any
    logprobs: Best | None = None
    public_prefix: str | list[int] | None = None

    suffix: Any = None
    echo: Any = None
    best_of: Any = None


def read(data: bytes, kind: type[ChatBody] | type[TextBody] | None = None) -> ChatBody | TextBody:
    """The body of a request; kind: not given, that of a conversation where it has ``messages``.

    Raises Refusal for another, and for a field that asks for what is not done here.
    """
    try:
        if kind is None:
            kind = ChatBody if "messages" in records.decode(data, dict[str, Any]) else TextBody
        body: ChatBody | TextBody = records.decode(data, kind)
    except Malformed as error:
        raise Refusal(400, f"the body is {error}; see docs/serving.md for the fields") from None
    for name, neutral in NEUTRAL.items():
        value = getattr(body, name, None)
        if value is not None and value not in neutral:
            raise Refusal(400, f"{name} is not supported; leave it out", "unsupported_field")
    return body
