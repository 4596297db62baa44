"""Requests of several callers in one open batch of the session: whose answer is whose, and when a request is whole.

Owns who is in. A request takes one place for each of its answers; where there is room, the next in the queue joins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from crypten_llm.serving import refusals
from crypten_llm.serving.job import Broken, Ended
from crypten_llm.session.grammar import NotFollowed
from crypten_llm.session.open_batch import Done, Joined, Refused
from crypten_llm.session.prompted import Progress, Step
from crypten_llm.session.report import Cost, Counters

if TYPE_CHECKING:
    from crypten_llm.serving.fair_queue import FairQueue
    from crypten_llm.serving.job import Job
    from crypten_llm.serving.kept import Kept
    from crypten_llm.serving.metrics import Metrics
    from crypten_llm.serving.pricing import Pricer
    from crypten_llm.session.api import PrivateLlama
    from crypten_llm.session.request import Asked, Result


@dataclass
class _Open:
    """A request that has been taken from the queue and not ended. waiting: numbers of answers that have no place."""

    job: Job
    waiting: deque[int]
    results: dict[int, Result] = field(default_factory=dict)
    before: Counters | None = None  # when its first answer was given a place

    @property
    def is_whole(self) -> bool:
        return len(self.results) == len(self.job.asked)


class Sharing:
    """One batch. room: for so many answers at the same time. stopping: whether nobody is to join any more. apart:
    whether a request is answered by itself, beside so many: nobody joins after it, and it is ``held`` for the end."""

    def __init__(
        self,
        llama: PrivateLlama,
        queue: FairQueue[Job],
        metrics: Metrics,
        pricer: Pricer,
        kept: Kept,
        room: int,
        stopping: Callable[[], bool],
        apart: Callable[[Job, int], bool] = lambda job, inside: False,
    ) -> None:
        self._llama, self._queue, self._metrics, self._pricer = llama, queue, metrics, pricer
        self._kept, self._room, self._stopping, self._apart = kept, room, stopping, apart
        self.held: Job | None = None
        self._open: list[_Open] = []
        self._told: list[tuple[Asked, _Open, int]] = []  # what joins, and has not been given a place yet
        self._places: dict[int, tuple[_Open, int]] = {}
        self._seen = Counters()  # what metrics know of

    @property
    def jobs(self) -> list[Job]:
        return [*(each.job for each in self._open), *([self.held] if self.held else [])]

    def run(self, job: Job) -> None:
        """Answers it, and those that join, until nobody is in. What ends it ends all of them; see ``fail``."""
        self._take(job)
        first = self._waiting(0)
        self.tell_dropped()
        batch = self._llama.open_batch(first, self._joining, self._kept.dropped)
        with closing(batch.run()) as events:
            self._follow(events, batch.leave)

    def tell_dropped(self) -> None:
        """While nothing runs: has the other parties drop the conversations that are dropped here."""
        for conversation in self._kept.dropped():
            self._llama.forget(conversation)

    def fail(self, refusal: refusals.Refusal) -> None:
        """Tells all that are in why they get no answer."""
        for each in self._open:
            self._settle(each.job)
            each.job.tell(Broken(refusal))
            self._metrics.ended(each.job, "refused" if refusal.status < 500 else "failed")
        self._open.clear()
        if self.held is not None:
            self.held.tell(Broken(refusal))
            self._metrics.ended(self.held, "failed")
            self.held = None

    def _take(self, job: Job) -> None:
        job.begun = perf_counter()
        self._open.append(_Open(job, deque(range(len(job.asked)))))

    def _joining(self, inside: int) -> Sequence[Asked]:
        """Who joins beside so many."""
        if self._stopping():
            return []
        found = self._waiting(inside)
        while not self.held and inside + len(found) < self._room and (job := self._queue.take(0)):
            if self._apart(job, inside + len(found)):
                self.held = job
                break
            self._take(job)
            found += self._waiting(inside + len(found))
        return found

    def _waiting(self, inside: int) -> list[Asked]:
        """Answers that get a place beside so many, of requests that have been taken."""
        found: list[Asked] = []
        for each in self._open:
            while each.waiting and not each.job.left and inside + len(found) < self._room:
                number, job = each.waiting.popleft(), each.job
                job.asked[number] = self._kept.begin(self._llama, job.asked[number], job.talk)
                found.append(job.asked[number])
                self._told.append((found[-1], each, number))
        return found

    def _follow(self, events: Generator[Any, None, None], leave: Callable[[int], None]) -> None:
        for event in events:
            match event:
                case Joined(place, asked, counters):
                    each, _ = self._places[place] = self._claim(asked)
                    each.before = each.before or counters
                case Refused(asked, error):
                    each, _ = self._claim(asked)
                    self._end(each, Broken(refusals.of(error)), "refused")
                case Progress() | Step():
                    each, number = self._places[event.prompt]
                    event = replace(event, prompt=number)
                    if isinstance(event, Step):
                        self._metrics.step(each.job, event)
                    if not each.job.left:
                        each.job.tell(event)
                case Done(place, result, counters):
                    each, number = self._places.pop(place)
                    self._metrics.passed(self._cost(self._seen, counters))
                    self._seen = counters
                    if isinstance(result, NotFollowed):
                        self._end(each, Broken(refusals.of(result)), "refused")
                    else:
                        self._done(each, number, result, counters)
            for place, (each, _) in self._places.items():
                if each.job.left or each not in self._open:
                    leave(place)
            for each in [each for each in self._open if each.job.left and not self._has_place(each)]:
                self._end(each, Broken(refusals.stopping()), "left")

    def _claim(self, asked: Asked) -> tuple[_Open, int]:
        at = next(at for at, (told, _, _) in enumerate(self._told) if told is asked)
        _, each, number = self._told.pop(at)
        return each, number

    def _has_place(self, each: _Open) -> bool:
        return any(other is each for other, _ in self._places.values()) or any(told[1] is each for told in self._told)

    def _done(self, each: _Open, number: int, result: Result, counters: Counters) -> None:
        each.results[number] = result
        self._metrics.counted(result)
        if result.prompts == 1:  # beside others it says little of a request alone
            self._pricer.learn(each.job.asked[number].course, result)
        if not each.is_whole:
            return
        if each.job.left:
            self._end(each, Broken(refusals.stopping()), "left")
            return
        assert each.before is not None, "it was given a place"
        results = [each.results[place] for place in range(len(each.job.asked))]
        self._settle(each.job, results[0])
        passed = counters.since(each.before, self._llama.party.load_reveals.as_list())
        self._end(each, Ended(results, self._cost(each.before, counters), passed.revealed), "answered")

    def _cost(self, before: Counters, after: Counters) -> Cost:
        return Cost(after.since(before, []).ranks, self._llama.party.compute_parties)

    def _end(self, each: _Open, event: Ended | Broken, outcome: str) -> None:
        if each in self._open:
            self._settle(each.job)
            self._metrics.ended(each.job, outcome)
            self._open.remove(each)
            each.job.tell(event)

    def _settle(self, job: Job, result: Result | None = None) -> None:
        """Keeps the conversation of an answer, or drops it where there is none: once, whatever is told later."""
        if job.talk:
            self._kept.end(self._llama, job.talk, result)
