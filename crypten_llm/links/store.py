"""The torch.distributed store through which parties find each other, and waits that end.

Owns what is needed of a TCPStore, its failures in our words, and how long a party waits for others before there are
links. What is kept in the store is the business of `rendezvous`.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import TCPStore

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links.sockets import dial, reason_of

POLL_SECONDS = 0.02
Result = TypeVar("Result")
LATE_SECONDS = 1.0  # for what is asked of the store at the very end: an answer is on its way


class Wait:
    """How long this party waits for the others, all in all, and what it looks after meanwhile.

    timeout: seconds from now. look: called at every turn; what it raises ends the wait.
    """

    def __init__(self, timeout: float, look: Callable[[], object] | None = None) -> None:
        self.timeout, self._deadline, self._look = timeout, time.monotonic() + timeout, look

    @property
    def left(self) -> float:
        """Seconds; negative when the time is over."""
        return self._deadline - time.monotonic()

    def turn(self) -> float:
        """Seconds until the next turn. Raises TimeoutError when the time is over."""
        if self._look is not None:
            self._look()
        left = self.left
        if left <= 0:
            raise TimeoutError("timed out")
        return min(left, POLL_SECONDS)

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
        wait = Wait(max(self.left, LATE_SECONDS), self._look)
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


class Store:
    """The few operations needed of a TCPStore, its failures in our words, polling in place of its waits.

    TCPStore's own waits print C++ stack traces and do not notice Ctrl-C; so it is only connected when the port
    answers, and keys are polled. Its other operations wait for ever on a host that hangs; so each is made in a thread.
    """

    def __init__(self, host: str, port: int, is_master: bool, master_name: str, wait: Wait, prefix: str) -> None:
        self.place, self.prefix, self._wait = f"{host}:{port}", prefix, wait
        if not is_master:
            self._await_port(host, port, master_name)
        self._store = self._open(host, port, is_master, master_name)

    def _open(self, host: str, port: int, is_master: bool, master_name: str) -> TCPStore:
        """The TCPStore. Making it waits for ever on a port where something else answers."""
        seconds = timedelta(seconds=max(LATE_SECONDS, self._wait.left))
        try:
            return self._wait.in_thread(
                lambda: TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=seconds)
            )
        except TimeoutError:
            reason = f"no answer in {self._wait.timeout:g} s"
        except RuntimeError as error:  # DistNetworkError among them
            reason = reason_of(error)
        if is_master and "EADDRINUSE" in reason:
            raise UsageError(
                f"port {port} is in use on this machine, perhaps by another {master_name}, so the rendezvous store "
                "cannot open there: give every party another MASTER_PORT"
            )
        raise PartyError(
            f"what listens at {self.place} is no rendezvous store ({reason}): check MASTER_ADDR and MASTER_PORT"
        )

    def _await_port(self, host: str, port: int, master_name: str) -> None:
        while True:
            try:
                self._wait.in_thread(lambda: dial(host, port, self._wait.left)).close()
                return
            except OSError as error:
                if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                    raise UsageError(
                        f"MASTER_ADDR={host!r} is no known host: give the address of {master_name}"
                    ) from None
                if self._wait.left <= 0:
                    raise PartyError(
                        f"no rendezvous store at {self.place} after {self._wait.timeout:g} s ({reason_of(error)}): "
                        f"start {master_name} and check MASTER_ADDR and MASTER_PORT"
                    ) from None
            time.sleep(POLL_SECONDS)

    def _call(self, method: str, key: str, *args: Any) -> Any:
        name = self.prefix + key
        try:
            return self._wait.in_thread(
                lambda: getattr(self._store, method)([name] if method == "check" else name, *args)
            )
        except TimeoutError:
            raise PartyError(
                f"the rendezvous store at {self.place} did not answer {method} {key!r} within {self._wait.timeout:g} "
                "s: the party or launcher that hosts it hangs, or its network is down; start all parties again"
            ) from None
        except RuntimeError as error:
            raise PartyError(
                f"the rendezvous store at {self.place} went away ({reason_of(error)}): the party or launcher that "
                "hosts it stopped, start all parties again"
            ) from None

    def put(self, key: str, value: str) -> None:
        self._call("set", key, value)

    def put_first(self, key: str, value: object) -> str:
        """Set `key` unless it is set; the value it has then."""
        return self._call("compare_set", key, "", value).decode()

    def add(self, key: str) -> int:
        """Count up `key`; its value then."""
        return self._call("add", key, 1)

    def get(self, key: str) -> str | None:
        """The value of `key`, or None while it is not set."""
        return self._call("get", key).decode() if self._call("check", key) else None
