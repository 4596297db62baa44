"""Where a prompt's public beginning ends: at the client, before anything is announced.

Owns the cut. What is public is fixed before a secret word is looked at, so that neither its text nor its length depends
on one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import encode_rendered, render_chat


def cut(
    tokenizer: Any, public: str, secret: str, encode: Callable[[Any, str], list[int]]
) -> tuple[list[int], list[int]]:
    """Ids of a public text and of the secret one after it; encode: ids of a text that stands alone, or of both.

    The first are those of the public text whatever follows. Where both together are written with other tokens at the
    seam, the secret text is written on its own.
    """
    before, both = encode(tokenizer, public), encode(tokenizer, public + secret)
    if both[: len(before)] == before:
        return before, both[len(before) :]
    return before, encode_rendered(tokenizer, secret)


def cut_chat(tokenizer: Any, rendered: str, system: str | None) -> tuple[list[int], list[int]]:
    """The same of a conversation after ``system``, as the chat template wrote it: see ``beginning``."""
    public = beginning(tokenizer, system)
    if not rendered.startswith(public):
        raise UsageError("the chat template does not begin every conversation alike; leave public_system out")
    return cut(tokenizer, public, rendered.removeprefix(public), encode_rendered)


def beginning(tokenizer: Any, system: str | None) -> str:
    """What the chat template writes before the first word of a user: the system's message and words of its own.

    Found by what conversations of other texts and lengths have in common, so that no real one decides where it ends.
    Raises UsageError where that is nothing, or the system's message is not in it.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    conversations = [first + _alternating(texts) for texts in ("a", "b", "aba", "bab")]
    common = os.path.commonprefix([render_chat(tokenizer, messages) for messages in conversations])
    if not common or (system is not None and system.strip() not in common):
        raise UsageError(
            "the chat template writes no system message before all that a user says; leave public_system out "
            "(--public-system)"
        )
    return common


def _alternating(texts: str) -> list[dict]:
    """Messages of a user and of the model in turn, of a letter each."""
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]
