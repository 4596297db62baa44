"""Answers in the shapes of OpenAI's interface, whole and in pieces, with what they cost and revealed beside them.

Owns the shapes. ``crypten_llm`` is a field of our own, which clients of that interface pass over.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from crypten_llm.serving.bodies import ChatBody, TextBody
from crypten_llm.serving.calling import Calling
from crypten_llm.serving.calls import Part, Piece, Reader
from crypten_llm.serving.job import Ended
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.prompted import Step
from crypten_llm.session.request import Result
from crypten_llm.session.sampling import Logprobs


@dataclass
class Writer:
    """Writes the answer to one body. model: the name that it goes by. calling: where functions may be called."""

    body: ChatBody | TextBody
    llama: PrivateLlama
    model: str
    calling: Calling | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.is_chat = isinstance(self.body, ChatBody)
        self.id = ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12)
        self._offsets: dict[int, int] = {}  # characters of each choice so far
        self._readers: dict[int, Reader] = {}
        self._count = self.body.n or 1

    def whole(self, ended: Ended) -> dict[str, Any]:
        """The answer that is not streamed."""
        results = ended.results
        return {
            **self._head("chat.completion" if self.is_chat else "text_completion"),
            "choices": [self._choice(index, result) for index, result in enumerate(results)],
            "usage": self.usage(results),
            "crypten_llm": self.facts(ended),
        }

    def first(self, index: int) -> dict[str, Any] | None:
        """What comes before a choice's first piece; nothing of a text."""
        return self._piece(index, {"role": "assistant", "content": ""}) if self.is_chat else None

    def piece(self, step: Step) -> dict[str, Any] | None:
        """What a token adds; None where that is nothing yet."""
        likely = None if step.logprobs is None else [step.logprobs]
        if (reader := self._reader(step.prompt)) is None:
            what: dict | str = {"content": step.text} if self.is_chat else step.text
            return None if not step.text and likely is None else self._piece(step.prompt, what, likely)
        read = reader.read(step.text)
        return None if not read and likely is None else self._piece(step.prompt, _delta(read), likely)

    def ending(self, ended: Ended) -> list[dict[str, Any]]:
        """The last pieces: why each choice ended, with the last of them what all cost and revealed; then usage, where
        that was asked for.
        """
        results = ended.results
        pieces = []
        for index, result in enumerate(results):
            rest = Piece() if (reader := self._reader(index)) is None else reader.read("", last=True)
            if rest:
                pieces.append(self._piece(index, _delta(rest)))
            nothing: dict | str = {} if self.is_chat else ""
            pieces.append(self._piece(index, nothing, reason=self._reason(result, reader)))
        pieces[-1]["crypten_llm"] = self.facts(ended)
        if self.body.stream_options and self.body.stream_options.include_usage:
            pieces.append({**self._head(self._kind), "choices": [], "usage": self.usage(results)})
        return pieces

    def usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """Tokens: of each prompt once, however many answers it has; ``cached_tokens``: those of a kept conversation."""
        prompts = results[:: self._count]
        cached = sum(result.cached_tokens for result in prompts)
        prompt = cached + sum(result.prompt_tokens + result.public_tokens for result in prompts)
        completion = sum(len(result.token_ids) for result in results)
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}

    def facts(self, ended: Ended) -> dict[str, Any]:
        """Rounds and bytes as counted, seconds, and the ledger: what was revealed to whom, with the load's part. All
        that passed meanwhile; beside: how many other answers grew at the same time, at most.
        """
        cost, first = ended.cost, ended.results[0]
        return {
            "engine": first.engine,
            "policy": first.policy,
            "decoding": first.decoding,
            "rounds": cost.rounds(),
            "bytes_sent": cost.bytes_sent(),
            "dealer_bytes": cost.dealer_bytes(),
            "seconds": {phase: cost.seconds(phase) for phase in ("prefill", "decode")},
            "from_stock": bool(first.block),
            "beside": max(0, max(result.prompts for result in ended.results) - len(ended.results)),
            "revealed": ended.revealed,
            "outside": first.outside,
            "receipt": None if first.receipt is None else f"/v1/receipts/{self.id}",
        }

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _piece(
        self, index: int, what: dict | str, likely: list[Logprobs] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "logprobs": self._likely(index, likely), "finish_reason": reason}
        return {**self._head(self._kind), "choices": [{**choice, "delta" if self.is_chat else "text": what}]}

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        said: dict[str, Any] = {"text": result.text}
        reader = self._reader(index)
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": result.text, "refusal": None}}
        if reader is not None:
            read = reader.read(result.text, last=True)
            said["message"]["content"] = read.content or (None if read.calls else "")
            if read.calls:
                said["message"]["tool_calls"] = [_call(part) for part in read.calls]
        likely = self._likely(index, result.logprobs)
        return {"index": index, **said, "logprobs": likely, "finish_reason": self._reason(result, reader)}

    def _reader(self, index: int) -> Reader | None:
        """Of this choice, where it may call functions."""
        if self.calling is None or not self.calling.functions:
            return None
        return self._readers.setdefault(index, Reader(self.calling.format, self.calling.leads))

    def _reason(self, result: Result, reader: Reader | None) -> str:
        called = reader is not None and reader.count and result.finish_reason == "stop"
        return "tool_calls" if called else result.finish_reason

    def _likely(self, index: int, steps: list[Logprobs] | None) -> dict[str, Any] | None:
        if steps is None:
            return None
        if self.is_chat:
            content = []
            for step in steps:
                top = [self._token(token, value) for token, value in step.top]
                content.append({**self._token(step.token_id, step.logprob), "top_logprobs": top})
            return {"content": content, "refusal": None}
        texts, offset = [self._text(step.token_id) for step in steps], self._offsets.get(index, 0)
        offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        self._offsets[index] = offset + sum(map(len, texts))
        return {
            "tokens": texts,
            "token_logprobs": [step.logprob for step in steps],
            "top_logprobs": [{self._text(token): value for token, value in step.top} for step in steps],
            "text_offset": offsets,
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self._text(token_id)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, token_id: int) -> str:
        return self.llama.tokenizer.decode([token_id]) if self.llama.has_tokenizer else str(token_id)


def _delta(read: Piece) -> dict[str, Any]:
    found: dict[str, Any] = {"content": read.content} if read.content else {}
    if read.calls:
        found["tool_calls"] = [{"index": part.index, **_call(part)} for part in read.calls]
    return found


def _call(part: Part) -> dict[str, Any]:
    """A call, or what is added to one."""
    function = {"arguments": part.arguments}
    if part.name is None:
        return {"function": function}
    return {"id": part.id, "type": "function", "function": {"name": part.name, **function}}
