"""What is asked of a session and what comes back: requests, results, and the text of an answer in the making.

Owns what can be refused without a model.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import encode_chat, encode_prompt
from crypten_llm.session.generation import DEFAULT_CHUNK, Plan, parse_policy
from crypten_llm.session.report import Cost
from crypten_llm.session.sampling import SamplingConfig


@dataclass(frozen=True)
class Request:
    """What ``generate`` and ``stream`` take; what can be refused without a model is refused here.

    prompt or input_ids: text, or token ids used as they are. max_new_tokens, do_sample, temperature, top_k, top_p,
    seed: as in transformers; without ``do_sample`` decoding is greedy. hide_length: run all steps alike and show the
    answer after the last, so that only the client knows where it ended. prefill_chunk: prompt tokens per pass.
    policy: a KV-cache eviction policy. chat: the prompt is what a user says, and the tokenizer's chat template is
    applied to it. messages: or a whole conversation as transformers takes it, [{"role": "user", "content": text}, ...].

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
    chat: bool = False
    messages: list[dict] | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.prompt, self.input_ids, self.messages)) != 1:
            raise UsageError(
                "give either a prompt, input_ids or messages (in a command --prompt, --prompt-file or --prompt-ids)"
            )
        if self.chat and self.prompt is None:
            raise UsageError("chat applies the chat template to a text; give a prompt (--prompt or --prompt-file)")
        if self.messages is not None:
            _check_messages(self.messages)
        if self.prompt is not None and not isinstance(self.prompt, str):
            raise UsageError(
                f"the prompt is a {type(self.prompt).__name__}; give one text, and one request after the other (token "
                "ids are input_ids, a conversation is messages)"
            )
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

    def ids(self, tokenizer: Any) -> list[int]:
        """Token ids of what is asked; ``tokenizer()`` gives the client's, where one is needed."""
        if self.messages is not None or self.chat:
            return encode_chat(tokenizer(), self.messages or [{"role": "user", "content": self.prompt}])
        return encode_prompt(tokenizer(), self.prompt) if self.prompt is not None else one_row(self.input_ids)

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


class Detokenizer:
    """Text of a growing list of tokens, holding back bytes of a character that is not complete yet."""

    def __init__(self, tokenizer: Any) -> None:
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


def one_row(ids: Any) -> list[int]:
    """Ids as a list; tensors and a batch of one are taken as transformers takes them."""
    ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    if not any(isinstance(row, list) for row in ids):
        return ids
    if len(ids) > 1:
        raise UsageError(f"input_ids holds {len(ids)} prompts; ask one at a time")
    return ids[0]


def check_ids(ids: list[int], vocab_size: int) -> list[int]:
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise UsageError(f"token id {token!r} is not in the vocabulary; ids go from 0 to {vocab_size - 1}")
    return ids


def _check_messages(messages: Any) -> None:
    """Raises UsageError for what is no conversation."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError(f"messages is {messages!r}; give a list of {{'role': ..., 'content': ...}}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UsageError(f"{message!r} is no message; give {{'role': 'user', 'content': TEXT}}")
