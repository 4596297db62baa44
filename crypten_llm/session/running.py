"""What the parties of a session do now, which is one thing: who else asks is told so, and who stops reading ends it."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.session.prompted import Answer

BUSY = "another stream of this session is still being read; read it to its end or close it"
Events = Generator[Any, None, None]


class Running:
    """For any threads: of several that ask at once, one finds the parties free."""

    def __init__(self) -> None:
        self._now: tuple[Sequence[Answer], Events | None] | None = None
        self._claiming = threading.Lock()

    def check(self) -> None:
        """Raises UsageError when the parties do something."""
        if self._now is not None:
            raise UsageError(BUSY)

    @contextmanager
    def claimed(self, answers: Sequence[Answer] = (), events: Events | None = None) -> Iterator[None]:
        """Makes this what they do. events: to be read to their end, of these answers; None where nobody can leave it.

        Raises: as ``check``.
        """
        with self._claiming:
            self.check()
            self._now = mine = (answers, events)
        try:
            yield
        finally:
            if self._now is mine:
                self._now = None

    def is_now(self, events: Events) -> bool:
        """Whether they do this, and nobody has left it."""
        return self._now is not None and self._now[1] is events

    def leave(self) -> Events | None:
        """Ends the answers of what runs, if it can be left; its events then are the caller's to read to their end."""
        if self._now is None or self._now[1] is None:
            return None
        (answers, events), self._now = self._now, None
        for answer in answers:
            answer.abandoned = True
        return events
