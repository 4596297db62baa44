"""Variable tracking: a chain of assignments hidden in text, and the question for all variables of one value."""

from __future__ import annotations

from itertools import cycle
from random import Random
from string import ascii_uppercase

from experiments.tasks import natural
from experiments.tasks.synthetic.drafts import Draft, Source, woven
from experiments.tasks.synthetic.needles import NOISE, distinct

HOPS = 4  # of one chain, as RULER's own setting
ASKS = "Remember the chain of variable assignments that is hidden in the following text."
SHOWN = 10  # sentences of the worked example


def variable(random: Random) -> str:
    return "".join(random.choices(ascii_uppercase, k=5))


def chain(names: list[str], value: str) -> list[str]:
    """Assignments by which all names have the value."""
    return [f"VAR {names[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False))]


def question(value: str) -> str:
    return f"Question: Find all variables that are assigned the value {value} in the text above."


def prefix(value: str) -> str:
    return f"Answer: By the chain of assignments above, {HOPS + 1} variables have the value {value}, they are:"


def make(source: Source) -> Draft:
    """One worked example comes before, as in RULER."""
    random = source.random
    names = distinct(variable, random, 2 * (HOPS + 1))
    shown, asked = names[: HOPS + 1], names[HOPS + 1 :]
    values = [str(random.randrange(10_000, 100_000)) for _ in range(2)]
    depths = [sorted(random.random() for _ in asked) for _ in range(2)]
    text = natural.first_words(cycle(NOISE), source.length)
    example = woven(text, len(" ".join(NOISE).split()) * SHOWN // len(NOISE), chain(shown, values[0]), depths[0])
    worked = f"{ASKS}\n\n{example}\n{question(values[0])} {prefix(values[0])} {' '.join(shown)}"

    def message(units: int) -> str:
        hidden = woven(text, units, chain(asked, values[1]), depths[1])
        return f"{worked}\n\n{ASKS}\n\n{hidden}\n{question(values[1])}"

    return Draft(message, tuple(asked), prefix(values[1]))


MAKERS = {"vt": make}
