"""What the tasks of the corpus are written with: seeded prose, facts, questions.

Held-out samples differ from training samples twice: by seed, and by content. A fact joins two things (a name and a
city, a record and its number); a hash puts one joint in eight on the held-out side, held-out documents state only
such facts, training documents never do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from zlib import crc32

from experiments.model.lexicon import FILLER, POOLS, RELATIONS

SPLITS = ("train", "heldout")
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Question:
    """`prompt` as written after the document, `answer`, and the indices into `Draft.facts` that it needs.

    `bridge` is the word between two hops, which training may ask the middle of the model to hold.
    """

    prompt: str
    answer: str
    facts: tuple[int, ...] = ()
    bridge: str = ""


@dataclass
class Draft:
    """What a task hands over: the pieces of a document before they are put in order.

    `questions[0]` is the task's own question, the one asked in evaluation; the others serve training alone.
    `prose` is called for one more piece, a text and the answer that ends it (mostly empty), until the document is
    full. Facts keep their order when `ordered`.
    """

    opening: str
    facts: list[str]
    questions: list[Question]
    prose: Callable[[], tuple[str, str]]
    ordered: bool = False


def is_held_out(*parts: str) -> bool:
    """Whether a fact that joins `parts` belongs to the held-out side."""
    return crc32("|".join(parts).encode()) % HELD_OUT_ONE_IN == 0


@cache
def partners(split: str, relation: str, subject: str) -> tuple[str, ...]:
    """Objects that `subject` may have under `relation` in `split`."""
    objects = POOLS[RELATIONS[relation][1]]
    held_out = split == "heldout"
    # A small pool may have no held-out partner: such a subject then gets no fact of this relation.
    return tuple(o for o in objects if o != subject and is_held_out(relation, subject, o) == held_out)


def _compile(pattern: str) -> tuple[str, tuple[tuple[str, ...], ...]]:
    pools = tuple(POOLS[name] for name in re.findall(r"{(\w+)}", pattern))
    return re.sub(r"{\w+}", "%s", pattern), pools


_FILLER = [_compile(pattern) for pattern in FILLER]
_with_n = re.compile(r"\b([Aa]) (?=[aeiou])").sub


def _articles(text: str) -> str:
    """`a otter` becomes `an otter`."""
    return _with_n(r"\1n ", text)


class Writer:
    """A seeded source of choices for one document of one split."""

    def __init__(self, seed: str, split: str):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        self.rng, self.split = Random(f"{seed}/{split}"), split
        self.choice, self.random = self.rng.choice, self.rng.random

    def sentence(self) -> str:
        """One sentence of prose."""
        pattern, pools = self.choice(_FILLER)
        return _articles(pattern % tuple([self.choice(pool) for pool in pools]))

    def prose(self) -> tuple[str, str]:
        """One piece of prose; about every sixth opens a paragraph."""
        return ("\n" if self.random() < 0.17 else " ") + self.sentence(), ""

    def documents(self) -> Callable[[], tuple[str, str]]:
        """Prose broken into numbered short documents."""
        count = 0

        def piece() -> tuple[str, str]:
            nonlocal count
            if self.random() > 0.2:
                return " " + self.sentence(), ""
            count += 1
            return f"\nDocument {count}: {self.sentence()}", ""

        return piece

    def number(self, digits: int, *owner: str) -> str:
        """A number that may belong to `owner` in this split."""
        while True:
            text = str(self.rng.randrange(10 ** (digits - 1), 10**digits))
            if is_held_out(*owner, text) == (self.split == "heldout"):
                return text

    def distinct(self, pool: str, count: int) -> list[str]:
        """`count` different words of a pool, at most all of them."""
        return self.rng.sample(POOLS[pool], min(count, len(POOLS[pool])))


class FactBook:
    """Facts of one document; a subject has one object per relation."""

    def __init__(self, writer: Writer):
        self.writer, self.facts, self.index, self.objects = writer, [], {}, {}

    def add(self, relation: str, subject: str) -> str | None:
        """States the fact (once) and returns its object, or None where the split has no partner for it."""
        if (relation, subject) in self.objects:
            return self.objects[relation, subject]
        candidates = partners(self.writer.split, relation, subject)
        if not candidates:
            return None
        obj = self.writer.choice(candidates)
        self.index[relation, subject] = len(self.facts)
        self.objects[relation, subject] = obj
        self.facts.append(" " + _articles(self.writer.choice(RELATIONS[relation][2]).format(a=subject, b=obj)))
        return obj

    def question(self, relation: str, subject: str) -> Question:
        text = RELATIONS[relation][3].format(a=subject)
        return ask(text, self.objects[relation, subject], self.index[relation, subject])


def ask(text: str, answer: str, *facts: int, bridge: str = "") -> Question:
    """A question in the form that all tasks share."""
    return Question(f"\nQuestion: {text}\nAnswer:", f" {answer}", facts, bridge)
