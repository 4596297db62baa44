"""Where parties meet: one listener, at which many greet at once, and what they are told there of each other.

Owns the door, at which each connection has a deadline of its own and no stranger holds the others up, and the meeting:
the party that hosts it waits until all others have come, and tells each where the others listen.
"""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Generic, NoReturn, TypeVar

from msgspec import Meta

from crypten_llm.errors import CryptenLLMError, PartyError, UsageError
from crypten_llm.links.greeting import Greeter, read_facts, send_facts
from crypten_llm.links.sockets import reason_of
from crypten_llm.links.waiting import LATE_SECONDS, Wait
from crypten_llm.records import Record, Words

GREETING_SECONDS = 5.0  # for a whole greeting, however its bytes come
GREETINGS = 64  # at once; one more ends the oldest, whose party tries again
Greeted = TypeVar("Greeted")
Host = Annotated[str, Meta(min_length=1, max_length=255, pattern="^[!-~]+$")]
Port = Annotated[int, Meta(ge=0, le=65535)]
Place = tuple[Host, Port]  # where a party listens; port 0 where no party has to connect to it


class Places(Record, frozen=True, tag="places"):
    """All have come, and each listens there, by rank."""

    of: tuple[Place, ...]


class Stop(Record, frozen=True, tag="stop"):
    """The run does not start; is_usage: because of how a party was started."""

    reason: Words
    is_usage: bool


class Door(Generic[Greeted]):
    """A listener that greets whoever comes, side by side; used as a context, which closes it.

    greet: what is done with a connection, in a thread of its own, until the deadline that it is given. It closes the
    connection where it raises: OSError for a stranger, an error of ours for what ends the wait.
    """

    def __init__(self, listener: socket.socket, greet: Callable[[socket.socket, Wait], Greeted]) -> None:
        self._listener, self._greet = listener, greet
        self._greeted: queue.Queue[Greeted | CryptenLLMError] = queue.Queue()
        self._greeting: dict[int, socket.socket] = {}  # in order; each a handle to end it by
        self._number, self._open = 0, True
        self.turned_away, self.reason = 0, ""

    def __enter__(self) -> Door[Greeted]:
        return self

    def __exit__(self, *_: object) -> None:
        """Nobody is let in any more; who was greeted and not taken is let go."""
        self._open = False
        self._listener.close()
        for number in list(self._greeting):
            self._end(number)
        while not self._greeted.empty():
            _let_go(self._greeted.get())

    def next(self, wait: Wait, leaving: Iterable[socket.socket] = ()) -> Greeted | None:
        """The next that was greeted; None when one of ``leaving``, which have nothing to say, has ended.

        Raises TimeoutError, and what a greeting raised that is no stranger's.
        """
        while True:
            with contextlib.suppress(queue.Empty):
                greeted = self._greeted.get_nowait()
                if isinstance(greeted, CryptenLLMError):
                    raise greeted
                return greeted
            ready, _, _ = select.select([self._listener, *leaving], [], [], wait.turn())
            if self._listener in ready:
                self._accept()
            elif ready:
                return None

    @property
    def strangers(self) -> str:
        """What to add to a message about who did not come."""
        if not self.turned_away:
            return ""
        count = "a connection was" if self.turned_away == 1 else f"{self.turned_away} connections were"
        return f"; {count} turned away ({self.reason})"

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again
            return
        if len(self._greeting) >= GREETINGS:
            self._end(min(list(self._greeting), default=0))
        self._number += 1
        self._greeting[self._number] = sock.dup()
        threading.Thread(target=self._run, args=(self._number, sock), daemon=True).start()

    def _run(self, number: int, sock: socket.socket) -> None:
        try:
            greeted = self._greet(sock, Wait(GREETING_SECONDS))
            if self._open:
                self._greeted.put(greeted)
            else:
                _let_go(greeted)
        except CryptenLLMError as error:
            self._greeted.put(error)
        except OSError as error:
            self.turned_away, self.reason = self.turned_away + 1, reason_of(error)
        finally:
            if handle := self._greeting.pop(number, None):
                handle.close()

    def _end(self, number: int) -> None:
        if handle := self._greeting.pop(number, None):
            with contextlib.suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)
            handle.close()


def _let_go(greeted: object) -> None:
    for part in greeted if isinstance(greeted, tuple) else ():
        if isinstance(part, socket.socket):
            part.close()


def host(listener: socket.socket, greeter: Greeter, mine: Place, wait: Wait) -> dict[int, socket.socket]:
    """At the party that hosts the meeting: the links to all others, each of which has been told where the rest listen.

    Raises PartyError for parties that do not come, UsageError for parties that were started differently.
    """
    others = set(range(len(greeter.roles))) - {greeter.rank}
    arrived: dict[int, tuple[socket.socket, Place]] = {}

    def greet(sock: socket.socket, deadline: Wait) -> tuple[int, socket.socket, Place]:
        peer, secured = greeter.answer(sock, others, deadline)
        try:
            return peer, secured, read_facts(secured, Place, deadline)
        except BaseException:
            secured.close()
            raise

    def stop(error: CryptenLLMError) -> NoReturn:
        for sock, _ in arrived.values():
            _tell(sock, _stop(error))
        raise error

    try:
        with Door(listener, greet) as door:
            while len(arrived) < len(others):
                try:
                    came = door.next(wait, [sock for sock, _ in arrived.values()])
                except TimeoutError:
                    absent = ", ".join(greeter.name(rank) for rank in sorted(others - set(arrived)))
                    text = (
                        f"{absent} did not come within {wait.timeout:g} s: start every party with the same MASTER_ADDR "
                        f"and MASTER_PORT, and raise the timeout if they only need longer{door.strangers}"
                    )
                    stop(PartyError(text))
                except UsageError as error:
                    stop(error)
                if came is None:  # a party that ends before all have come may come again
                    for rank in [rank for rank, (sock, _) in arrived.items() if _has_ended(sock)]:
                        arrived.pop(rank)[0].close()
                    continue
                peer, sock, place = came
                if peer in arrived:
                    twice = f"{greeter.name(peer)} was already started by another process"
                    _tell(sock, _stop(UsageError(f"{twice}: give each process its own RANK")))
                    sock.close()
                    continue
                arrived[peer] = sock, place
            places = {greeter.rank: mine} | {rank: place for rank, (_, place) in arrived.items()}
            for sock, _ in arrived.values():
                _tell(sock, Places(tuple(place for _, place in sorted(places.items()))))
    except BaseException:
        for sock, _ in arrived.values():
            sock.close()
        raise
    return {rank: sock for rank, (sock, _) in arrived.items()}


def attend(sock: socket.socket, greeter: Greeter, hub: int, mine: Place, wait: Wait) -> Sequence[Place]:
    """At any other party, greeted by the one that hosts: where each party listens, by rank.

    Raises PartyError when that one goes away or does not answer, and what it says stops the run.
    """
    late = Wait(max(wait.left, 0.0) + LATE_SECONDS, wait.look)  # who hosts says who is missing, when its time is over
    try:
        send_facts(sock, mine, late)
        told = read_facts(sock, Places | Stop, late)
        if isinstance(told, Stop):
            raise (UsageError if told.is_usage else PartyError)(told.reason)
        if len(told.of) != len(greeter.roles):
            raise OSError(f"it says where {len(told.of)} parties are")
        return told.of
    except OSError as error:
        raise PartyError(
            f"{greeter.name(hub)} did not say within {wait.timeout:g} s that all parties have come "
            f"({reason_of(error)}): its own output may say why, start all parties again"
        ) from None


def _stop(error: CryptenLLMError) -> Stop:
    return Stop(str(error), isinstance(error, UsageError))


def _tell(sock: socket.socket, facts: Places | Stop) -> None:
    """Best effort: who does not hear it has gone, which shows at the next step."""
    with contextlib.suppress(OSError):
        send_facts(sock, facts, Wait(LATE_SECONDS))


def _has_ended(sock: socket.socket) -> bool:
    """Of a socket on which nothing is due."""
    return bool(select.select([sock], [], [], 0)[0])
