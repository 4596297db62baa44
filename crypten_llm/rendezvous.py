"""How the parties find each other: from RANK, WORLD_SIZE and the address of a store to connected links.

Owns the environment variables of a start (those of torchrun), the torch.distributed store, the listening
sockets and the handshake. Afterwards the store is dropped and nothing of this module is in use; it sends no data
and knows nothing of what the parties compute.

Each party publishes in the store where it listens, and a random token. For each pair the higher rank connects to
the lower, and each side proves that it read the store by sending the other's token: a stray connection is turned
away. This keeps out accidents and whoever cannot reach the store; it is no substitute for TLS (see `tls`), under which
each side shows its role's key as well. The store itself is never under TLS: it holds addresses and tokens alone.
"""

import contextlib
import errno
import hmac
import json
import os
import secrets
import socket
import struct
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.transport import Transport

PROTOCOL_VERSION = 2  # of the handshake and the frames: change it when either changes
HELLO = struct.Struct("<8sHHH16s")  # magic, version, rank, world size, the token of the party addressed
MAGIC = b"cryptllm"
READY = b"R"
HELLO_SECONDS = 2.0  # a stray connection that says nothing holds the others up no longer than this
POLL_SECONDS = 0.02
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def read_environment(env=os.environ):
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
    rank,
    world,
    roles,
    store_host,
    store_port,
    timeout=60.0,
    host=None,
    is_master=None,
    *,
    port_base=None,
    job=None,
    links=None,
    meter=None,
    network=None,
    while_waiting=None,
):
    """The `Transport` of this party, connected to all others. Returns once every party has all its links.

    roles: one name per rank. timeout: seconds to wait for the others, and afterwards the transport's timeout.
    host: the address the others reach this party at; by default that of the interface that reaches the store.
    is_master: whether this process hosts the store; by default rank 0 does unless a torchrun agent hosts it.
    port_base: listen on port_base + rank instead of a free port. job: separates jobs that share a store; by
    default torchrun's run id and restart count. links: `tls.Links` that put each connection under TLS; all parties or
    none. meter, network: see `Transport`. while_waiting: called again and again until all have come; what it raises
    ends the wait (a launcher looks after its children there).

    Raises PartyError for parties that do not come or cannot be reached, UsageError for a port in use, a rank
    taken twice, or parties that disagree on the world size, the roles or the version.
    """
    assert len(roles) == world, f"{len(roles)} roles for {world} parties"
    deadline = time.monotonic() + timeout
    names = [f"rank {r} ({role})" for r, role in enumerate(roles)]
    if is_master is None:
        is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if job is None:
        job = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    with contextlib.ExitStack() as opened:
        store = _Store(store_host, store_port, is_master, names[0], deadline, timeout, prefix=f"crypten_llm/{job}/")
        address = host or _address_towards(store_host, store_port)
        listener = opened.enter_context(_listen(address, port_base, rank, world))
        token = secrets.token_bytes(16)
        mine = {"host": address, "port": listener.getsockname()[1], "token": token.hex()}
        _agree(store, rank, world, roles, links)
        _claim_rank(store, names, rank, mine)
        directory = _read_directory(store, names, rank, deadline, timeout, while_waiting)
        sockets = {}
        opened.callback(lambda: [sock.close() for sock in sockets.values()])
        for peer in range(rank):
            sockets[peer] = _dial(names, peer, directory[peer], rank, world, token, deadline, links)
        while len(sockets) < world - 1:
            peer, sock = _answer(listener, names, rank, world, token, directory, sockets, deadline, timeout, links)
            sockets[peer] = sock
        _barrier(sockets, names, deadline, timeout)
        transport = Transport(rank, roles, dict(sockets), timeout=timeout, meter=meter, network=network)
        sockets.clear()  # the transport's now
        return transport


class _Store:
    """The few operations needed of a TCPStore, its failures in our words, polling in place of its waits.

    TCPStore's own waits print C++ stack traces and do not notice Ctrl-C; so it is only connected when the port
    answers, and keys are polled.
    """

    def __init__(self, host, port, is_master, master_name, deadline, timeout, prefix):
        self.place, self.prefix = f"{host}:{port}", prefix
        if not is_master:
            self._await_port(host, port, master_name, deadline, timeout)
        self._store = self._open(host, port, is_master, master_name, deadline, timeout)

    def _open(self, host, port, is_master, master_name, deadline, timeout):
        """The TCPStore. It is made in a thread, because it waits for ever on a port where something else answers."""
        seconds = max(1.0, deadline - time.monotonic())
        made, failed = [], []

        def make():
            try:
                made.append(
                    TCPStore(
                        host, port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=seconds)
                    )
                )
            except RuntimeError as error:  # DistNetworkError among them
                failed.append(_first_line(error))

        maker = threading.Thread(target=make, daemon=True)
        maker.start()
        maker.join(seconds)
        if made:
            return made[0]
        reason = failed[0] if failed else f"no answer in {timeout:g} s"
        if is_master and "EADDRINUSE" in reason:
            raise UsageError(
                f"port {port} is in use on this machine, perhaps by another {master_name}, so the rendezvous store "
                "cannot open there: give every party another MASTER_PORT"
            )
        raise PartyError(
            f"what listens at {self.place} is no rendezvous store ({reason}): check MASTER_ADDR and MASTER_PORT"
        )

    def _await_port(self, host, port, master_name, deadline, timeout):
        while True:
            try:
                left = max(0.1, deadline - time.monotonic())
                socket.create_connection((host, port), timeout=left).close()
                return
            except OSError as error:
                if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                    raise UsageError(
                        f"MASTER_ADDR={host!r} is no known host: give the address of {master_name}"
                    ) from None
                if time.monotonic() >= deadline:
                    raise PartyError(
                        f"no rendezvous store at {self.place} after {timeout:g} s ({_first_line(error)}): start "
                        f"{master_name} and check MASTER_ADDR and MASTER_PORT"
                    ) from None
            time.sleep(POLL_SECONDS)

    def _call(self, method, key, *args):
        try:
            return getattr(self._store, method)(key, *args)
        except RuntimeError as error:
            raise PartyError(
                f"the rendezvous store at {self.place} went away ({_first_line(error)}): the party or launcher that "
                "hosts it stopped, start all parties again"
            ) from None

    def put(self, key, value):
        self._call("set", self.prefix + key, value)

    def put_first(self, key, value):
        """Set `key` unless it is set; the value it has then."""
        return self._call("compare_set", self.prefix + key, "", value).decode()

    def add(self, key):
        """Count up `key`; its value then."""
        return self._call("add", self.prefix + key, 1)

    def get(self, key):
        """The value of `key`, or None while it is not set."""
        key = self.prefix + key
        return self._call("get", key).decode() if self._call("check", [key]) else None


def _agree(store, rank, world, roles, links):
    """Hold the first party's idea of the job against this one's; a disagreement stops everyone."""
    mine = {"world size": world, "roles": list(roles), "protocol version": PROTOCOL_VERSION}
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


def _claim_rank(store, names, rank, mine):
    if store.add(f"claim/{rank}") > 1:
        raise UsageError(
            f"{names[rank]} was already started by another process: give each process its own RANK, and a job that "
            "starts again a new store or run id"
        )
    store.put(f"address/{rank}", json.dumps(mine))


def _read_directory(store, names, rank, deadline, timeout, while_waiting):
    """{peer: where it listens and its token}, waiting until all have come."""
    directory = {}
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
        if while_waiting is not None:
            while_waiting()
        if time.monotonic() >= deadline:
            absent = [names[r] for r in range(len(names)) if r != rank and r not in directory]
            raise PartyError(
                f"{', '.join(absent)} did not come within {timeout:g} s: start every party with the same MASTER_ADDR "
                "and MASTER_PORT, and raise the timeout if they only need longer"
            )
        time.sleep(POLL_SECONDS)


def _address_towards(host, port):
    """This machine's address on the interface that reaches `host`. Sends nothing: UDP connects by routing alone."""
    try:
        family, kind, proto, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"MASTER_ADDR={host!r} cannot be reached ({_first_line(error)}): give another one") from None


def _listen(address, port_base, rank, world):
    port = 0 if port_base is None else port_base + rank
    if not 0 <= port <= 65535:
        raise UsageError(f"port base {port_base} is too large: rank {rank} would listen on port {port}, above 65535")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for place in (address, ""):  # an address translated on the way (a container's host) is not ours to bind
        try:
            return socket.create_server((place, port), family=family, backlog=world + 16)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"port {port} (port base {port_base} + rank {rank}) is in use on this machine: choose another port "
                    "base for every party"
                ) from None
            if place == "" or error.errno not in (errno.EADDRNOTAVAIL, socket.EAI_NONAME):
                raise UsageError(
                    f"cannot listen on {place or 'any address'}, port {port} ({_first_line(error)}): give this party's "
                    "address as host"
                ) from None
    raise AssertionError("the loop returns or raises")


def _dial(names, peer, entry, rank, world, token, deadline, links):
    """Connect to a lower rank that listens at `entry` and greet each other."""
    name, place = names[peer], f"{entry['host']}:{entry['port']}"
    try:
        sock = socket.create_connection((entry["host"], entry["port"]), timeout=max(0.1, deadline - time.monotonic()))
    except OSError as error:
        raise PartyError(
            f"{name} cannot be reached at {place} ({_first_line(error)}): give that party's host an address that this "
            "one reaches, and open the port in the firewall"
        ) from None
    try:
        sock = links.secure(sock, peer) if links else sock
        sock.sendall(HELLO.pack(MAGIC, PROTOCOL_VERSION, rank, world, bytes.fromhex(entry["token"])))
        answer = _read_exactly(sock, HELLO.size, max(0.1, deadline - time.monotonic()))
        if hmac.compare_digest(HELLO.unpack(answer)[4], token):
            return sock
        reason = "another program answered"
    except OSError as error:
        reason = _first_line(error)
    sock.close()
    raise PartyError(
        f"{name} did not complete the handshake at {place} ({reason}): its own output may say why, start all parties "
        "again"
    )


def _answer(listener, names, rank, world, token, directory, sockets, deadline, timeout, links):
    """Accept the next higher rank; connections that do not show our token, or the rank's key, are dropped without a
    word.
    """
    while True:
        left = deadline - time.monotonic()
        try:
            listener.settimeout(max(0.01, left))
            sock, _ = listener.accept()
        except TimeoutError:
            absent = [names[peer] for peer in range(rank + 1, world) if peer not in sockets]
            raise PartyError(
                f"{', '.join(absent)} did not connect within {timeout:g} s: look at its own output, and whether it "
                f"reaches {listener.getsockname()[0]}:{listener.getsockname()[1]}"
            ) from None
        try:
            sock.settimeout(HELLO_SECONDS)
            sock = links.secure(sock) if links else sock
            magic, version, peer, their_world, shown = HELLO.unpack(_read_exactly(sock, HELLO.size, HELLO_SECONDS))
            known = hmac.compare_digest(shown, token) and (magic, version, their_world) == (
                MAGIC,
                PROTOCOL_VERSION,
                world,
            )
            expected = known and rank < peer < world and peer not in sockets
            if expected and (not links or links.is_of(sock, peer)):
                theirs = bytes.fromhex(directory[peer]["token"])
                sock.sendall(HELLO.pack(MAGIC, PROTOCOL_VERSION, rank, world, theirs))
                return peer, sock
        except OSError:
            pass
        sock.close()


def _barrier(sockets, names, deadline, timeout):
    """Wait until every party has all its links: then nobody needs the store any more."""
    for peer, sock in sockets.items():
        with _blames(names[peer], timeout):
            sock.sendall(READY)
    for peer, sock in sockets.items():
        with _blames(names[peer], timeout):
            _read_exactly(sock, len(READY), max(0.1, deadline - time.monotonic()))


@contextlib.contextmanager
def _blames(name, timeout):
    try:
        yield
    except OSError as error:
        raise PartyError(
            f"{name} did not finish connecting within {timeout:g} s ({_first_line(error)}): look at its own output, "
            "start all parties again"
        ) from None


def _read_exactly(sock, count, seconds):
    """`count` bytes; OSError when they do not come within about `seconds`."""
    deadline, data = time.monotonic() + seconds, b""
    while len(data) < count:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise ConnectionResetError("closed the connection")
        data += chunk
    return data


def _plain(value):
    return " ".join(value) if isinstance(value, list) else value


def _first_line(error):
    """One short line of an exception of the system or of torch."""
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0][:160] if text.strip() else type(error).__name__
