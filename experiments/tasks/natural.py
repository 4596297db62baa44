"""Natural text for prompts: the project's own prose, then Python's reference; or a file that the user names.

Owns which text there is. ``PROSE`` was written for this project, so no model has seen it: some 3,000 tokens. What goes
beyond is Python's language reference, whose paragraphs of prose come with every Python (`pydoc_data.topics`, PSF
licence): some 23,000 tokens more, of which models may know much. Lengths that go beyond these too begin again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import chain, islice
from pathlib import Path
from random import Random

from crypten_llm.errors import UsageError
from crypten_llm.session.calibration import PROSE

SUFFIXES = (".txt", ".md")
LEAST = 200  # words of a file; fewer are no haystack
_PROSE_OF_REFERENCE = re.compile(r"[A-Z][^:\[\]{}=_|<>\\`]*[.!?]")


def is_text(data: str | None) -> bool:
    """Whether ``data`` names a file of plain text, and not a set of rows."""
    return data is not None and data.endswith(SUFFIXES)


@cache
def books(data: str | None = None) -> tuple[tuple[str, ...], ...]:
    """The texts there are, best first, each as its paragraphs: the file ``data``, or the text that is at hand.

    Raises UsageError for a file that cannot be read or is too short.
    """
    if data is None:
        return _paragraphs(PROSE.read_text("utf-8")), _reference()
    if not is_text(data):
        raise UsageError(f"{data!r} is no file of plain text; give one that ends in {' or '.join(SUFFIXES)}")
    try:
        text = Path(data).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"cannot read the text {data}: {reason}; give a file of plain text in UTF-8") from None
    if (words := len(text.split())) < LEAST:
        raise UsageError(f"{data} has {words} words, too few to hide anything in; give a text of {LEAST} or more")
    return (_paragraphs(text),)


def _paragraphs(text: str) -> tuple[str, ...]:
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return tuple(part for part in joined if re.search(r"\w", part))


@cache
def _reference() -> tuple[str, ...]:
    """Paragraphs of Python's language reference that hold prose and no code."""
    from pydoc_data.topics import topics

    found = chain.from_iterable(_paragraphs(text) for text in topics.values())
    prose = (part for part in found if _PROSE_OF_REFERENCE.fullmatch(part) and len(part.split()) >= 25)
    return tuple(dict.fromkeys(prose))


def paragraphs(random: Random, data: str | None = None) -> Iterator[str]:
    """Without end: each book from a paragraph chosen by ``random`` on, once round, one book after the other."""
    while True:
        for book in books(data):
            start = random.randrange(len(book))
            yield from book[start:]
            yield from book[:start]


def sentences(random: Random, data: str | None = None) -> Iterator[str]:
    """The sentences of ``paragraphs``."""
    for paragraph in paragraphs(random, data):
        yield from re.split(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)\s+", paragraph)


@cache
def words(data: str | None = None) -> tuple[str, ...]:
    """Distinct words of four letters or more in lower case, those of the first book first, in alphabetic order each."""
    found = (sorted(set(re.findall(r"\b[a-z]{4,}\b", " ".join(book)))) for book in books(data))
    return tuple(dict.fromkeys(chain.from_iterable(found)))


def first_words(text: Iterator[str], count: int) -> list[str]:
    """As many sentences as have ``count`` words, the last of them cut."""
    taken: list[str] = []
    for sentence in text:
        if count <= 0:
            break
        split = sentence.split()
        taken.append(" ".join(islice(split, count)))
        count -= len(split)
    return taken
