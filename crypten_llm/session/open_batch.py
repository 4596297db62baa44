"""Requests that join while others run, at the client: a result for each when it ends, with what passed meanwhile.

Owns who is who in an open batch. What the parties do is ``scheduler``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from crypten_llm.errors import UsageError
from crypten_llm.session.grammar import NotFollowed
from crypten_llm.session.prompted import Answer, Progress, Step
from crypten_llm.session.report import Cost, Counters
from crypten_llm.session.scheduler import Counted, Newcomer, said

if TYPE_CHECKING:
    from crypten_llm.session import scheduler
    from crypten_llm.session.api import PrivateLlama
    from crypten_llm.session.request import Asked, Result


@dataclass(frozen=True)
class Joined:
    """A request has been taken, and goes by this place from now on."""

    place: int
    asked: Asked
    counters: Counters  # of the batch so far


@dataclass(frozen=True)
class Done:
    """The answer at this place has ended. ``Result.prompts`` is how many were in at most while it was; an answer that
    could not be held to its grammar has none.
    """

    place: int
    result: Result | NotFollowed
    counters: Counters  # of the batch so far


@dataclass(frozen=True)
class Refused:
    """A newcomer that this machine cannot hold; the others go on."""

    asked: Asked
    error: UsageError


Event = Joined | Progress | Step | Done | Refused


@dataclass
class _Inside:
    asked: Asked
    answer: Answer
    before: Counters  # when it joined
    most: int = 1
    steps: list[Step] = field(default_factory=list)


class OpenBatch:
    """first: requests to begin with. more: how many are inside to those that join now, asked after each pass. drops:
    conversations that nobody goes on with any more, which it takes over."""

    def __init__(
        self,
        llama: PrivateLlama,
        first: Sequence[Asked],
        more: Callable[[int], Sequence[Asked]] = lambda inside: (),
        drops: Callable[[], Sequence[int]] = lambda: (),
    ) -> None:
        self._llama, self._more, self.dropped = llama, more, drops
        self._tokenizer = llama.tokenizer if llama.has_tokenizer else None
        self._inside: dict[int, _Inside] = {}
        self._coming: list[tuple[Asked, Answer]] = []
        self._refused: list[Refused] = []
        self.answers: list[Answer] = []  # of all that were ever in
        self._first = [(each, each.answer(self._tokenizer)) for each in first]

    def run(self) -> Generator[Event, None, None]:
        """What happens, until nobody is in. Left early, all answers end at their next token.

        Raises: as ``PrivateLlama.stream``.
        """
        first = [Newcomer(each.plan, each.turn, answer) for each, answer in self._first]
        if self._llama.protocol.tape:
            raise UsageError("a tape is dealt for one request, and others may join these; leave the tape out")
        self.answers += [answer for _, answer in self._first]
        self._events = self._begun(first)
        check = partial(self._llama.party.check_plans, *said(first))
        with closing(self._llama.alone(self.answers, self._events, check)) as running:
            self._coming = self._first
            yield from self._join(range(len(first)), Counters())
            for event in running:
                yield from self._tell(event)

    def _begun(self, first: Sequence[Newcomer]) -> Generator[scheduler.Event, None, None]:
        """The other parties hear of it when the first is asked for, once it is known that it can be run."""
        yield from self._llama.party.request_open(first, self)

    def leave(self, place: int) -> None:
        """Nobody reads this answer on: it ends at its next token, where it does not hide its length."""
        if place in self._inside:
            self._inside[place].answer.abandoned = True

    def newcomers(self, inside: int) -> list[Newcomer]:
        """The scheduler's question. Nobody joins a batch that was left; where each answer is, the batch goes on."""
        self._coming = []
        if not self._llama.running.is_now(self._events):
            return []
        for each in self._more(inside):
            try:
                self._llama.party.check_plans([each.plan], [each.turn])
            except UsageError as error:
                self._refused.append(Refused(each, error))
                continue
            self._coming.append((each, each.answer(self._tokenizer)))
        self.answers += [answer for _, answer in self._coming]
        return [Newcomer(each.plan, each.turn, answer) for each, answer in self._coming]

    def _join(self, places: Sequence[int], counters: Counters) -> Iterator[Event]:
        for place, (asked, answer) in zip(places, self._coming, strict=True):
            self._inside[place] = _Inside(asked, answer, counters)
            yield Joined(place, asked, counters)
        for each in self._inside.values():
            each.most = max(each.most, len(self._inside))

    def _tell(self, event: Any) -> Iterator[Event]:
        match event:
            case Step():
                inside = self._inside[event.prompt]
                inside.steps.append(event)
                if not inside.asked.plan.hide_length:
                    yield event
            case Progress():
                yield event
            case Counted(ended, joined, counters):
                for place in ended:
                    yield from self._end(place, counters)
                yield from self._join(joined, counters)
        refused, self._refused = self._refused, []
        yield from refused

    def _end(self, place: int, counters: Counters) -> Iterator[Event]:
        llama, inside = self._llama, self._inside.pop(place)
        self.answers.remove(inside.answer)
        if inside.asked.plan.hide_length:
            yield from inside.steps
        passed = counters.since(inside.before, llama.party.load_reveals.as_list())
        cost = Cost(passed.ranks, llama.party.compute_parties)
        party, engine = llama.party, llama.protocol.engine
        facts = engine, llama.load_seconds, cost, passed.revealed, inside.most, party.outside, party.notary.take(place)
        yield Done(place, inside.answer.failed or inside.asked.result(inside.answer, inside.steps, *facts), counters)
