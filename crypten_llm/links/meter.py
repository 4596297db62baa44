"""What a run costs: rounds, messages, bytes and seconds, by phase and kind of operation.

Owns the counters and the names of the phase and operation in progress. Only the transport counts traffic
(`Meter.count`); everything else only names what it is doing and reads. The meter is always on, so it does
nothing but add: one count takes about a microsecond, entering and leaving an operation about two.

Rounds: a transfer that waits for peers counts one round, however many peers take part: the transport's `exchange`,
`all_exchange` and `all_exchange_many` one round for each participant, `recv` and `recv_json` one round for the
receiver. `send` and `send_json` count a message and no round. Bytes are those of frames, headers included, counted
when the transfer is complete; the rendezvous handshake and what TLS adds (22 bytes for 16 KiB) are not counted.

Traffic is split in two channels: "online" is what the parties wait for when a prompt runs, "dealer" is
correlated randomness, which a tape or a dealer that runs ahead takes off the critical path.
"""

from __future__ import annotations

import resource
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Annotated, Self, TypedDict

from msgspec import Meta

from crypten_llm.records import Count, Word

CHANNELS = ("online", "dealer")
CLOCKS = ("seconds", "wait_seconds", "dealer_wait_seconds")  # of a table's row
Cell = tuple[str, str]  # (phase, kind): what a count goes to
Cells = Mapping[Cell, Sequence[int]]  # bytes sent and received of each


class Row(TypedDict):
    """One row of ``Meter.table`` as other parties are told it: without clocks."""

    phase: Word
    kind: Word
    rounds: Count
    bytes_sent: Count
    bytes_received: Count
    dealer_rounds: Count
    dealer_bytes_sent: Count
    dealer_bytes_received: Count


class DealersCounters(TypedDict):
    """What a party has counted since a request began."""

    rank: Annotated[int, Meta(ge=0, le=100)]
    table: Annotated[list[Row], Meta(max_length=10_000)]
    peak_bytes: Count


class Counters(DealersCounters, total=False):
    """The same of a compute party; dealer: those of a dealer that it has asked."""

    dealer: DealersCounters


@dataclass(frozen=True)
class _Subtractable:
    """Field by field difference: the cost of an interval is its last totals minus its first."""

    def __sub__(self, earlier: Self) -> Self:
        return type(self)(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Traffic(_Subtractable):
    """What one channel carried.

    rounds: sequential message flights this party waited for.
    messages: frames this party sent. bytes_sent, bytes_received: socket bytes, headers included.
    wait_seconds: time spent inside the transport.
    """

    rounds: int = 0
    messages: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class Totals(_Subtractable):
    """Everything counted so far on both channels; `seconds` is the wall clock since the meter was made."""

    online: Traffic
    dealer: Traffic
    seconds: float


class Scope:
    """A named stretch of the program: while it is open, counts and wall time go to its (phase, kind)."""

    __slots__ = ("meter", "phase", "label", "kind")

    def __init__(self, meter: Meter, phase: str, label: str, kind: str) -> None:
        self.meter, self.phase, self.label, self.kind = meter, phase, label, kind

    def __enter__(self) -> Self:
        self.meter._charge_wall()
        self.meter._scopes.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.meter._charge_wall()
        left = self.meter._scopes.pop()
        assert left is self, f"scope {left.label!r} was left before {self.label!r}: close the inner one first"


class Meter:
    """Counters of one party.

    One thread, the one that computes, opens phases and operations; traffic may be counted from any thread and
    goes to the operation then in progress.
    """

    def __init__(self) -> None:
        self._scopes = [Scope(self, "setup", "", "other")]
        # (phase, kind, channel) -> [rounds, messages, sent, received, wait seconds]
        self._traffic: dict[tuple[str, str, str], list] = {}
        self._wall: dict[Cell, float] = {}  # (phase, kind) -> seconds, exclusive of nested scopes of another kind
        self._lock = threading.Lock()
        self._started = self._charged_until = perf_counter()

    def phase(self, name: str) -> Scope:
        """Context manager: a part of the run (load, prefill, decode ...); it starts with no operation."""
        return Scope(self, name, "", "other")

    def operation(self, label: str, kind: str | None = None) -> Scope:
        """Context manager: `label` names the step in error messages, `kind` is the row it is counted in.

        Nested labels read outer to inner ("layer 3" then "softmax": "layer 3 softmax"); without a kind the
        enclosing one goes on.
        """
        outer = self._scopes[-1]
        return Scope(self, outer.phase, f"{outer.label} {label}" if outer.label else label, kind or outer.kind)

    @property
    def scope(self) -> Scope:
        """The step in progress, to come back to with `within`."""
        return self._scopes[-1]

    def within(self, scope: Scope) -> Scope:
        """Context manager: the step that was in progress when `scope` was taken."""
        return Scope(self, scope.phase, scope.label, scope.kind)

    def exchange_scopes(self, scopes: list[Scope]) -> list[Scope]:
        """Put other steps in progress in the place of those now, which are returned: what runs side by side has its
        own.
        """
        before = list(self._scopes)
        self._charge_wall()
        self._scopes[:] = scopes
        return before

    @property
    def where(self) -> str:
        """The step in progress, for error messages: "prefill: layer 3 softmax"."""
        scope = self._scopes[-1]
        return f"{scope.phase}: {scope.label}" if scope.label else scope.phase

    @property
    def cell(self) -> Cell:
        """(phase, kind) that counts go to now."""
        return self._scopes[-1].phase, self._scopes[-1].kind

    def twin(self) -> Meter:
        """Counters of another party that is always in the phase and operation in progress here."""
        twin = Meter()
        twin._scopes = self._scopes
        return twin

    def count(
        self,
        channel: str,
        rounds: int,
        messages: int,
        sent: int,
        received: int,
        seconds: float,
        cells: Cells | None = None,
    ) -> None:
        """Add one transfer to the operation in progress. For the transport, and a tape that stands for a link.

        cells: by (phase, kind), the bytes sent and received of it that belong there instead.
        """
        scope = self._scopes[-1]
        with self._lock:
            if cells:
                for (phase, kind), (out, back) in cells.items():
                    self._add((phase, kind, channel), 0, 0, out, back, 0.0)
                    sent, received = sent - out, received - back
            self._add((scope.phase, scope.kind, channel), rounds, messages, sent, received, seconds)

    def count_received(self, channel: str, received: int) -> None:
        """Add bytes that have come before and are used now: no message, and no round."""
        scope = self._scopes[-1]
        key = scope.phase, scope.kind, channel
        with self._lock:
            cell = self._traffic.get(key)
            if cell is None:
                self._add(key, 0, 0, 0, received, 0.0)
            else:
                cell[3] += received

    def _add(
        self, key: tuple[str, str, str], rounds: int, messages: int, sent: int, received: int, seconds: float
    ) -> None:
        cell = self._traffic.get(key)
        if cell is None:
            assert key[2] in CHANNELS, f"unknown channel {key[2]!r}"
            cell = self._traffic[key] = [0, 0, 0, 0, 0.0]
        cell[0] += rounds
        cell[1] += messages
        cell[2] += sent
        cell[3] += received
        cell[4] += seconds

    def snapshot(self) -> Totals:
        """The `Totals` so far. Subtract two of them for the cost of what ran between."""
        with self._lock:
            cells = {key: tuple(cell) for key, cell in self._traffic.items()}
        online, dealer = (
            Traffic(*map(sum, zip(*(cell for key, cell in cells.items() if key[2] == channel), strict=True)))
            for channel in CHANNELS
        )
        return Totals(online, dealer, perf_counter() - self._started)

    def table(self) -> list[dict]:
        """One JSON-able dict per (phase, kind), in the order first met.

        Keys: phase, kind, rounds, bytes_sent, bytes_received and wait_seconds of the online channel, the same
        of the dealer channel under dealer_*, and `seconds`: wall time exclusive of nested operations.
        """
        self._charge_wall()
        with self._lock:
            cells = {key: tuple(cell) for key, cell in self._traffic.items()}
        keys = dict.fromkeys([*self._wall, *((phase, kind) for phase, kind, _ in cells)])
        rows = []
        for phase, kind in keys:
            online, dealer = (Traffic(*cells.get((phase, kind, channel), ())) for channel in CHANNELS)
            rows.append(
                {
                    "phase": phase,
                    "kind": kind,
                    "rounds": online.rounds,
                    "bytes_sent": online.bytes_sent,
                    "bytes_received": online.bytes_received,
                    "wait_seconds": online.wait_seconds,
                    "dealer_rounds": dealer.rounds,
                    "dealer_bytes_sent": dealer.bytes_sent,
                    "dealer_bytes_received": dealer.bytes_received,
                    "dealer_wait_seconds": dealer.wait_seconds,
                    "seconds": self._wall.get((phase, kind), 0.0),
                }
            )
        return rows

    def counts(self) -> list[dict]:
        """`table` without clocks: what this party may tell others, as they could count it themselves."""
        return [{name: row[name] for name in row if name not in CLOCKS} for row in self.table()]

    def _charge_wall(self) -> None:
        """Give the time since the last call to the innermost scope, so nested time is never counted twice."""
        now = perf_counter()
        scope = self._scopes[-1]
        key = (scope.phase, scope.kind)
        self._wall[key] = self._wall.get(key, 0.0) + now - self._charged_until
        self._charged_until = now


def peak_bytes() -> int:
    """The most memory this process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
