"""Requests whose material is in stock: which they are, what they cost, and how one is answered from a block.

Owns the choice. A block is dealt for one request, so that one is answered by itself: those that come meanwhile wait for
it, and it waits for those that share rounds with the dealer's material. ``only_alone`` has a request take a block only
where nobody else waits or is answered; others share rounds then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from crypten_llm.protocols.dealer.stock import GRACE_SECONDS
from crypten_llm.serving import refusals
from crypten_llm.serving.job import Broken, Ended
from crypten_llm.serving.stock_metrics import SupplyMetrics, shape_of
from crypten_llm.session.plan import Course
from crypten_llm.session.prompted import Step
from crypten_llm.session.request import Taken

if TYPE_CHECKING:
    from crypten_llm.serving.job import Job
    from crypten_llm.serving.metrics import Metrics
    from crypten_llm.serving.pricing import Pricer
    from crypten_llm.session.api import PrivateLlama
    from crypten_llm.session.plan import Plan
    from crypten_llm.session.request import Asked, Result


class Stocking:
    """pricer: of requests from stock, which learns from them alone. dealt: of those that a dealer follows."""

    def __init__(self, pricer: Pricer, dealt: Pricer, metrics: Metrics, only_alone: bool = False) -> None:
        self.pricer, self.dealt, self._metrics, self._only_alone = pricer, dealt, metrics, only_alone
        self.counts = SupplyMetrics(metrics.registry, self._have)
        self._llama: PrivateLlama | None = None
        self._looked = monotonic()

    def opened(self, llama: PrivateLlama) -> None:
        """The session in which requests come from now on."""
        self._llama = llama

    def _have(self) -> dict[str, int]:
        stocked = self._llama.party.stocked if self._llama else None
        if stocked is None or stocked.stock is None:
            return {}
        return dict(Counter(shape_of(h.plan) for h in stocked.stock.halves() if h.series == stocked.series))

    def look(self, llama: PrivateLlama) -> None:
        """Now and then, while nothing is asked: halves of which the other party has none are dropped at both."""
        if monotonic() - self._looked > GRACE_SECONDS:
            self._looked = monotonic()
            llama.reconcile()

    def fit(self, llama: PrivateLlama, asked: Sequence[Asked]) -> Plan | None:
        """As what these would be run from stock now, if they can be: one answer that goes on with nothing kept."""
        if len(asked) != 1 or asked[0].before:
            return None
        found = llama.party.stocked.fitting(llama.party, asked[0].plan)
        return found[0][1] if found else None

    def takes(self, llama: PrivateLlama, job: Job, others: int = 0) -> bool:
        """Whether it is answered from a block, by itself; if not, it is counted why. others: that are answered now."""
        if llama.party.stocked.stock is None:
            return False
        if len(job.asked) != 1:
            why = "several answers"
        elif job.asked[0].before:
            why = "kept conversation"
        elif self._only_alone and others:
            why = "beside others"
        elif self.fit(llama, job.asked) is None:
            why = "no block"
        else:
            return True
        self.counts.missed(why)
        return False

    def price(self, llama: PrivateLlama, asked: Sequence[Asked], ahead: Sequence[Job]) -> dict[str, Any]:
        """As ``Pricer.price``, of what would be run now. Where a stock is kept also: from_stock, whether a block is
        there for it; seconds_from_stock, with that, else None; seconds_with_dealer: without."""
        dealt = self.dealt.price(llama.config, [each.course for each in asked], ahead)
        if llama.party.stocked.stock is None:
            return dealt
        more = {"from_stock": False, "seconds_from_stock": None, "seconds_with_dealer": dealt["seconds"]}
        plan = None if self._only_alone and ahead else self.fit(llama, asked)
        if plan is None:
            return {**dealt, **more}
        found = self.pricer.price(llama.config, [Course(plan)])
        more |= {"from_stock": True, "seconds_from_stock": found["seconds"]}
        return {**found, "queue_seconds": dealt["queue_seconds"], **more}


class Alone:
    """One request, answered by itself from a block of the stock; where the owner has none, the dealer follows."""

    def __init__(self, llama: PrivateLlama, metrics: Metrics, stocking: Stocking) -> None:
        self._llama, self._metrics, self._stocking = llama, metrics, stocking
        self.jobs: list[Job] = []
        self.held: Job | None = None

    def run(self, job: Job) -> None:
        """Raises what ends it; see ``fail``."""
        if job.left:
            self._metrics.ended(job, "left")
            return
        self.jobs, job.begun, taken = [job], perf_counter(), Taken()
        fresh = job.talk.fresh if job.talk else job.asked[0]
        job.asked[0] = asked = replace(fresh, turn=None)
        with closing(self._llama.run([asked], taken=taken)) as events:
            (result,) = self._follow(job, taken, events)
        self.jobs = []
        self._count(asked, taken, result)
        if job.left:
            self._metrics.ended(job, "left")
            job.tell(Broken(refusals.stopping()))
            return
        self._metrics.ended(job, "answered")
        job.tell(Ended([result], result.cost, result.revealed))

    def fail(self, refusal: refusals.Refusal) -> None:
        """Tells it why it gets no answer."""
        for job in self.jobs:
            job.tell(Broken(refusal))
            self._metrics.ended(job, "refused" if refusal.status < 500 else "failed")
        self.jobs = []

    def _follow(self, job: Job, taken: Taken, events: Any) -> list[Result]:
        while True:
            try:
                event = next(events)
            except StopIteration as ended:
                results: list[Result] = ended.value
                return results
            if isinstance(event, Step):
                self._metrics.step(job, event)
            if not job.left:
                job.tell(event)
            for answer in taken.answers if job.left else ():
                answer.abandoned = True

    def _count(self, asked: Asked, taken: Taken, result: Result) -> None:
        self._metrics.counted(result)
        self._metrics.passed(result.cost)
        if result.block:
            self._stocking.counts.hit(result.cost.dealer_wait_seconds())
            self._stocking.pricer.learn(Course(taken.plans[0]), result)
        else:
            self._stocking.counts.missed("not at the owner")
            self._stocking.dealt.learn(asked.course, result)
