"""An answer as it grows: server-sent events, with comments where nothing is to be said, so that no proxy hangs up.

Owns the format of a stream and its end. Who stops reading ends the answer at its next token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from crypten_llm import records
from crypten_llm.serving import refusals
from crypten_llm.serving.answers import Writer
from crypten_llm.serving.job import Broken, Ended, Job
from crypten_llm.session.prompted import Progress, Step
from crypten_llm.session.request import Result

QUIET_SECONDS = 10.0  # between two signs of life; proxies cut what is idle for a minute


async def events(
    job: Job, writer: Writer, leave: Callable[[Job], None], keep: Callable[[Sequence[Result]], None]
) -> AsyncIterator[bytes]:
    """The bytes of the stream; leave: is called when it ends, whoever ended it; keep: with all answers."""
    begun: set[int] = set()
    try:
        while True:
            match await job.next(QUIET_SECONDS):
                case None:
                    yield b": waiting\n\n" if job.begun is None else b": working\n\n"
                case Progress(done, total):
                    yield f": prefill {done} of {total}\n\n".encode()
                case Step() as step:
                    for piece in _pieces(writer, step, begun):
                        yield _data(piece)
                case Ended() as ended:
                    keep(ended.results)
                    for piece in writer.ending(ended):
                        yield _data(piece)
                    yield b"data: [DONE]\n\n"
                    return
                case Broken(why):
                    yield _data(why.body)
                    return
    except Exception as error:  # the status is sent already
        yield _data(refusals.of(error).body)
    finally:
        leave(job)


def _pieces(writer: Writer, step: Step, begun: set[int]) -> list[dict[str, Any]]:
    first = None if step.prompt in begun else writer.first(step.prompt)
    begun.add(step.prompt)
    return [piece for piece in (first, writer.piece(step)) if piece is not None]


def _data(value: Any) -> bytes:
    return b"data: " + records.encode(value) + b"\n\n"
