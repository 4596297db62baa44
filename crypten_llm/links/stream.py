"""A stream as its reader wants it: any number of bytes at a time, in sections that end where a message does.

Owns what is left of the last message. Where messages end means nothing to the reader.
"""

from collections import deque
from collections.abc import Callable

import torch

from crypten_llm.errors import PartyError
from crypten_llm.links.faults import SAME_PROGRAM
from crypten_llm.links.staging import Staging

AHEAD = 256 << 20  # bytes that may be held before they are asked for


class StreamReader:
    """next_piece: receives the next message; there_is: whether one has begun to come. name: of the party that sends.
    staging: to where what is read goes.
    """

    unit = 1  # bytes of which what is read at once takes a whole number
    window = 1 << 20  # bytes that are best read at once, about: by then more has come

    def __init__(
        self, next_piece: Callable[[], memoryview], there_is: Callable[[], bool], name: str, staging: Staging
    ) -> None:
        self._next_piece, self._there_is, self._name, self._staging = next_piece, there_is, name, staging
        self._left = memoryview(b"")  # of the last message
        self._ahead: deque[memoryview] = deque()  # messages that were received before they were asked for
        self._bytes_ahead = 0

    def receive_ahead(self) -> bool:
        """For who waits for something else: receives a message that is coming; whether there was one, and room."""
        if self._bytes_ahead >= AHEAD or not self._there_is():
            return False
        self._ahead.append(self._next_piece())
        self._bytes_ahead += len(self._ahead[-1])
        return True

    def begin(self, label: str) -> None:
        """The next section, whatever its label: it is what comes next."""

    def read(self, count: int, counted: int | None = None) -> torch.Tensor:
        """The next `count` bytes, a uint8 tensor; counted: of them, where there is more between them, which is not."""
        out, filled = self._staging.empty((count,), torch.uint8), 0
        target = out.numpy().data
        while filled < count:
            if not self._left:
                self._left = self._next()
            take = min(count - filled, len(self._left))
            target[filled : filled + take] = self._left[:take]
            self._left = self._left[take:]
            filled += take
        return self._staging.to_device(out)

    def _next(self) -> memoryview:
        if not self._ahead:
            return self._next_piece()
        self._bytes_ahead -= len(self._ahead[0])
        return self._ahead.popleft()

    def end(self) -> None:
        if self._left:
            raise PartyError(f"{self._name} sent more than this section needs: {SAME_PROGRAM}")
