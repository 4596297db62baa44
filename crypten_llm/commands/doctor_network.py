"""``doctor network A B``: what the link between two parties' machines carries, before anything depends on it.

Owns the checks. Both ends run it, at the place and under the rules and keys of a run between these two, take the same
steps in turn, and print the same figures.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from crypten_llm.errors import CryptenLLMError, UsageError, last_words
from crypten_llm.links import keyring, rendezvous
from crypten_llm.links.network import Network
from crypten_llm.links.tls import Links, name_of
from crypten_llm.links.transport import Transport

FRAME = 2 << 20  # bytes; what a step sends goes in messages of a few of these at most
FRAMES = (1, 1 << 10, 1 << 14, 1 << 16, 1 << 20, FRAME, 16 << 20)  # some networks lose what is above a size
TRIPS = 50


@dataclass(frozen=True)
class Place:
    """tls, insecure_links, host, timeout: as of a run (``settings``). megabytes: sent each way for the bandwidth. idle:
    seconds of silence that the link has to outlast; many proxies cut one after 60.
    """

    tls: str = ""
    insecure_links: bool = False
    host: str = ""
    timeout: float = 60.0
    megabytes: int = 32
    idle: float = 65.0


def run(
    roles: Sequence[str], place: Place, env: Mapping[str, str] = os.environ, network: Network | None = None
) -> bool:
    """Every check, a line each; true when all passed. network: emulated, for two ends on one machine.

    Raises UsageError for what cannot be tried.
    """
    if len({name_of(role) for role in roles}) != 2:
        raise UsageError(f"doctor network takes two roles, such as owner client; {' '.join(roles) or 'none'} was given")
    if place.megabytes < 1 or not 0 <= place.idle < place.timeout * 100:
        raise UsageError(f"--megabytes is {place.megabytes} and --idle {place.idle:g}; give 1 or more, and 0 or more")
    rank, world, host, port = rendezvous.read_environment(env)
    if world != 2:
        raise UsageError(f"WORLD_SIZE is {world}; of 2, the {roles[0]} starts this as RANK 0, the {roles[1]} as RANK 1")
    secret = keyring.find((host, place.host or host), place.tls, place.insecure_links, env)
    links = Links(place.tls, roles, rank) if place.tls else None
    found: list[Transport] = []

    def connection() -> str:
        own = place.host or None
        found.append(
            rendezvous.connect(
                rank, 2, roles, host, port, place.timeout, own, secret=secret, links=links, network=network
            )
        )
        return f"{roles[0]} and {roles[1]} by way of {host}, port {port}, {'TLS 1.3' if links else 'plain TCP'}"

    if not _line("connection", connection):
        return False
    transport = found[0]
    try:
        return _checks(transport, rank, roles, place)
    finally:
        transport.close()


def _checks(transport: Transport, rank: int, roles: Sequence[str], place: Place) -> bool:
    trip, widths = 0.0, list[float]()

    def round_trip() -> str:
        nonlocal trip
        times = sorted(_trip(transport, rank) for _ in range(TRIPS))
        trip, slow = (_of_both(transport, rank, each) for each in (median(times), times[-1]))
        return f"{1e3 * trip:.2f} ms, {1e3 * slow:.2f} at most"

    def bandwidth(sender: int) -> Callable[[], str]:
        def measure() -> str:
            seconds = _one_way(transport, rank, sender, place.megabytes)
            widths.append(place.megabytes * (1 << 20) * 8e-6 / max(seconds - trip, 1e-9))
            return f"{widths[-1]:,.0f} Mbit/s, of {place.megabytes} MiB"

        return measure

    def frames() -> str:
        for size in FRAMES:
            mine, theirs = (torch.arange(size, dtype=torch.int64).add(who).to(torch.uint8) for who in (rank, 1 - rank))
            if not torch.equal(transport.exchange(1 - rank, mine), theirs):
                raise CryptenLLMError(f"a message of {size:,} bytes was altered on the way; use --tls")
        return f"messages of 1 byte to {FRAMES[-1] >> 20} MiB arrive whole, both ways"

    def idle() -> str:
        time.sleep(place.idle)
        transport.exchange(1 - rank, torch.zeros(1, dtype=torch.uint8))
        return f"still there after {place.idle:g} s of silence"

    checks = {
        "round trip": round_trip,
        f"{roles[0]} to {roles[1]}": bandwidth(0),
        f"{roles[1]} to {roles[0]}": bandwidth(1),
        "messages": frames,
        "idle": idle,
    }
    for name, check in checks.items():
        if not _line(name, check):  # the ends are out of step from here on
            return False
    print(f"for cost, and to emulate it: --network {1e3 * trip:.3g}ms,{min(widths):.0f}", flush=True)
    return True


def _one_way(transport: Transport, rank: int, sender: int, megabytes: int) -> float:
    """Seconds at the sender until the other end has all of it, known at both."""
    count, data = -(-(megabytes << 20) // FRAME), torch.zeros(FRAME, dtype=torch.uint8)
    if rank != sender:
        for _ in range(count):
            transport.recv(sender, (FRAME,), torch.uint8)
        transport.send_json(sender, True)
        return transport.recv_json(sender, float)
    started = time.perf_counter()
    for _ in range(count):
        transport.send(1 - rank, data)
    transport.recv_json(1 - rank, bool)
    seconds = time.perf_counter() - started
    transport.send_json(1 - rank, seconds)
    return seconds


def _of_both(transport: Transport, rank: int, mine: float) -> float:
    """The larger of both ends' figures."""
    nanoseconds = torch.tensor([round(mine * 1e9)])
    return max(int(nanoseconds), int(transport.exchange(1 - rank, nanoseconds))) * 1e-9


def _trip(transport: Transport, rank: int) -> float:
    """Seconds of a byte to the second end and back; 0 there."""
    byte = torch.zeros(1, dtype=torch.uint8)
    if rank:
        transport.send(0, transport.recv(0, (1,), torch.uint8))
        return 0.0
    started = time.perf_counter()
    transport.send(1, byte)
    transport.recv(1, (1,), torch.uint8)
    return time.perf_counter() - started


def _line(name: str, check: Callable[[], str]) -> bool:
    started = time.perf_counter()
    try:
        mark, text = "ok", check()
    except CryptenLLMError as problem:
        mark, text = "NO", last_words(problem)
    print(f"{mark}  {name:<18} {text}  ({time.perf_counter() - started:.1f} s)", flush=True)
    return mark == "ok"
