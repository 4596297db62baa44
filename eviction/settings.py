"""Settings of policies: what kinds there are, how each is read from text, and the errors of those that cannot be used.

Owns the checks. A policy's dataclass names each setting with one of the functions below; a value comes from Python or
as text from the command line, and is refused with the policy's and the setting's name.
"""

from collections.abc import Callable
from dataclasses import field
from typing import Any

LARGEST = 2**62  # of a whole number: a policy's text comes from another party, and tensors have 64 bits


class PolicyError(ValueError):
    """A policy cannot be used as asked for; the message says which setting, its value, and what it may be."""


class UnknownPolicy(PolicyError):
    """No policy of that name; the message lists those there are."""


def setting(default: Any, read: Callable, what: str, kind: str, **facts: Any) -> Any:
    """A dataclass field with a default; ``read`` takes a value or text and raises ValueError when it does not fit.

    kind: share, whole, number, word or text; with facts, such as bounds, from which a search takes values to try.
    """
    return field(default=default, metadata={"read": read, "what": what, "kind": kind, **facts})


def budget(default: float, zero: bool = False) -> float:
    """Rows to keep: a whole number above 1 counts tokens, a number in (0, 1] is a share of the prompt."""

    def read(value: Any) -> float:
        number = _number(value)
        if number > 1:
            return _whole(value)
        if number > 0 or (zero and number == 0):
            return float(number)
        raise ValueError

    what = "tokens (a whole number above 1) or a share of the prompt (above 0, at most 1)"
    return setting(default, read, what, "share")


def whole(default: int, low: int, high: int | None = None) -> int:
    """A whole number from ``low`` on, up to ``high``."""

    def read(value: Any) -> int:
        number = _whole(value)
        if number < low or (high is not None and number > high):
            raise ValueError
        return number

    what = f"a whole number, {low} or more" + ("" if high is None else f", {high} at most")
    return setting(default, read, what, "whole", low=low, high=high)


def share(default: float) -> float:
    """A number in (0, 1]."""

    def read(value: Any) -> float:
        number = _number(value)
        if not 0 < number <= 1:
            raise ValueError
        return float(number)

    return setting(default, read, "a number above 0, at most 1", "share")


def number(default: float, low: float, high: float) -> float:
    """A number in [low, high]."""

    def read(value: Any) -> float:
        found = _number(value)
        if not low <= found <= high:
            raise ValueError
        return float(found)

    return setting(default, read, f"a number from {low:g} to {high:g}", "number", low=low, high=high)


def one_of(default: str, *options: str) -> str:
    """One of some words."""

    def read(value: Any) -> str:
        if value not in options:
            raise ValueError
        return value

    return setting(default, read, " or ".join(options), "word", options=options)


def switch(default: bool) -> bool:
    """true or false."""

    def read(value: Any) -> bool:
        found = {"true": True, "false": False}.get(str(value).lower())
        if found is None:
            raise ValueError
        return found

    return setting(default, read, "true or false", "word", options=(False, True))


def text(default: str) -> str:
    """Any text without comma, equals sign or bracket, such as a file's name."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or any(mark in value for mark in ",=()"):
            raise ValueError
        return value

    return setting(default, read, "text without , = ( )", "text")


def tokens(budget: float, prompt_tokens: int) -> int:
    """A budget in rows; one that is not zero keeps at least one."""
    if budget > 1 or budget == 0:
        return int(budget)
    return max(1, round(budget * prompt_tokens))


def fitting(size: int, most: float) -> int:
    """A published size, halved until it is at most ``most``; never below 1.

    Published sizes suit contexts of many thousand tokens; what a policy does with few rows should stay of their kind.
    """
    while size > max(most, 1):
        size //= 2
    return size


def written(value: object) -> str:
    """A value as ``--set`` takes it."""
    return (
        str(value).lower() if isinstance(value, bool) else f"{value:.12g}" if isinstance(value, float) else str(value)
    )


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number) or abs(number) > LARGEST:
        raise ValueError
    return int(number)
