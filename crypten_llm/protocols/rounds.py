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


class Rounds:
    """One role's protocols under way, over its runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._running: list[Running] = []
        self._strands: dict[greenlet, Running | None] = {}  # programs side by side, and what each waits for

    @property
    def is_shared(self) -> bool:
        """Whether programs run side by side."""
        return bool(self._strands)

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
            strand = getcurrent()
            if strand in self._strands:
                self._strands[strand] = running
                strand.parent.switch()
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

        They take turns in the order in which they are given, alike on every role. A program that raises ends all, and
        what they had asked for is forgotten.
        """
        assert not self._strands, "programs side by side are not nested"
        before = list(self._running)
        hub, results, outer = getcurrent(), {}, self._meter.exchange_scopes([self._meter.scope])
        strands = [greenlet(program, hub) for program in programs]
        scopes = {strand: [outer[-1]] for strand in strands}
        self._strands = dict.fromkeys(strands)
        try:
            while self._strands:
                for strand, waits in list(self._strands.items()):
                    if waits is not None and not waits.is_done:
                        continue
                    self._meter.exchange_scopes(scopes[strand])
                    given = strand.switch()
                    scopes[strand] = self._meter.exchange_scopes([outer[-1]])
                    if strand.dead:
                        results[strand] = given
                        del self._strands[strand]
                if any(waits is not None and not waits.is_done for waits in self._strands.values()):
                    self._round()
        finally:
            left, self._strands = list(self._strands), {}
            for strand in left:  # after an error: each leaves the steps that it was in
                self._meter.exchange_scopes(scopes[strand])
                strand.throw()
            if left:
                self._running = [item for item in self._running if item in before]
            self._meter.exchange_scopes(outer)
        return [results[strand] for strand in strands]

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
