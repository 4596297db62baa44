"""Sockets before anything is said over them: where to listen, how to connect, what a link's socket is set to.

Owns addresses, ports and options of the system, and why it refused, in one line.
"""

import contextlib
import errno
import ipaddress
import socket

from crypten_llm.errors import UsageError

BACKLOG = 128  # connections that have not been looked at yet
# Small frames leave at once; a machine that vanished is noticed within a minute even by a wait without end. Buffer
# sizes are left to the kernel: fixing them turns its tuning to the link off, and gained nothing on loopback.
TCP_OPTIONS = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}


def address_towards(host: str, port: int) -> str:
    """This machine's address on the interface that reaches `host`. Sends nothing: UDP connects by routing alone."""
    try:
        family, kind, proto, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"MASTER_ADDR={host!r} cannot be reached ({reason_of(error)}): give another one") from None


def listen(address: str, port: int = 0) -> socket.socket:
    """A socket at which other parties reach this one, on a free port if none is given; at this address alone.

    An address that is translated on the way (a container's host) is not this machine's to bind: then on every one of
    this machine's. Raises UsageError for a port in use and what else cannot be bound.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for place in (address, ""):
        try:
            return socket.create_server((place, port), family=family, backlog=BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UsageError(
                    f"port {port} is in use on this machine, perhaps by another run: give every party another "
                    "MASTER_PORT, or this one another --link-port"
                ) from None
            is_foreign = error.errno in (errno.EADDRNOTAVAIL, socket.EAI_NONAME)
            if place == "" or is_loopback(address) or not is_foreign:
                raise UsageError(
                    f"cannot listen on {place or 'any address'}, port {port} ({reason_of(error)}): give this party's "
                    "address as host"
                ) from None
    raise AssertionError("the loop returns or raises")


def dial(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to a listener. Raises OSError, a timeout after so many seconds (0.1 at least) among them."""
    return socket.create_connection((host, port), timeout=max(0.1, seconds))


def set_up(sock: socket.socket) -> None:
    """Makes a connected socket that of a link."""
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in TCP_OPTIONS.items():
            if hasattr(socket, option):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def is_local(sock: socket.socket) -> bool:
    """Whether the other end of a connected socket is on this machine."""
    if sock.family == socket.AF_UNIX:
        return True
    here, there = sock.getsockname()[0], sock.getpeername()[0]
    return here == there or is_loopback(there)


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine by way of no network at all."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    return host.rstrip(".").lower() in ("localhost", "ip6-localhost")


def places(sock: socket.socket) -> bytes:
    """Both ends' addresses of a connection, alike at both; of one that may be translated on its way, nothing."""
    if sock.family == socket.AF_UNIX or not is_loopback(sock.getpeername()[0]):
        return b""
    return " ".join(sorted(f"{end[0]}:{end[1]}" for end in (sock.getsockname(), sock.getpeername()))).encode()


def reason_of(error: BaseException) -> str:
    """One short line of an exception of the system or of torch."""
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0][:160] if text.strip() else type(error).__name__
