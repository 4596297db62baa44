"""Where thin clients come in: at the helper, which then asks for them, and for a moment at the owner.

Owns these connections. Both have one port each, open as long as the party; greeting, proofs and TLS are those of the
parties' own links, between two: the party, and a ``client``. A client names a session, a random number of its own: at
the helper when it knocks, and at the owner with the key that both will have in common.
"""

from __future__ import annotations

import contextlib
import hmac
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links import keyring, meeting, rendezvous, sockets
from crypten_llm.links.greeting import Greeter, read_facts, send_facts
from crypten_llm.links.transport import Transport
from crypten_llm.links.waiting import Wait
from crypten_llm.records import Digest, Record
from crypten_llm.roles import OWNER
from crypten_llm.session.settings import Agreement

if TYPE_CHECKING:
    from crypten_llm.session.party import Party
    from crypten_llm.session.settings import LaunchConfig, ProtocolConfig

ROLE = "client"
INTRODUCTION_SECONDS = 30.0  # for a client that the helper has admitted to come to the owner
RUN = "thin client"
Hex = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Knock(Record, frozen=True, tag="knock"):
    """A client's first words to the helper."""

    session: Digest
    settings: Agreement


class Introduction(Record, frozen=True, tag="introduction"):
    """A client's words to the owner: of which session, and the key that both will have in common."""

    session: Digest
    key: Hex


class Known(Record, frozen=True, tag="known"):
    """The owner's answer."""


class Entrance:
    """Where a party takes thin clients; place: its address and port. kind: of their first words."""

    def __init__(self, listener: socket.socket, greeter: Greeter, kind: Any, timeout: float) -> None:
        self._greeter, self._kind, self._timeout = greeter, kind, timeout
        self._door: meeting.Door[tuple[socket.socket, Any]] = meeting.Door(listener, self._greet)
        self.place: meeting.Place = listener.getsockname()[:2]

    @classmethod
    def open(cls, protocol: ProtocolConfig, launch: LaunchConfig, rank: int, env: Mapping[str, str]) -> Entrance:
        """At the port at which other parties reached this one; in a local run, any that is free.

        Raises UsageError for a port in use, and for links that nothing protects.
        """
        _, _, host, port = rendezvous.read_environment(env)
        address = launch.host or rendezvous.own_address(host, port)
        is_hub = rank == int(env.get(rendezvous.HUB, OWNER))
        own = port if rank == OWNER and is_hub else launch.link_port
        greeter = _greeter(protocol, launch, protocol.roles[rank], 0, address, env)
        return cls(sockets.listen(address, own), greeter, Introduction if rank == OWNER else Knock, launch.timeout)

    def _greet(self, sock: socket.socket, deadline: Wait) -> tuple[socket.socket, Any]:
        _, secured = self._greeter.answer(sock, {1}, deadline)
        try:
            return secured, read_facts(secured, self._kind, deadline)
        except BaseException:
            secured.close()
            raise

    def next(self, wait: Wait) -> tuple[socket.socket, Any]:
        """Who comes next, and its first words; who comes meanwhile waits. Raises TimeoutError."""
        while True:
            try:
                came = self._door.next(wait)
            except UsageError:  # of who was started otherwise, which has been told so
                continue
            assert came is not None, "nobody is watched here"
            return came

    def guest(self, wait: Wait) -> tuple[Transport, Knock]:
        """At the helper: the link to who knocks next, and what it said.

        A client is given up sooner than the owner gives up who waits for that client.
        """
        sock, said = self.next(wait)
        return Transport(0, self._greeter.roles, {1: sock}, timeout=self._timeout / 2), said

    def key_of(self, session: str, party: Party) -> bytes | None:
        """At the owner: the key of a session's client, when that has come; ``None`` where it does not come in time.

        Raises PartyError where another party ends meanwhile.
        """
        assert party.transport is not None, "a helper is another process"
        wait = Wait(min(INTRODUCTION_SECONDS, self._timeout / 2), party.transport.check_open)
        while True:
            try:
                sock, said = self.next(wait)
            except TimeoutError:
                return None
            with sock:
                if hmac.compare_digest(said.session, session):
                    with contextlib.suppress(OSError):  # it has gone, which the helper finds out
                        send_facts(sock, Known(), wait)
                    return bytes.fromhex(said.key)

    def close(self) -> None:
        """Nobody is let in any more."""
        self._door.__exit__()


def _greeter(
    protocol: ProtocolConfig,
    launch: LaunchConfig,
    role: str,
    rank: int,
    host: str,
    env: Mapping[str, str],
) -> Greeter:
    """Of a link between the party of that role and a client; rank: 0 at the party."""
    roles, links = (role, ROLE), None
    if launch.tls:
        from crypten_llm.links import tls  # plain links need no X.509

        links = tls.Links(launch.tls, roles, rank, many="" if rank else ROLE)
    secret = keyring.find((host,), launch.tls, protocol.insecure_links, env)
    return Greeter(rank, roles, RUN, secret, links)


def place_of(option: str, text: str) -> meeting.Place:
    """An address and a port, as HOST:PORT. Raises UsageError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) < 1 << 16:
        raise UsageError(f"{option} is {text!r}; give where that party takes thin clients, as HOST:PORT")
    return host, int(port)


def dial(
    protocol: ProtocolConfig, launch: LaunchConfig, role: str, place: meeting.Place, env: Mapping[str, str]
) -> socket.socket:
    """At a client: a connection to the party of that role, both ends known.

    Raises PartyError where it does not come about, UsageError for parties that were started differently.
    """
    greeter = _greeter(protocol, launch, role, 1, place[0], env)
    try:
        return rendezvous.dial(greeter, 0, place, Wait(launch.timeout), patient=True, named=f"--{role}")
    except PartyError as error:
        turn = "; it may also be another client's turn, or --helper and --owner may be swapped"
        raise PartyError(f"{error}{turn}") from None


def knock(
    protocol: ProtocolConfig, launch: LaunchConfig, place: meeting.Place, session: str, env: Mapping[str, str]
) -> Transport:
    """At a client: the link to the helper, which has been told the session. Raises: as ``dial``."""
    sock = dial(protocol, launch, "helper", place, env)
    send_facts(sock, Knock(session, protocol.agreement()), Wait(launch.timeout))
    return Transport(1, ("helper", ROLE), {0: sock}, timeout=launch.timeout)


def introduce(
    protocol: ProtocolConfig,
    launch: LaunchConfig,
    place: meeting.Place,
    introduction: Introduction,
    env: Mapping[str, str],
) -> None:
    """At a client: tells the owner its key of a session. Raises: as ``dial``, and PartyError where it is silent."""
    wait = Wait(launch.timeout)
    with dial(protocol, launch, "owner", place, env) as sock:
        try:
            send_facts(sock, introduction, wait)
            read_facts(sock, Known, wait)
        except OSError as error:
            raise PartyError(
                f"the owner did not take this client's key at {place[0]}:{place[1]} ({sockets.reason_of(error)}): are "
                "--helper and --owner of the same parties?"
            ) from None
