"""One prompt on its way to an answer, at one party: what it brings into a pass, and what comes of a token.

Owns what is alike for both loops over prompts (``generation``, ``scheduler``): the order of events within a prompt,
which is public and the same for every prompt of one length. The client alone has token ids, samples, and decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

import eviction
from crypten_llm.errors import UsageError
from crypten_llm.models.llama import Pass
from crypten_llm.models.tokenizer import check_ids
from crypten_llm.session.grammar import Guide, NotFollowed
from crypten_llm.session.plan import Plan, Turn
from crypten_llm.session.sampling import Logprobs

if TYPE_CHECKING:
    from crypten_llm.models.cache import KVCache
    from crypten_llm.session.party import Party
    from crypten_llm.session.text import Detokenizer
    from eviction.operations import Handle


Value = TypeVar("Value")


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
    """Prompt tokens prefilled so far, streamed before the first ``Step``; prompt: of which one, where one is read."""

    done: int
    total: int
    prompt: int = 0


@dataclass
class Answer:
    """What the client alone knows of an answer in the making.

    choose: the sampler, [V] logits to an id, or ``int`` where an id is all that is shown. stop_ids: tokens that end the
    answer. text: makes text of it and ends it at a stop string, where there is a tokenizer. logprobs: how many of the
    best tokens each step tells, ``None`` for nothing. guide: what ``choose`` is held to, which ends the answer when it
    is whole. abandoned: set when nobody reads on; the answer then ends at the next token, as the others see it. failed:
    why it is none, where the guide could not be followed; it has ended then.
    """

    prompt_ids: list[Any]
    choose: Callable[[torch.Tensor], int]
    stop_ids: tuple[int, ...] = ()
    text: Detokenizer | None = None
    logprobs: int | None = None
    guide: Guide | None = None
    abandoned: bool = False
    token_ids: list[int] = field(default_factory=list)  # those drawn; the model has seen all but the last
    finished: bool = False
    failed: NotFollowed | None = None

    @property
    def token_id(self) -> int:
        """The last token, which the model sees next; it stays the last when the answer has ended."""
        return self.token_ids[-1]

    def take(self, shown: torch.Tensor, last: bool = False) -> tuple[str, Logprobs | None]:
        """Draws the next token, the ``last`` or not; returns what it adds to the text, and its probability.

        A finished answer keeps its tokens, and does all this for nothing: it takes as long.
        """
        try:
            drawn, failed = int(self.choose(shown)), None
        except NotFollowed as error:  # the others take their step all the same
            drawn, failed = int(shown.argmax()), error
        likely = None if self.logprobs is None else Logprobs.of(shown, drawn, self.logprobs)
        if self.finished:
            if self.text:
                self.text.again()
            return "", None
        self.token_ids.append(drawn)
        self.finished = drawn in self.stop_ids or (self.guide is not None and self.guide.is_complete)
        if failed is not None:
            self.finished, self.failed = True, failed
            return "", None
        if self.text is None:
            return "", likely
        text = self.text.push(drawn, self.finished or last)
        self.finished |= self.text.stopped
        return text, likely


class Prompted:
    """One prompt at one party: its plan, its cache, and at the client its answer."""

    def __init__(
        self,
        party: Party,
        plan: Plan,
        answer: Answer | None,
        cache: KVCache,
        place: int = 0,
        turn: Turn | None = None,
    ) -> None:
        """place: among the prompts that share its passes. turn: of the conversation whose cache this is."""
        self.party, self.plan, self.answer, self.cache, self.place = party, plan, answer, cache, place
        self.turn = turn
        self.chunked = self.steps = 0  # chunks of the prompt that the cache holds, and tokens that were drawn
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
            self.cache.follow(policy, len(prefix) + plan.rows)
        if prefix:
            what = f"public prefix: {len(prefix)} tokens, known to all"
            reveals.public(what, "the owner computes their keys and values in the clear")
        more = f", after {self.behind} that the cache holds" if self.behind else ""
        reveals.public(f"prompt length: {plan.prompt_tokens} tokens{more}", "shapes and rounds depend on it")
        if plan.pads:
            reveals.public(f"pads behind the prompt: {plan.pads} rows", "it is read as long as its block was dealt for")
        if self.turn:
            reveals.public(
                f"conversation {self.turn.conversation}, whose cache is kept", "its next turn goes on with it"
            )
        limits = f"at most {plan.max_new_tokens} new tokens, prefill by {plan.chunk}, policy {plan.policy}"
        for fact in filter(None, (f"request: {limits}", self.party.mode.fact(plan.temperature))):
            reveals.public(fact, "all parties run the same program")

    def end(self) -> None:
        counted = "upper bound of the answer's length" if self.plan.hide_length else "number of generated tokens"
        why = "each token is one decode step that all parties run"
        self.party.reveals.public(f"{counted}: {self.steps}", why)

    def begin_with_prefix(self) -> None:
        """Brings the public prefix into the cache, if there is one."""
        if ids := self.plan.public_prefix:
            with self.party.engine.meter.operation("public prefix", "prefix"):
                rows = self.party.prefixes.rows(ids, len(ids) + self.plan.prompt_tokens)
                self.cache.begin_with(rows, len(ids))
            self.behind = self.cache.length

    def end_prompt(self) -> None:
        """To be called when all of the prompt is in the cache; the next token's position is behind its own tokens."""
        self.cache.end_prompt()
        self.cache.length -= self.plan.pads
        if self.turn and not self.turn.keeps_answer:
            self.party.kept[self.turn.conversation] = self.cache.copy()

    @property
    def chunks(self) -> int:
        return -(-self.plan.rows // self.plan.chunk)

    def next_chunk(self) -> Rows:
        """Of the prompt, which is then said to be in the cache."""
        start = self.chunked * self.plan.chunk
        stop = min(start + self.plan.chunk, self.plan.rows)
        self.chunked += 1
        ids = None
        if self.answer is not None:
            ids = self.answer.prompt_ids[start:stop]
            ids += self.answer.prompt_ids[-1:] * (stop - start - len(ids))  # a pad is its last token once more
        return Rows(ids, Pass(self.cache, stop - start, self.behind + self.plan.rows))

    @property
    def last_row(self) -> int | None:
        """Of the chunk that was read last, the prompt's last token, if it is there."""
        place = self.plan.prompt_tokens - 1 - (self.chunked - 1) * self.plan.chunk
        return place if 0 <= place < self.plan.chunk else None

    def newest(self) -> Rows:
        """The last token of the answer."""
        return Rows(None if self.answer is None else [self.answer.token_id], Pass(self.cache, 1))

    @property
    def is_read(self) -> bool:
        """Whether all of the prompt is in the cache."""
        return self.chunked == self.chunks

    @property
    def is_last(self) -> bool:
        """Whether the last token that it may have was drawn."""
        return self.steps == self.plan.max_new_tokens

    def take(self, value: torch.Tensor | None, started: float) -> Step | None:
        """The next token, of which ``value`` was opened; what to tell of it, at the client, unless the answer has
        ended. started: when its step began.
        """
        self.steps += 1
        if (answer := self.answer) is None:
            return None
        assert value is not None, "the client sees what it chooses from"
        ended = answer.finished
        text, likely = answer.take(value, self.is_last)
        online = self.party.engine.meter.snapshot().online
        reason = "stop" if answer.finished else "length" if self.is_last else None
        seconds, counts = perf_counter() - started, (online.rounds, online.bytes_sent)
        if ended:
            return None
        return Step(self.steps - 1, answer.token_id, text, seconds, *counts, reason, self.place, likely)

    def open(self, logits: Handle) -> torch.Tensor | None:
        """What the client chooses the next token from (``open_choice``), ``None`` elsewhere; logits [1, V]."""
        party = self.party
        asked = logits, party.client, party.mode, self.plan.temperature, party.thin
        return party.reveals.open_choice(party.engine, *asked)


class Rows(NamedTuple):
    """What a sequence brings into a pass. ids: at the client alone; at a helper a thin client's keys of them."""

    ids: list[Any] | None
    part: Pass


def go_on(cache: KVCache, prompt_tokens: int) -> None:
    """Makes ``cache`` ready for as many further tokens of its conversation; what is in it stays as it is.

    Raises UsageError when its policy cannot go on.
    """
    for layer_cache in cache.layers:
        check_chat(layer_cache.policy)
        layer_cache.go_on(cache.length + prompt_tokens, prompt_tokens)


def extend(party: Party, rows: Sequence[Rows]) -> Handle:
    """Hidden states [T, H] of all these rows, which join their caches."""
    return party.model.extend_together(given(party, rows), [each.part for each in rows])


def given(party: Party, rows: Sequence[Rows]) -> Handle:
    """The tokens of all these rows, [T, V]."""
    ids: list[Any] | None = []
    for each in rows:
        ids = None if ids is None or each.ids is None else ids + each.ids
    count = sum(each.part.rows for each in rows)
    if party.thin is not None:
        points = party.thin.points(ids, count, party.model.config.vocab_size)
        return party.engine.tokens_of(points, count, party.model.config.vocab_size)
    return party.engine.tokens(None if ids is None else torch.tensor(ids), count, party.model.config.vocab_size)


def draw(party: Party, prompted: Sequence[Prompted], hidden: Handle) -> list[torch.Tensor | None]:
    """What each client chooses its next token from; hidden: states [B, H] of the last token of each."""
    logits = party.model.logits(hidden)
    return side_by_side(party, [partial(each.open, logits[i : i + 1]) for i, each in enumerate(prompted)])


def side_by_side(party: Party, programs: Sequence[Callable[[], Value]]) -> list[Value]:
    """What these return, which share their rounds."""
    if len(programs) == 1:
        return [programs[0]()]
    with party.engine.meter.operation("prompts side by side", "shared"):
        return party.engine.side_by_side(list(programs))


def check_chat(policy: eviction.Policy) -> None:
    """Raises UsageError for a policy that cannot go on with a conversation."""
    if not policy.goes_on:
        able = ", ".join(name for name, kind in eviction.POLICIES.items() if kind.goes_on)
        raise UsageError(
            f"policy {policy.name} cannot go on with the cache of an earlier turn: {policy.why_not}; chat with one of "
            f"{able} (--policy)"
        )
