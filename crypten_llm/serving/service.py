"""The session behind the endpoint: one thread that opens it, answers what is asked, and sees it end.

Owns the session and its state. Everything that parties do happens in this thread; the endpoint's loop never waits for
them. A session that a prompt has ended by leaving the engine's range is opened anew where the parties were started
here; one that a party has ended is not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum

from crypten_llm.errors import LeftRange, UsageError, last_words
from crypten_llm.models.tokenizer import has_chat_template, render_chat
from crypten_llm.serving import refusals
from crypten_llm.serving.fair_queue import ROOM, FairQueue, QueueFull
from crypten_llm.serving.job import Broken, Job
from crypten_llm.serving.kept import Kept
from crypten_llm.serving.metrics import Metrics
from crypten_llm.serving.pricing import Pricer
from crypten_llm.serving.refusals import Refusal
from crypten_llm.serving.sharing import Sharing
from crypten_llm.serving.stocking import Alone, Stocking
from crypten_llm.session import watch
from crypten_llm.session.api import PrivateLlama

LOOK_SECONDS = 1.0  # between two looks at the parties while nothing is asked
STOP_SECONDS = 10.0  # for the running requests to come to their next token when all ends


class State(StrEnum):
    """Progressing: the model is being shared. Available: requests are answered. Failed: none will be any more."""

    PROGRESSING = "Progressing"
    AVAILABLE = "Available"
    FAILED = "Failed"


class Service:
    """open_session: starts or joins the parties and has the model shared. together: answers that grow at the same time.
    reopens: whether the session can be opened again. ends: whether its end is the endpoint's.

    opened, ended: are called, from the service's thread, when requests are answered from now on, and when the endpoint
    is to end: the session cannot be opened at first, or has ended and ``ends`` says so. stocking: which requests are
    answered from a stock.
    """

    def __init__(
        self,
        open_session: Callable[[], PrivateLlama],
        queue: FairQueue[Job],
        metrics: Metrics,
        pricer: Pricer,
        kept: Kept,
        together: int = ROOM,
        reopens: bool = False,
        ends: bool = False,
        opened: Callable[[PrivateLlama], None] = lambda llama: None,
        ended: Callable[[], None] = lambda: None,
        stocking: Stocking | None = None,
    ) -> None:
        self.stocking = stocking or Stocking(pricer, pricer, metrics)
        self.queue, self.metrics, self.pricer, self.kept = queue, metrics, pricer, kept
        self.llama: PrivateLlama | None = None
        self.error: BaseException | None = None  # why the endpoint is to end
        self._open_session, self._together, self._reopens, self._ends = open_session, together, reopens, ends
        self._opened, self._ended = opened, ended
        self._stopping = False
        self._sharing: Sharing | Alone | None = None
        self._thread = threading.Thread(target=self._run, name="session", daemon=True)
        self._set(State.PROGRESSING, "the model is being shared")

    def start(self) -> None:
        self._thread.start()

    @property
    def running(self) -> list[Job]:
        """Requests that are being answered now."""
        sharing = self._sharing
        return sharing.jobs if sharing else []

    def stop(self) -> None:
        """Whoever waits for an answer is told so now, and the running requests end at their next token; then the
        parties. Does not wait."""
        self._stopping = True
        for job in self.running:
            job.left = True
            job.tell(Broken(refusals.stopping()))
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
        self.kept.clear()
        llama.defaults  # noqa: B018  (read when first asked for, which is not to be at the first request)
        if llama.has_tokenizer and has_chat_template(llama.tokenizer):
            with suppress(UsageError):  # of a template that refuses this conversation
                render_chat(llama.tokenizer, [{"role": "user", "content": "a"}])
        self.stocking.opened(llama)
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
        if self._ends or self.llama is None:
            self.error = error
            self._ended()

    def _set(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason
        self.metrics.state(state)

    def _turn(self) -> None:
        assert self.llama is not None, "it has been opened"
        job, llama = self.queue.take(LOOK_SECONDS), self.llama
        if job is None:
            watch.check(llama)
            self.kept.expire(llama)
            self._share(llama).tell_dropped()
            self.stocking.look(llama)
        while job is not None:
            job = self._answer(llama, job)

    def _share(self, llama: PrivateLlama) -> Sharing:
        shared = llama, self.queue, self.metrics, self.pricer, self.kept, self._together, lambda: self._stopping
        return Sharing(*shared, apart=lambda job, inside: self.stocking.takes(llama, job, inside))

    def _answer(self, llama: PrivateLlama, job: Job) -> Job | None:
        """A request, and those that join it; who waits to be answered by itself next."""
        is_apart = self.stocking.takes(llama, job, len(self.queue))
        self._sharing = sharing = Alone(llama, self.metrics, self.stocking) if is_apart else self._share(llama)
        try:
            sharing.run(job)
            return sharing.held
        except BaseException as error:
            if not llama.is_open:
                self._set(State.FAILED, last_words(error))  # before anybody hears of it
            sharing.fail(refusals.of(error, llama.is_open))
            if not llama.is_open:
                raise
            return None
        finally:
            self._sharing = None
