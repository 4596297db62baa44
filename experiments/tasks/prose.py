"""Natural text (`natural`) as a task: its perplexity, and whether a policy's continuation is the full cache's.

Nothing here has a right answer of its own: a text's next tokens are those that it has, a continuation is compared with
what the same model gives with its full cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from random import Random
from typing import ClassVar

from crypten_llm.errors import UsageError
from experiments.tasks import natural
from experiments.tasks.base import Example, Text
from experiments.tasks.chat import Frame
from experiments.tasks.synthetic.drafts import longest

SCORED = 64  # tokens of a text over which its loss is taken


@dataclass(frozen=True)
class Prose:
    """Texts for perplexity: each is scored at its last tokens, and these are another stretch in each."""

    name: str = "prose"
    metric: str = "perplexity"
    data: str | None = None
    source: ClassVar[str] = "prose"

    def reading(self, data: str | None, offline: bool) -> Prose:
        return replace(self, data=data)

    def texts(self, tokenizer, length: int, count: int, seed: int = 0) -> list[Text]:
        """As many as there are, up to `count`; the text is what it is, whatever the seed."""
        whole = "\n\n".join(chain.from_iterable(natural.books(self.data)))
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        ends = range(length, len(ids) + 1, SCORED)[:count]
        return [Text(self.name, _cut(ids, end, tokenizer, length), i, SCORED) for i, end in enumerate(ends)]


def _cut(ids: list[int], end: int, tokenizer, length: int) -> str:
    """What ends at a token and has at most `length`, those at its beginning made anew."""
    for start in range(end - length, end):
        text = tokenizer.decode(ids[start:end])
        if len(Text("", text).ids(tokenizer)) <= length:
            return text
    raise UsageError(f"no text fits into {length} tokens; ask for more")


@dataclass(frozen=True)
class Continuation:
    """Prompts of natural text; the answer, greedy, is compared with the full cache's.

    asks: what is asked about the text, before and behind it, in the model's chat template; without it the text goes on.
    """

    name: str
    metric: str
    max_new_tokens: int
    asks: str = ""
    data: str | None = None
    source: ClassVar[str] = "prose"

    def reading(self, data: str | None, offline: bool) -> Continuation:
        return replace(self, data=data)

    def examples(self, tokenizer, length: int, count: int, seed: int = 0) -> list[Example]:
        return [self._example(tokenizer, length, i, Random(f"{seed} {i}")) for i in range(count)]

    def _example(self, tokenizer, length: int, index: int, random: Random) -> Example:
        sentences, frame = natural.first_words(natural.sentences(random, self.data), length), Frame(tokenizer)

        def prompt(words: int) -> str:
            text = " ".join(natural.first_words(iter(sentences), words))
            return frame.around(f"{self.asks}\n\n{text}\n\n{self.asks}", "Summary:") if self.asks else text

        def example(words: int) -> Example:
            rendered = bool(self.asks) and frame.rendered
            return Example(self.name, prompt(words), (), self.max_new_tokens, index=index, rendered=rendered)

        words = longest(lambda words: len(example(words).ids(tokenizer)) <= length, 1, length)
        if words is None:
            raise UsageError(f"a prompt of {self.name} has more than {length} tokens; ask for more")
        return example(words)

    def clean(self, prediction: str) -> str:
        return prediction


TASKS = (
    Prose(),
    Continuation("continuation/exact", "exact_match", 32),
    Continuation("continuation/rouge_l", "rouge_l", 64),
    Continuation("continuation/summary", "rouge_l", 64, "Summarise the text in two sentences."),
)
