"""What the endpoint counts of itself, for Prometheus: requests, tokens, time, and what the links have carried.

Owns the names. Nothing of a prompt or an answer is among them; who may read them learns lengths and times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import fmean
from time import perf_counter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from crypten_llm.serving.job import Job
    from crypten_llm.session.prompted import Step
    from crypten_llm.session.report import Cost
    from crypten_llm.session.request import Result

STATES = ["Progressing", "Available", "Failed"]
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
UNKNOWN_SECONDS = 5.0  # a request, as long as none has been answered


class Metrics:
    """waiting, running: how many requests wait and are answered now."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self._state = Enum("crypten_llm_state", "of the session", states=STATES, registry=registry)
        for name, what, count in (("waiting", "in the queue", waiting), ("running", "being answered", running)):
            gauge = Gauge(f"crypten_llm_{name}_requests", f"{what} now", registry=registry)
            gauge.set_function(count)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"crypten_llm_{name}", what, labels, registry=registry)

        def seconds(name: str, what: str) -> Histogram:
            return Histogram(f"crypten_llm_{name}_seconds", what, buckets=SECONDS, registry=registry)

        self._requests = counter("requests", "by how they ended", "outcome")
        self._refusals = counter("refusals", "before they were queued", "code")
        self._prompt = counter("prompt_tokens", "of answered requests, public ones included")
        self._completion = counter("completion_tokens", "of answered requests")
        self._rounds = counter("rounds", "online, while requests were answered")
        self._sent = counter("sent_bytes", "online, by compute party", "rank")
        self._dealt = counter("dealer_bytes", "of material, at both compute parties")
        self._queued = seconds("queue", "from arrival to the first round")
        self._first = seconds("first_token", "from arrival to the first token")
        self._token = seconds("token", "of a decode step at the client")
        self._lengths: deque[float] = deque(maxlen=20)  # seconds of the last requests

    def text(self) -> bytes:
        """In Prometheus' own format."""
        return generate_latest(self.registry)

    def state(self, state: str) -> None:
        self._state.state(str(state))

    def refused(self, code: str) -> None:
        self._refusals.labels(code).inc()

    def step(self, job: Job, step: Step) -> None:
        if step.index:
            self._token.observe(step.seconds)
        elif step.prompt == 0:
            self._first.observe(perf_counter() - job.created)

    def counted(self, result: Result) -> None:
        self._prompt.inc(result.prompt_tokens + result.public_tokens)
        self._completion.inc(len(result.token_ids))

    def passed(self, cost: Cost) -> None:
        """What the links have carried since it was told last."""
        self._rounds.inc(cost.rounds())
        for rank, sent in enumerate(cost.bytes_sent()):
            self._sent.labels(str(rank)).inc(sent)
        self._dealt.inc(cost.dealer_bytes())

    def ended(self, job: Job, outcome: str) -> None:
        """outcome: answered, left, refused or failed."""
        self._requests.labels(outcome).inc()
        if job.begun is not None:
            self._queued.observe(job.begun - job.created)
            self._lengths.append(perf_counter() - job.begun)

    def seconds_of(self, requests: int) -> int:
        """What so many requests will about take, at least 1."""
        each = fmean(self._lengths) if self._lengths else UNKNOWN_SECONDS
        return max(1, math.ceil(each * requests))
