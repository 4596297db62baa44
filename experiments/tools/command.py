"""How a command of this folder ends: on an error that its user can do something about, with one line and no traceback.

Owns the exit. Other errors are the project's own mistakes, and keep their traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

from crypten_llm.errors import CryptenLLMError, exit_code, last_words


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """``main`` that returns the exit code of its process."""

    @wraps(main)
    def run(*arguments) -> int:
        try:
            return main(*arguments) or 0
        except (CryptenLLMError, KeyboardInterrupt) as error:
            print(f"error: {last_words(error)}", file=sys.stderr)
            return exit_code(error)

    return run
