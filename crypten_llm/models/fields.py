"""One value of a JSON configuration: the checks that all fields share, and the words of their errors.

Owns nothing of a model. Each function raises UsageError with the field, its value and what it must be.
"""

from __future__ import annotations

from typing import Any

from crypten_llm.errors import UsageError


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(name: str, value: Any, most: int) -> int:
    # The upper bound keeps a nonsense size from reaching an allocation.
    if not is_integer(value) or not 0 < value <= most:
        raise UsageError(f"{name} is {short(value)}; it must be a positive integer, {most} at most")
    return value


def number(name: str, value: Any, least: float = 0) -> float:
    # Strictly positive and within float32, which also refuses NaN and infinity.
    if isinstance(value, bool) or not isinstance(value, int | float) or not max(least, 1e-38) <= value <= 3e38:
        wanted = f"number of at least {least}" if least else "positive number"
        raise UsageError(f"{name} is {short(value)}; it must be a {wanted}")
    return value


def short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
