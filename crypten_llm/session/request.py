"""What is asked of a session and what comes back: requests, their settings, and results.

Owns what can be refused without a model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.limits import PADDED
from crypten_llm.models.tokenizer import encode_prompt, encode_rendered, render_chat
from crypten_llm.session.conversation import check_messages, system_of
from crypten_llm.session.defaults import Defaults
from crypten_llm.session.grammar import Grammar, text_of
from crypten_llm.session.mode import ID, Mode
from crypten_llm.session.plan import DEFAULT_CHUNK, Course, Plan, Turn, parse_policy
from crypten_llm.session.prompted import Answer, Step
from crypten_llm.session.public import cut, cut_chat
from crypten_llm.session.receipt import Receipt
from crypten_llm.session.report import WAYS, Cost
from crypten_llm.session.sampling import Logprobs, Sampler, SamplingConfig
from crypten_llm.session.text import Detokenizer, check_stops

NEW_TOKENS, NEW_TOKENS_OF_CHAT = 32, 256
LEFT = "left"
"""Why an answer ended of which nobody read on."""
NONE, ALL_LOGITS = Defaults(), Mode()


@dataclass(frozen=True)
class Request:
    """What ``generate`` and ``stream`` take; what can be refused without a model is refused here.

    prompt or input_ids: text, or token ids used as they are. chat: the prompt is what a user says, and the tokenizer's
    chat template is applied to it, after ``system`` if that is given. messages: or a whole conversation as transformers
    takes it, [{"role": "user", "content": text}, ...].

    max_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty: as in transformers; what is not
    given is as the client's copy of the model's generation_config.json has it, or else greedy, 32 tokens, 256 where a
    chat template is used. seed: of the draws. logprobs: tell every token's probability, and as many of the best.

    stop: text that ends the answer, which ends before it; or several. eos_token_id: ids that end it, one or several;
    not given, those of the client's own tokenizer and folder. Another party's announcement ends nothing: it would
    decide how much is revealed.

    json_schema: what the answer has to be, as JSON. grammar: or as any text, in the form of Lark's that llguidance
    reads. An answer that is whole ends; one that max_new_tokens ends may be a part. tools: functions of which the chat
    template tells the model, as transformers takes them.

    public_prefix: text or token ids before the prompt that are no secret: all parties see them, and the owner computes
    them in the clear. public_system: the same of what a chat template writes before a user's first word, ``system``
    with it.

    hide_length: run all steps alike and show the answer after the last, so that only the client knows where it ended;
    not given, where it is asked for as a whole and not streamed (``PrivateLlama.generate``).
    prefill_chunk: prompt tokens per pass. padded: rows of which the answer's cache is counted as a multiple, so that a
    GPU does every step alike; 0 for as many as there are. policy: a KV-cache eviction policy.

    Raises UsageError for a value out of range.
    """

    prompt: str | None = None
    input_ids: list[int] | None = None
    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    hide_length: bool | None = None
    prefill_chunk: int = DEFAULT_CHUNK
    padded: int = 0
    policy: str = "full"
    chat: bool = False
    messages: list[dict] | None = None
    system: str | None = None
    stop: str | list[str] | tuple[str, ...] = ()
    eos_token_id: int | list[int] | tuple[int, ...] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logprobs: int | None = None
    public_prefix: str | list[int] | None = None
    public_system: bool = False
    json_schema: dict | None = None
    grammar: str | None = None
    tools: list[dict] | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.prompt, self.input_ids, self.messages)) != 1:
            raise UsageError(
                "give either a prompt, input_ids or messages (in a command --prompt, --prompt-file or --prompt-ids)"
            )
        if self.chat and self.prompt is None:
            raise UsageError("chat applies the chat template to a text; give a prompt (--prompt or --prompt-file)")
        if self.system is not None and not self.chat:
            raise UsageError("system is a message of a chat; say chat as well (--chat), or put it first in messages")
        if self.messages is not None:
            check_messages(self.messages)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise UsageError(
                f"the prompt is a {type(self.prompt).__name__}; give a text, or a list of texts (token ids are "
                "input_ids, a conversation is messages)"
            )
        if self.prompt is not None and not self.prompt.strip():
            raise UsageError("the prompt is empty; give some text")
        if self.input_ids is not None and not len(self.input_ids):
            raise UsageError("the prompt is empty; give at least one token id")
        self._check_public()
        for name in ("max_new_tokens", "prefill_chunk"):
            value = getattr(self, name)
            if not (value is None and name == "max_new_tokens") and (type(value) is not int or value < 1):
                raise UsageError(f"{name} is {value!r}; it must be 1 or more")
        if self.logprobs is not None and (type(self.logprobs) is not int or self.logprobs < 0):
            raise UsageError(
                f"logprobs is {self.logprobs!r}; it must be a number of tokens, 0 for the chosen one alone"
            )
        if type(self.padded) is not int or not 0 <= self.padded <= PADDED:
            raise UsageError(f"padded is {self.padded!r}; it must be 0 to {PADDED:,} rows")
        check_policy(self.policy)
        check_stops(self.stop)
        if self.tools is not None and (not self.templated or self.public_system):
            raise UsageError("tools are of a chat, whose system message is no public one; leave tools or that out")
        self.within  # noqa: B018  (for what it raises)
        self.stop_ids(NONE)
        SamplingConfig(**{"do_sample": True, **self._given(("do_sample", *_DRAWN))})
        if self.do_sample is False:
            self.sampling()

    def _check_public(self) -> None:
        """Raises UsageError for a public beginning that there cannot be."""
        if self.public_prefix is not None and self.templated:
            raise UsageError(
                "public_prefix comes before a text or ids; the beginning of a chat is made public with public_system "
                "(--public-system)"
            )
        if self.public_system and not self.templated:
            raise UsageError("public_system is of a chat; say chat as well (--chat), or give public_prefix")
        if self.public_prefix is not None and not len(self.public_prefix):
            raise UsageError("the public prefix is empty; give some text or ids, or leave it out (--public-prefix)")

    @property
    def within(self) -> str | None:
        """The grammar that the answer follows, if any. Raises UsageError for what an answer cannot be held to."""
        return text_of(self.json_schema, self.grammar, bool(self.stops))

    @property
    def stops(self) -> tuple[str, ...]:
        return check_stops(self.stop)

    @property
    def templated(self) -> bool:
        """Whether a chat template is used."""
        return self.chat or self.messages is not None

    def ids(self, tokenizer: Callable[[], Any]) -> list[int]:
        """Token ids of all that the model is to read; ``tokenizer()`` gives the client's, where one is needed."""
        public, secret = self.parts(tokenizer)
        return [*public, *secret]

    def parts(self, tokenizer: Callable[[], Any]) -> tuple[list[int], list[int]]:
        """The same in two: of what is public, and of what follows it."""
        if self.templated:
            messages = self.conversation
            rendered = render_chat(tokenizer(), messages, self.tools)
            if self.public_system:
                return cut_chat(tokenizer(), rendered, system_of(messages))
            return [], encode_rendered(tokenizer(), rendered)
        public = self.public_prefix
        if isinstance(public, str) and self.prompt is not None:
            return cut(tokenizer(), public, self.prompt, encode_prompt)
        before = encode_prompt(tokenizer(), public) if isinstance(public, str) else _row(public or (), "public_prefix")
        if self.prompt is not None:  # a text that is not the first has no first token
            return before, (encode_rendered if before else encode_prompt)(tokenizer(), self.prompt)
        return before, _row(self.input_ids, "input_ids")

    @property
    def conversation(self) -> list[dict]:
        """The messages that a chat template writes."""
        if self.messages is not None:
            return self.messages
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": self.prompt}]

    def sampling(self, defaults: Defaults = NONE) -> SamplingConfig:
        """How tokens are chosen. Raises UsageError for what greedy decoding, given or default, would ignore."""
        samples = defaults.sampling.get("do_sample", False) if self.do_sample is None else self.do_sample
        usable = (name for name in defaults.sampling if samples or name == "repetition_penalty")
        model = {name: defaults.sampling[name] for name in usable}
        return SamplingConfig(**{**model, **self._given(_DRAWN), "do_sample": samples})

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def stop_ids(self, defaults: Defaults) -> tuple[int, ...]:
        """What ends the answer beside its text."""
        if self.eos_token_id is None:
            return defaults.stop_ids
        given = [self.eos_token_id] if isinstance(self.eos_token_id, int) else self.eos_token_id
        if isinstance(given, str) or not all(type(token) is int and token >= 0 for token in given):
            raise UsageError(f"eos_token_id is {self.eos_token_id!r}; give a token id, or several")
        return tuple(given)

    def chosen(self, defaults: Defaults = NONE) -> tuple[SamplingConfig, tuple[int, ...]]:
        """How tokens are chosen, and those that end the answer."""
        return self.sampling(defaults), self.stop_ids(defaults)

    def plan(
        self, prompt_tokens: int, defaults: Defaults = NONE, public: Sequence[int] = (), mode: Mode = ALL_LOGITS
    ) -> Plan:
        """prompt_tokens: of what is secret, after the ids that are ``public``. Raises UsageError for what cannot be
        chosen from what the client learns in ``mode``."""
        sampling = self.sampling(defaults)
        mode.check(sampling, self.logprobs, self.within is not None)
        usual = defaults.max_new_tokens or (NEW_TOKENS_OF_CHAT if self.templated else NEW_TOKENS)
        new = usual if self.max_new_tokens is None else self.max_new_tokens
        limits = prompt_tokens, new, self.prefill_chunk, bool(self.hide_length), self.policy, tuple(public)
        return Plan(*limits, str(mode), mode.temperature(sampling), self.padded)


_DRAWN = ("temperature", "top_k", "top_p", "seed", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Result:
    """An answer, what it cost and what was revealed for it.

    public_tokens: of the public prefix, which are not among ``prompt_tokens``.
    prompts: how many shared its rounds; ``seconds``, ``cost`` and ``revealed`` are of all these together.
    outside: why the answer is not to be trusted, where the model was shared although it leaves the engine's ranges.
    cached_tokens: of its conversation, that the cache held already. decoding: how tokens were chosen, in words.
    stop_ids: what would have ended it. receipt: of all these together; ``None`` on engine ``plain``. block: of a stock,
    that its material came from; empty where a dealer followed.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    engine: str
    policy: str
    finish_reason: str
    seconds: dict
    cost: Cost
    revealed: list[dict]
    decoding: str = "greedy"
    stop_ids: tuple[int, ...] = ()
    logprobs: list[Logprobs] | None = None
    prompts: int = 1
    cached_tokens: int = 0
    public_tokens: int = 0
    outside: str = ""
    receipt: Receipt | None = None
    block: str = ""

    def to_dict(self) -> dict:
        """The JSON object that ``generate --json`` prints."""
        likely = None if self.logprobs is None else [asdict(step) for step in self.logprobs]
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _APART}
        return {
            **plain,
            "logprobs": likely,
            "online": {"rounds": self.cost.rounds(), "bytes_sent": self.cost.bytes_sent()},
            "offline": {"bytes": self.cost.dealer_bytes(), "rounds": self.cost.dealer_rounds()},
            **({"thin_client": dict(zip(WAYS, self.cost.thin_bytes(), strict=True))} if self.cost.thin else {}),
            "peak_memory_bytes": self.cost.peak_bytes(),
            "table": self.cost.table(),
        }


_APART = ("cost", "receipt")


@dataclass
class Taken:
    """What has come of a request so far, also of one that nobody reads on."""

    answers: list[Answer] = field(default_factory=list)
    steps: list[list[Step]] = field(default_factory=list)
    ranks: list[dict] = field(default_factory=list)  # every rank's counters, once it has ended
    block: str = ""  # of a stock, and the plans as they were run
    plans: Sequence[Plan] = ()


@dataclass(frozen=True)
class Asked:
    """A request that can be run: its ids after the public prefix, its public plan, and what decides its tokens.

    before: ids that the conversation's cache holds already, of which the first ``before_public`` are a public prefix.
    turn: of that conversation, at all parties. grammar: that the answer follows.
    """

    request: Request
    ids: list[int]
    plan: Plan
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    before: Sequence[int] = ()
    turn: Turn | None = None
    before_public: int = 0
    grammar: Grammar | None = None

    @property
    def course(self) -> Course:
        """What its cost depends on, under a policy that keeps all rows."""
        if not self.before:
            return Course(self.plan)
        public, secret = tuple(self.before[: self.before_public]), len(self.before) - self.before_public
        return Course(self.plan, Plan(secret, 1, self.plan.chunk, public_prefix=public, reveal=self.plan.reveal))

    def answer(self, tokenizer: Any) -> Answer:
        """Where the answer grows; tokenizer: the client's, if it has one."""
        seen = [*self.before, *self.plan.public_prefix, *self.ids]
        guide = None if self.grammar is None else self.grammar.guide(self.stop_ids)
        choose = int if self.plan.reveal == ID else Sampler(self.sampling, seen, guide)
        text = None if tokenizer is None else Detokenizer(tokenizer, self.request.stops)
        return Answer(self.ids, choose, self.stop_ids, text, self.request.logprobs, guide)

    def result(
        self,
        answer: Answer,
        steps: list[Step],
        engine: str,
        load_seconds: float,
        cost: Cost,
        revealed: list[dict],
        prompts: int,
        outside: str,
        receipt: Receipt | None,
        block: str = "",
    ) -> Result:
        """What came of it; steps: those that were read, of which the last ends the answer if it was read to its end.

        Raises NotFollowed for an answer that could not be held to its grammar.
        """
        if answer.failed is not None:
            raise answer.failed
        decode = [step.seconds for step in steps[1:]]
        return Result(
            text="" if answer.text is None else answer.text.text,
            token_ids=answer.token_ids,
            prompt_tokens=len(self.ids),
            engine=engine,
            policy=self.plan.policy,
            finish_reason=(steps[-1].finish_reason if steps else None) or LEFT,
            seconds={
                "load": load_seconds,
                "prefill": steps[0].seconds if steps else None,
                "per_token": median(decode) if decode else None,
            },
            cost=cost,
            revealed=revealed,
            decoding=str(self.sampling),
            stop_ids=self.stop_ids,
            logprobs=None if self.request.logprobs is None else [s.logprobs for s in steps if s.logprobs],
            prompts=prompts,
            cached_tokens=len(self.before),
            public_tokens=len(self.plan.public_prefix),
            outside=outside,
            receipt=receipt,
            block=block,
        )


def result_of(events: Generator[Any, None, Any]) -> Any:
    """Reads a stream to its end; returns its own result: another thread's may be the session's by now."""
    with contextlib.closing(events):
        while True:
            try:
                next(events)
            except StopIteration as ended:
                return ended.value


def check_policy(name: str) -> None:
    """Raises UsageError for a policy that is not in the table, or a setting that it has not."""
    parse_policy(name)


def rows_of(ids: Any) -> list[list[int]]:
    """Ids as rows; a tensor, and a row that is in no list, are taken as transformers takes them."""
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in ids]
    return [list(row) for row in rows] if rows and all(isinstance(row, list | tuple) for row in rows) else [rows]


def _row(ids: Any, what: str) -> list[int]:
    rows = rows_of(ids)
    if len(rows) > 1:
        raise UsageError(f"{what} holds {len(rows)} prompts; a request is one, ask for several with generate()")
    return rows[0]
