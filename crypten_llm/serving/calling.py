"""What a conversation's tools come down to: messages that the model reads, and a grammar that its answer follows.

Owns both. The schemas of the functions hold the calls; where the template takes no tools, a message of the system
describes them to the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crypten_llm.models.tokenizer import has_chat_template
from crypten_llm.serving.bodies import ChatBody, Chosen, Function, Message
from crypten_llm.serving.refusals import Refusal
from crypten_llm.serving.tool_format import HERMES, ToolFormat, of_tokenizer
from crypten_llm.session.grammar import json_rule

MOST_CALLS = 16  # of an answer


@dataclass(frozen=True)
class Calling:
    """Of one request. functions: those that may be called. is_due: whether one has to be. many: whether several may be.
    schema: of an answer that calls none, where it has to be JSON.
    """

    format: ToolFormat = HERMES
    functions: tuple[Function, ...] = ()
    is_due: bool = False
    many: bool = True
    schema: dict[str, Any] | None = None

    @classmethod
    def of(cls, body: ChatBody, tokenizer: Any) -> Calling:
        """Raises Refusal for a choice that there is not."""
        schema = body.response_format.schema if body.response_format else None
        choice, tools = body.tool_choice, body.tools or []
        if not tools and choice not in (None, "none", "auto"):
            raise Refusal(400, "tool_choice asks for a call, and there are no tools; give some, or leave it out")
        functions = tuple(tool.function for tool in tools)
        names = [function.name for function in functions]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise Refusal(400, f"two tools are named {twice}; give each a name of its own")
        if isinstance(choice, Chosen):
            functions = tuple(each for each in functions if each.name == choice.function.name)
            if not functions:
                raise Refusal(400, f"tool_choice names {choice.function.name[:80]!r}, which is none of the tools")
        uses = functions or any(m.tool_calls or m.role == "tool" for m in body.messages)
        has_template = uses and tokenizer is not None and has_chat_template(tokenizer)
        format = of_tokenizer(tokenizer) if has_template else HERMES
        if choice == "none":
            functions = ()
        is_due = choice == "required" or isinstance(choice, Chosen)
        many = body.parallel_tool_calls is not False and not isinstance(choice, Chosen) and format.between is not None
        if functions and not is_due and schema is not None and format.mark.startswith("{"):
            raise Refusal(400, "this model writes a call as JSON alone, so not with a response_format; leave one out")
        return cls(format, functions, is_due, many, schema)

    @property
    def leads(self) -> bool:
        """Whether text may come before a call."""
        return not self.is_due and self.schema is None

    def grammar(self) -> str | None:
        """Of the answer; None where it may be any text. Raises UsageError for what is no schema."""
        if not self.functions:
            return None if self.schema is None else f"start: {json_rule(self.schema)}"
        shape = self.format
        rest = shape.opening.removeprefix(shape.mark) + shape.head if shape.opening else ""
        more = f" more{{0,{MOST_CALLS - 1}}}" if self.many else ""
        calls = f"{_text(rest)} call{more} {_text(shape.closing)}"
        marked = f"{_text(shape.mark)} {calls}"
        if self.is_due:
            lines = [f"start: {marked}"]
        elif self.schema is not None:
            lines = [f"start: {marked} | {json_rule(self.schema)}"]
        else:  # a lazy lexeme ends at its first mark, so no text holds one
            lines = [f"start: TEXT | marked {calls}", f"marked[lazy]: TEXT {_text(shape.mark)}", r"TEXT: /(.|\n)*/"]
        lines.append("call: " + " | ".join(f"call_{number}" for number in range(len(self.functions))))
        if self.many:
            lines.append(f"more: {_text((shape.between or '') + shape.head)} call")
        for number, function in enumerate(self.functions):
            name = _text(function.name + shape.middle)
            lines.append(f"call_{number}: {name} {json_rule(_arguments(function))} {_text('}')}")
        return "\n".join(lines)

    def tools(self) -> list[dict[str, Any]] | None:
        """For the template, where it takes them."""
        if not self.functions or not self.format.by_template:
            return None
        return [_described(function) for function in self.functions]

    def messages(self, said: Sequence[Message]) -> list[dict[str, Any]]:
        """The conversation as the template takes it. Raises Refusal for what is none."""
        names: dict[str, str] = {}
        made: list[dict[str, Any]] = []
        for message in said:
            role = "system" if message.role == "developer" else message.role
            text = message.text
            if message.role == "tool":
                if message.tool_call_id not in names:
                    raise Refusal(400, "a message of the tool answers no call before it; give its tool_call_id")
                made.append({"role": role, "content": text, "tool_call_id": message.tool_call_id})
                made[-1]["name"] = names[message.tool_call_id]
                continue
            made.append({"role": role, "content": text})
            if message.tool_calls:
                names |= {call.id: call.function.name for call in message.tool_calls}
                calls = made[-1]["tool_calls"] = []
                for call in message.tool_calls:
                    called = {"name": call.function.name, "arguments": call.function.given}
                    calls.append({"id": call.id, "type": "function", "function": called})
        return made if self.format.by_template else self._written(made)

    def _written(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The same for a template that knows of texts alone."""
        made: list[dict[str, Any]] = []
        is_result = False  # the last message
        for message in messages:
            follows, is_result = is_result, message["role"] == "tool"
            if is_result:
                text = f"<tool_response>\n{message['content']}\n</tool_response>"
                if follows:
                    made[-1]["content"] += f"\n{text}"
                else:
                    made.append({"role": "user", "content": text})
                continue
            text = message["content"]
            if calls := message.get("tool_calls"):
                objects = (json.dumps(call["function"], ensure_ascii=False) for call in calls)
                written = HERMES.opening + (HERMES.between or "").join(objects) + HERMES.closing
                text = f"{text}\n{written}" if text else written
            made.append({"role": message["role"], "content": text})
        if self.functions:
            has_system = made[0]["role"] == "system"
            words = f"{made[0]['content']}\n\n" if has_system else ""
            made[: int(has_system)] = [{"role": "system", "content": words + self._words()}]
        return made

    def _words(self) -> str:
        """What the system says of the functions."""
        listed = "\n".join(json.dumps(_described(function), ensure_ascii=False) for function in self.functions)
        call = HERMES.opening + HERMES.head + 'NAME", "arguments": {...}}' + HERMES.closing
        how = "You have to call one." if self.is_due else "Call one where it helps; answer in words where none does."
        return f"You can call these functions, described in JSON:\n{listed}\n{how} A call is written\n{call}"


def _text(text: str) -> str:
    """A literal of a grammar."""
    return json.dumps(text) if text else ""


def _arguments(function: Function) -> dict[str, Any]:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    if function.parameters is None:
        return nothing
    if function.parameters.get("type", "object") != "object":
        raise Refusal(400, f"the parameters of tool {function.name} are no schema of an object; set type to object")
    return {"type": "object", **function.parameters}


def _described(function: Function) -> dict[str, Any]:
    about = {"name": function.name, "description": function.description, "parameters": function.parameters}
    return {"type": "function", "function": {name: value for name, value in about.items() if value is not None}}
