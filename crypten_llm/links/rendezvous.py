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
from crypten_llm.links.transport import Transport

PROTOCOL_VERSION = 2  # of the handshake and the frames: change it when either changes
HELLO = struct.Struct("<8sHHH16s")  # magic, version, rank, world size, the token of the party addressed
MAGIC = b"cryptllm"
READY = b"R"
HELLO_SECONDS = 2.0  # a stray connection that says nothing holds the others up no longer than this
POLL_SECONDS = 0.02
LATE_SECONDS = 1.0  # for what is asked of the store at the very end: an answer is on its way
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
    none. meter, network: see `Transport`. while_waiting: called again and again until all links stand; what it raises
    ends the wait (a launcher looks after its children there).

    Raises PartyError for parties that do not come or cannot be reached and for a store that does not answer,
    UsageError for a port in use, a rank taken twice, or parties that disagree on the world size, the roles or the
    version.
    """
    assert len(roles) == world, f"{len(roles)} roles for {world} parties"
    wait = _Wait(timeout, while_waiting)
    names = [f"rank {r} ({role})" for r, role in enumerate(roles)]
    if is_master is None:
        is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if job is None:
        job = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    with contextlib.ExitStack() as opened:
        store = _Store(store_host, store_port, is_master, names[0], wait, prefix=f"crypten_llm/{job}/")
        address = host or _address_towards(store_host, store_port)
        listener = opened.enter_context(_listen(address, port_base, rank, world))
        token = secrets.token_bytes(16)
        mine = {"host": address, "port": listener.getsockname()[1], "token": token.hex()}
        _agree(store, rank, world, roles, links)
        _claim_rank(store, names, rank, mine)
        directory = _read_directory(store, names, rank, wait)
        sockets = {}
        opened.callback(lambda: [sock.close() for sock in sockets.values()])
        for peer in range(rank):
            sockets[peer] = _dial(names, peer, directory[peer], rank, world, token, wait, links)
        while len(sockets) < world - 1:
            peer, sock = _answer(listener, names, rank, world, token, directory, sockets, wait, links)
            sockets[peer] = sock
        _barrier(sockets, names, wait)
        transport = Transport(rank, roles, dict(sockets), timeout=timeout, meter=meter, network=network)
        sockets.clear()  # the transport's now
        return transport


class _Wait:
    """How long this party waits for the others, all in all, and what it looks after meanwhile.

    timeout: seconds from now. look: called at every turn; what it raises ends the wait.
    """

    def __init__(self, timeout, look=None):
        self.timeout, self._deadline, self._look = timeout, time.monotonic() + timeout, look

    @property
    def left(self):
        """Seconds; negative when the time is over."""
        return self._deadline - time.monotonic()

    def turn(self):
        """Seconds until the next turn. Raises TimeoutError when the time is over."""
        if self._look is not None:
            self._look()
        left = self.left
        if left <= 0:
            raise TimeoutError("timed out")
        return min(left, POLL_SECONDS)

    def on(self, sock, step, *args):
        """`step(*args)`, which waits for `sock` and can be tried again after a timeout."""
        while True:
            sock.settimeout(self.turn())
            with contextlib.suppress(TimeoutError):
                return step(*args)

    def in_thread(self, job):
        """`job()`, in a thread that is left to itself when the time is over: for what neither timeout nor Ctrl-C ends.

        One that starts late still has LATE_SECONDS.
        """
        wait, done = _Wait(max(self.left, LATE_SECONDS), self._look), []

        def work():
            try:
                done.append((job(), None))
            except Exception as error:
                done.append((None, error))

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        while not done:
            worker.join(wait.turn())
        ((result, error),) = done
        if error is not None:
            raise error
        return result


class _Store:
    """The few operations needed of a TCPStore, its failures in our words, polling in place of its waits.

    TCPStore's own waits print C++ stack traces and do not notice Ctrl-C; so it is only connected when the port
    answers, and keys are polled. Its other operations wait for ever on a host that hangs; so each is made in a thread.
    """

    def __init__(self, host, port, is_master, master_name, wait, prefix):
        self.place, self.prefix, self._wait = f"{host}:{port}", prefix, wait
        if not is_master:
            self._await_port(host, port, master_name)
        self._store = self._open(host, port, is_master, master_name)

    def _open(self, host, port, is_master, master_name):
        """The TCPStore. Making it waits for ever on a port where something else answers."""
        seconds = timedelta(seconds=max(LATE_SECONDS, self._wait.left))
        try:
            return self._wait.in_thread(
                lambda: TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=seconds)
            )
        except TimeoutError:
            reason = f"no answer in {self._wait.timeout:g} s"
        except RuntimeError as error:  # DistNetworkError among them
            reason = _first_line(error)
        if is_master and "EADDRINUSE" in reason:
            raise UsageError(
                f"port {port} is in use on this machine, perhaps by another {master_name}, so the rendezvous store "
                "cannot open there: give every party another MASTER_PORT"
            )
        raise PartyError(
            f"what listens at {self.place} is no rendezvous store ({reason}): check MASTER_ADDR and MASTER_PORT"
        )

    def _await_port(self, host, port, master_name):
        while True:
            try:
                self._wait.in_thread(lambda: _open_connection(host, port, self._wait)).close()
                return
            except OSError as error:
                if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                    raise UsageError(
                        f"MASTER_ADDR={host!r} is no known host: give the address of {master_name}"
                    ) from None
                if self._wait.left <= 0:
                    raise PartyError(
                        f"no rendezvous store at {self.place} after {self._wait.timeout:g} s ({_first_line(error)}): "
                        f"start {master_name} and check MASTER_ADDR and MASTER_PORT"
                    ) from None
            time.sleep(POLL_SECONDS)

    def _call(self, method, key, *args):
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
                f"the rendezvous store at {self.place} went away ({_first_line(error)}): the party or launcher that "
                "hosts it stopped, start all parties again"
            ) from None

    def put(self, key, value):
        self._call("set", key, value)

    def put_first(self, key, value):
        """Set `key` unless it is set; the value it has then."""
        return self._call("compare_set", key, "", value).decode()

    def add(self, key):
        """Count up `key`; its value then."""
        return self._call("add", key, 1)

    def get(self, key):
        """The value of `key`, or None while it is not set."""
        return self._call("get", key).decode() if self._call("check", key) else None


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


def _read_directory(store, names, rank, wait):
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
        try:
            time.sleep(wait.turn())
        except TimeoutError:
            absent = [names[r] for r in range(len(names)) if r != rank and r not in directory]
            raise PartyError(
                f"{', '.join(absent)} did not come within {wait.timeout:g} s: start every party with the same "
                "MASTER_ADDR and MASTER_PORT, and raise the timeout if they only need longer"
            ) from None


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


def _open_connection(host, port, wait):
    return socket.create_connection((host, port), timeout=max(0.1, wait.left))


def _dial(names, peer, entry, rank, world, token, wait, links):
    """Connect to a lower rank that listens at `entry` and greet each other."""
    name, place = names[peer], f"{entry['host']}:{entry['port']}"
    try:
        sock = wait.in_thread(lambda: _open_connection(entry["host"], entry["port"], wait))
    except OSError as error:
        raise PartyError(
            f"{name} cannot be reached at {place} ({_first_line(error)}): give that party's host an address that this "
            "one reaches, and open the port in the firewall"
        ) from None
    try:
        sock = wait.in_thread(lambda: links.secure(sock, peer)) if links else sock
        sock.sendall(HELLO.pack(MAGIC, PROTOCOL_VERSION, rank, world, bytes.fromhex(entry["token"])))
        answer = _read_exactly(sock, HELLO.size, wait)
        if hmac.compare_digest(HELLO.unpack(answer)[4], token):
            return sock
        reason = "another program answered"
    except OSError as error:
        reason = _first_line(error)
    except BaseException:
        sock.close()
        raise
    sock.close()
    raise PartyError(
        f"{name} did not complete the handshake at {place} ({reason}): its own output may say why, start all parties "
        "again"
    )


def _answer(listener, names, rank, world, token, directory, sockets, wait, links):
    """Accept the next higher rank; connections that do not show our token, or the rank's key, are dropped without a
    word.
    """
    while True:
        try:
            sock, _ = wait.on(listener, listener.accept)
        except TimeoutError:
            absent = [names[peer] for peer in range(rank + 1, world) if peer not in sockets]
            raise PartyError(
                f"{', '.join(absent)} did not connect within {wait.timeout:g} s: look at its own output, and whether "
                f"it reaches {listener.getsockname()[0]}:{listener.getsockname()[1]}"
            ) from None
        try:
            hello = _Wait(HELLO_SECONDS)
            sock.settimeout(hello.timeout)
            sock = links.secure(sock) if links else sock
            magic, version, peer, their_world, shown = HELLO.unpack(_read_exactly(sock, HELLO.size, hello))
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


def _barrier(sockets, names, wait):
    """Wait until every party has all its links: then nobody needs the store any more."""
    for peer, sock in sockets.items():
        with _blames(names[peer], wait):
            sock.sendall(READY)
    for peer, sock in sockets.items():
        with _blames(names[peer], wait):
            _read_exactly(sock, len(READY), wait)


@contextlib.contextmanager
def _blames(name, wait):
    try:
        yield
    except OSError as error:
        raise PartyError(
            f"{name} did not finish connecting within {wait.timeout:g} s ({_first_line(error)}): look at its own "
            "output, start all parties again"
        ) from None


def _read_exactly(sock, count, wait):
    """`count` bytes; OSError when they do not come in time."""
    data = b""
    while len(data) < count:
        chunk = wait.on(sock, sock.recv, count - len(data))
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
