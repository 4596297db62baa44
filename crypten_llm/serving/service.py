"""The session behind the endpoint: one thread that opens it, answers one request after another, and sees it end.

Owns the session and its state. Everything that parties do happens in this thread; the endpoint's loop never waits for
them. A session that a prompt has ended by leaving the engine's range is opened anew where the parties were started
here; one that a party has ended is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from enum import StrEnum
from time import perf_counter
from typing import Any

from crypten_llm.errors import LeftRange, UsageError, last_words
from crypten_llm.models.tokenizer import has_chat_template, render_chat
from crypten_llm.serving import refusals
from crypten_llm.serving.fair_queue import FairQueue, QueueFull
from crypten_llm.serving.job import Broken, Ended, Job
from crypten_llm.serving.metrics import Metrics
from crypten_llm.serving.pricing import Pricer
from crypten_llm.serving.refusals import Refusal
from crypten_llm.session import watch
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.prompted import Step
from crypten_llm.session.request import Result

LOOK_SECONDS = 1.0  # between two looks at the parties while nothing is asked
STOP_SECONDS = 30.0  # for the running request to come to its next token when all ends


class State(StrEnum):
    """Progressing: the model is being shared. Available: requests are answered. Failed: none will be any more."""

    PROGRESSING = "Progressing"
    AVAILABLE = "Available"
    FAILED = "Failed"


class Service:
    """open_session: starts or joins the parties and has the model shared. reopens: whether it can do so again.

    opened, ended: are called, from the service's thread, when requests are answered from now on, and when the session
    cannot be opened at first.
    """

    def __init__(
        self,
        open_session: Callable[[], PrivateLlama],
        queue: FairQueue[Job],
        metrics: Metrics,
        pricer: Pricer,
        reopens: bool = False,
        opened: Callable[[PrivateLlama], None] = lambda llama: None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue, self.metrics, self.pricer = queue, metrics, pricer
        self.llama: PrivateLlama | None = None
        self.error: BaseException | None = None  # what kept the session from being opened at first
        self.running: Job | None = None
        self._open_session, self._reopens = open_session, reopens
        self._opened, self._ended = opened, ended
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self._set(State.PROGRESSING, "the model is being shared")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """The running request ends at its next token, those that wait now; then the parties. Does not wait."""
        self._stopping = True
        if running := self.running:
            running.left = True
        for job in self.queue.close():
            job.tell(Broken(refusals.stopping()))

    def join(self) -> None:
        """Waits for the parties' end, which a person can cut short by Ctrl-C: local ones end with this process."""
        if self._thread.ident is not None:
            self._thread.join(STOP_SECONDS)

    def ready(self) -> PrivateLlama:
        """The session. Raises Refusal where none answers now."""
        if self.state is State.PROGRESSING:
            raise Refusal(503, f"not ready: {self.reason}; ask again in a moment", "progressing", retry_after=2)
        if self.state is State.FAILED or self.llama is None:
            raise Refusal(503, f"the parties have ended: {self.reason}; start the endpoint again", "parties_failed")
        return self.llama

    def submit(self, job: Job) -> None:
        """Raises Refusal where there is no room for it."""
        self.ready()
        try:
            self.queue.put(job.caller, job)
        except QueueFull:
            self.ready()  # the queue of a session that ended just now is closed
            if self._stopping:
                raise refusals.stopping() from None
            self.metrics.refused("queue_full")
            seconds = self.metrics.seconds_of(len(self.queue))
            raise Refusal(
                429,
                f"{self.queue.room} requests wait already; ask again in {seconds} s",
                "queue_full",
                retry_after=seconds,
            ) from None

    def leave(self, job: Job) -> None:
        """Nobody listens to it any more: its place is free at once where it waits, at the next token where it runs."""
        job.left = True
        if self.queue.discard(job):
            self.metrics.ended(job, "left")

    def _run(self) -> None:
        try:
            self._open()
        except BaseException as error:
            self._fail(error)
            self.error = error
            self._ended()
            return
        while not self._stopping:
            try:
                self._turn()
            except LeftRange as error:
                self._reopen(error)
            except BaseException as error:
                self._fail(error)
                return
        if self.llama is not None:
            self.llama.close()

    def _open(self) -> None:
        self.llama = llama = self._open_session()
        llama.defaults  # noqa: B018  (read when first asked for, which is not to be at the first request)
        if llama.has_tokenizer and has_chat_template(llama.tokenizer):
            with suppress(UsageError):  # of a template that refuses this conversation
                render_chat(llama.tokenizer, [{"role": "user", "content": "a"}])
        self._set(State.AVAILABLE, "")
        self._opened(llama)

    def _reopen(self, error: LeftRange) -> None:
        if not self._reopens or self._stopping:
            self._fail(error)
            self._stopping = True
            return
        self._set(State.PROGRESSING, "a prompt left the engine's range, which ended the session; another is opened")
        try:
            self._open()
        except BaseException as other:
            self._fail(other)
            self._stopping = True

    def _fail(self, error: BaseException) -> None:
        self._set(State.FAILED, last_words(error))
        for job in self.queue.close():
            job.tell(Broken(refusals.of(error, is_open=False)))
            self.metrics.ended(job, "failed")

    def _set(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason
        self.metrics.state(state)

    def _turn(self) -> None:
        assert self.llama is not None, "it has been opened"
        job = self.queue.take(LOOK_SECONDS)
        if job is None:
            watch.check(self.llama)
            return
        self.running, job.begun = job, perf_counter()
        try:
            results = self._answer(self.llama, job)
        except BaseException as error:
            if not self.llama.is_open:
                self._set(State.FAILED, last_words(error))  # before anybody hears of it
            refusal = refusals.of(error, self.llama.is_open)
            job.tell(Broken(refusal))
            self.metrics.ended(job, "refused" if refusal.status < 500 else "failed")
            if not self.llama.is_open:
                raise
            return
        finally:
            self.running = None
        whole = len(results) == len(job.asked)
        job.tell(Ended(results) if whole else Broken(refusals.stopping()))  # who has left hears neither
        self.metrics.ended(job, "answered" if whole else "left")

    def _answer(self, llama: PrivateLlama, job: Job) -> list[Result]:
        """Its answers, up to the one that nobody waited for any more."""
        results: list[Result] = []
        for number, each in enumerate(job.asked):
            if job.left:
                break
            with closing(llama.run([each], number)) as events:
                results += self._read(job, events)
            if len(results) > number:
                self.pricer.learn(each.plan, results[-1])
                self.metrics.counted(results[-1])
        return results

    def _read(self, job: Job, events: Generator[Any, None, list[Result]]) -> list[Result]:
        while not job.left:
            try:
                event = next(events)
            except StopIteration as end:
                return end.value
            if isinstance(event, Step):
                self.metrics.step(job, event)
            job.tell(event)
        return []
