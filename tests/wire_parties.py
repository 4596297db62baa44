"""Owner, client and dealer of the wire engine as three threads of one process.

Owns the sockets between them and the record of every frame they send. A role that raises closes its links, so the
others stop at once, and its error is raised in the test; a wait without progress fails after ``TIMEOUT`` seconds.
Masks are drawn through ``crypten_llm.insecure.audit``, so every test also checks that none is used twice.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from dataclasses import dataclass

import torch

from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.errors import PartyError
from crypten_llm.insecure.audit import audited
from crypten_llm.links.frames import HEADER, KIND_NAMES
from crypten_llm.links.transport import Transport
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Rounds
from crypten_llm.protocols.secret import Secret, Wire
from crypten_llm.roles import CLIENT, DEALER, OWNER

TIMEOUT = 20.0
ROLES = ("owner", "client", "dealer")


@dataclass(frozen=True)
class Frame:
    """A message as it left its sender: ``kind`` is "tensor", "JSON" or "stream"."""

    source: int
    target: int
    kind: str
    payload: bytes


class RecordingTransport(Transport):
    """A ``Transport`` that keeps a copy of all it sends."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.frames: list[Frame] = []

    def _frame(self, link, kind, dtype, views):
        payload = b"".join(bytes(view) for view in views)
        self.frames.append(Frame(self.rank, link.rank, KIND_NAMES[kind], payload))
        return super()._frame(link, kind, dtype, views)


@dataclass
class Outcome:
    """What each role returned, what each sent, and the traffic of the job alone, set-up left out."""

    results: list
    frames: list[list[Frame]]
    traffic: list

    def cost(self) -> tuple[int, int, int, int, int]:
        """(rounds, payload bytes owner to client, client to owner, dealer to owner, dealer to client)."""
        rounds = max(self.traffic[role].online.rounds for role in (OWNER, CLIENT))
        return (
            rounds,
            self.sent(OWNER, CLIENT),
            self.sent(CLIENT, OWNER),
            self.sent(DEALER, OWNER),
            self.sent(DEALER, CLIENT),
        )

    def sent(self, source: int, target: int) -> int:
        return sum(len(frame.payload) for frame in self.frames[source] if frame.target == target)

    def check_meter(self) -> None:
        """The meter counts what the frames hold, headers included."""
        for role, traffic in enumerate(self.traffic):
            sent = traffic.online.bytes_sent + traffic.dealer.bytes_sent
            assert sent == sum(len(frame.payload) + HEADER.size for frame in self.frames[role])


def _mesh() -> list[RecordingTransport]:
    sockets = [{} for _ in ROLES]
    for high in range(3):
        for low in range(high):
            sockets[low][high], sockets[high][low] = socket.socketpair()
    return [RecordingTransport(rank, ROLES, sockets[rank], timeout=TIMEOUT) for rank in range(3)]


def key(seed: int, party: int) -> bytes:
    """A key that a test can repeat."""
    return hashlib.sha256(f"test {seed} party {party}".encode()).digest()


def run(job, *arguments, engine: bool | type = False, seed: int = 0, section: str = "test") -> Outcome:
    """``job(runtime, *arguments)`` in every role, in one section whose masks follow from ``seed``.

    engine: hand the job a ``WireEngine``, or one of this class, instead of its runtime.
    """
    transports = _mesh()
    results, traffic, errors = [None] * 3, [None] * 3, []

    @torch.inference_mode()
    def play(role: int) -> None:
        transport = transports[role]
        try:
            keys = [key(seed, 0), key(seed, 1)] if role == DEALER else [key(seed, role)]
            runtime = audited(roles.ROLES[role])(transport, keys)
            subject = None
            if engine:
                subject = (WireEngine if engine is True else engine)(transport, runtime=runtime)
            transport.frames.clear()
            before = transport.meter.snapshot()
            runtime.begin(section)
            results[role] = job(subject if engine else runtime, *arguments)
            runtime.end()
            traffic[role] = transport.meter.snapshot() - before
        except BaseException as error:
            errors.append(error)
            transport.abort(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=play, args=(role,), name=ROLES[role], daemon=True) for role in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT)
        assert not thread.is_alive(), f"{thread.name} did not stop"
    for transport in transports:
        transport.close()
    if errors:  # the first cause; a lost peer is only its consequence
        raise next((error for error in errors if not isinstance(error, PartyError)), errors[0])
    # By link: the dealer sends to both parties at once, so the order of frames on different links means nothing.
    frames = [sorted(transport.frames, key=lambda frame: frame.target) for transport in transports]
    return Outcome(results, frames, traffic)


def check_cost(job, declared: tuple[int, int, int, int, int]) -> None:
    """The job costs what is declared, as ``Outcome.cost`` gives it, and the meter says so."""
    outcome = run(job)
    assert outcome.cost() == declared
    outcome.check_meter()


# Secrets that a test chooses, and what it may know of a result.


def share(runtime, integers: torch.Tensor, scale: int = 0, width: int = 64, bits: int | None = None) -> Secret:
    """Secret shares of ``integers``, nothing sent: the client's share is pseudo-random, the same in every run."""
    if bits is None:
        bits = max(0, int(integers.abs().max()).bit_length() - scale) if integers.numel() else 0
    generator = torch.Generator().manual_seed(integers.numel())
    theirs = torch.randint(-(2**63), 2**63 - 1, integers.shape, generator=generator)
    return Secret(runtime.share(integers.shape, lambda: integers - theirs, lambda: theirs), scale, width, bits)


def open_wires(runtime, openings: list[Opening]) -> list[Wire]:
    """All in one round, by a protocol of their own."""
    return Rounds(runtime).open(*openings)


def play(runtime, protocol):
    """The result of a protocol, run alone."""
    return Rounds(runtime).run(protocol)


def reconstruct(outcome: Outcome, width: int | None = None) -> torch.Tensor:
    """The signed integers that the parties' resulting ``Secret`` shares stand for, modulo 2^width (its own)."""
    return joined(outcome.results[OWNER], outcome.results[CLIENT], width)


def joined(mine: Secret, theirs: Secret, width: int | None = None) -> torch.Tensor:
    width = width or mine.width
    assert (mine.scale, mine.width, mine.bits) == (theirs.scale, theirs.width, theirs.bits)
    return signed(mine.share + theirs.share, width)


def signed(x: torch.Tensor, width: int) -> torch.Tensor:
    """Words modulo 2^width as integers in [-2^(width-1), 2^(width-1))."""
    return (x << (64 - width)) >> (64 - width)


def value(outcome: Outcome) -> torch.Tensor:
    """The float64 numbers that the resulting ``Secret`` stands for."""
    return reconstruct(outcome).double() / 2.0 ** outcome.results[OWNER].scale


def plus(first, *others):
    """Costs, number by number."""
    return tuple(map(sum, zip(first, *others, strict=True)))
