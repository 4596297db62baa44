"""A conversation as transformers takes it: a list of messages, each of somebody, with a text.

Owns which list is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crypten_llm.errors import UsageError


def check_messages(messages: Any) -> None:
    """Raises UsageError for what is no conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError(f"messages is {messages!r}; give a list of {{'role': ..., 'content': ...}}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UsageError(f"{message!r} is no message; give {{'role': 'user', 'content': TEXT}}")


def system_of(messages: Sequence[dict]) -> str | None:
    """The text before all turns of a conversation, if there is one."""
    first = next(iter(messages), {})
    return first["content"] if first.get("role") == "system" else None
