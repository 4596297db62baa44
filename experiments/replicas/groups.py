"""Groups behind a balancer, event by event: where a request goes, who is beside it, and when its tokens come.

Owns the simulation. A group is owner, dealer and client together, and takes passes one after another as
``session.scheduler`` does: a token of each answer that grows, and a chunk of one newcomer's prompt. Nothing is random
but where the balancer sends a user that it does not know.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments.replicas.costs import NOTHING, Costs
from experiments.replicas.load import Request
from experiments.replicas.scaler import OVER, PERIOD, REFUSALS, RUNNING, WAITING, Scaler


@dataclass
class _Inside:
    request: Request
    read: int = 0  # of its prompt
    tokens: int = 0
    last: float = 0.0  # when the last one came


@dataclass
class _Group:
    number: int
    ready: float  # from when on
    drains: bool = False
    busy: bool = False
    waiting: deque[Request] = field(default_factory=deque)
    inside: list[_Inside] = field(default_factory=list)

    @property
    def all(self) -> list[Request]:
        return [*self.waiting, *(each.request for each in self.inside)]


@dataclass
class Outcome:
    """requests: as they went. gaps: seconds of every later token. seconds: of groups, whether they compute or not;
    busy: of those, in passes. looks: (when, groups, waiting) at each of the scaler's. dealt: (when, seconds, bytes).
    """

    requests: Sequence[Request]
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    busy: float = 0.0
    looks: list[tuple[float, int, int]] = field(default_factory=list)
    dealt: list[tuple[float, float, float]] = field(default_factory=list)


class Simulation:
    """groups: at the beginning. start: seconds that a new one takes until it answers. deadline: of each request, which
    is refused when its price says that it would miss it; 0 for none. affinity: seconds since its last request for which
    a user stays with its group. live: whether a pass waits for its dealer, or finds its material in stock.
    """

    def __init__(
        self,
        costs: Costs,
        requests: Sequence[Request],
        groups: int,
        scaler: Scaler | None = None,
        start: float = 90.0,
        deadline: float = 0.0,
        affinity: float = 300.0,
        live: bool = True,
        seed: int = 0,
    ) -> None:
        self._costs, self._scaler, self._start = costs, scaler, start
        self._deadline, self._affinity, self._live = deadline, affinity, live
        self._draw = random.Random(seed)  # no secret depends on it
        self._groups = [_Group(number, 0.0) for number in range(groups)]
        self._known: dict[int, tuple[_Group, float]] = {}  # by user, where to and when it asked last
        self._events: list[tuple[float, int, str, object]] = []
        self._refused: deque[float] = deque()  # when
        self._count = 0
        self.outcome = Outcome(requests)
        for request in requests:
            self._at(request.arrived, "arrives", request)
        if scaler:
            self._at(PERIOD, "look", None)

    def run(self) -> Outcome:
        """Until the last request has ended."""
        now, last = 0.0, max((request.arrived for request in self.outcome.requests), default=0.0)
        while self._events:
            before = now
            now, _, kind, what = heapq.heappop(self._events)
            self.outcome.seconds += (now - before) * len(self._groups)
            if kind == "arrives":
                self._arrives(now, what)
            elif kind == "pass":
                self._passed(now, *what)
            elif now <= last or any(group.all for group in self._groups):
                self._look(now)
        return self.outcome

    def _at(self, when: float, kind: str, what: object) -> None:
        self._count += 1  # events of one moment in the order in which they were made
        heapq.heappush(self._events, (when, self._count, kind, what))

    def _arrives(self, now: float, request: Request) -> None:
        group = self._chosen(now, request.user)
        ahead = sum(self._price(other) for other in group.all)
        if self._deadline and self._price(request) + ahead > self._deadline:
            request.refused = True
            self._refused.append(now)
            return
        group.waiting.append(request)
        if not group.busy:
            self._begin(now, group)

    def _price(self, request: Request) -> float:
        return self._costs.alone(request.prompt, request.asked)

    def _chosen(self, now: float, user: int) -> _Group:
        """As a Service with session affinity: the user's group while it is ready, else any."""
        group, asked = self._known.get(user, (None, 0.0))
        if group is None or group.drains or group not in self._groups or now - asked > self._affinity:
            ready = [each for each in self._groups if each.ready <= now and not each.drains]
            group = self._draw.choice(ready)
        self._known[user] = group, now
        return group

    def _begin(self, now: float, group: _Group) -> None:
        while group.waiting and len(group.inside) < self._costs.room:
            group.inside.append(_Inside(group.waiting.popleft()))
        if not group.inside:
            group.busy = False
            return
        grow = [each for each in group.inside if each.tokens]
        newcomer = next((each for each in group.inside if not each.tokens), None)
        found = self._costs.step(len(grow))
        end = 0
        if newcomer:
            end = min(newcomer.read + self._costs.chunk, newcomer.request.prompt)
            part = self._costs.part(newcomer.read, end)
            found = found.beside(part) if grow else part
        assert found is not NOTHING, "somebody is inside"
        seconds = max(found.seconds, found.dealing) if self._live else found.seconds
        group.busy = True
        self.outcome.busy += seconds
        self.outcome.dealt.append((now, found.dealing, found.material))
        self._at(now + seconds, "pass", (group, grow, newcomer, end))

    def _passed(self, now: float, group: _Group, grow: list[_Inside], newcomer: _Inside | None, end: int) -> None:
        for each in grow:
            self.outcome.gaps.append(now - each.last)
            each.tokens, each.last = each.tokens + 1, now
        if newcomer:
            newcomer.read = end
            if end == newcomer.request.prompt:
                newcomer.tokens, newcomer.last, newcomer.request.first = 1, now, now
        for each in [each for each in group.inside if each.tokens == each.request.answer]:
            each.request.ended = now
            group.inside.remove(each)
        self._begin(now, group)
        if group.drains and not group.busy:
            self._groups.remove(group)

    def _look(self, now: float) -> None:
        assert self._scaler is not None, "nobody else looks"
        ready = [group for group in self._groups if group.ready <= now and not group.drains]
        kept = [group for group in self._groups if not group.drains]
        while self._refused and self._refused[0] < now - OVER:
            self._refused.popleft()
        sums = {
            REFUSALS: len(self._refused) / OVER,
            WAITING: float(sum(len(group.waiting) for group in ready)),
            RUNNING: float(sum(len(group.inside) for group in ready)),
        }
        wanted = self._scaler.look(now, len(kept), sums)
        for number in range(len(kept), wanted):
            self._groups.append(_Group(number, now + self._start))
        for group in kept[wanted:]:  # the last first; it answers what it has
            group.drains = True
            if not group.busy:
                self._groups.remove(group)
        self.outcome.looks.append((now, wanted, int(sums[WAITING])))
        self._at(now + PERIOD, "look", None)
