"""Prompts that come and go: passes in which running answers take a token each, and a newcomer's prompt a chunk.

Owns the order of events of an open batch (continuous batching with chunked prefills: Yu et al. 2022, Orca; Agrawal et
al. 2023, arXiv 2308.16369). After each pass the client says in public who ends and who joins, and all parties follow.
One newcomer is read at a time, so that a pass that others wait for has at most one chunk of one prompt in it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, NamedTuple, Protocol

import torch
from msgspec import Meta

from crypten_llm import limits
from crypten_llm.records import Count, Record
from crypten_llm.session.plan import Plan, Turn, Turns, turns_of
from crypten_llm.session.prompted import Answer, Progress, Prompted, Step, draw, extend
from crypten_llm.session.report import Counters

if TYPE_CHECKING:
    from crypten_llm.session.party import Party


class Next(Record, frozen=True):
    """The client's, after each pass. stop: which answers end here, by place. join: plans of newcomers, which take the
    places behind the last; turns: where they stand in conversations. forget: conversations whose caches are dropped."""

    stop: Annotated[tuple[Count, ...], Meta(max_length=limits.PROMPTS)] = ()
    join: Annotated[tuple[Plan, ...], Meta(max_length=limits.PROMPTS)] = ()
    turns: Annotated[tuple[Turn | None, ...], Meta(max_length=limits.PROMPTS)] = ()
    forget: Annotated[tuple[Count, ...], Meta(max_length=limits.CONVERSATIONS)] = ()


class Newcomer(NamedTuple):
    """Who begins. turn: of a conversation, if it is one's; answer: at the client."""

    plan: Plan
    turn: Turn | None = None
    answer: Answer | None = None


def joining(plans: Sequence[Plan], turns: Turns) -> list[Newcomer]:
    """As parties hear of them."""
    return [Newcomer(plan, turn) for plan, turn in zip(plans, turns or [None] * len(plans), strict=True)]


def said(newcomers: Sequence[Newcomer]) -> tuple[tuple[Plan, ...], tuple[Turn | None, ...]]:
    """As they hear of it: plans and turns."""
    return tuple(each.plan for each in newcomers), turns_of([each.turn for each in newcomers])


@dataclass(frozen=True)
class Counted:
    """Places that have ended, or were taken, before the next pass, with all counters so far; at the client."""

    ended: tuple[int, ...]
    joined: tuple[int, ...]
    counters: Counters


class Door(Protocol):
    """Where newcomers wait, at the client."""

    def newcomers(self, inside: int) -> Sequence[Newcomer]:
        """Who joins now, beside ``inside`` others that go on."""
        ...

    def dropped(self) -> Sequence[int]:
        """Conversations that nobody goes on with any more, each once."""
        ...


Event = Progress | Step | Counted


@torch.inference_mode()
def follow(party: Party, first: Sequence[Newcomer], door: Door | None = None) -> Generator[Event, None, None]:
    """Follows the ``first`` and those that join, until nobody is in or all end at once.

    At the client, which has answers and ``door``, yields what comes of them. To be read to its end, as
    ``generation.together``.

    Reveals: to the client what the mode says of each generated token; to all who joins and ends when, how many tokens
    each took, unless hidden, and which conversation each goes on with. Cost: of a pass, the rounds of one token.
    Raises: UsageError for a policy that does not fit.
    """
    engine, meter = party.engine, party.engine.meter
    inside: dict[int, Prompted] = {}
    party.reveals.public("requests side by side", "they share rounds; who joins and leaves when is public")
    coming = first
    taken = index = 0
    ended: tuple[int, ...] = ()
    while True:
        if index and (ended or coming):
            places = tuple(range(taken, taken + len(coming)))
            with meter.phase("counters"):  # which are no part of what they count
                ranks = party.count(ended)
            if ranks:
                yield Counted(ended, places, Counters(ranks, party.reveals.as_list()))
        for plan, turn, answer in coming:
            party.notary.begin(party, [plan], turn, taken)
            inside[taken] = Prompted(party, plan, answer, party.cache(turn), taken, turn)
            inside[taken].begin()
            taken += 1
        if not inside:
            return
        started = perf_counter()
        drawing = [each for each in inside.values() if each.is_read]
        reading = next((each for each in inside.values() if not each.is_read), None)
        phase = meter.phase("decode" if drawing else "prefill")
        with phase, engine.section(f"request {party.requests} token {index}"):
            rows = [each.newest() for each in drawing]
            if reading:
                if not reading.chunked:
                    reading.begin_with_prefix()
                rows.append(reading.next_chunk())
            hidden = extend(party, rows)
            states = [hidden[: len(drawing)]] if drawing else []
            if reading and reading.is_read:
                reading.end_prompt()
                drawing.append(reading)
                states.append(hidden[-1:])
            values = draw(party, drawing, engine.cat(states, 0) if len(states) > 1 else states[0]) if states else []
        if reading and reading.answer is not None:
            total = reading.plan.rows
            yield Progress(min(reading.chunked * reading.plan.chunk, total), total, reading.place)
        for each, value in zip(drawing, values, strict=True):
            if step := each.take(value, started):
                yield step
        index += 1
        ended, coming = tuple(place for place, each in inside.items() if each.is_last), ()
        if len(ended) < len(inside):
            with meter.phase("decode"), meter.operation("who ends and who joins", "stop or go"):
                ended, coming = _agree(party, inside, door)
        for place in ended:
            inside.pop(place).end()


def _agree(party: Party, inside: dict[int, Prompted], door: Door | None) -> tuple[tuple[int, ...], Sequence[Newcomer]]:
    """Who ends here, by place, and who joins: as the client says, at every party."""
    last = {place for place, each in inside.items() if each.is_last}
    running = [each.turn.conversation for each in inside.values() if each.turn]
    mine: Next | None = None
    newcomers: list[Newcomer] = []
    if door is not None:
        stop = tuple(place for place, each in inside.items() if place not in last and _stops(each))
        newcomers = list(door.newcomers(len(inside) - len(last) - len(stop)))
        mine = Next(stop, *said(newcomers), tuple(door.dropped()))
    if party.transport is not None:
        mine = party.transport.announce(party.client, party.peers, mine, Next)
    assert mine is not None, "one process is the client too"
    known = inside.keys() - last
    if not set(mine.stop) <= known or any(not _may_stop(inside[place]) for place in mine.stop):
        assert party.transport is not None, "what it says itself is right"
        raise party.transport.unexpected(party.client, "who ends and who joins")
    for conversation in mine.forget:
        party.reveals.public("a conversation that ends", "its cache is dropped")
        party.forget(conversation)
    if door is None:
        party.admit(mine.join, mine.turns, len(known), running)
    return tuple(sorted(last | set(mine.stop))), newcomers or joining(mine.join, mine.turns)


def _may_stop(prompted: Prompted) -> bool:
    """An answer that hides its length ends before its last token only where no token was drawn yet."""
    return not (prompted.plan.hide_length and prompted.is_read)


def _stops(prompted: Prompted) -> bool:
    answer = prompted.answer
    return answer is not None and _may_stop(prompted) and (answer.finished or answer.abandoned)
