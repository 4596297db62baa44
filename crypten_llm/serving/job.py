"""One request on its way: what is asked, who waits for it, and what has come so far.

Owns the passage between the thread of the session, which tells, and the loop of the endpoint, which listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from crypten_llm.serving.fair_queue import Caller
from crypten_llm.serving.kept import Talk
from crypten_llm.serving.refusals import Refusal
from crypten_llm.session.prompted import Progress, Step
from crypten_llm.session.report import Cost
from crypten_llm.session.request import Asked, Result


@dataclass(frozen=True)
class Ended:
    """All answers, in the order in which they were asked for; with what passed, and was revealed, while they grew."""

    results: list[Result]
    cost: Cost
    revealed: list[dict]


@dataclass(frozen=True)
class Broken:
    """No more comes, for this reason."""

    why: Refusal


Event = Progress | Step | Ended | Broken


class Job:
    """asked: what to run, side by side where there is room. caller: whose turn it takes. talk: where it may go on with
    a conversation. Made in the loop."""

    def __init__(self, asked: Sequence[Asked], caller: Caller, talk: Talk | None = None) -> None:
        self.asked, self.caller, self.talk = list(asked), caller, talk
        self.left = False  # set when nobody listens any more: it ends at the next token
        self.created = perf_counter()
        self.begun: float | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def tell(self, event: Event) -> None:
        """From the session's thread; for nothing where the endpoint has closed meanwhile."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            self.left = True

    async def next(self, seconds: float | None = None) -> Event | None:
        """What has come next; None where nothing comes in that time."""
        try:
            async with asyncio.timeout(seconds):
                return await self._events.get()
        except TimeoutError:
            return None
