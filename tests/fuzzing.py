"""Mutated inputs for whatever reads what others have written, within limits of time and memory.

Owns the mutations and the limits; the readers are in ``fuzz_readers``. A reader takes bytes; it may return or raise the
project's own errors, in one line, and nothing else. Every input follows from a seed and its number, so that one that
fails can be made again: ``PYTHONPATH=.:tests python tests/fuzz_readers.py NAME SEED NUMBER``.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crypten_llm.errors import CryptenLLMError

SECONDS = 5.0  # for one input
MEBIBYTES = 1024  # of address space beyond what the process has, for one input
ODD = (
    *(None, True, False, 0, -1, 1, 2, 1.5, -0.0, 1e308, 1e-320, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 10**9),
    *("", "\x00", "\x1b[2J", "é\u202e", "a" * 5000, "../x", "/etc/passwd", "NaN", [], {}, [[]], [None], {"": None}),
)


@dataclass(frozen=True)
class Reader:
    """corpus: sound inputs. read: what must take any. is_json: whether values are changed too, not bytes alone."""

    corpus: tuple[bytes, ...]
    read: Callable[[bytes], Any]
    is_json: bool = True


def mutated(reader: Reader, seed: int, number: int) -> bytes:
    """Input ``number`` of those that follow from ``seed``."""
    rng = random.Random(f"{seed}/{number}")
    data = rng.choice(reader.corpus)
    if reader.is_json and rng.random() < 0.7:
        value = json.loads(data)
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            value = _other_value(value, rng)
        with contextlib.suppress(ValueError):
            return _written(value, rng)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        data = _other_bytes(data, rng, reader.corpus)
    return data


def _written(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = text.replace("null", "NaN", 1).replace(": 1", ": -Infinity", 1)
    if rng.random() < 0.02:
        depth = rng.choice((50, 500, 20_000))
        text = text.replace("null", "[" * depth + "]" * rng.choice((0, depth)), 1) if "null" in text else "[" * depth
    return text.encode()


def _other_value(value: Any, rng: random.Random) -> Any:
    """The same with one value, key or element changed, somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {name: entry for name, entry in value.items() if name != key}
            case 1:
                return {**value, str(rng.choice(ODD)): rng.choice(ODD)}
            case 2:
                return {**value, key: value[rng.choice(list(value))]}
            case _:
                return {**value, key: _other_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value + value[place:] * rng.choice((1, 2, 100))
            case _:
                return [*value[:place], _other_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        with contextlib.suppress(OverflowError):
            return rng.choice((-value, value + 1, value - 1, value * 2**20, value / 2, str(value), value**20))
    return rng.choice(ODD)


def _other_bytes(data: bytes, rng: random.Random, corpus: tuple[bytes, ...]) -> bytes:
    place = rng.randrange(len(data) + 1)
    match rng.randrange(7):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        case 2:
            return data[:place] + rng.randbytes(rng.choice((1, 2, 8, 64))) + data[place:]
        case 3:
            return data[:place] + data[place + rng.choice((1, 2, 8, 64)) :]
        case 4:
            return data[:place] + rng.choice((b"\xff", b"\x00", b"\x7f")) * rng.choice((1, 4, 8)) + data[place + 8 :]
        case 5:
            other = rng.choice(corpus)
            return data[:place] + other[rng.randrange(len(other) + 1) :]
        case _:
            return data[:place] + data[max(0, place - rng.choice((1, 4, 32))) :]


# Limits.


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Memory beyond ``MEBIBYTES`` is refused to this process, so whoever asks for it fails."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (MEBIBYTES << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class Hang(BaseException):
    """No Exception: nobody may take it for one of a library's."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise Hang(f"no answer within {SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, reader: Reader, count: int, seed: int, first: int = 0) -> tuple[int, int]:
    """Reads ``count`` mutated inputs; returns how many were taken and how many refused. name: for errors.

    Raises AssertionError with the input's number for anything else.
    """
    taken = 0
    for data in reader.corpus:
        reader.read(data)  # raises where a sound input is refused
    with limited():
        for number in range(first, first + count):
            data = mutated(reader, seed, number)
            try:
                with in_time():
                    reader.read(data)
                taken += 1
            except CryptenLLMError as error:
                assert str(error).isprintable() and len(str(error)) < 2010, f"{name} {seed} {number}: {str(error)!r}"
                assert not isinstance(error.__cause__ or error.__context__, MemoryError), f"{name} {seed} {number}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise AssertionError(f"{name} {seed} {number}: {error!r} of {data[:200]!r}") from error
    return taken, count - taken
