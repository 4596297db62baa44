"""One value of a JSON configuration: the checks that all fields share, and the words of their errors.

Owns nothing of a model. Each function raises UsageError with the field, its value and what it must be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from crypten_llm.errors import UsageError


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def integer(name: str, value: Any) -> int:
    # The upper bound keeps a nonsense size from reaching an allocation.
    if not is_integer(value) or not 0 < value < 2**31:
        raise UsageError(f"{name} is {value!r}; it must be a positive integer")
    return value


def number(name: str, value: Any, least: float = 0) -> float:
    # Strictly positive and within float32, which also refuses NaN and infinity.
    if isinstance(value, bool) or not isinstance(value, int | float) or not max(least, 1e-38) <= value <= 3e38:
        wanted = f"number of at least {least}" if least else "positive number"
        raise UsageError(f"{name} is {value!r}; it must be a {wanted}")
    return value


def short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_json(path: Path) -> dict[str, Any]:
    try:
        d = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # JSON and encoding errors alike
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(d, dict):
        raise UsageError(f"{path}: must hold a JSON object, not {type(d).__name__}")
    return d
