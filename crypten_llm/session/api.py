"""``PrivateLlama``: load, generate, stream, chat. What the command line and the notebooks are made of.

Owns the client's side of a run: it starts or joins the parties, turns text into token ids and back, samples, and
gathers the cost. The process that calls it is the client; under torchrun it is whichever party its rank says.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import ENDED, UsageError, public_words, unheard
from crypten_llm.models import checkpoint
from crypten_llm.models import tokenizer as tokenizers
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import launch, stocked, thin_client
from crypten_llm.session.batches import requests_of
from crypten_llm.session.bench import Shape
from crypten_llm.session.chat import Chat
from crypten_llm.session.defaults import Defaults
from crypten_llm.session.folder import ClientFolder
from crypten_llm.session.open_batch import OpenBatch
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Turn, turns_of
from crypten_llm.session.prompted import Answer, Progress, Step
from crypten_llm.session.report import Cost
from crypten_llm.session.request import Asked, Request, Result, Taken, check_policy, result_of
from crypten_llm.session.running import Events, Running
from crypten_llm.session.settings import LaunchConfig, ProtocolConfig, split
from crypten_llm.session.weights import know_weights

if TYPE_CHECKING:
    from types import TracebackType

    from crypten_llm.links.transport import Transport
    from crypten_llm.models.config import LlamaConfig


ENDED_SESSION = "this session has ended, by close() or an error; open another with PrivateLlama.from_pretrained()"
BATCH = 8  # prompts that share rounds, where more are given and nothing else is said


class PrivateLlama:
    """A Llama whose weights its owner keeps and whose prompts the client keeps; this object is the client.

    Use ``from_pretrained``; then ``generate`` or ``stream`` as often as wanted; then ``close`` (or a with block).
    A process can be a party of one private session at a time.
    """

    def __init__(self, protocol: ProtocolConfig, launched: LaunchConfig, model_folder: str = "") -> None:
        """Parties that have met but share no model yet. ``model_folder``: what a local owner will open."""
        self.protocol, self.launch = protocol, launched
        know_weights(launched.policy_weights)
        self.load_seconds = 0.0
        self._children: launch.LocalParties | None = None
        self._joined: Transport | None = None
        self._transport: Transport | None = None
        self._folder = ClientFolder("", launched.offline)
        self.conversations = itertools.count(1)  # numbers that none of this session has yet
        self.result: Any = None  # of the last request: a ``Result``, or several
        self.running = Running()
        if not protocol.is_private:
            torch.set_num_threads(launched.thread_count(1))
            self.party = Party(PlainEngine.on(launched.device), mode=protocol.mode)
            return
        if launch.is_distributed() and (rank := launch.own_rank(protocol)) != CLIENT:
            raise UsageError(f"this is rank {rank}, and the client is rank {CLIENT}: call PrivateLlama.serve() here")
        launch.check_ready(protocol, launched)
        self.environment: Mapping[str, str] = os.environ
        if launched.is_thin:
            self.party, self._transport, self._children = thin_client.join(protocol, launched, model_folder)
            return
        if not launch.is_distributed():
            self._children = launch.LocalParties(protocol, launched, model_folder)
            self.environment = self._children.environment(CLIENT)
        with self._guarded():
            self._transport = self._joined = launch.join(protocol, launched, self.environment, self._children)
            self.party = launch.make_party(self._transport, protocol, launched)

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
        local = not protocol.is_private or not (launch.is_distributed() or launched.owner_at)
        folder = str(checkpoint.resolve_model(model, launched.offline)) if local else ""
        loaded = checkpoint.load_tokenizer(tokenizer, launched.offline) if tokenizer else None
        llama = cls(protocol, launched, folder)
        llama._folder = ClientFolder(tokenizer or model, launched.offline, loaded, is_guess=not local and not tokenizer)
        with llama._guarded():
            if first is not None and protocol.tape:
                public, ids = first.parts(lambda: llama.tokenizer)
                llama.party.expect("generate", first.plan(len(ids), llama.defaults, public, protocol.mode))
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
        return self._folder.tokenizer(self.party.tokens_digest)

    @property
    def has_tokenizer(self) -> bool:
        """Whether answers can be shown as text; without a tokenizer, prompts and answers are token ids.

        Looked for once in a session: a hub may have to be asked. Raises UsageError for another model's tokenizer.
        """
        return self._folder.has_tokenizer(self.party.tokens_digest)

    @property
    def defaults(self) -> Defaults:
        """What the client's own copy of the model's files says of answers: what ends them, how tokens are chosen."""
        return self._folder.defaults(self.party.tokens_digest)

    def encode(self, prompt: str) -> list[int]:
        """Token ids of ``prompt``, as ``generate`` uses them (see ``tokenizer.encode_prompt``)."""
        return tokenizers.encode_prompt(self.tokenizer, prompt)

    def stream(
        self, prompt: Any = None, *, batch_size: int = BATCH, **arguments: Any
    ) -> Generator[Progress | Step, None, Result | list[Result]]:
        """Yields ``Progress`` while the prompt is prefilled and then a ``Step`` per token; ``result`` follows.

        prompt: a text, a list of texts, or a list of ``Request``; of several, ``batch_size`` at a time share their
        rounds, ``Step.prompt`` says whose token it is, and the result is a list. arguments: fields of ``Request``.

        The other parties wait while the reader does something with a token, and see how long. With ``hide_length``
        they do not: every ``Step`` comes after the last step was run, all at once. When the next request comes, or the
        end of the session, they see in any case.

        A stream that is left early ends its answers at the next token, with ``hide_length`` after all steps, and only
        then goes on what left it: also an exception or Ctrl-C in the reader's loop. The next request may follow.

        Raises UsageError for a request that cannot be run, or when the session has ended.
        """
        requests, several = requests_of(prompt, arguments)
        return self._stream(requests, several, self._size(batch_size))

    def _size(self, batch_size: int) -> int:
        if type(batch_size) is not int or batch_size < 1:
            raise UsageError(f"batch_size is {batch_size!r}; it must be 1 or more")
        return 1 if self.protocol.tape or self.launch.is_thin else batch_size

    def _stream(
        self, requests: list[Request], several: bool, size: int
    ) -> Generator[Progress | Step, None, Result | list[Result]]:
        self._check_free()
        asked = [self.prepare(request) for request in requests]
        results: list[Result] = []
        if several:
            self.result = results  # what there is when an error ends the session
        for start in range(0, len(asked), size):
            results += yield from self.run(asked[start : start + size], start)
        self.result = found = results if several else results[0]
        return found

    def prepare(
        self,
        request: Request,
        parts: tuple[list[int], list[int]] | None = None,
        before: Sequence[int] = (),
        turn: Turn | None = None,
    ) -> Asked:
        """What ``request`` comes down to; parts: public and other ids of a ``turn``, after ``before`` in its cache.

        Raises UsageError for what this model, or this client's tokenizer, cannot run.
        """
        public, ids = request.parts(lambda: self.tokenizer) if parts is None else parts
        tokenizers.check_ids([*public, *ids], self.config.vocab_size)
        plan = request.plan(len(ids), self.defaults, public, self.protocol.mode).check(self.config, turn)
        self.party.engine.check_sampling(plan.temperature)
        if request.stops and not self.has_tokenizer:
            raise UsageError("stop is a text, and there is no tokenizer to make text of tokens; give one (--tokenizer)")
        chosen, grammar = request.chosen(self.defaults), self._folder.grammar(request.within, self.party.tokens_digest)
        return Asked(request, ids, plan, *chosen, before, turn, grammar=grammar)

    def run(
        self, asked: Sequence[Asked], first: int = 0, taken: Taken | None = None
    ) -> Generator[Progress | Step, None, list[Result]]:
        """Runs these side by side, as one request to the other parties; returns a result of each.

        first: number of the first prompt. taken: is filled with what comes of them.
        """
        tokenizer, taken = self.tokenizer if self.has_tokenizer else None, taken or Taken()
        taken.answers = answers = [each.answer(tokenizer) for each in asked]
        taken.steps = steps = [list[Step]() for _ in asked]
        plans, turns = [each.plan for each in asked], turns_of([each.turn for each in asked])
        events = stocked.run(self.party, plans, answers, taken, turns)

        def check() -> None:
            self.party.expect("generate", *plans)
            self.party.check_plans(plans, turns)

        with contextlib.closing(self.alone(answers, events, check)) as running:
            for event in running:
                if isinstance(event, Step):
                    steps[event.prompt].append(event)
                    event = replace(event, prompt=first + event.prompt)
                yield event
        return self.results(asked, taken)

    def open_batch(self, first: Sequence[Asked], *doors: Callable) -> OpenBatch:
        """Requests that others may join while they run; see ``OpenBatch``. Not with a tape, which is for one."""
        return OpenBatch(self, first, *doors)

    def alone(self, answers: Sequence[Answer], events: Events, check: Callable[[], None]) -> Events:
        """Yields what the parties do, who do nothing else meanwhile. Left early, it ends ``answers`` and reads on.

        check: is called before. Raises UsageError when they do something, or when the session has ended.
        """
        self._check_free()
        with self.running.claimed(answers, events):
            try:
                check()
                with self._guarded():
                    for event in events:  # noqa: UP028  (left early, they are read on)
                        yield event
                if not self.running.is_now(events):
                    raise UsageError(ENDED_SESSION)
            except GeneratorExit:
                if self.running.is_now(events):
                    self._leave_stream()
                raise

    def results(self, asked: Sequence[Asked], taken: Taken) -> list[Result]:
        """What came of the last request, which has ended."""
        ranks = taken.ranks or self.party.collect_statistics()
        cost, revealed = Cost(ranks, self.party.compute_parties), self.party.reveals.as_list()
        party, engine = self.party, self.protocol.engine
        facts = engine, self.load_seconds, cost, revealed, len(asked), party.outside, party.notary.take(0), taken.block
        made = zip(asked, taken.answers, taken.steps, strict=True)
        return [each.result(answer, steps, *facts) for each, answer, steps in made]

    @property
    def is_open(self) -> bool:
        """Whether requests can still be made, now or when the one that runs has ended."""
        return not self.protocol.is_private or self._transport is not None

    def _leave_stream(self, at_once: bool = False) -> None:
        """Ends the answers that are being read, if any: the other parties still follow their plan.

        at_once: what nobody follows any more ends here.
        """
        events = self.running.leave()
        if events is None:
            return
        if not self.is_open or at_once:
            events.close()
            return
        with self._guarded():
            for _ in events:
                pass

    def _check_free(self) -> None:
        if not self.is_open:
            raise UsageError(ENDED_SESSION)
        self.running.check()

    def generate(self, prompt: Any = None, *, batch_size: int = BATCH, **arguments: Any) -> Any:
        """The whole answer, a ``Result``, or a list of them for several prompts; arguments as for ``stream``.

        Nobody waits for its first token, so its length is hidden from the others unless ``hide_length`` is false: all
        ``max_new_tokens`` steps are run.
        """
        requests, several = requests_of(prompt, arguments)
        if self.protocol.is_private:
            requests = [each if each.hide_length is not None else replace(each, hide_length=True) for each in requests]
        return result_of(self._stream(requests, several, self._size(batch_size)))

    def chat(self, system: str | None = None, **arguments: Any) -> Chat:
        """A conversation, whose cache all parties keep, so that a turn costs its own tokens alone; see ``Chat``.

        system: what stands before all turns. arguments: of every turn, fields of ``Request``.

        Raises UsageError where there is no chat template, or for arguments with which no conversation can go on.
        """
        self._check_free()
        return Chat(self, next(self.conversations), system, arguments)

    def forget(self, conversation: int) -> None:
        """Has all parties drop the cache of a conversation; nothing in a session that has ended."""
        if self.is_open:
            self._check_free()
            with self._guarded():
                self.party.request_forget(conversation)

    def reconcile(self) -> None:
        """Has both compute parties drop halves of blocks in stock of which the other has none."""
        if self.is_open and self.launch.stock:
            self._check_free()
            with self._guarded():
                self.party.stocked.reconcile(self.party)

    def bench(self, shape: Shape) -> tuple[dict, Cost]:
        """Times decode steps on random weights; needs no model (see ``bench.run``). Returns figures and cost."""
        check_policy(shape.policy)
        self._check_free()
        with self.running.claimed(), self._guarded():
            self.party.expect("bench", shape)
            figures = self.party.request_bench(shape)
            return figures, Cost(self.party.collect_statistics(), self.party.compute_parties)

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
        self._leave_stream(at_once=True)
        cause = self._children.cause_of(error) if self._children else error
        self._stop_children(failed=True)
        return cause

    def _stop_children(self, failed: bool = False) -> None:
        if self._joined is not None:
            launch.forget(self._joined)
        children, self._children = self._children, None
        if children is not None:
            children.stop(failed)
