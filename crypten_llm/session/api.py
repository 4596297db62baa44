"""``PrivateLlama``: load, generate, stream. What the command line and the notebooks are made of.

Owns the client's side of a run: it starts or joins the parties, turns text into token ids and back, samples, and
gathers the cost. The process that calls it is the client; under torchrun it is whichever party its rank says.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from statistics import median
from time import perf_counter

import torch

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import ENDED, UsageError, public_words, unheard
from crypten_llm.models import checkpoint
from crypten_llm.models.tokenizer import encode_prompt
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import launch
from crypten_llm.session.bench import Shape
from crypten_llm.session.generation import DEFAULT_CHUNK, Answer, Plan, Progress, Step, parse_policy
from crypten_llm.session.party import Party
from crypten_llm.session.report import Cost
from crypten_llm.session.sampling import Sampler, SamplingConfig
from crypten_llm.session.settings import LaunchConfig, ProtocolConfig, check_names, split

ENDED_SESSION = "this session has ended, by close() or an error; open another with PrivateLlama.from_pretrained()"


@dataclass(frozen=True)
class Request:
    """What ``generate`` and ``stream`` take; what can be refused without a model is refused here.

    prompt or input_ids: text, or token ids used as they are. max_new_tokens, do_sample, temperature, top_k, top_p,
    seed: as in transformers; without ``do_sample`` decoding is greedy. hide_length: run all steps alike and show the
    answer after the last, so that only the client knows where it ended. prefill_chunk: prompt tokens per pass.
    policy: a KV-cache eviction policy.

    Raises UsageError for a value out of range.
    """

    prompt: str | None = None
    input_ids: list[int] | None = None
    max_new_tokens: int = 32
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    hide_length: bool = False
    prefill_chunk: int = DEFAULT_CHUNK
    policy: str = "full"

    def __post_init__(self):
        if (self.prompt is None) == (self.input_ids is None):
            raise UsageError("give either a prompt or input_ids (--prompt, --prompt-file or --prompt-ids)")
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("the prompt is empty; give some text")
        if self.input_ids is not None and not len(self.input_ids):
            raise UsageError("the prompt is empty; give at least one token id")
        for name in ("max_new_tokens", "prefill_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{name} is {value!r}; it must be 1 or more")
        check_policy(self.policy)
        self.sampling()

    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.do_sample, self.temperature, self.top_k, self.top_p, self.seed)

    def plan(self, prompt_tokens: int) -> Plan:
        return Plan(prompt_tokens, self.max_new_tokens, self.prefill_chunk, self.hide_length, self.policy)


@dataclass(frozen=True)
class Result:
    """An answer, what it cost and what was revealed for it."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    engine: str
    policy: str
    finish_reason: str
    seconds: dict
    cost: Cost
    revealed: list[dict]

    def to_dict(self) -> dict:
        """The JSON object that ``generate --json`` prints."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self) if field.name != "cost"},
            "online": {"rounds": self.cost.rounds(), "bytes_sent": self.cost.bytes_sent()},
            "offline": {"bytes": self.cost.dealer_bytes(), "rounds": self.cost.dealer_rounds()},
            "peak_memory_bytes": self.cost.peak_bytes(),
            "table": self.cost.table(),
        }


class PrivateLlama:
    """A Llama whose weights its owner keeps and whose prompts the client keeps; this object is the client.

    Use ``from_pretrained``; then ``generate`` or ``stream`` as often as wanted; then ``close`` (or a with block).
    A process can be a party of one private session at a time.
    """

    def __init__(self, protocol: ProtocolConfig, launched: LaunchConfig, model_folder: str = ""):
        """Parties that have met but share no model yet. ``model_folder``: what a local owner will open."""
        self.protocol, self.launch = protocol, launched
        self.load_seconds = 0.0
        self._children = self._joined = self._transport = self._tokenizer = self._tokenizer_source = None
        self._no_tokenizer = False
        self._reading: tuple[Answer, Iterator[Progress | Step]] | None = None
        if not protocol.is_private:
            torch.set_num_threads(launched.thread_count(1))
            self.party = Party(PlainEngine())
            return
        if launch.is_distributed() and (rank := launch.own_rank(protocol)) != CLIENT:
            raise UsageError(
                f"this process is rank {rank}; the client is rank {CLIENT}. Call PrivateLlama.serve() here"
            )
        launch.check_free()
        environment = os.environ
        if not launch.is_distributed():
            self._children = launch.LocalParties(protocol, launched, model_folder)
            environment = self._children.environment(CLIENT)
        with self._guarded():
            self._transport = self._joined = launch.join(protocol, launched, environment, self._children)
            self.party = launch.make_party(self._transport, protocol)

    @classmethod
    def from_pretrained(
        cls, model: str = "shipped", *, tokenizer: str | None = None, first: Request | None = None, **settings
    ) -> "PrivateLlama":
        """Starts (or joins, under torchrun) the other parties and has the owner share its model.

        model: "shipped", a folder, or a hub id; the owner's process alone opens the weights. tokenizer: the
        client's, taken from ``model`` when not given. first: the request that will come first, so that a tape that
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
        with llama._guarded():
            if first is not None and protocol.tape:
                llama.party.expect("generate", first.plan(len(llama._ids_of(first))))
            llama.party.request_load(folder, launched.progress)
        llama.load_seconds = perf_counter() - started
        return llama

    @staticmethod
    def serve(model: str | None = "shipped", **settings) -> None:
        """Under torchrun, any rank but the client's: follows the client until it closes. The owner opens ``model``."""
        protocol, launched = split(settings)
        is_owner = launch.own_rank(protocol) == OWNER
        folder = checkpoint.resolve_model(model, launched.offline) if is_owner and model else None
        launch.serve(protocol, launched, folder)

    @property
    def config(self):
        """The shared model's public ``LlamaConfig``."""
        return self.party.model.config

    @property
    def tokenizer(self):
        """The client's tokenizer, loaded when first asked for; raises UsageError when there is none."""
        if self._tokenizer is None:
            self._tokenizer = checkpoint.load_tokenizer(self._tokenizer_source, self.launch.offline)
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether answers can be shown as text; without a tokenizer, prompts and answers are token ids.

        Looked for once in a session: a hub may have to be asked.
        """
        if self._tokenizer is None and not self._no_tokenizer:
            try:
                return self.tokenizer is not None
            except UsageError:
                self._no_tokenizer = True
        return self._tokenizer is not None

    def encode(self, prompt: str) -> list[int]:
        """Token ids of ``prompt``, as ``generate`` uses them (see ``tokenizer.encode_prompt``)."""
        return encode_prompt(self.tokenizer, prompt)

    def _ids_of(self, request: Request) -> list[int]:
        return self.encode(request.prompt) if request.prompt else _one_row(request.input_ids)

    def stream(self, prompt: str | None = None, **arguments) -> Iterator[Progress | Step]:
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

    def _stream(self, request: Request) -> Iterator[Progress | Step]:
        self._check_free()
        ids = _check_ids(self._ids_of(request), self.config.vocab_size)
        plan = request.plan(len(ids)).check(self.config)
        self.party.expect("generate", plan)
        answer = Answer(ids, Sampler(request.sampling()), self.config.eos_token_ids)
        text = Detokenizer(self.tokenizer if self.has_tokenizer else None)
        steps: list[Step] = []
        ranks: list[dict] = []
        events = self._events(plan, answer, ranks)
        self._reading = answer, events
        try:
            with self._guarded():
                for event in events:
                    if isinstance(event, Step):
                        event = replace(event, text=text.push(event.token_id, event.finish_reason is not None))
                        steps.append(event)
                    yield event
            if answer.abandoned:
                raise UsageError(ENDED_SESSION)
        except GeneratorExit:
            if not answer.abandoned:
                self._leave_stream()
            raise
        finally:
            if not answer.abandoned:
                self._reading = None
        decode = [step.seconds for step in steps[1:]]
        self.result = Result(
            text=text.text,
            token_ids=[step.token_id for step in steps],
            prompt_tokens=len(ids),
            engine=self.protocol.engine,
            policy=plan.policy,
            finish_reason=steps[-1].finish_reason,
            seconds={
                "load": self.load_seconds,
                "prefill": steps[0].seconds,
                "per_token": median(decode) if decode else None,
            },
            cost=Cost(ranks, self.party.compute_parties),
            revealed=self.party.reveals.as_list(),
        )

    def _events(self, plan: Plan, answer: Answer, ranks: list[dict]) -> Iterator[Progress | Step]:
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
        if self._reading is None:
            return
        (answer, events), self._reading = self._reading, None
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
        if self._reading is not None:
            raise UsageError("another stream of this session is still being read; read it to its end or close it")

    def generate(self, prompt: str | None = None, **arguments) -> Result:
        """The whole answer; arguments as for ``stream``."""
        with contextlib.closing(self.stream(prompt, **arguments)) as events:
            for _ in events:
                pass
        return self.result

    def bench(self, shape: Shape) -> tuple[dict, Cost]:
        """Times decode steps on random weights; needs no model (see ``bench.run``). Returns figures and cost."""
        check_policy(shape.policy)
        self._check_free()
        with self._guarded():
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

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            self.close()
        else:  # of the caller's own code, or a mistake in a request: nothing that was written for the other parties
            self._abort(error, public_words(error) if isinstance(error, KeyboardInterrupt) else ENDED)

    @contextlib.contextmanager
    def _guarded(self):
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


class Detokenizer:
    """Text of a growing list of tokens, holding back bytes of a character that is not complete yet."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""

    def push(self, token_id: int, last: bool) -> str:
        """What ``token_id`` adds to the text that may be shown; the last token adds whatever is left."""
        if self.tokenizer is None:
            return ""
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.endswith("\ufffd") and not last:
            return ""
        new, self.text = text[len(self.text) :], text
        return new


def check_policy(name: str) -> None:
    """Raises UsageError for a policy that is not in the table, or a setting that it has not."""
    parse_policy(name)


def _one_row(ids) -> list[int]:
    """Ids as a list; tensors and a batch of one are taken as transformers takes them."""
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not any(isinstance(row, list) for row in ids):
        return ids
    if len(ids) > 1:
        raise UsageError(f"input_ids holds {len(ids)} prompts; ask one at a time")
    return ids[0]


def _check_ids(ids: list[int], vocab_size: int) -> list[int]:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise UsageError(f"token id {token!r} is not in the vocabulary; ids go from 0 to {vocab_size - 1}")
    return ids
