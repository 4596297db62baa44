"""From a body to requests of the session: which of its fields say what.

Owns the differences between the two interfaces. What a body leaves open is as everywhere in this project: the client's
own copy of the model's files says how tokens are chosen, and an answer that is asked for as a whole hides its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crypten_llm.serving.bodies import Body, ChatBody, TextBody
from crypten_llm.serving.calling import Calling
from crypten_llm.serving.refusals import Refusal
from crypten_llm.session.request import Request, rows_of

if TYPE_CHECKING:
    from crypten_llm.session.api import PrivateLlama
    from crypten_llm.session.request import Asked

MOST_ANSWERS = 16  # of a request: prompts times n


@dataclass(frozen=True)
class Usual:
    """What holds for requests that do not say otherwise: fields of ``Request``."""

    policy: str = "full"
    prefill_chunk: int = 128
    hide_length: bool | None = None  # not given: of private answers that are not streamed
    public_system: bool = False


def prepare(llama: PrivateLlama, body: ChatBody | TextBody, usual: Usual) -> tuple[list[Asked], Calling | None]:
    """What is to be run, and for a conversation how its answers are read.

    Raises UsageError or Refusal for what cannot be asked, or what this model or this machine cannot run.
    """
    calling = None
    if isinstance(body, ChatBody):
        calling = Calling.of(body, llama.tokenizer if llama.has_tokenizer else None)
    asked = [llama.prepare(request) for request in _requests(body, usual, llama.protocol.is_private, calling)]
    for each in asked:
        llama.party.check_plans([each.plan])
    return asked, calling


def _requests(body: ChatBody | TextBody, usual: Usual, is_private: bool, calling: Calling | None) -> list[Request]:
    """One for each choice of the answer, those of a prompt after one another.

    Raises UsageError or Refusal for what cannot be asked.
    """
    count = body.n or 1
    if isinstance(body, ChatBody):
        assert calling is not None, "it is made of every conversation"
        public = body.public_system or usual.public_system
        if public and calling.functions:
            raise Refusal(400, "the system message is public here, and tools would stand in it; leave one of them out")
        within = {"grammar": calling.grammar(), "tools": calling.tools()}
        prompts: list[dict[str, Any]] = [
            {"messages": calling.messages(body.messages), "public_system": public, **within}
        ]
    else:
        prompts = [{**prompt, "public_prefix": body.public_prefix} for prompt in _prompts(body.prompt)]
    if len(prompts) * count > MOST_ANSWERS:
        raise Refusal(400, f"{len(prompts) * count} answers are asked for; ask for {MOST_ANSWERS} at most")
    shared = _shared(body, usual, is_private)
    made = []
    for prompt in prompts:
        for number in range(count):
            seed = None if body.seed is None else (body.seed + number) % 2**63
            made.append(Request(**prompt, **shared, seed=seed))
    return made


def _shared(body: ChatBody | TextBody, usual: Usual, is_private: bool) -> dict[str, Any]:
    drawn = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    hides = body.hide_length if body.hide_length is not None else usual.hide_length
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return {
        "max_new_tokens": _limit(body),
        "do_sample": None if all(value is None for value in drawn.values()) else True,
        **drawn,
        "repetition_penalty": body.repetition_penalty,
        "stop": tuple(stops),
        "logprobs": _logprobs(body),
        "policy": body.policy or usual.policy,
        "prefill_chunk": usual.prefill_chunk,
        "hide_length": is_private and not body.stream if hides is None else hides,
    }


def _limit(body: Body) -> int | None:
    newer = getattr(body, "max_completion_tokens", None)
    if None not in (newer, body.max_tokens) and newer != body.max_tokens:
        raise Refusal(400, f"max_tokens is {body.max_tokens} and max_completion_tokens {newer}; give one of them")
    return body.max_tokens if newer is None else newer


def _logprobs(body: ChatBody | TextBody) -> int | None:
    if isinstance(body, TextBody):
        return body.logprobs
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs belongs to logprobs; say logprobs true as well, or leave it out")
    return (body.top_logprobs or 0) if body.logprobs else None


def _prompts(prompt: Any) -> list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"prompt": prompt}]
    if isinstance(prompt, list) and prompt and all(isinstance(each, str) for each in prompt):
        return [{"prompt": each} for each in prompt]
    rows = rows_of(prompt) if isinstance(prompt, list) else []
    if not rows or not all(rows) or any(type(token) is not int for row in rows for token in row):
        raise Refusal(400, "prompt must be a text, a list of token ids, or a list of either")
    return [{"input_ids": row} for row in rows]
