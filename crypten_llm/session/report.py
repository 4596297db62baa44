"""What a request cost and what it revealed, for people and for programs.

Owns the arithmetic on the parties' counters and the cost table. It counts nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crypten_llm.roles import CLIENT
from crypten_llm.units import size

if TYPE_CHECKING:
    from crypten_llm.session.request import Result

PHASES = ("load", "prefill", "decode")
ONLINE = ("prefill", "decode")
WAYS = ("bytes_sent", "bytes_received")


@dataclass(frozen=True)
class Cost:
    """Counters of every rank for one request; ``ranks`` holds what ``Party.collect_statistics`` returns: clocks are the
    client's alone.
    """

    ranks: list[dict]
    compute_parties: int

    def _rows(self, rank: int, phases: tuple[str, ...] = PHASES) -> list[dict]:
        return [row for row in self.ranks[rank]["table"] if row["phase"] in phases]

    def _sums(self, keys: tuple[str, ...], phases: tuple[str, ...]) -> list[int]:
        """By compute party, the sum of these counters."""
        return [
            sum(row[key] for row in self._rows(rank, phases) for key in keys) for rank in range(self.compute_parties)
        ]

    def rounds(self, phases: tuple[str, ...] = ONLINE) -> int:
        """Online rounds that the parties wait for one after another: the most of any compute party."""
        return max(self._sums(("rounds",), phases))

    def bytes_sent(self, phases: tuple[str, ...] = ONLINE) -> list[int]:
        """Online bytes by rank of the compute parties, headers included."""
        return self._sums(("bytes_sent",), phases)

    def dealer_bytes(self, phases: tuple[str, ...] = ONLINE) -> int:
        """Bytes on the links to the dealer, both ways, as the compute parties count them: it knows no phases."""
        return sum(self._sums(("dealer_bytes_sent", "dealer_bytes_received"), phases))

    def dealer_rounds(self, phases: tuple[str, ...] = ONLINE) -> int:
        """Round trips to the dealer, each of which the parties wait for on this engine."""
        return max(self._sums(("dealer_rounds",), phases))

    def dealer_wait_seconds(self, phases: tuple[str, ...] = ONLINE) -> float:
        """For which the client waited for material."""
        return sum(row["dealer_wait_seconds"] for row in self._rows(self._client, phases))

    def seconds(self, phase: str) -> float:
        """Wall clock of a phase at the client, its waits for the other parties included."""
        return sum(row["seconds"] for row in self._rows(self._client, (phase,)))

    @property
    def thin(self) -> dict | None:
        """The counters of a client that is no party, where there is one; they are the last of ``ranks``."""
        return self.ranks[-1] if "thin" in self.ranks[-1] else None

    def thin_bytes(self, phases: tuple[str, ...] = ONLINE) -> tuple[int, int]:
        """Bytes that such a client has sent and received, headers included."""
        rows = [row for row in (self.thin or {"table": []})["table"] if row["phase"] in phases]
        return sum(row["bytes_sent"] for row in rows), sum(row["bytes_received"] for row in rows)

    def names(self, roles: Sequence[str]) -> list[str]:
        """Of ``ranks``, where the parties' names are ``roles``."""
        return [*roles[: len(self.ranks) - 1], "client"] if self.thin else list(roles)

    def peak_bytes(self) -> list[int]:
        return [entry["peak_bytes"] for entry in self.ranks]

    @property
    def _client(self) -> int:
        return min(CLIENT, self.compute_parties - 1)

    def table(self) -> list[dict]:
        """One row per phase and kind of operation: rounds and bytes are the most of any party, seconds the client's.

        ``dealer_bytes`` is the sum over the parties.
        """
        merged: dict[tuple[str, str], dict] = {}
        for rank in range(self.compute_parties):
            for row in self._rows(rank):
                key = {"phase": row["phase"], "kind": row["kind"]}
                empty = {**key, "rounds": 0, "bytes_sent": 0, "dealer_bytes": 0, "seconds": 0.0}
                entry = merged.setdefault((row["phase"], row["kind"]), empty)
                entry["rounds"] = max(entry["rounds"], row["rounds"])
                entry["bytes_sent"] = max(entry["bytes_sent"], row["bytes_sent"])
                entry["dealer_bytes"] += row["dealer_bytes_sent"] + row["dealer_bytes_received"]
                if rank == self._client:
                    entry["seconds"] = row["seconds"]
        return sorted(merged.values(), key=lambda row: PHASES.index(row["phase"]))


def cost_table(cost: Cost) -> str:
    """The table at the end of a run."""
    lines = [f"{'phase':<9}{'operation':<12}{'rounds':>9}{'sent a party':>14}{'dealer':>11}{'seconds':>10}"]
    rows = cost.table()
    for phase in dict.fromkeys(row["phase"] for row in rows):
        shown = [row for row in rows if row["phase"] == phase and (row["kind"] != "other" or row["seconds"] > 0.05)]
        lines += [_line(phase if row is shown[0] else "", row["kind"], row) for row in shown]
        total = {
            "rounds": cost.rounds((phase,)),
            "bytes_sent": max(cost.bytes_sent((phase,))),
            "dealer_bytes": cost.dealer_bytes((phase,)),
            "seconds": cost.seconds(phase),
        }
        lines.append(_line("", "total", total))
    return "\n".join([*lines, *thin_lines(cost)])


def thin_lines(cost: Cost) -> list[str]:
    """What a thin client has sent and received, by phase; nothing where the client is a party."""
    return [thin_line({phase: cost.thin_bytes((phase,)) for phase in ONLINE})] if cost.thin else []


def thin_line(passed: Mapping[str, tuple[int, int]]) -> str:
    """passed: bytes sent and received, by phase."""
    parts = (f"{phase} {size(sent)} sent, {size(received)} received" for phase, (sent, received) in passed.items())
    return f"the thin client: {'; '.join(parts)}"


def _line(phase: str, kind: str, row: dict) -> str:
    sent, dealer = size(row["bytes_sent"]), size(row["dealer_bytes"])
    return f"{phase:<9}{kind:<12}{row['rounds']:>9,}{sent:>14}{dealer:>11}{row['seconds']:>10.2f}"


def turns_table(turns: list[Result]) -> str:
    """What each turn of a conversation cost."""
    named = (
        f"{'turn':<6}{'cached':>8}{'new':>6}{'answer':>8}{'rounds':>9}{'sent a party':>14}{'dealer':>11}{'seconds':>10}"
    )
    lines = [named]
    for number, turn in enumerate(turns, 1):
        cost = turn.cost
        seconds = sum(cost.seconds(phase) for phase in ONLINE)
        lines.append(
            f"{number:<6}{turn.cached_tokens:>8}{turn.prompt_tokens:>6}{len(turn.token_ids):>8}{cost.rounds():>9,}"
            f"{size(max(cost.bytes_sent())):>14}{size(cost.dealer_bytes()):>11}{seconds:>10.2f}"
        )
    return "\n".join(lines)


_NAMES = ("phase", "kind")


@dataclass(frozen=True)
class Counters:
    """All that was counted since a request began: of every rank, and what was revealed, the load's part with it."""

    ranks: list[dict] = field(default_factory=list)
    revealed: list[dict] = field(default_factory=list)

    def since(self, before: Counters, loaded: list[dict]) -> Counters:
        """What came after ``before``, which is empty for the beginning; loaded: what the load revealed."""
        tables = {(entry["rank"], *_names(row)): row for entry in before.ranks for row in entry["table"]}
        ranks = []
        for entry in self.ranks:
            table = []
            for row in entry["table"]:
                less = tables.get((entry["rank"], *_names(row)), {})
                table.append({name: row[name] if name in _NAMES else row[name] - less.get(name, 0) for name in row})
            ranks.append({**entry, "table": table})
        of_load = {_fact(entry): entry["times"] for entry in loaded}
        earlier = {_fact(entry): entry["times"] for entry in before.revealed} or of_load
        revealed = []
        for entry in self.revealed:
            fact = _fact(entry)
            if times := entry["times"] - earlier.get(fact, 0) + of_load.get(fact, 0):
                revealed.append({**entry, "times": times})
        return Counters(ranks, revealed)


def added(before: list[dict], ranks: list[dict]) -> list[dict]:
    """Counters of every rank with those ``before``, which may be empty."""
    found = {entry["rank"]: {_names(row): dict(row) for row in entry["table"]} for entry in before}
    for entry in ranks:
        rows = found.setdefault(entry["rank"], {})
        for row in entry["table"]:
            held = rows.setdefault(_names(row), dict.fromkeys(row, 0) | {name: row[name] for name in _NAMES})
            held |= {name: held.get(name, 0) + row[name] for name in row if name not in _NAMES}
    return [{**entry, "table": list(found[entry["rank"]].values())} for entry in ranks]


def _names(row: dict) -> tuple:
    return tuple(row[name] for name in _NAMES)


def _fact(entry: dict) -> tuple:
    return entry["what"], entry["to"], entry["why"]


def ledger(loaded: list[dict], requests: list[list[dict]]) -> list[dict]:
    """What was revealed in all requests of a session; loaded: when the model was shared, which each of them lists."""
    before = {_fact(entry): entry["times"] for entry in loaded}
    found = {_fact(entry): dict(entry) for entry in loaded}
    for revealed in requests:
        for entry in revealed:
            more = entry["times"] - before.get(_fact(entry), 0)
            found.setdefault(_fact(entry), {**entry, "times": 0})["times"] += more
    return list(found.values())


def revealed_table(revealed: list[dict]) -> str:
    """Who learned what."""
    lines = [f"{'revealed to':<12}{'what':<68}{'times':>5}"]
    lines += [f"{entry['to']:<12}{entry['what']:<68}{entry['times']:>5}" for entry in revealed]
    return "\n".join(lines)
