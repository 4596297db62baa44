"""Needles in a haystack: sentences that give a key a value, hidden in text, and the question for some of the values.

As RULER's niah tasks: which kinds of keys, values and haystack each has is its table B; the wording is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from random import Random
from uuid import UUID

from crypten_llm.errors import UsageError
from experiments.model.lexicon import POOLS
from experiments.tasks import natural
from experiments.tasks.synthetic.drafts import Draft, Source, woven

NOISE = ("The road is long.", "The sky is grey.", "The river is cold.", "On we go.", "There and home again.")


def _words(random: Random) -> str:
    return f"{random.choice(POOLS['quality'])}-{random.choice(POOLS['noun'])}"


def _number(random: Random) -> str:
    return str(random.randrange(1_000_000, 10_000_000))


def _uuid(random: Random) -> str:
    return str(UUID(int=random.getrandbits(128), version=4))


TRIES = 4  # a key, on the mean, until it is a new one
NAMES = {_number: "number", _uuid: "uuid"}


def distinct(draw: Callable[[Random], str], random: Random, count: int) -> list[str]:
    """So many different ones. Raises UsageError where there seem to be no more."""
    found: dict[str, None] = {}
    for _ in range(TRIES * (count + 1)):
        if len(found) == count:
            return list(found)
        found[draw(random)] = None
    raise UsageError(f"there are no {count:,} different keys for a prompt of this length; give a smaller --length")


@dataclass(frozen=True)
class Needles:
    """haystack: "noise", "prose", or "needles" of other keys. asked: the keys that are asked for, of ``keys``, each
    with so many ``values``."""

    haystack: str
    key: Callable[[Random], str] = _words
    value: Callable[[Random], str] = _number
    keys: int = 1
    values: int = 1
    asked: int = 1

    def __call__(self, source: Source) -> Draft:
        random, kind = source.random, NAMES[self.value]
        others = source.length // 12 if self.haystack == "needles" else 0  # no needle has fewer tokens
        keys = distinct(self.key, random, self.keys + others)
        values = distinct(self.value, random, self.values * len(keys))
        needles = [
            f"One of the secret {kind}s for {key} is: {value}."
            for place, key in enumerate(keys)
            for value in values[place * self.values :][: self.values]
        ]
        hidden = needles[: self.keys * self.values]
        depths = [random.random() for _ in hidden]
        text = self._text(source, needles[len(hidden) :])
        asked, wanted = keys[: self.asked], values[: self.asked * self.values]
        which = asked[0] if self.asked == 1 else f"{', '.join(asked[:-1])} and {asked[-1]}"
        one = len(wanted) == 1
        what = f"secret {kind if one else kind + 's'} for {which} mentioned in the text"
        question = f"What is the {what}?" if one else f"What are all the {what}?"

        def message(units: int) -> str:
            return (
                f"Some secret {kind}s are hidden in the following text. Remember them. I will ask you about the "
                f"{kind}s afterwards.\n{text(units, hidden, depths)}\n{question}"
            )

        return Draft(message, tuple(wanted), f"The {what} {'is' if one else 'are'}")

    def _text(self, source: Source, others: list[str]) -> Callable[[int, list[str], list[float]], str]:
        if self.haystack == "needles":

            def lines(units: int, hidden: list[str], depths: list[float]) -> str:
                rows = others[:units]
                for depth, needle in sorted(zip(depths, hidden, strict=True), reverse=True):
                    rows.insert(round(depth * len(rows)), needle)
                return "\n".join(rows)

            return lines
        noise = natural.first_words(cycle(NOISE), source.length)
        sentences = noise if self.haystack == "noise" else source.sentences()
        return lambda units, hidden, depths: woven(sentences, units, hidden, depths)


MAKERS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("prose"),
    "niah_single_3": Needles("prose", value=_uuid),
    "niah_multikey_1": Needles("prose", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key=_uuid, value=_uuid),
    "niah_multivalue": Needles("prose", values=4),
    "niah_multiquery": Needles("prose", keys=4, asked=4),
}
