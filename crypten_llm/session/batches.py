"""Several requests at once, as people ask for them: lists of texts, of conversations, of rows of ids.

Owns which arguments are of all and which are of each.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.session.request import Request, rows_of
from crypten_llm.session.settings import check_names


def requests_of(prompt: Any, arguments: dict[str, Any]) -> tuple[list[Request], bool]:
    """The requests that arguments of ``generate`` make, and whether there are several, which one in a list is too.

    prompt: a text, a list of texts or a list of ``Request``. input_ids: a row of ids, or rows. messages: a
    conversation, or a list of them. All other arguments hold for each.

    Raises UsageError for an argument that there is not, and for what ``Request`` refuses.
    """
    check_names("argument", arguments, [each.name for each in fields(Request)])
    several: list[Any] | None = None
    if isinstance(prompt, list | tuple):
        if all(isinstance(each, Request) for each in prompt) and not arguments:
            several = list(prompt)
        elif not any(isinstance(each, Request) for each in prompt):
            several = [Request(each, **arguments) for each in prompt]
        else:
            raise UsageError("a list of prompts holds texts alone, or Requests alone, which bring their own arguments")
    elif isinstance(messages := arguments.get("messages"), list | tuple) and _is_nested(messages):
        several = [Request(prompt, **{**arguments, "messages": each}) for each in messages]
    elif prompt is None and (ids := arguments.get("input_ids")) is not None and len(rows := rows_of(ids)) > 1:
        several = [Request(**{**arguments, "input_ids": row}) for row in rows]
    if several is None:
        return [Request(prompt, **arguments)], False
    if not several:
        raise UsageError("the list of prompts is empty; give at least one")
    return several, True


def _is_nested(messages: list | tuple) -> bool:
    return bool(messages) and all(isinstance(each, list | tuple) for each in messages)
