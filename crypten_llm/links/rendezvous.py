"""How the parties find each other: from RANK, WORLD_SIZE and the address of a store to connected links.

Owns the environment variables of a start (those of torchrun), what the parties tell each other through the store
(`store`), and the handshake. Afterwards the store is dropped and nothing of this module is in use; it sends no data
and knows nothing of what the parties compute.

Each party publishes in the store where it listens, and a random token. For each pair the higher rank connects to
the lower, and each side proves that it read the store by sending the other's token: a stray connection is turned
away. This keeps out accidents and whoever cannot reach the store; it is no substitute for TLS (see `tls`), under which
each side shows its role's key as well. The store itself is never under TLS: it holds addresses and tokens alone.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links import sockets
from crypten_llm.links.meter import Meter
from crypten_llm.links.sockets import reason_of
from crypten_llm.links.store import Store, Wait
from crypten_llm.links.transport import Transport

if TYPE_CHECKING:
    from crypten_llm.links.network import Network
    from crypten_llm.links.tls import Links


PROTOCOL_VERSION = 2  # of the handshake and the frames: change it when either changes
HELLO = struct.Struct("<8sHHH16s")  # magic, version, rank, world size, the token of the party addressed
MAGIC = b"cryptllm"
READY = b"R"
HELLO_SECONDS = 2.0  # a stray connection that says nothing holds the others up no longer than this
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_environment(env: Mapping[str, str] = os.environ) -> tuple[int, int, str, int]:
    """(rank, world, store host, store port) from RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

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
    if not 1 <= port <= 65535:
        raise UsageError(f"MASTER_PORT={port} is out of range: ports go from 1 to 65535")
    return rank, world, env["MASTER_ADDR"].strip(), port


def connect(
    rank: int,
    world: int,
    roles: Sequence[str],
    store_host: str,
    store_port: int,
    timeout: float = 60.0,
    host: str | None = None,
    is_master: bool | None = None,
    *,
    port_base: int | None = None,
    job: str | None = None,
    links: Links | None = None,
    meter: Meter | None = None,
    network: Network | None = None,
    while_waiting: Callable[[], object] | None = None,
) -> Transport:
    """The `Transport` of this party, connected to all others. Returns once every party has all its links.

    roles: one name per rank. timeout: seconds to wait for the others, and afterwards the transport's timeout.
    host: the address the others reach this party at; by default that of the interface that reaches the store.
    is_master: whether this process hosts the store; by default rank 0 does unless a torchrun agent hosts it.
    port_base: listen on port_base + rank instead of a free port. job: separates jobs that share a store; by
    default torchrun's run id and restart count. links: `tls.Links` that put each connection under TLS; all parties or
    none. meter, network: see `Transport`. while_waiting: called again and again until all links stand; what it raises
    ends the wait (a launcher looks after its children there).

    Raises PartyError for parties that do not come or cannot be reached and for a store that does not answer,
    UsageError for a port in use, a rank taken twice, or parties that disagree on the world size, the roles or the
    version.
    """
    assert len(roles) == world, f"{len(roles)} roles for {world} parties"
    wait = Wait(timeout, while_waiting)
    names = [f"rank {r} ({role})" for r, role in enumerate(roles)]
    if is_master is None:
        is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if job is None:
        job = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    with contextlib.ExitStack() as opened:
        store = Store(store_host, store_port, is_master, names[0], wait, prefix=f"crypten_llm/{job}/")
        address = host or sockets.address_towards(store_host, store_port)
        listener = opened.enter_context(sockets.listen(address, port_base, rank, world))
        token = secrets.token_bytes(16)
        mine = {"host": address, "port": listener.getsockname()[1], "token": token.hex()}
        _agree(store, rank, world, roles, links)
        _claim_rank(store, names, rank, mine)
        directory = _read_directory(store, names, rank, wait)
        connected: dict[int, socket.socket] = {}
        opened.callback(_close, connected)
        for peer in range(rank):
            connected[peer] = _dial(names, peer, directory[peer], rank, world, token, wait, links)
        while len(connected) < world - 1:
            peer, sock = _answer(listener, names, rank, world, token, directory, connected, wait, links)
            connected[peer] = sock
        _barrier(connected, names, wait)
        transport = Transport(rank, roles, dict(connected), timeout=timeout, meter=meter, network=network)
        connected.clear()  # the transport's now
        return transport


def _agree(store: Store, rank: int, world: int, roles: Sequence[str], links: Links | None) -> None:
    """Hold the first party's idea of the job against this one's; a disagreement stops everyone."""
    mine: dict[str, Any] = {"world size": world, "roles": list(roles), "protocol version": PROTOCOL_VERSION}
    mine["links"] = "TLS (--tls)" if links else "plain TCP"
    first = json.loads(store.put_first("job", json.dumps(mine)))
    for fact, value in mine.items():
        if first.get(fact) != value:
            text = (
                f"the parties disagree on the {fact}: rank {rank} was started with {_plain(value)}, another with "
                f"{_plain(first.get(fact))}; start every party with the same command and version"
            )
            store.put("stop", text)
            raise UsageError(text)


def _claim_rank(store: Store, names: list[str], rank: int, mine: dict) -> None:
    if store.add(f"claim/{rank}") > 1:
        raise UsageError(
            f"{names[rank]} was already started by another process: give each process its own RANK, and a job that "
            "starts again a new store or run id"
        )
    store.put(f"address/{rank}", json.dumps(mine))


def _read_directory(store: Store, names: list[str], rank: int, wait: Wait) -> dict[int, dict]:
    """{peer: where it listens and its token}, waiting until all have come."""
    directory: dict[int, dict] = {}
    while True:
        for peer in set(range(len(names))) - {rank} - set(directory):
            text = store.get(f"address/{peer}")
            if text is not None:
                directory[peer] = json.loads(text)
        if len(directory) == len(names) - 1:
            return directory
        stop = store.get("stop")
        if stop is not None:
            raise UsageError(stop)
        try:
            time.sleep(wait.turn())
        except TimeoutError:
            absent = [names[r] for r in range(len(names)) if r != rank and r not in directory]
            raise PartyError(
                f"{', '.join(absent)} did not come within {wait.timeout:g} s: start every party with the same "
                "MASTER_ADDR and MASTER_PORT, and raise the timeout if they only need longer"
            ) from None


def _dial(
    names: list[str], peer: int, entry: dict, rank: int, world: int, token: bytes, wait: Wait, links: Links | None
) -> socket.socket:
    """Connect to a lower rank that listens at `entry` and greet each other."""
    name, place = names[peer], f"{entry['host']}:{entry['port']}"
    try:
        sock = wait.in_thread(lambda: sockets.dial(entry["host"], entry["port"], wait.left))
    except OSError as error:
        raise PartyError(
            f"{name} cannot be reached at {place} ({reason_of(error)}): give that party's host an address that this "
            "one reaches, and open the port in the firewall"
        ) from None
    try:
        sock = wait.in_thread(lambda: links.secure(sock, peer)) if links else sock
        sock.sendall(HELLO.pack(MAGIC, PROTOCOL_VERSION, rank, world, bytes.fromhex(entry["token"])))
        answer = wait.read_exactly(sock, HELLO.size)
        if hmac.compare_digest(HELLO.unpack(answer)[4], token):
            return sock
        reason = "another program answered"
    except OSError as error:
        reason = reason_of(error)
    except BaseException:
        sock.close()
        raise
    sock.close()
    raise PartyError(
        f"{name} did not complete the handshake at {place} ({reason}): its own output may say why, start all parties "
        "again"
    )


def _answer(
    listener: socket.socket,
    names: list[str],
    rank: int,
    world: int,
    token: bytes,
    directory: dict[int, dict],
    connected: Mapping[int, socket.socket],
    wait: Wait,
    links: Links | None,
) -> tuple[int, socket.socket]:
    """Accept the next higher rank; connections that do not show our token, or the rank's key, are dropped without a
    word.
    """
    while True:
        try:
            sock, _ = wait.on(listener, listener.accept)
        except TimeoutError:
            absent = [names[peer] for peer in range(rank + 1, world) if peer not in connected]
            raise PartyError(
                f"{', '.join(absent)} did not connect within {wait.timeout:g} s: look at its own output, and whether "
                f"it reaches {listener.getsockname()[0]}:{listener.getsockname()[1]}"
            ) from None
        try:
            hello = Wait(HELLO_SECONDS)
            sock.settimeout(hello.timeout)
            sock = links.secure(sock) if links else sock
            magic, version, peer, their_world, shown = HELLO.unpack(hello.read_exactly(sock, HELLO.size))
            known = hmac.compare_digest(shown, token) and (magic, version, their_world) == (
                MAGIC,
                PROTOCOL_VERSION,
                world,
            )
            expected = known and rank < peer < world and peer not in connected
            if expected and (not links or links.is_of(sock, peer)):
                theirs = bytes.fromhex(directory[peer]["token"])
                sock.sendall(HELLO.pack(MAGIC, PROTOCOL_VERSION, rank, world, theirs))
                return peer, sock
        except OSError:
            pass
        sock.close()


def _close(connected: Mapping[int, socket.socket]) -> None:
    for sock in connected.values():
        sock.close()


def _barrier(connected: Mapping[int, socket.socket], names: list[str], wait: Wait) -> None:
    """Wait until every party has all its links: then nobody needs the store any more."""
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


def _plain(value: object) -> object:
    return " ".join(value) if isinstance(value, list) else value
