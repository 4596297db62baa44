"""What an evaluation task is: a source of prompts with their answers, and the metric that compares.

Owns the types alone. A task that generates makes `Example`s and is scored by `score`; a task of plain text makes
`Text`s, over which the perplexity is taken. Lengths are counted in tokens of the tokenizer that is handed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from crypten_llm.errors import UsageError
from experiments.tasks.chat import token_ids
from experiments.tasks.metrics import METRICS


@dataclass(frozen=True)
class Example:
    """One prompt and what a good continuation may be.

    Greedy decoding goes on for `max_new_tokens` tokens or up to the end-of-sequence token. `classes` are all labels
    of a classification task; `index` is the example's number in its task. `rendered`: a chat template wrote the prompt,
    special tokens and all. Without `answers` it is compared with what the full cache gives.
    """

    task: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    classes: tuple[str, ...] = ()
    index: int = 0
    rendered: bool = False

    def ids(self, tokenizer) -> list[int]:
        """The prompt's tokens, as the model gets them."""
        return token_ids(tokenizer, self.prompt, self.rendered)


@dataclass(frozen=True)
class Text:
    """A text of which the last `scored` tokens are to be predicted one by one, each from all before it."""

    task: str
    text: str
    index: int = 0
    scored: int = 24

    def ids(self, tokenizer) -> list[int]:
        """The text's tokens, as the model gets them."""
        return token_ids(tokenizer, self.text, rendered=False)


class Task(Protocol):
    """A task that generates; `source` says whose it is ("ruler"), `metric` is a key of `METRICS`."""

    name: str
    source: str
    metric: str
    max_new_tokens: int

    def examples(self, tokenizer, length: int, count: int, seed: int = 0) -> list[Example]:
        """`count` examples of at most `length` prompt tokens, always the same for the same arguments.

        Raises UsageError where the data lack, with the next step.
        """

    def clean(self, prediction: str) -> str:
        """The part of what was generated that is compared."""


@runtime_checkable
class TextTask(Protocol):
    """A task of text alone; its `metric` is "perplexity"."""

    name: str
    source: str
    metric: str

    def texts(self, tokenizer, length: int, count: int, seed: int = 0) -> list[Text]:
        """`count` texts of at most `length` tokens, always the same for the same arguments."""


def score(task: Task, example: Example, prediction: str) -> float:
    """How good a continuation is, in [0, 1], by the metric of the task; the best over the answers.

    `prediction` is what was generated before the end-of-sequence token, decoded.
    """
    return METRICS[task.metric](task.clean(prediction), example.answers, example.classes)


def truncated(prompt: str, tokenizer, length: int) -> str:
    """The first and the last half of an over-long prompt, in tokens, as LongBench cuts its own.

    Cutting may change tokens at the seam; where that makes more than `length` of them, less is kept. Raises UsageError
    where nothing fits.
    """
    ids = _ids(prompt, tokenizer)
    if len(ids) <= length:
        return prompt
    for half in range(length // 2, 0, -1):
        cut = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
        if len(_ids(cut, tokenizer)) <= length:
            return cut
    raise UsageError(f"a prompt of {len(ids):,} tokens cannot be cut to {length}; give a greater length")


def _ids(text: str, tokenizer) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]  # quiet about texts that are about to be cut
