"""The text of an answer in the making, and the texts that end it; at the client alone.

Owns what may be shown when: never a part of a character, and never a part of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import decode


class Detokenizer:
    """Text of a growing list of tokens, holding back bytes of a character that is not complete yet.

    stops: texts that end the answer, which ends before the first that it comes to hold. What may be the beginning of
    one is held back until it is known, which is at most the length of the longest.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False  # by one of ``stops``

    def push(self, token_id: int, last: bool) -> str:
        """What ``token_id`` adds to the text that may be shown; the last token adds whatever is left."""
        self.ids.append(token_id)
        text = decode(self.tokenizer, self.ids)
        if (found := self._first_stop(text)) is not None:
            text, self.stopped = text[:found], True
        elif not last:
            if text.endswith("\ufffd"):
                return ""
            text = text[: len(text) - self._held(text)]
        new, self.text = text[len(self.text) :], text
        return new

    def again(self) -> None:
        """Does a token's work for none: a hidden end is not to be seen by how long the client takes."""
        self._first_stop(decode(self.tokenizer, self.ids))

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop string begins; none begins before what was shown."""
        found = [place for stop in self.stops if (place := text.find(stop, len(self.text))) >= 0]
        return min(found, default=None)

    def _held(self, text: str) -> int:
        """Characters at the end of ``text`` that a stop string may begin with."""
        unseen = len(text) - len(self.text)
        for count in range(min(unseen, max(map(len, self.stops), default=1) - 1), 0, -1):
            if any(stop.startswith(text[-count:]) for stop in self.stops):
                return count
        return 0


def check_stops(stops: Any) -> tuple[str, ...]:
    """Stop strings from one or several. Raises UsageError for what is none."""
    given = [stops] if isinstance(stops, str) else list(stops or ())
    for stop in given:
        if not isinstance(stop, str) or not stop:
            raise UsageError(f"stop is {stop!r}; give a text that ends the answer, or several (--stop TEXT)")
    return tuple(given)
