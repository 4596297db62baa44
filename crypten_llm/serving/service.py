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
from crypten_llm.serving.metrics import Metrics
from crypten_llm.serving.pricing import Pricer
from crypten_llm.serving.refusals import Refusal
from crypten_llm.serving.sharing import Sharing
from crypten_llm.session import watch
from crypten_llm.session.api import PrivateLlama

LOOK_SECONDS = 1.0  # between two looks at the parties while nothing is asked
STOP_SECONDS = 30.0  # for the running requests to come to their next token when all ends


class State(StrEnum):
    """Progressing: the model is being shared. Available: requests are answered. Failed: none will be any more."""

    PROGRESSING = "Progressing"
    AVAILABLE = "Available"
    FAILED = "Failed"


class Service:
    """open_session: starts or joins the parties and has the model shared. together: answers that grow at the same time.
    reopens: whether the session can be opened again. ends: whether its end is the endpoint's.

    opened, ended: are called, from the service's thread, when requests are answered from now on, and when the endpoint
    is to end: the session cannot be opened at first, or has ended and ``ends`` says so.
    """

    def __init__(
        self,
        open_session: Callable[[], PrivateLlama],
        queue: FairQueue[Job],
        metrics: Metrics,
        pricer: Pricer,
        together: int = ROOM,
        reopens: bool = False,
        ends: bool = False,
        opened: Callable[[PrivateLlama], None] = lambda llama: None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.queue, self.metrics, self.pricer = queue, metrics, pricer
        self.llama: PrivateLlama | None = None
        self.error: BaseException | None = None  # why the endpoint is to end
        self._open_session, self._together, self._reopens, self._ends = open_session, together, reopens, ends
        self._opened, self._ended = opened, ended
        self._stopping = False
        self._sharing: Sharing | None = None
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
        """The running requests end at their next token, those that wait now; then the parties. Does not wait."""
        self._stopping = True
        for job in self.running:
            job.left = True
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
        if self._ends or self.llama is None:
            self.error = error
            self._ended()

    def _set(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason
        self.metrics.state(state)

    def _turn(self) -> None:
        assert self.llama is not None, "it has been opened"
        job = self.queue.take(LOOK_SECONDS)
        if job is None:
            watch.check(self.llama)
            return
        self._sharing = sharing = Sharing(
            self.llama, self.queue, self.metrics, self.pricer, self._together, lambda: self._stopping
        )
        try:
            sharing.run(job)
        except BaseException as error:
            if not self.llama.is_open:
                self._set(State.FAILED, last_words(error))  # before anybody hears of it
            sharing.fail(refusals.of(error, self.llama.is_open))
            if not self.llama.is_open:
                raise
        finally:
            self._sharing = None
