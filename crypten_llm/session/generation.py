"""Prefill and decode: the loop that turns secret prompts into tokens that only the client reads.

Owns the order of events, which is public and the same for every prompt of one length. All compute parties run it
together; the client alone has token ids, samples, and decides to stop. Several prompts take their steps side by side,
and one prompt is several of which there is one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, TypeVar

import torch
from msgspec import Meta

import eviction
from crypten_llm import limits
from crypten_llm.errors import UsageError
from crypten_llm.models.llama import Pass
from crypten_llm.models.tokenizer import check_ids
from crypten_llm.records import Record
from crypten_llm.session.plan import Plan
from crypten_llm.session.sampling import Logprobs

if TYPE_CHECKING:
    from crypten_llm.models.cache import KVCache
    from crypten_llm.session.party import Party
    from crypten_llm.session.text import Detokenizer
    from eviction.operations import Handle


Result = TypeVar("Result")


@dataclass(frozen=True)
class Step:
    """One generated token, as streamed to command line, API and notebooks.

    text: what this token adds to the answer (the client holds back bytes of an unfinished character, and what a stop
    string may begin with). seconds: for this step; the first one holds the prefill. rounds, bytes_sent: online, this
    party, so far. finish_reason: ``None``, ``"stop"`` or ``"length"``. prompt: which of several prompts it answers.
    logprobs: where they were asked for.
    """

    index: int
    token_id: int
    text: str
    seconds: float
    rounds: int
    bytes_sent: int
    finish_reason: str | None = None
    prompt: int = 0
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Progress:
    """Prompt tokens prefilled so far, streamed before the first ``Step``."""

    done: int
    total: int


@dataclass
class Answer:
    """What the client alone knows of an answer in the making.

    choose: the sampler, [V] logits to an id, or ``int`` where an id is all that is shown. stop_ids: tokens that end the
    answer. text: makes text of it and ends it at a stop string, where there is a tokenizer. logprobs: how many of the
    best tokens each step tells, ``None`` for nothing. abandoned: set when nobody reads on; the answer then ends at the
    next token, as the others see it.
    """

    prompt_ids: list[int]
    choose: Callable[[torch.Tensor], int]
    stop_ids: tuple[int, ...] = ()
    text: Detokenizer | None = None
    logprobs: int | None = None
    abandoned: bool = False
    token_ids: list[int] = field(default_factory=list)  # those drawn; the model has seen all but the last
    finished: bool = False

    @property
    def token_id(self) -> int:
        """The last token, which the model sees next; it stays the last when the answer has ended."""
        return self.token_ids[-1]

    def take(self, shown: torch.Tensor, last: bool = False) -> tuple[str, Logprobs | None]:
        """Draws the next token, the ``last`` or not; returns what it adds to the text, and its probability.

        A finished answer keeps its tokens, and does all this for nothing: it takes as long.
        """
        drawn = int(self.choose(shown))
        likely = None if self.logprobs is None else Logprobs.of(shown, drawn, self.logprobs)
        if self.finished:
            if self.text:
                self.text.again()
            return "", None
        self.token_ids.append(drawn)
        self.finished = drawn in self.stop_ids
        if self.text is None:
            return "", likely
        text = self.text.push(drawn, self.finished or last)
        self.finished |= self.text.stopped
        return text, likely


class _Sequence:
    """One prompt at one party: its plan, its cache, and at the client its answer."""

    def __init__(self, party: Party, plan: Plan, answer: Answer | None, cache: KVCache) -> None:
        self.party, self.plan, self.answer, self.cache = party, plan, answer, cache
        self.behind = cache.length  # tokens that the cache holds already

    def begin(self) -> None:
        if self.plan.reveal != str(self.party.mode):
            raise UsageError(
                f"a request would reveal {self.plan.reveal}, and this party reveals {self.party.mode}; start every "
                "party with the same --reveal"
            )
        policy, plan, reveals = self.party.make_policy(self.plan.policy), self.plan, self.party.reveals
        prefix = check_ids(list(plan.public_prefix), self.party.model.config.vocab_size)
        if self.behind:
            if prefix:
                raise UsageError("a public prefix comes before all turns of a conversation; begin another")
            go_on(self.cache, plan.prompt_tokens)
        else:
            self.cache.follow(policy, len(prefix) + plan.prompt_tokens)
        if prefix:
            what = f"public prefix: {len(prefix)} tokens, known to all"
            reveals.public(what, "the owner computes their keys and values in the clear")
        more = f", after {self.behind} that the cache holds" if self.behind else ""
        reveals.public(f"prompt length: {plan.prompt_tokens} tokens{more}", "shapes and rounds depend on it")
        limits = f"at most {plan.max_new_tokens} new tokens, prefill by {plan.chunk}, policy {plan.policy}"
        for fact in filter(None, (f"request: {limits}", self.party.mode.fact(plan.temperature))):
            reveals.public(fact, "all parties run the same program")

    def end(self, steps: int) -> None:
        counted = "upper bound of the answer's length" if self.plan.hide_length else "number of generated tokens"
        why = "each token is one decode step that all parties run"
        self.party.reveals.public(f"{counted}: {steps}", why)

    def begin_with_prefix(self) -> None:
        """Brings the public prefix into the cache, if there is one."""
        if ids := self.plan.public_prefix:
            with self.party.engine.meter.operation("public prefix", "prefix"):
                rows = self.party.prefixes.rows(ids, len(ids) + self.plan.prompt_tokens)
                self.cache.begin_with(rows, len(ids))
            self.behind = self.cache.length

    @property
    def chunks(self) -> int:
        return -(-self.plan.prompt_tokens // self.plan.chunk)

    def chunk(self, number: int) -> _Rows:
        """A chunk of the prompt."""
        start = number * self.plan.chunk
        stop = min(start + self.plan.chunk, self.plan.prompt_tokens)
        ids = None if self.answer is None else self.answer.prompt_ids[start:stop]
        return _Rows(ids, Pass(self.cache, stop - start, self.behind + self.plan.prompt_tokens))

    def newest(self) -> _Rows:
        """The last token of the answer."""
        return _Rows(None if self.answer is None else [self.answer.token_id], Pass(self.cache, 1))

    def open(self, logits: Handle) -> torch.Tensor | None:
        """What the client chooses the next token from (``open_choice``), ``None`` elsewhere; logits [1, V]."""
        party = self.party
        return party.reveals.open_choice(party.engine, logits, party.client, party.mode, self.plan.temperature)


class _Rows(NamedTuple):
    """What a sequence brings into a pass. ids: at the client alone."""

    ids: list[int] | None
    place: Pass


def go_on(cache: KVCache, prompt_tokens: int) -> None:
    """Makes ``cache`` ready for as many further tokens of its conversation; what is in it stays as it is.

    Raises UsageError when its policy cannot go on.
    """
    for layer_cache in cache.layers:
        check_chat(layer_cache.policy)
        layer_cache.go_on(cache.length + prompt_tokens, prompt_tokens)


def run(
    party: Party, plan: Plan, answer: Answer | None = None, cache: KVCache | None = None
) -> Generator[Progress | Step, None, None]:
    """``together`` of one prompt."""
    return together(party, [plan], None if answer is None else [answer], None if cache is None else [cache])


@torch.inference_mode()
def together(
    party: Party,
    plans: Sequence[Plan],
    answers: Sequence[Answer] | None = None,
    caches: Sequence[KVCache] | None = None,
) -> Generator[Progress | Step, None, None]:
    """Follows ``plans`` on this party, side by side; at the client, which alone has ``answers``, yields their tokens.

    Once started it must be read to its end, or the parties lose step: see ``Answer.abandoned``. The others wait while
    a reader does something with a token, so one who hides the length reads all before (``PrivateLlama.stream``).

    caches: new ones by default. One that holds rows is gone on with: the prompt follows what it holds.

    Reveals: to the client what the mode says of each generated token; to all the number of steps, unless hidden.
    Cost: the rounds of the longest prompt, then those of the longest answer; the bytes of all.
    Raises: UsageError for a policy that does not fit.
    """
    engine, model, meter = party.engine, party.model, party.engine.meter
    caches = [model.new_cache() for _ in plans] if caches is None else caches
    known: Sequence[Answer | None] = [None] * len(plans) if answers is None else answers
    live = dict(enumerate(map(_Sequence, [party] * len(plans), plans, known, caches)))
    if len(plans) > 1:
        party.reveals.public(f"{len(plans)} prompts at once", "they share rounds")
    for sequence in live.values():
        sequence.begin()
    index = 0
    while live:
        started = perf_counter()
        section = engine.section(f"request {party.requests} token {index}")
        with meter.phase("decode" if index else "prefill"), section:
            if index == 0:
                for sequence in live.values():
                    sequence.begin_with_prefix()
                hidden = yield from _prefill(party, list(live.values()))
            else:
                hidden = _pass(party, [sequence.newest() for sequence in live.values()])
            logits = model.logits(hidden)
            values = _side_by_side(party, [partial(s.open, logits[i : i + 1]) for i, s in enumerate(live.values())])
        asked, ending = {}, set()
        for (place, sequence), value in zip(list(live.items()), values, strict=True):
            last = index + 1 == sequence.plan.max_new_tokens
            if (answer := sequence.answer) is not None:
                assert value is not None, "the client sees what it chooses from"
                ended = answer.finished
                text, likely = answer.take(value, last)
                online = meter.snapshot().online
                reason = "stop" if answer.finished else "length" if last else None
                seconds = perf_counter() - started
                counts = online.rounds, online.bytes_sent
                if not ended:
                    yield Step(index, answer.token_id, text, seconds, *counts, reason, place, likely)
            if last:
                ending.add(place)
            elif not sequence.plan.hide_length:
                asked[place] = sequence.answer
        index += 1
        if asked:
            with meter.phase("decode"), meter.operation("whether the answer goes on", "stop or go"):
                ending |= agree(party, asked)
        for place in sorted(ending):
            live.pop(place).end(index)


def _prefill(party: Party, sequences: list[_Sequence]) -> Generator[Progress, None, Handle]:
    """Brings the prompts into their caches chunk by chunk, at the client yielding ``Progress``; returns the hidden
    states of their last tokens, [B, H].
    """
    done, total = 0, sum(sequence.plan.prompt_tokens for sequence in sequences)
    last: dict[int, Handle] = {}
    for chunk in range(max(sequence.chunks for sequence in sequences)):
        places = [place for place, sequence in enumerate(sequences) if chunk < sequence.chunks]
        rows = [sequences[place].chunk(chunk) for place in places]
        hidden = _pass(party, rows)
        ends = itertools.accumulate(each.place.rows for each in rows)
        last |= {place: hidden[end - 1 : end] for place, end in zip(places, ends, strict=True)}
        done += hidden.shape[0]
        if sequences[0].answer is not None:
            yield Progress(done, total)
    _side_by_side(party, [sequence.cache.end_prompt for sequence in sequences])
    in_order = [last[place] for place in range(len(sequences))]
    return in_order[0] if len(in_order) == 1 else party.engine.cat(in_order, 0)


def _pass(party: Party, rows: Sequence[_Rows]) -> Handle:
    """Hidden states [T, H] of all these rows, which join their caches."""
    ids: list[int] | None = []
    for each in rows:
        ids = None if ids is None or each.ids is None else ids + each.ids
    count = sum(each.place.rows for each in rows)
    given = None if ids is None else torch.tensor(ids)
    one_hot = party.engine.tokens(given, count, party.model.config.vocab_size)
    return party.model.extend_together(one_hot, [each.place for each in rows])


def _side_by_side(party: Party, programs: Sequence[Callable[[], Result]]) -> list[Result]:
    if len(programs) == 1:
        return [programs[0]()]
    with party.engine.meter.operation("prompts side by side", "shared"):
        return party.engine.side_by_side(list(programs))


def agree(party: Party, answers: Mapping[int, Answer | None]) -> set[int]:
    """Which of these answers end here, by their place: the client's public decision, at every compute party.

    answers: by place; ``None`` at all parties but the client.
    """
    mine = None
    if None not in answers.values():
        mine = Decision([place for place, a in answers.items() if a and (a.finished or a.abandoned)] or False)
    if party.transport is not None:
        mine = party.transport.announce(party.client, party.peers, mine, Decision)
    assert mine is not None, "one process is the client too"
    ending = set(mine.stop or ())
    if not ending <= answers.keys():
        assert party.transport is not None, "what it says itself is right"
        raise party.transport.unexpected(party.client, "whether the answer goes on")
    return ending


class Decision(Record, frozen=True):
    """The client's: which of the answers that go on end here, by their place; False: none."""

    stop: Literal[False] | Annotated[list[int], Meta(min_length=1, max_length=limits.PROMPTS)]


def check_chat(policy: eviction.Policy) -> None:
    """Raises UsageError for a policy that cannot go on with a conversation."""
    if not policy.goes_on:
        able = ", ".join(name for name, kind in eviction.POLICIES.items() if kind.goes_on)
        raise UsageError(
            f"policy {policy.name} cannot go on with the cache of an earlier turn: {policy.why_not}; chat with one of "
            f"{able} (--policy)"
        )
