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
from crypten_llm.session.scheduler import Counted

if TYPE_CHECKING:
    from crypten_llm.session import scheduler
    from crypten_llm.session.api import PrivateLlama
    from crypten_llm.session.plan import Plan
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
    """first: requests to begin with. more: how many are inside to those that join now, asked after each pass."""

    def __init__(
        self, llama: PrivateLlama, first: Sequence[Asked], more: Callable[[int], Sequence[Asked]] = lambda inside: ()
    ) -> None:
        self._llama, self._more = llama, more
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
        party, plans = self._llama.party, [each.plan for each, _ in self._first]
        if self._llama.protocol.tape:
            raise UsageError("a tape is dealt for one request, and others may join these; leave the tape out")
        self.answers += [answer for _, answer in self._first]
        check = partial(party.check_plans, plans, None)
        with closing(self._llama.alone(self.answers, self._events(plans), check)) as running:
            self._coming = self._first
            yield from self._join(range(len(plans)), Counters())
            for event in running:
                yield from self._tell(event)

    def _events(self, plans: list[Plan]) -> Generator[scheduler.Event, None, None]:
        """The other parties hear of it when the first is asked for, once it is known that it can be run."""
        yield from self._llama.party.request_open(plans, list(self.answers), self)

    def leave(self, place: int) -> None:
        """Nobody reads this answer on: it ends at its next token, where it does not hide its length."""
        if place in self._inside:
            self._inside[place].answer.abandoned = True

    def newcomers(self, inside: int) -> list[tuple[Plan, Answer]]:
        """The scheduler's question."""
        self._coming = []
        if self.answers and all(answer.abandoned for answer in self.answers):
            return []
        for each in self._more(inside):
            try:
                self._llama.party.check_plans([each.plan], None)
            except UsageError as error:
                self._refused.append(Refused(each, error))
                continue
            self._coming.append((each, each.answer(self._tokenizer)))
        self.answers += [answer for _, answer in self._coming]
        return [(each.plan, answer) for each, answer in self._coming]

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
        facts = llama.protocol.engine, llama.load_seconds, cost, passed.revealed, inside.most, llama.party.outside
        result = inside.answer.failed or inside.asked.result(inside.answer, inside.steps, *facts)
        yield Done(place, result, counters)
