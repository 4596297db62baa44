"""What was said in a conversation, as a kept cache holds it and as the model's chat template has written it.

Owns where a further turn begins. The whole conversation is written anew by the template at each turn; only where that
begins with what the cache holds can the turn go on with it: by its ids, or by its text where the model wrote its answer
in other tokens than the tokenizer would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crypten_llm.models.tokenizer import encode_rendered


@dataclass(frozen=True)
class Spoken:
    """cached: ids that the cache holds. text, ids: the conversation to the end of its last answer, which may be further
    on; no text where the template may write that otherwise."""

    cached: Sequence[int] = ()
    text: str = ""
    ids: Sequence[int] = field(default=(0,))

    @classmethod
    def after(
        cls, tokenizer: Any, rendered: str, prompt: Sequence[int], drawn: Sequence[int], text: str, cached: int
    ) -> Spoken:
        """A prompt, which the template has written as ``rendered``, and an answer of these ids, of which ``text`` was
        shown; cached: how many ids of both the cache holds."""
        whole = [*prompt, *drawn]
        # The last token may add nothing: the template writes what ends an answer itself.
        for own in (drawn[:-1], drawn):
            if tokenizer.decode(own, skip_special_tokens=True) == text:
                return cls(whole[:cached], rendered + text, [*prompt, *own])
        return cls(whole[:cached])  # cut at a stop string, or left before the end of a character

    def continued(self, tokenizer: Any, rendered: str, ids: list[int]) -> list[int]:
        """``ids`` of what the template wrote, or others of it, which begin with what the cache holds if any do."""
        if not self.cached or ids[: len(self.cached)] == list(self.cached) or not self.text:
            return ids
        rest = rendered.removeprefix(self.text)
        more = encode_rendered(tokenizer, rest)
        if len(rest) == len(rendered) or not more or ids[-len(more) :] != more:
            return ids
        return [*self.ids, *more]

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether ``ids`` are what the cache holds, and more."""
        count = len(self.cached)
        return len(ids) > count > 0 and list(ids[:count]) == list(self.cached)
