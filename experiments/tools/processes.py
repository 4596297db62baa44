"""Work on several processes, which end with the one that started them, however it dies.

Owns the processes. An item's result or error comes back to the caller; a process that is killed, as the system does
for lack of memory, is an error of one line too, and nothing waits for its results.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

from crypten_llm.errors import CryptenLLMError


class Processes:
    """What ``processes`` gives."""

    def __init__(self, executor: ProcessPoolExecutor):
        self._executor = executor

    def map(self, function: Callable, items: Iterable, ordered: bool = True) -> Iterator:
        """Yields ``function`` of each item, in the items' order or else as they are done.

        Raises what ``function`` raised, or the start of the process that it ran in; CryptenLLMError where a process
        ended.
        """
        call = partial(_call, function)
        try:
            if ordered:
                yield from self._executor.map(call, items)
            else:
                for done in as_completed([self._executor.submit(call, item) for item in items]):
                    yield done.result()
        except BrokenProcessPool:
            raise CryptenLLMError(
                "a worker process was ended from outside, as the system does when memory is short; run again with "
                "fewer --workers: what was kept in a file is not lost"
            ) from None


@contextmanager
def processes(count: int, start: Callable, *arguments) -> Iterator[Processes]:
    """That many fresh processes, in each of which ``start(*arguments)`` was called.

    On leaving, they finish what they were given; on an error they end at once.
    """
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)  # closed by whatever ends this process: they wait for that
    executor = ProcessPoolExecutor(count, context, _begin, (theirs, start, arguments))
    try:
        with theirs, ours:
            yield Processes(executor)
            executor.shutdown()
    finally:
        executor.shutdown(cancel_futures=True)


_failed: Exception | None = None  # in a worker: why it could not start


def _begin(lifeline, start: Callable, arguments: tuple) -> None:
    """An error waits for the first item: it is the caller's to see, and not a broken pool."""
    global _failed

    def end():
        lifeline.poll(None)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which this process would leave behind
    threading.Thread(target=end, daemon=True).start()
    try:
        start(*arguments)
    except Exception as error:
        _failed = error


def _call(function: Callable, item):
    if _failed is not None:
        raise _failed
    return function(item)
