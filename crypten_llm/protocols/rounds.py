"""The session of openings that protocols share.

Owns when what is opened, and who waits for it.

Protocols are generators: they yield what they want opened and are sent the wires, ``(wire,) = yield [Opening(x)]``. A
protocol that is started goes on to its first request at once, and waits there; a round opens what all of them have
asked for, in the order in which they were started, in one message each way, and takes each to its next request. So what
does not depend on each other travels together, whoever asked for it: the new rows of a cache with the next layer's
scores, and one sequence's openings with another's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor

from crypten_llm.links.meter import Meter, Scope
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.opening import Opening, Request
from crypten_llm.protocols.secret import Wire

Result = TypeVar("Result")
Protocol = Generator[list[Request], list[Any], Result]  # yields what it wants opened and is sent the wires
Finish = Iterator[tuple[Callable[[Tensor | None], Any], Tensor | None]]  # for each request what makes its wire, of what


class Running:
    """A protocol under way. ``requests``: what it waits for. ``is_done``: then ``result`` is what it returned."""

    __slots__ = ("protocol", "scope", "requests", "is_done", "result")

    def __init__(self, protocol: Protocol[Any], scope: Scope) -> None:
        self.protocol, self.scope = protocol, scope
        self.requests: list[Request] = []
        self.is_done = False
        self.result: Any = None


class _Strand:
    """A program side by side with others: the steps that it is in, and what it waits for."""

    __slots__ = ("scopes", "waits")

    def __init__(self, scopes: list[Scope]) -> None:
        self.scopes = scopes
        self.waits: Running | _Several | None = None

    @property
    def is_ready(self) -> bool:
        return self.waits is None or self.waits.is_done


class _Several:
    """Programs that were begun together, and what those that have ended returned."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._results: dict[int, Any] = {}

    def play(self, place: int, program: Callable[[], Any]) -> None:
        self._results[place] = program()

    @property
    def is_done(self) -> bool:
        return len(self._results) == self._count

    @property
    def in_order(self) -> list[Any]:
        return [self._results[place] for place in range(self._count)]


class Rounds:
    """One role's protocols under way, over its runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._running: list[Running] = []
        self._strands: dict[greenlet, _Strand] = {}  # programs side by side

    @property
    def is_shared(self) -> bool:
        """Whether programs run side by side."""
        return bool(self._strands)

    @property
    def is_busy(self) -> bool:
        """Whether any protocol waits for a round."""
        return bool(self._running)

    @property
    def _meter(self) -> Meter:
        return self.runtime.transport.meter

    def start(self, protocol: Protocol[Any]) -> Running:
        """Takes a protocol to its first request, which joins the next round."""
        running = Running(protocol, self._meter.scope)
        self._advance(running, None)
        if not running.is_done:
            self._running.append(running)
        return running

    def finish(self, running: Running) -> Any:
        """Runs rounds until this protocol is done; returns its result."""
        while not running.is_done:
            if getcurrent() in self._strands:
                self._wait(running)
            else:
                self._round()
        return running.result

    def run(self, protocol: Protocol[Result]) -> Result:
        """``start`` and ``finish``."""
        return self.finish(self.start(protocol))

    def open(self, *openings: Opening) -> list[Wire]:
        """The wires of these, and a round of everything that waits."""
        return self.run(_opened(list(openings)))

    def side_by_side(self, programs: list[Callable[[], Result]]) -> list[Result]:
        """Runs programs that know nothing of each other, and shares their rounds: whenever all that have not ended wait
        for one, one message carries what all of them open. Returns what each returned.

        They take turns in the order in which they are given, alike on every role. A program may run programs side by
        side itself: while it waits for them, they share rounds with all others. A program that raises ends all, and
        what they had asked for is forgotten.
        """
        here, several = getcurrent(), _Several(len(programs))
        is_nested = here in self._strands
        assert is_nested or not self._strands, "one hub runs all programs side by side"
        for place, program in enumerate(programs):
            play = partial(several.play, place, program)
            self._strands[greenlet(play, here.parent if is_nested else here)] = _Strand([self._meter.scope])
        if is_nested:
            self._wait(several)
        else:
            self._run_strands()
        return several.in_order

    def _wait(self, waited: Running | _Several) -> None:
        """Leaves the turn to the other strands until what this one waits for is done."""
        strand = getcurrent()
        self._strands[strand].waits = waited
        while not waited.is_done:
            strand.parent.switch()

    def _run_strands(self) -> None:
        """Gives strands their turns, and runs a round whenever none can go on, until all have ended."""
        before, meter = list(self._running), self._meter
        outer = meter.exchange_scopes([meter.scope])
        try:
            while self._strands:
                ready = [strand for strand, state in self._strands.items() if state.is_ready]
                for strand in ready:
                    state = self._strands[strand]
                    meter.exchange_scopes(state.scopes)
                    strand.switch()
                    state.scopes = meter.exchange_scopes([outer[-1]])
                    if strand.dead:
                        del self._strands[strand]
                if not ready:
                    self._round()
        finally:
            left, self._strands = self._strands, {}
            for strand, state in left.items():  # after an error: each leaves the steps that it was in
                meter.exchange_scopes(state.scopes)
                strand.throw()
            if left:
                self._running = [item for item in self._running if item in before]
            meter.exchange_scopes(outer)

    def _round(self) -> None:
        """Opens all that is asked for, and takes every protocol one request further."""
        running, self._running = self._running, []
        assert running, "no protocol is under way: what is waited for will never come"
        prepared = [
            request.prepare(self.runtime, (item.scope.phase, item.scope.kind))
            for item in running
            for request in item.requests
        ]
        opened = self.runtime.exchange([piece for piece, _ in prepared]) if prepared else []
        finish = zip([finish for _, finish in prepared], opened, strict=True)
        for item in running:
            self._advance(item, finish)
            if not item.is_done:
                self._running.append(item)

    def _advance(self, item: Running, finish: Finish | None) -> None:
        """finish: gives for each request what makes its wire, and of what; ``None`` at the start."""
        meter = self._meter
        if item.scope is meter.scope:
            self._resume(item, finish)
        else:
            with meter.within(item.scope):
                self._resume(item, finish)

    def _resume(self, item: Running, finish: Finish | None) -> None:
        try:
            if finish is None:
                item.requests = next(item.protocol)
            else:
                wires = [make(of) for make, of in itertools.islice(finish, len(item.requests))]
                item.requests = item.protocol.send(wires)
        except StopIteration as end:
            item.is_done, item.result, item.requests = True, end.value, []


def _opened(openings: list[Request]) -> Protocol[list[Wire]]:
    return (yield openings)
