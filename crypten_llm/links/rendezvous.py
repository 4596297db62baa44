"""How the parties find each other: from RANK, WORLD_SIZE and the address of a meeting point to connected links.

Owns the environment variables of a start (those of torchrun), and the order in which links are made. One party hosts
the meeting (``meeting``): the others connect to it and greet each other (``greeting``), it tells each where the others
listen, and of these the higher rank connects to the lower. Each connection becomes a link, under TLS where that is
asked for, and each greeting is proven by the secret that the parties hold in common (``keyring``). Afterwards nobody
listens any more and nothing of this module is in use; it sends no data and knows nothing of what the parties compute.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links import meeting, sockets
from crypten_llm.links.greeting import Greeter, Stranger
from crypten_llm.links.meter import Meter
from crypten_llm.links.sockets import reason_of
from crypten_llm.links.transport import Transport
from crypten_llm.links.waiting import POLL_SECONDS, Wait

if TYPE_CHECKING:
    from crypten_llm.links.network import Network
    from crypten_llm.links.tls import Links


LOOPBACK = "127.0.0.1"
HUB = "CRYPTEN_LLM_HUB"  # in the environment of a local party: the rank that hosts the meeting
READY = b"R"
TRIES = 20  # of a greeting that is cut off: the other side may have had too many at once
PAUSE_SECONDS = 0.05  # after the first of them, and so much more after each
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_environment(env: Mapping[str, str] = os.environ) -> tuple[int, int, str, int]:
    """(rank, world, host, port of the meeting point) from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Where a launcher listens on MASTER_PORT itself, as torchrun does, parties meet on the port after it. Where it has
    started all of them on this machine, they meet on 127.0.0.1, by whatever name it calls the machine.

    Raises UsageError for a variable that is missing or is not a number in range.
    """
    missing = [name for name in VARIABLES if not env.get(name, "").strip()]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not set: start with torchrun, or set {', '.join(VARIABLES)} for every party"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        try:
            numbers[name] = int(env[name])
        except ValueError:
            raise UsageError(f"{name}={env[name]!r} is not a whole number: set it for every party") from None
    rank, world, port = numbers["RANK"], numbers["WORLD_SIZE"], numbers["MASTER_PORT"]
    if world < 2:
        raise UsageError(f"WORLD_SIZE={world} is too small: at least two parties compute together")
    if not 0 <= rank < world:
        raise UsageError(f"RANK={rank} is out of range: with WORLD_SIZE={world} ranks go from 0 to {world - 1}")
    if not 1 <= port <= 65534:
        raise UsageError(f"MASTER_PORT={port} is out of range: give one from 1 to 65534")
    host = env["MASTER_ADDR"].strip()
    if sockets.is_loopback(host) or env.get("LOCAL_WORLD_SIZE", "").strip() == str(world):
        host = "::1" if host == "::1" else LOOPBACK
    return rank, world, host, port + (env.get("TORCHELASTIC_USE_AGENT_STORE") == "True")


def run_of(env: Mapping[str, str] = os.environ) -> str:
    """What tells a run from others that meet at the same place: torchrun's run id and restart count."""
    return f"{env.get('TORCHELASTIC_RUN_ID', '')}/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def connect(
    rank: int,
    world: int,
    roles: Sequence[str],
    host: str,
    port: int,
    timeout: float = 60.0,
    address: str | None = None,
    *,
    own_port: int = 0,
    hub: int = 0,
    listener: socket.socket | None = None,
    run: str = "",
    secret: bytes = b"",
    links: Links | None = None,
    meter: Meter | None = None,
    network: Network | None = None,
    while_waiting: Callable[[], object] | None = None,
) -> Transport:
    """The `Transport` of this party, connected to all others. Returns once every party has all its links.

    roles: one name per rank. host, port: where the parties meet. timeout: seconds to wait for the others, and
    afterwards the transport's timeout. address: at which the others reach this party; by default that of the interface
    that reaches the meeting point. own_port: where they reach it, if it does not host the meeting and a higher rank
    connects to it; 0 for any that is free. hub: the rank that hosts the meeting. listener: at the hub, one that listens
    there already; it is closed. run: separates runs that might meet by accident. secret: the parties' own, see
    `keyring`; where it is empty and links is too, whoever connects is believed. links: `tls.Links` that put each
    connection under TLS; all parties or none. meter, network: see `Transport`. while_waiting: called again and again
    until all links stand; what it raises ends the wait (a launcher looks after its children there).

    Raises PartyError for parties that do not come, cannot be reached or do not prove who they are, UsageError for a
    port in use, a rank taken twice, or parties that disagree on the world size, the links or the version.
    """
    assert len(roles) == world, f"{len(roles)} roles for {world} parties"
    wait = Wait(timeout, while_waiting)
    greeter = Greeter(rank, roles, run, secret, links)
    with contextlib.ExitStack() as opened:
        if listener is not None:
            opened.enter_context(listener)
        connected: dict[int, socket.socket] = {}
        opened.callback(_close, connected)
        if rank == hub:
            at = address or own_address(host, port)
            listener = listener or opened.enter_context(sockets.listen(at, port))
            connected |= meeting.host(listener, greeter, (at, port), wait)
        else:
            _attend(connected, greeter, hub, (host, port), (address, own_port), wait)
        _barrier(connected, [greeter.name(peer) for peer in range(world)], wait)
        transport = Transport(rank, roles, dict(connected), timeout=timeout, meter=meter, network=network)
        connected.clear()  # the transport's now
    return transport


def _attend(
    connected: dict[int, socket.socket],
    greeter: Greeter,
    hub: int,
    place: meeting.Place,
    own: tuple[str | None, int],
    wait: Wait,
) -> None:
    """At every party but the hub: the links to it, and to all others once it has said where they are."""
    higher = {peer for peer in range(greeter.rank + 1, len(greeter.roles)) if peer != hub}
    with contextlib.ExitStack() as opened:
        mine = own[0] or own_address(*place), 0
        if higher:
            listener = opened.enter_context(sockets.listen(mine[0], own[1]))
            mine = mine[0], listener.getsockname()[1]
        connected[hub] = dial(greeter, hub, place, wait, patient=True)
        directory = meeting.attend(connected[hub], greeter, hub, mine, wait)
        for peer in set(range(greeter.rank)) - {hub}:
            connected[peer] = dial(greeter, peer, directory[peer], wait)
        if not higher:
            return
        with meeting.Door(listener, lambda sock, deadline: greeter.answer(sock, higher, deadline)) as door:
            while missing := higher - set(connected):
                try:
                    came = door.next(wait)
                except TimeoutError:
                    absent = ", ".join(greeter.name(peer) for peer in sorted(missing))
                    raise PartyError(
                        f"{absent} did not connect within {wait.timeout:g} s: look at its own output, and whether it "
                        f"reaches {mine[0]}:{mine[1]}{door.strangers}"
                    ) from None
                assert came is not None, "nobody is watched here"
                peer, sock = came
                if peer in connected:
                    sock.close()
                else:
                    connected[peer] = sock


def own_address(host: str, port: int) -> str:
    """Where this party listens, that others who meet at ``host`` may reach it."""
    return host if sockets.is_loopback(host) else sockets.address_towards(host, port)


def dial(
    greeter: Greeter,
    peer: int,
    place: meeting.Place,
    wait: Wait,
    patient: bool = False,
    named: str = "MASTER_ADDR and MASTER_PORT",
) -> socket.socket:
    """Connects to a party that listens at ``place``, and greets it. patient: it may not listen yet. named: what says
    where, for messages.

    Raises PartyError, and UsageError for parties that were started differently.
    """
    name, where, tries = greeter.name(peer), f"{place[0]}:{place[1]}", 0
    while True:
        try:
            sock = wait.in_thread(lambda: sockets.dial(*place, wait.left))
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                raise UsageError(
                    f"{named.partition(' ')[0]}={place[0]!r} is no known host: give the address of {name}"
                ) from None
            if patient and wait.left > 0:
                with contextlib.suppress(TimeoutError):
                    wait.pause(POLL_SECONDS)
                continue
            hint = (
                f"start {name} and check {named}"
                if patient
                else ("give that party's host an address that this one reaches, and open the port in the firewall")
            )
            raise PartyError(
                f"{name} cannot be reached at {where} within {wait.timeout:g} s ({reason_of(error)}): {hint}"
            ) from None
        tries += 1
        try:
            return greeter.dial(sock, peer, wait)
        except OSError as error:
            if isinstance(error, Stranger | TimeoutError) or tries == TRIES or wait.left <= 0:
                raise PartyError(
                    f"{name} did not complete the greeting at {where} ({reason_of(error)}): its own output may say "
                    "why; parties of different users or machines need the same CRYPTEN_LLM_LINK_SECRET, or --tls"
                ) from None
        with contextlib.suppress(TimeoutError):
            wait.pause(PAUSE_SECONDS * tries)


def _close(connected: Mapping[int, socket.socket]) -> None:
    for sock in connected.values():
        sock.close()


def _barrier(connected: Mapping[int, socket.socket], names: list[str], wait: Wait) -> None:
    """Wait until every party has all its links: then nobody has to listen any more."""
    for peer, sock in connected.items():
        with _blames(names[peer], wait):
            sock.sendall(READY)
    for peer, sock in connected.items():
        with _blames(names[peer], wait):
            wait.read_exactly(sock, len(READY))


@contextlib.contextmanager
def _blames(name: str, wait: Wait) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise PartyError(
            f"{name} did not finish connecting within {wait.timeout:g} s ({reason_of(error)}): look at its own "
            "output, start all parties again"
        ) from None
