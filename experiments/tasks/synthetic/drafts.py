"""What a generator makes: a prompt that can be of any length, with its answers.

Owns the filling: a draft's message grows with the number of its units (words, lines), and the longest that fits is
found by halving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from experiments.tasks import natural

DRAWS = 1  # changes with the generators: prompts of another number are others


@dataclass(frozen=True)
class Draft:
    """message: what is asked, with so many units of filling, which only grows with them. prefix: how the answer begins.
    least: units without which nothing is asked.
    """

    message: Callable[[int], str]
    answers: tuple[str, ...]
    prefix: str
    least: int = 0


class Source:
    """What a generator draws from: ``random``, which depends on ``key`` alone, and natural text.

    length: tokens, of which no word has less than one, so it is also the most words that are ever asked for.
    """

    def __init__(self, key: str, length: int, data: str | None = None):
        self.random, self.length, self.data = Random(key), length, data

    def sentences(self) -> list[str]:
        """Natural text, as many words as the prompt may have tokens."""
        return natural.first_words(natural.sentences(self.random, self.data), self.length)

    def again(self) -> Callable[[], Random]:
        """A generator that begins anew with each call, for what is drawn at every length."""
        state = self.random.getrandbits(64)
        return lambda: Random(state)


def longest(fits: Callable[[int], bool], least: int, most: int) -> int | None:
    """The largest number from ``least`` to ``most`` that fits, where those that fit come first; ``None`` for none."""
    if not fits(least):
        return None
    low, high = least, max(least, most) + 1  # low fits, high does not or is out of bounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def woven(sentences: list[str], units: int, hidden: list[str], depths: list[float]) -> str:
    """The first ``units`` words of a text, with a sentence hidden at each depth, from 0 to 1, where others end."""
    taken = natural.first_words(iter(sentences), units)
    places: dict[int, list[str]] = {}
    for depth, sentence in zip(depths, hidden, strict=True):
        places.setdefault(round(depth * len(taken)), []).append(sentence)
    return " ".join(_merged(taken, places))


def _merged(taken: list[str], places: dict[int, list[str]]) -> Iterator[str]:
    for index, sentence in enumerate(taken):
        yield from places.get(index, ())
        yield sentence
    yield from places.get(len(taken), ())
