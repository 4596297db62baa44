"""How a model writes that it calls a function: as its chat template writes the calls of earlier turns.

Owns what is learned of a template, by having it write conversations whose words are known. One that does not show
tools, calls and their results to the model, or whose calls cannot be told from its text, has them written here, in the
form of the Hermes models, which others have taken over.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import decode, encode_rendered, render_chat


@dataclass(frozen=True)
class ToolFormat:
    """Calls are ``opening``, objects with ``between`` from one to the next, ``closing``; between: None where a template
    knows of one call alone. key: of the arguments, beside the name. by_template: whether the template writes it all.
    """

    opening: str
    between: str | None
    closing: str
    key: str = "arguments"
    by_template: bool = True

    @property
    def mark(self) -> str:
        """What tells calls from text: no text before them holds it."""
        return self.opening.rstrip() or self.head

    @property
    def head(self) -> str:
        """Of a call's object, up to the function's name; ``middle`` goes on up to the arguments."""
        return '{"name": "'

    @property
    def middle(self) -> str:
        return f'", "{self.key}": '


HERMES = ToolFormat("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", by_template=False)
_NAME, _OTHER, _ABOUT, _SAID, _RESULT = "probe_one", "probe_two", "probes what is", "zqjx", "vwkq"
_ARGUMENTS = {"probe": "v"}
_USER = {"role": "user", "content": "a"}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": _ABOUT,
            "parameters": {"type": "object", "properties": {"probe": {"type": "string"}}},
        },
    }
    for name in (_NAME, _OTHER)
]


@lru_cache(maxsize=2)
def of_tokenizer(tokenizer: Any) -> ToolFormat:
    """The format of its template, or else ``HERMES``."""
    try:
        return _learned(tokenizer) or HERMES
    except UsageError:  # of a template that refuses such a conversation
        return HERMES


def _learned(tokenizer: Any) -> ToolFormat | None:
    shown = render_chat(tokenizer, [_USER], _TOOLS)
    result = {"role": "tool", "tool_call_id": _id(0), "name": _NAME, "content": _RESULT}
    answered = render_chat(tokenizer, [_USER, _calling(_NAME), result], _TOOLS)
    if not all(word in shown for word in (_NAME, _OTHER, _ABOUT)) or _RESULT not in answered:
        return None
    before, _, after = render_chat(tokenizer, [_USER, _saying(_SAID)], opens=False).partition(_SAID)
    one = _objects(_between(render_chat(tokenizer, [_USER, _calling(_NAME)], opens=False), before, after))
    if one is None or len(one) != 3:
        return None
    opening, key, closing = one
    try:
        two = _objects(_between(render_chat(tokenizer, [_USER, _calling(_NAME, _OTHER)], opens=False), before, after))
    except UsageError:  # it takes one call alone
        two = None
    several = two is not None and len(two) == 5 and (two[0], two[1], two[4]) == one and two[3] == key
    found = ToolFormat(opening, two[2] if two is not None and several else None, closing, key)
    return found if all(_is_text(tokenizer, part) for part in (opening, found.between or "", closing)) else None


def _id(number: int) -> str:
    return f"probe000{number}"  # some templates want nine characters


def _saying(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _calling(*names: str) -> dict[str, Any]:
    calls = [
        {"id": _id(number), "type": "function", "function": {"name": name, "arguments": _ARGUMENTS}}
        for number, name in enumerate(names)
    ]
    return {**_saying(""), "tool_calls": calls}


def _between(text: str, before: str, after: str) -> str:
    """What an answer added, or nothing where the template writes around it otherwise than around a text."""
    if not text.startswith(before) or not text.endswith(after) or len(text) < len(before) + len(after):
        return ""
    return text[len(before) : len(text) - len(after)]


def _objects(text: str) -> tuple[str, ...] | None:
    """The text around calls' objects, each of which is replaced by its key: before, key, between, key, after."""
    pattern = rf'\{{"name": "(?:{_NAME}|{_OTHER})", "(arguments|parameters)": \{{"probe": "v"\}}\}}'
    parts = tuple(re.split(pattern, text))
    return parts if len(parts) > 1 else None


def _is_text(tokenizer: Any, part: str) -> bool:
    """Whether an answer shows it: some templates write tokens that are no text."""
    return decode(tokenizer, encode_rendered(tokenizer, part)).strip() == part.strip()
