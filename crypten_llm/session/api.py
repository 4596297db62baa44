"""``PrivateLlama``: load, generate, stream. What the command line and the notebooks are made of.

Owns the client's side of a run: it starts or joins the parties, turns text into token ids and back, samples, and
gathers the cost. The process that calls it is the client; under torchrun it is whichever party its rank says.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import fields, replace
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import ENDED, UsageError, public_words, unheard
from crypten_llm.models import checkpoint
from crypten_llm.models import tokenizer as tokenizers
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import launch
from crypten_llm.session.bench import Shape
from crypten_llm.session.generation import Answer, Plan, Progress, Step
from crypten_llm.session.party import Party
from crypten_llm.session.report import Cost
from crypten_llm.session.request import Detokenizer, Request, Result, check_ids, check_policy
from crypten_llm.session.sampling import Sampler
from crypten_llm.session.settings import LaunchConfig, ProtocolConfig, check_names, split

if TYPE_CHECKING:
    from types import TracebackType

    from crypten_llm.links.transport import Transport
    from crypten_llm.models.config import LlamaConfig


ENDED_SESSION = "this session has ended, by close() or an error; open another with PrivateLlama.from_pretrained()"
BUSY = "another stream of this session is still being read; read it to its end or close it"
UNLEAVABLE = (None, None)
Events = Generator[Progress | Step, None, None]


class PrivateLlama:
    """A Llama whose weights its owner keeps and whose prompts the client keeps; this object is the client.

    Use ``from_pretrained``; then ``generate`` or ``stream`` as often as wanted; then ``close`` (or a with block).
    A process can be a party of one private session at a time.
    """

    def __init__(self, protocol: ProtocolConfig, launched: LaunchConfig, model_folder: str = "") -> None:
        """Parties that have met but share no model yet. ``model_folder``: what a local owner will open."""
        self.protocol, self.launch = protocol, launched
        self.load_seconds = 0.0
        self._children: launch.LocalParties | None = None
        self._joined: Transport | None = None
        self._transport: Transport | None = None
        self._tokenizer: Any = None
        self._tokenizer_source: str | None = None
        self._no_tokenizer = False
        self._is_guess = False  # the tokenizer's source: that of the client's --model, where the owner has its own
        self._compared: str | None = None
        # What runs now: an answer and its events, or two times None for what cannot be left early.
        self._running: tuple[Answer | None, Events | None] | None = None
        self._claiming = threading.Lock()  # of several threads that ask at once, one finds the parties free
        if not protocol.is_private:
            torch.set_num_threads(launched.thread_count(1))
            self.party = Party(PlainEngine())
            return
        if launch.is_distributed() and (rank := launch.own_rank(protocol)) != CLIENT:
            raise UsageError(
                f"this process is rank {rank}; the client is rank {CLIENT}. Call PrivateLlama.serve() here"
            )
        launch.check_free()
        environment: Mapping[str, str] = os.environ
        if not launch.is_distributed():
            self._children = launch.LocalParties(protocol, launched, model_folder)
            environment = self._children.environment(CLIENT)
        with self._guarded():
            self._transport = self._joined = launch.join(protocol, launched, environment, self._children)
            self.party = launch.make_party(self._transport, protocol)

    @classmethod
    def from_pretrained(
        cls, model: str = "shipped", *, tokenizer: str | None = None, first: Request | None = None, **settings: Any
    ) -> PrivateLlama:
        """Starts (or joins, under torchrun) the other parties and has the owner share its model.

        model: "shipped", a folder, a GGUF file, or a hub id; the owner's process alone opens the weights. tokenizer:
        the client's, taken from ``model`` when not given. first: the request that will come first, so that a tape that
        does not fit it is refused before it is used. settings: fields of ``ProtocolConfig`` and ``LaunchConfig``.

        Raises UsageError for what cannot be used and PartyError when a party fails.
        """
        protocol, launched = split(settings)
        started = perf_counter()
        local = not (protocol.is_private and launch.is_distributed())
        folder = str(checkpoint.resolve_model(model, launched.offline)) if local else ""
        loaded = checkpoint.load_tokenizer(tokenizer, launched.offline) if tokenizer else None
        llama = cls(protocol, launched, folder)
        llama._tokenizer, llama._tokenizer_source = loaded, tokenizer or model
        llama._is_guess = not local and not tokenizer
        with llama._guarded():
            if first is not None and protocol.tape:
                llama.party.expect("generate", first.plan(len(llama._ids_of(first))))
            llama.party.request_load(folder, launched.progress)
        llama.load_seconds = perf_counter() - started
        return llama

    @staticmethod
    def serve(model: str | None = "shipped", **settings: Any) -> None:
        """Under torchrun, any rank but the client's: follows the client until it closes. The owner opens ``model``."""
        protocol, launched = split(settings)
        is_owner = launch.own_rank(protocol) == OWNER
        folder = checkpoint.resolve_model(model, launched.offline) if is_owner and model else None
        launch.serve(protocol, launched, folder)

    @property
    def config(self) -> LlamaConfig:
        """The shared model's public ``LlamaConfig``."""
        return self.party.model.config

    @property
    def tokenizer(self) -> Any:
        """The client's tokenizer, loaded when first asked for.

        Raises UsageError when there is none, or when its ids stand for other tokens than those of the owner's model.
        """
        if self._tokenizer is None:
            assert self._tokenizer_source is not None, "from_pretrained says where it is"
            self._tokenizer = checkpoint.load_tokenizer(self._tokenizer_source, self.launch.offline)
        self._compare_tokens()
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether answers can be shown as text; without a tokenizer, prompts and answers are token ids.

        Looked for once in a session: a hub may have to be asked. Raises UsageError for another model's tokenizer.
        """
        if self._is_guess and self.party.tokens_digest is None:
            return False
        if self._tokenizer is None and not self._no_tokenizer:
            assert self._tokenizer_source is not None, "from_pretrained says where it is"
            try:
                self._tokenizer = checkpoint.load_tokenizer(self._tokenizer_source, self.launch.offline)
            except UsageError:
                self._no_tokenizer = True
        if self._tokenizer is not None:
            self._compare_tokens()
        return self._tokenizer is not None

    def _compare_tokens(self) -> None:
        """Raises UsageError when the client's ids stand for other tokens than the owner's, where both are known."""
        theirs = self.party.tokens_digest
        if theirs is None and self._is_guess:
            raise UsageError(
                "the owner's model comes without a tokenizer, so nothing says which one it takes; give that model's "
                "tokenizer with --tokenizer (tokenizer=), or token ids"
            )
        if theirs is None or theirs == self._compared:
            return
        if tokenizers.digest_of(self._tokenizer) not in (None, theirs):
            raise UsageError(
                f"the tokenizer of {str(self._tokenizer_source)!r} is not the owner's model's: the same ids stand for "
                "other tokens; give that model's tokenizer with --tokenizer (tokenizer=), or token ids and a folder "
                "without a tokenizer"
            )
        self._compared = theirs

    def encode(self, prompt: str) -> list[int]:
        """Token ids of ``prompt``, as ``generate`` uses them (see ``tokenizer.encode_prompt``)."""
        return tokenizers.encode_prompt(self.tokenizer, prompt)

    def _ids_of(self, request: Request) -> list[int]:
        return request.ids(lambda: self.tokenizer)

    def stream(self, prompt: str | None = None, **arguments: Any) -> Generator[Progress | Step, None, Result]:
        """Yields ``Progress`` while the prompt is prefilled and then a ``Step`` per token; ``result`` follows.

        arguments: fields of ``Request``. The other parties wait while the reader does something with a token, and see
        how long. With ``hide_length`` they do not: every ``Step`` comes after the last step was run, all at once. When
        the next request comes, or the end of the session, they see in any case.

        A stream that is left early ends the answer at the next token, with ``hide_length`` after all steps, and only
        then goes on what left it: also an exception or Ctrl-C in the reader's loop. The next request may follow.

        Raises UsageError for a request that cannot be run, or when the session has ended.
        """
        check_names("argument", arguments, [field.name for field in fields(Request)])
        return self._stream(Request(prompt, **arguments))

    def _stream(self, request: Request) -> Generator[Progress | Step, None, Result]:
        self._check_free()
        ids = check_ids(self._ids_of(request), self.config.vocab_size)
        plan = request.plan(len(ids)).check(self.config)
        answer = Answer(ids, Sampler(request.sampling()), self.config.eos_token_ids)
        text = Detokenizer(self.tokenizer if self.has_tokenizer else None)
        steps: list[Step] = []
        ranks: list[dict] = []
        events = self._events(plan, answer, ranks)
        self._claim(answer, events)
        try:
            self.party.expect("generate", plan)
            with self._guarded():
                for event in events:
                    if isinstance(event, Step):
                        event = replace(event, text=text.push(event.token_id, event.finish_reason is not None))
                        steps.append(event)
                    yield event
            if answer.abandoned:
                raise UsageError(ENDED_SESSION)
            reason = steps[-1].finish_reason
            assert reason is not None, "the last token ends the answer"
            decode = [step.seconds for step in steps[1:]]
            self.result = result = Result(
                text=text.text,
                token_ids=[step.token_id for step in steps],
                prompt_tokens=len(ids),
                engine=self.protocol.engine,
                policy=plan.policy,
                finish_reason=reason,
                seconds={
                    "load": self.load_seconds,
                    "prefill": steps[0].seconds,
                    "per_token": median(decode) if decode else None,
                },
                cost=Cost(ranks, self.party.compute_parties),
                revealed=self.party.reveals.as_list(),
            )
        except GeneratorExit:
            if not answer.abandoned:
                self._leave_stream()
            raise
        finally:
            if not answer.abandoned:
                self._running = None
        return result

    def _events(self, plan: Plan, answer: Answer, ranks: list[dict]) -> Events:
        """Runs one request to its end, putting every rank's counters into ``ranks``.

        With ``hide_length`` nothing is left to be sent when the first ``Step`` is yielded.
        """
        held: list[Step] = []
        for event in self.party.request_generate(plan, answer):
            if plan.hide_length and isinstance(event, Step):
                held.append(event)
            else:
                yield event
        ranks += self.party.collect_statistics()
        yield from held

    def _leave_stream(self) -> None:
        """Ends the answer that is being read, if any: the other parties still follow its plan."""
        if self._running is None or self._running == UNLEAVABLE:
            return
        (answer, events), self._running = self._running, None
        assert answer is not None and events is not None, "what can be left early is an answer and its events"
        answer.abandoned = True
        if self._transport is None:
            events.close()
            return
        with self._guarded():
            for _ in events:
                pass

    def _check_free(self) -> None:
        """Raises UsageError when no request can be made now."""
        if self.protocol.is_private and self._transport is None:
            raise UsageError(ENDED_SESSION)
        if self._running is not None:
            raise UsageError(BUSY)

    def _claim(self, answer: Answer | None, events: Events | None) -> None:
        """Makes this what the parties do now. Raises UsageError, and leaves it be, when they do something."""
        with self._claiming:
            self._check_free()
            self._running = answer, events

    def generate(self, prompt: str | None = None, **arguments: Any) -> Result:
        """The whole answer; arguments as for ``stream``."""
        with contextlib.closing(self.stream(prompt, **arguments)) as events:
            while True:
                try:
                    next(events)
                except StopIteration as ended:  # with its own result: another thread's may be the session's by now
                    return ended.value

    def bench(self, shape: Shape) -> tuple[dict, Cost]:
        """Times decode steps on random weights; needs no model (see ``bench.run``). Returns figures and cost."""
        check_policy(shape.policy)
        self._check_free()
        self._claim(*UNLEAVABLE)
        try:
            with self._guarded():
                self.party.expect("bench", shape)
                figures = self.party.request_bench(shape)
                return figures, Cost(self.party.collect_statistics(), self.party.compute_parties)
        finally:
            self._running = None

    def close(self) -> None:
        """Ends the other parties, and a stream that is still being read. Calling it twice is harmless."""
        try:
            self._leave_stream()
            transport, self._transport = self._transport, None
            if transport is not None:
                self.party.close()
                transport.close()
        finally:
            self._stop_children()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # of the caller's own code, or a mistake in a request: nothing that was written for the other parties
            self._abort(error, public_words(error) if isinstance(error, KeyboardInterrupt) else ENDED)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Ends all parties when the block raises, and raises what went wrong first."""
        try:
            with unheard():
                yield
        except GeneratorExit:
            raise
        except BaseException as error:
            cause = self._abort(error, public_words(error))
            if cause is error:
                raise
            raise cause from error

    def _abort(self, error: BaseException, words: str) -> BaseException:
        """Ends all parties, telling the others ``words``; returns what ended the first of them."""
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.abort(words)
        self._leave_stream()
        cause = self._children.cause_of(error) if self._children else error
        self._stop_children(failed=True)
        return cause

    def _stop_children(self, failed: bool = False) -> None:
        if self._joined is not None:
            launch.forget(self._joined)
        children, self._children = self._children, None
        if children is not None:
            children.stop(failed)
