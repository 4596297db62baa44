"""Who asks when: a bursty load, the same for every number of groups.

Owns the arrival process. It is a Poisson process whose rate a two-state Markov chain switches (MMPP(2): Fischer and
Meier-Hellstern 1993, "The Markov-modulated Poisson process cookbook"): calm, and bursts of ``times`` that rate. Times
in either state are exponential. Each request is of one of ``users``, all alike; prompts are log-normal, answers
geometric, both cut at the longest.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """rate: requests a second, on the mean over both states. times: the rate in a burst by that of calm. calm, burst:
    mean seconds of the states. prompt: median tokens, with ``spread`` the standard deviation of their logarithm.
    answer: mean tokens. asked: tokens that a request asks for at most, which is what it is priced by.
    """

    rate: float = 0.5
    times: float = 6.0
    calm: float = 900.0
    burst: float = 180.0
    users: int = 200
    prompt: int = 128
    spread: float = 0.6
    longest: int = 512
    answer: int = 48
    asked: int = 128


@dataclass
class Request:
    """arrived, first, ended: seconds. steps: of each later token. ``refused`` before anything was sent for it."""

    arrived: float
    user: int
    prompt: int
    answer: int
    asked: int
    first: float = 0.0
    ended: float = 0.0
    refused: bool = False


def requests(load: Load, seconds: float, seed: int) -> list[Request]:
    """In the order of their arrival."""
    drawn = random.Random(seed)  # no secret depends on it
    share = load.burst / (load.calm + load.burst)
    calm_rate = load.rate / (1 + share * (load.times - 1))
    found: list[Request] = []
    now, bursts, change = 0.0, False, drawn.expovariate(1 / load.calm)
    while True:
        rate = calm_rate * (load.times if bursts else 1.0)
        following = now + drawn.expovariate(rate)
        if following >= change:  # without memory: what was drawn for the old rate is drawn anew
            now, bursts = change, not bursts
            change = now + drawn.expovariate(1 / (load.burst if bursts else load.calm))
            if now >= seconds:
                return found
            continue
        now = following
        if now >= seconds:
            return found
        prompt = round(load.prompt * drawn.lognormvariate(0.0, load.spread))
        answer = 1 + int(drawn.expovariate(1 / max(load.answer - 1, 1e-9)))
        prompt, answer = max(1, min(prompt, load.longest)), min(answer, load.asked)
        found.append(Request(now, drawn.randrange(load.users), prompt, answer, load.asked))
