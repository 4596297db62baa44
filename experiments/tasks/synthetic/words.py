"""Aggregation: the words of a list that come most often; in English (common words), and in code (frequent words)."""

from __future__ import annotations

import math
from random import Random
from string import ascii_lowercase

from experiments.tasks import natural
from experiments.tasks.synthetic.drafts import Draft, Source
from experiments.tasks.synthetic.needles import distinct

COMMON = 10  # words that are asked for
LONG = 4096  # tokens from which on words come more often: both as in RULER
OFTEN = {False: (6, 1), True: (30, 3)}  # a common word and another, below LONG and from there on
SHOWN, SHOWN_OFTEN = 20, (3, 1)  # other words of the worked example, and how often they come there
ASKS = (
    "Below is a numbered list of words. Some of these words come more often than others. Remember the ones that come "
    "most often."
)
QUESTION = "Question: What are the 10 most common words in the list above?"
PREFIX = "Answer: The 10 words that come most often in the list are:"


def _list(common: list[str], others: list[str], often: tuple[int, int], random: Random) -> str:
    words = common * often[0] + others * often[1]
    random.shuffle(words)
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def common_words(source: Source) -> Draft:
    """The ten words that come most often, after one worked example; a unit is one of the other words."""
    random, again = source.random, source.again()
    known = list(natural.words(source.data))
    random.shuffle(known)
    shown, known = known[: COMMON + SHOWN], known[COMMON + SHOWN :]
    common, others = known[:COMMON], known[COMMON:]
    listed = _list(shown[:COMMON], shown[COMMON:], SHOWN_OFTEN, random)
    answer = " ".join(f"{place}. {word}" for place, word in enumerate(shown[:COMMON], 1))
    worked = f"{ASKS}\n{listed}\n{QUESTION} {PREFIX} {answer}"
    often = OFTEN[source.length >= LONG]

    def message(units: int) -> str:
        return f"{worked}\n\n{ASKS}\n{_list(common, others[:units], often, again())}\n{QUESTION}"

    return Draft(message, tuple(common), PREFIX, COMMON)


NOISE, EXPONENT, CODED, LEAST = "....", 2.0, 3, 60


def counts(words: int) -> list[int]:
    """How often the noise and the coded words come among ``words``, by rank: as rank^-2, as in RULER."""
    share = 6 / math.pi**2
    found = [round(words * share * rank**-EXPONENT) for rank in range(1, words)]
    return [count for count in found if count]


def coded_words(source: Source) -> Draft:
    """The three coded words that come most often; the dots that come more often still do not count."""
    again = source.again()
    words = distinct(_coded, source.random, len(counts(source.length)))

    def message(units: int) -> str:
        noise, *often = counts(units)
        text = [NOISE] * noise + [word for word, count in zip(words, often, strict=False) for _ in range(count)]
        again().shuffle(text)
        return (
            "Read the following coded text and keep track of how often each coded word comes. Find the three that come "
            f"most often. {' '.join(text)}\nQuestion: Do not explain anything. Leave the dots '....' aside. What are "
            "the three words that come most often in the coded text above?"
        )

    prefix = "Answer: The three words that come most often in the coded text above are:"
    return Draft(message, tuple(words[:CODED]), prefix, LEAST)


def _coded(random: Random) -> str:
    return "".join(random.choices(ascii_lowercase, k=6))


MAKERS = {"cwe": common_words, "fwe": coded_words}
