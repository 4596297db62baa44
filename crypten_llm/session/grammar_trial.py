"""Compiles a grammar in a process of its own, which may take so much time, memory and stack, and reports in one line.

A schema comes from whoever may ask, and there are some of a few bytes that a compiler computes on for minutes, or that
overflow its stack, which ends a process. What was compiled here can be compiled at the client: it is the same work, and
any thread there has more stack. A program: the grammar is its standard input, what is wrong with it its output.
"""

from __future__ import annotations

import resource
import sys
import threading
from typing import Any

STACK_BYTES = 1 << 20
MEMORY_BYTES = 1 << 30
CPU_SECONDS = 2


def limits() -> Any:
    """What the compiler may use, here and at the client; a step's work is bounded by the library's own defaults."""
    from llguidance import LLParserLimits

    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def fault(tokenizer: Any, grammar: str) -> tuple[Any, str]:
    """The compiled grammar, and what is wrong with it or its first step, if anything is."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher, matcher.get_error()


def _try(grammar: str, found: list[str]) -> None:
    from llguidance import LLTokenizer

    found.append(fault(LLTokenizer("byte"), grammar)[1])


def main() -> int:
    grammar, found = sys.stdin.buffer.read().decode(), list[str]()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    if sys.platform == "linux":  # others count what is merely reserved
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_try, args=(grammar, found))
    thread.start()
    thread.join()
    if not found:
        return 1
    sys.stdout.write(found[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
