"""Text and calls of functions, told apart as an answer grows.

Owns the reading of what ``calling``'s grammar lets a model write, which holds for every whole answer; of one that was
cut, what there is.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import Enum, auto

from crypten_llm.serving.tool_format import ToolFormat


@dataclass
class Part:
    """What a piece of the answer adds to the call number ``index``; id, name: with the first piece of it."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass
class Piece:
    """content: text. calls: what is added to which."""

    content: str = ""
    calls: list[Part] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.content or self.calls)


class _At(Enum):
    TEXT = auto()  # where the mark may come
    HEAD = auto()  # up to a call's name
    NAME = auto()
    ARGUMENTS = auto()
    NEXT = auto()  # after a call
    PLAIN = auto()  # all else is text


class Reader:
    """Of one answer. leads: whether text may come before calls; else an answer that begins otherwise is text."""

    def __init__(self, format: ToolFormat, leads: bool) -> None:
        self._format, self._leads = format, leads
        self._at, self._held = _At.TEXT, ""
        self._depth, self._quoted, self._escaped = 0, False, False
        self.count = 0  # of calls so far

    def read(self, text: str, last: bool = False) -> Piece:
        """What ``text`` adds; the last adds what was held back."""
        self._held += text
        found = Piece()
        while self._step(found):
            pass
        if last and self._at in (_At.TEXT, _At.PLAIN):
            found.content, self._held = found.content + self._held, ""
        return found

    def _step(self, found: Piece) -> bool:
        """Reads on; whether it went from one state to another."""
        match self._at:
            case _At.TEXT:
                return self._text(found)
            case _At.PLAIN:
                found.content, self._held = found.content + self._held, ""
                return False
            case _At.HEAD:
                return self._past(self._format.head, _At.NAME)
            case _At.NAME:
                name, middle, rest = self._held.partition(self._format.middle)
                if not middle:
                    return False
                self._held, self._at = rest, _At.ARGUMENTS
                found.calls.append(Part(self.count, f"call_{secrets.token_hex(12)}", name))
                self.count += 1
                return True
            case _At.ARGUMENTS:
                return self._arguments(found)
            case _At.NEXT:
                return self._past(self._format.head, _At.NAME)

    def _text(self, found: Piece) -> bool:
        mark = self._format.mark
        place = self._held.find(mark)
        if place > 0 and not self._leads:
            place = -1
        if place >= 0:
            found.content += self._held[:place]
            # A mark that is the object's own beginning is read again as such.
            self._held = self._held[place if mark == self._format.head else place + len(mark) :]
            self._at = _At.HEAD
            return True
        if not self._leads and not mark.startswith(self._held):
            self._at = _At.PLAIN
            return True
        keep = next(
            (n for n in range(min(len(self._held), len(mark) - 1), 0, -1) if mark.startswith(self._held[-n:])), 0
        )
        cut = len(self._held) - keep
        found.content, self._held = found.content + self._held[:cut], self._held[cut:]
        return False

    def _past(self, words: str, then: _At) -> bool:
        _, seen, rest = self._held.partition(words)
        if seen:
            self._held, self._at = rest, then
        return bool(seen)

    def _arguments(self, found: Piece) -> bool:
        """Up to the brace that closes the object."""
        for place, character in enumerate(self._held):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{}":
                self._depth += 1 if character == "{" else -1
                if not self._depth:
                    self._add(found, self._held[: place + 1])
                    self._held, self._at = self._held[place + 1 :], _At.NEXT
                    return True
        self._add(found, self._held)
        self._held = ""
        return False

    def _add(self, found: Piece, arguments: str) -> None:
        if not found.calls or found.calls[-1].index != self.count - 1:
            found.calls.append(Part(self.count - 1))
        found.calls[-1].arguments += arguments
