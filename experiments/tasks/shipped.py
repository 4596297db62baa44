"""The tasks that the shipped model was trained on, by `experiments.model.corpus`, at any length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.model.corpus import MAX_ANSWER_TOKENS, Encoder, samples
from experiments.tasks.base import Example, Text


@dataclass(frozen=True)
class CorpusTask:
    """Held-out questions of one task of the corpus. With the shipped tokenizer no prompt exceeds its length."""

    name: str
    metric: str = "exact_match"
    max_new_tokens: int = MAX_ANSWER_TOKENS
    source: ClassVar[str] = "shipped"

    def examples(self, tokenizer, length: int, count: int, seed: int = 0) -> list[Example]:
        drawn = samples(self.name, length, count, Encoder(tokenizer), seed=seed)
        return [
            Example(self.name, one.prompt, (one.answer,), self.max_new_tokens, index=i) for i, one in enumerate(drawn)
        ]

    def clean(self, prediction: str) -> str:
        return prediction


@dataclass(frozen=True)
class Stories:
    """Held-out prose of the corpus, for perplexity."""

    name: str = "stories"
    metric: str = "perplexity"
    source: ClassVar[str] = "shipped"

    def texts(self, tokenizer, length: int, count: int, seed: int = 0) -> list[Text]:
        drawn = samples(self.name, length, count, Encoder(tokenizer), seed=seed)
        return [Text(self.name, one.prompt, i) for i, one in enumerate(drawn)]


TASKS = (
    *map(CorpusTask, ("passkey", "key_value", "one_hop", "two_hop", "few_shot", "span_copy", "variables")),
    Stories(),
)
