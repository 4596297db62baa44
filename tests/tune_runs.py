"""Searches on scores that are made up: whether a policy is right on a prompt follows from its settings."""

from __future__ import annotations

import os
import random
import time
from contextlib import contextmanager
from itertools import islice

from eviction import parse
from experiments.tasks import Example
from experiments.tuning import measure
from experiments.tuning.measure import FULL, Bench, Prompt, Prompts
from experiments.tuning.search import Search
from experiments.tuning.space import space
from experiments.tuning.store import Measured
from experiments.tuning.study import locked

AXES = ("static=0.1,0.3,0.5,1", "second=0.05,0.1,0.3,0.5", "fine=8,16,32", "summary=minmax,mean")  # 96 policies
# A command on the shipped model that takes seconds.
QUICK = ("--policy", "snapkv", "--set", "window=8", "--search", "budget=0.05,0.3,1", "--max-bytes", "0.9")
QUICK += ("--tasks", "passkey", "--lengths", "64", "--samples", "4", "--fresh", "2", "--workers", "1")


@contextmanager
def opened(folder):
    with locked(folder):
        yield Measured(folder / "measured.jsonl", "shipped")


def right(policy: str) -> float:
    """The share of prompts that a policy gets right."""
    if policy == FULL:
        return 0.98
    found = parse(policy)
    quality = 0.98 - 0.5 * (1 - found.static) ** 4 - 0.4 * (1 - found.second) ** 8
    return quality - 0.004 * found.fine - 0.05 * (found.summary == "minmax")


class Scores:
    """In place of ``Evaluator``. pause: seconds a row."""

    pause = 0.0

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def rows(self, examples, policies):
        for example in examples:
            for policy in policies:
                time.sleep(self.pause)
                hard = random.Random(f"{example.prompt}").random() + random.Random(example.prompt + policy).gauss(
                    0, 0.02
                )
                yield {"score": float(hard < right(policy))}


class Counts:
    """In place of a counted step."""

    def __init__(self, shape):
        found = parse(shape.policy)
        self.size = 1.0 if found.name == FULL else found.static * found.second + 0.3 * found.static / found.fine

    def total(self, what):
        return 100 * self.size

    def seconds(self, network):
        return 1 + self.size


def make_up(set_attribute) -> None:
    """Puts what is made up in place of what is slow."""
    set_attribute(measure, "Evaluator", Scores)
    set_attribute(measure, "count", Counts)
    set_attribute(os, "fsync", lambda file: None)  # milliseconds each; what a killed process wrote stays anyway


def prompts(rungs=(8, 16, 8, 16), fresh=20):
    made = (Prompt(f"t/{i}", Example("t", f"prompt {i}", ("a",), 1, index=i)) for i in range(1_000))

    def some(number):
        return tuple(islice(made, number))

    return Prompts(tuple(some(number) for number in rungs), some(fresh))


def search(folder, store, goal, seed=0, exhaustive=False, setup=None, name="made up", axes=AXES, batch=6):
    bench = Bench(store, "shipped", 512, workers=1)
    found = space("mpcache", axes)
    return Search(folder, name, setup or {"seed": seed}, found, goal, bench, prompts(), 0.95, batch, seed, exhaustive)
