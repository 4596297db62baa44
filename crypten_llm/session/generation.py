"""Prefill and decode: the loop that turns a secret prompt into tokens that only the client reads.

Owns the order of events, which is public and the same for every prompt of one length. All compute parties run it
together; the client alone has token ids, samples, and decides to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch

import eviction
from crypten_llm.errors import UsageError

if TYPE_CHECKING:
    from crypten_llm.models.cache import KVCache
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.party import Party
    from eviction.operations import Handle


DEFAULT_CHUNK = 128


@dataclass(frozen=True)
class Plan:
    """The public shape of one request, which every compute party follows.

    prompt_tokens: length of the prompt. max_new_tokens: upper bound of the answer. chunk: rows per prefill pass.
    hide_length: run all ``max_new_tokens`` steps alike, so that nobody but the client learns the length of the answer.
    policy: the eviction policy as text, such as "mpcache" or "mpcache(static=0.25)"; kept in one canonical form, which
    parties compare.

    Raises UsageError for a policy that there is not.
    """

    prompt_tokens: int
    max_new_tokens: int
    chunk: int = DEFAULT_CHUNK
    hide_length: bool = False
    policy: str = "full"

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", str(parse_policy(self.policy)))

    def check(self, config: LlamaConfig) -> Plan:
        """Itself, if the model ``config`` can run it; raises UsageError otherwise."""
        if self.prompt_tokens < 1:
            raise UsageError("the prompt is empty; give at least one token")
        needed, context = self.prompt_tokens + self.max_new_tokens, config.context
        if needed > context:
            raise UsageError(
                f"the prompt has {self.prompt_tokens} tokens and {self.max_new_tokens} more are asked for, but the "
                f"model's context is {context}; shorten the prompt by {needed - context} tokens or lower "
                "max_new_tokens (--max-new-tokens)"
            )
        shortest = min((window for window in config.windows if window is not None), default=context)
        if needed > shortest and parse_policy(self.policy).acts:
            raise UsageError(
                f"policy {self.policy} chooses among all rows, but attention of this model looks back {shortest} "
                f"tokens at most, and prompt and answer together may have {needed}; use policy full (--policy full) "
                f"or shorten them by {needed - shortest}"
            )
        return self


@dataclass(frozen=True)
class Step:
    """One generated token, as streamed to command line, API and notebooks.

    text: what this token adds to the answer (the client holds back bytes of an unfinished character).
    seconds: for this step; the first one holds the prefill. rounds, bytes_sent: online, this party, so far.
    finish_reason: ``None``, ``"stop"`` or ``"length"``.
    """

    index: int
    token_id: int
    text: str
    seconds: float
    rounds: int
    bytes_sent: int
    finish_reason: str | None = None


@dataclass(frozen=True)
class Progress:
    """Prompt tokens prefilled so far, streamed before the first ``Step``."""

    done: int
    total: int


@dataclass
class Answer:
    """What the client alone knows of an answer in the making.

    choose: the sampler, [V] logits to an id. stop_ids: tokens that end the answer. abandoned: set when nobody reads
    on; the answer then ends at the next token, as the others see it.
    """

    prompt_ids: list[int]
    choose: Callable[[torch.Tensor], int]
    stop_ids: tuple[int, ...] = ()
    abandoned: bool = False
    token_id: int = -1
    finished: bool = False

    def take(self, logits: torch.Tensor) -> None:
        """Draws the next token. A finished answer keeps its stop token, and draws all the same: it takes as long."""
        drawn = int(self.choose(logits))
        if not self.finished:
            self.token_id, self.finished = drawn, drawn in self.stop_ids


@torch.inference_mode()
def run(
    party: Party, plan: Plan, answer: Answer | None = None, cache: KVCache | None = None
) -> Generator[Progress | Step, None, None]:
    """Follows ``plan`` on this party; at the client, which alone has an ``answer``, yields each of its tokens.

    Once started it must be read to its end, or the parties lose step: see ``Answer.abandoned``. The others wait while
    a reader does something with a token, so one who hides the length reads all before (``PrivateLlama.stream``).

    cache: an empty one of the model's, for who wants to look at it; a new one by default.

    Reveals: to the client the logits of each generated token; to all the number of steps, unless ``hide_length``.
    """
    engine, model, meter = party.engine, party.model, party.engine.meter
    cache = model.new_cache() if cache is None else cache
    cache.follow(party.make_policy(plan.policy), plan.prompt_tokens)
    party.reveals.public(f"prompt length: {plan.prompt_tokens} tokens", "shapes and rounds depend on it")
    limits = f"at most {plan.max_new_tokens} new tokens, prefill by {plan.chunk}, policy {plan.policy}"
    party.reveals.public(f"request: {limits}", "all parties run the same program")
    for index in range(plan.max_new_tokens):
        started, last = perf_counter(), index + 1 == plan.max_new_tokens
        section = engine.section(f"request {party.requests} token {index}")
        with meter.phase("decode" if index else "prefill"), section:
            if index == 0:
                logits = yield from _prefill(party, plan, cache, answer)
            else:
                logits = model(_tokens(party, None if answer is None else [answer.token_id], 1), cache)
            value = _open(party, logits)
        if answer is not None:
            assert value is not None, "the client sees the logits"
            ended = answer.finished
            answer.take(value[0])
            online = meter.snapshot().online
            reason = "stop" if answer.finished else "length" if last else None
            seconds = perf_counter() - started
            if not ended:
                yield Step(index, answer.token_id, "", seconds, online.rounds, online.bytes_sent, reason)
        if not last and not plan.hide_length:
            with meter.phase("decode"), meter.operation("whether the answer goes on", "stop or go"):
                if agree(party, None if answer is None else answer.finished or answer.abandoned):
                    break
    counted = "upper bound of the answer's length" if plan.hide_length else "number of generated tokens"
    party.reveals.public(f"{counted}: {index + 1}", "each token is one decode step that all parties run")


def _prefill(party: Party, plan: Plan, cache: KVCache, answer: Answer | None) -> Generator[Progress, None, Handle]:
    """Brings the prompt into ``cache`` chunk by chunk, yielding ``Progress``; returns the last row's logits."""
    for start in range(0, plan.prompt_tokens, plan.chunk):
        stop = min(start + plan.chunk, plan.prompt_tokens)
        rows = _tokens(party, None if answer is None else answer.prompt_ids[start:stop], stop - start)
        last = party.model.extend(rows, cache, seq_len=plan.prompt_tokens)[-1:]
        if answer is not None:
            yield Progress(stop, plan.prompt_tokens)
    cache.end_prompt()
    return party.model.logits(last)


def agree(party: Party, flag: bool | None) -> bool:
    """The client's public ``flag``, at every compute party; ``None`` at the others."""
    if party.transport is None:
        assert flag is not None, "one process is the client too"
        return flag
    message = party.transport.announce(party.client, party.peers, None if flag is None else {"stop": flag})
    if not isinstance(message.get("stop"), bool):
        raise party.transport.unexpected(party.client, "whether the answer goes on")
    return message["stop"]


def parse_policy(text: str, *assignments: str) -> eviction.Policy:
    """The policy that ``text`` names, with more ``setting=value`` texts.

    Raises UsageError when there is none of that name, or for a setting that it has not or that does not fit.
    """
    try:
        return eviction.parse(text, *assignments)
    except eviction.PolicyError as error:
        raise UsageError(str(error)) from None


def _tokens(party: Party, ids: list[int] | None, count: int) -> Handle:
    return party.engine.tokens(None if ids is None else torch.tensor(ids), count, party.model.config.vocab_size)


def _open(party: Party, logits: Handle) -> torch.Tensor | None:
    with party.engine.meter.operation("reveal of the logits to the client", "reveal"):
        why = "the client samples its own answer"
        return party.reveals.open_to_client(party.engine, logits, party.client, "logits of each generated token", why)
