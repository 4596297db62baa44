"""Waits that end: how long a party waits for others before there are links, and what it looks after meanwhile.

Owns the deadline, which no byte that comes in between moves, and the turns in which Ctrl-C and a child's end are seen.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

POLL_SECONDS = 0.02
Result = TypeVar("Result")
LATE_SECONDS = 1.0  # for what is asked at the very end: an answer is on its way


class Wait:
    """How long this party waits for the others, all in all, and what it looks after meanwhile.

    timeout: seconds from now. look: called at every turn; what it raises ends the wait.
    """

    def __init__(self, timeout: float, look: Callable[[], object] | None = None) -> None:
        self.timeout, self._deadline, self.look = timeout, time.monotonic() + timeout, look

    @property
    def left(self) -> float:
        """Seconds; negative when the time is over."""
        return self._deadline - time.monotonic()

    def turn(self) -> float:
        """Seconds until the next turn. Raises TimeoutError when the time is over."""
        if self.look is not None:
            self.look()
        left = self.left
        if left <= 0:
            raise TimeoutError("timed out")
        return min(left, POLL_SECONDS)

    def pause(self, seconds: float) -> None:
        """Sleeps, in turns. Raises TimeoutError when the time is over."""
        until = time.monotonic() + seconds
        while (rest := until - time.monotonic()) > 0:
            time.sleep(min(rest, self.turn()))

    def on(self, sock: socket.socket, step: Callable[..., Result], *args: Any) -> Result:
        """`step(*args)`, which waits for `sock` and can be tried again after a timeout."""
        while True:
            sock.settimeout(self.turn())
            with contextlib.suppress(TimeoutError):
                return step(*args)

    def in_thread(self, job: Callable[[], Result]) -> Result:
        """`job()`, in a thread that is left to itself when the time is over: for what neither timeout nor Ctrl-C ends.

        One that starts late still has LATE_SECONDS.
        """
        wait = Wait(max(self.left, LATE_SECONDS), self.look)
        done: list[Result] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                done.append(job())
            except Exception as error:
                failed.append(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        while not (done or failed):
            worker.join(wait.turn())
        if failed:
            raise failed[0]
        return done[0]

    def read_exactly(self, sock: socket.socket, count: int) -> bytes:
        """`count` bytes of `sock`; OSError when they do not come in time."""
        data = b""
        while len(data) < count:
            chunk = self.on(sock, sock.recv, count - len(data))
            if not chunk:
                raise ConnectionResetError("closed the connection")
            data += chunk
        return data
