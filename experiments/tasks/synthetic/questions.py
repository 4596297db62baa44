"""Questions about documents, one or two of which hold the answer, among others that do not.

In RULER the documents are SQuAD's and HotpotQA's. Here they are in ``passages.toml``: written for this project, about
people and places that there are not, so that no model knows an answer beforehand. Behind these come paragraphs of
natural text.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path

from experiments.tasks import natural
from experiments.tasks.synthetic.drafts import Draft, Source

FILE = Path(__file__).with_name("passages.toml")
ASKS = "Answer the question by the given documents. Give only the answer and no other words."


@cache
def passages() -> dict:
    """``document``: each with title, text, question and answers. ``two``: questions, answers, and two titles."""
    return tomllib.loads(FILE.read_text("utf-8"))


def _others(source: Source, without: set[str]) -> list[str]:
    """Texts that do not hold the answer: the other passages in any order, then natural text."""
    mine = [entry["text"] for entry in passages()["document"] if entry["title"] not in without]
    source.random.shuffle(mine)
    return list(_up_to(chain(mine, natural.paragraphs(source.random, source.data)), source.length))


def _up_to(texts: Iterator[str], words: int) -> Iterator[str]:
    for text in texts:
        yield text
        words -= len(text.split())
        if words <= 0:
            return


def _draft(source: Source, question: str, answers: list[str], titles: list[str]) -> Draft:
    """A unit is a word of the other documents, the last of which is cut."""
    gold = [entry["text"] for entry in passages()["document"] if entry["title"] in titles]
    others, depths, again = _others(source, set(titles)), [source.random.random() for _ in gold], source.again()

    def message(units: int) -> str:
        documents = natural.first_words(iter(others), units)
        again().shuffle(documents)
        for depth, text in sorted(zip(depths, gold, strict=True)):
            documents.insert(round(depth * len(documents)), text)
        listed = "\n\n".join(f"Document {place}:\n{text}" for place, text in enumerate(documents, 1))
        return f"{ASKS}\n\nThe following are the documents.\n\n{listed}\n\n{ASKS}\n\nQuestion: {question}"

    return Draft(message, tuple(answers), "Answer:")


def _maker(kind: str) -> Callable[[Source], Draft]:
    def make(source: Source) -> Draft:
        entry = source.random.choice(passages()[kind])
        return _draft(source, entry["question"], entry["answers"], entry.get("titles") or [entry["title"]])

    return make


MAKERS = {"qa_1": _maker("document"), "qa_2": _maker("two")}
