"""Synthetic English documents with questions whose answers stand in the text.

Every sample is a document of seeded prose with facts spread uniformly over it, followed by a question. What a document
is about is a task's business (`drafts`); placing the facts, filling up to the length wanted and making text of it all
is common to all, and owned here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from experiments.model.drafts import TASKS
from experiments.model.writer import Draft, Question, Writer

MAX_ANSWER_TOKENS = 24
"""Room for every answer and the end-of-sequence token after it; the longest answers have 16."""


@dataclass(frozen=True)
class Sample:
    """One prompt with its expected continuation.

    `facts` are the (start, end) character spans, within `prompt`, of the sentences that the answer follows from.
    `answer` begins with a space and is followed by the end-of-sequence token; it is empty for plain stories.
    """

    task: str
    prompt: str
    answer: str
    facts: tuple[tuple[int, int], ...] = ()


class Encoder:
    """Token ids of ASCII text, without the leading `<s>`, through a cache of words.

    Equal to the tokenizer on text of this corpus (tests hold it to that) and some ten times faster, which is what
    lets documents be written while the model trains.
    """

    _words = re.compile(r"'s|[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s")

    def __init__(self, tokenizer):
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self._tokenizer, self._cache = tokenizer, {}

    def __call__(self, text: str) -> list[int]:
        out, known = [], self._cache
        for word in self._words.findall(text):
            ids = known.get(word)
            if ids is None:
                ids = known[word] = self._tokenizer(word, add_special_tokens=False)["input_ids"]
            out += ids
        return out


@dataclass
class Document:
    """Pieces in order, as (text, answer, index of the fact or None), and the draft's questions."""

    pieces: list[tuple[str, str, int | None]]
    questions: list[Question] = field(default_factory=list)


def lay_out(writer: Writer, draft: Draft, encode: Encoder, tokens: int, questions: list[Question]) -> Document:
    """Spreads the facts of `draft` uniformly over prose, in at most `tokens` tokens, questions included."""
    ends = sum(len(encode(q.prompt)) for q in questions) + sum(len(encode(q.answer)) + 1 for q in questions[:-1])
    left = tokens - 1 - len(encode(draft.opening)) - ends - sum(len(encode(fact)) for fact in draft.facts)
    prose = []
    while True:
        text, answer = draft.prose()
        left -= len(encode(text + answer))
        if left < 0:
            break
        prose.append((text, answer, None))
    order = list(range(len(draft.facts)))
    if not draft.ordered:
        writer.rng.shuffle(order)
    total = len(prose) + len(order)
    slots = set(writer.rng.sample(range(total), len(order)))
    facts, rest = iter(order), iter(prose)
    pieces = [(draft.opening, "", None)]
    for i in range(total):
        if i in slots:
            fact = next(facts)
            pieces.append((draft.facts[fact], "", fact))
        else:
            pieces.append(next(rest))
    return Document(pieces, questions)


def sample(task: str, tokens: int, index: int, encode: Encoder, split: str = "heldout", seed: int = 0) -> Sample:
    """Sample number `index` of a task; its prompt has at most `tokens` tokens, and mostly within 15 of it.

    Raises ValueError for an unknown task or split.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: choose from {', '.join(TASKS)}")
    writer = Writer(f"{seed}/{task}/{tokens}/{index}", split)
    draft = TASKS[task](writer, tokens)
    asked = draft.questions[:1]
    document = lay_out(writer, draft, encode, tokens, asked)
    prompt, spans = "", {}
    for text, answer, fact in document.pieces:
        if fact is not None:
            spans[fact] = (len(prompt) + 1, len(prompt) + len(text))
        prompt += text + answer
    if not asked:
        return Sample(task, prompt, "")
    return Sample(task, prompt + asked[0].prompt, asked[0].answer, tuple(spans[i] for i in asked[0].facts))


def samples(task: str, tokens: int, count: int, encode: Encoder, seed: int = 0) -> Iterator[Sample]:
    """The first `count` held-out samples of a task."""
    return (sample(task, tokens, i, encode, seed=seed) for i in range(count))
