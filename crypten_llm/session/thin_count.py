"""What a thin client sends and receives in a request, counted from the messages that it would say and hear.

Owns the count. Each message is made as the client and its helper make it, so that none is described twice; a test
compares the count with a real client's meter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from crypten_llm.links.frames import HEADER
from crypten_llm.links.transport import encode_json
from crypten_llm.session import thin_words
from crypten_llm.session.messages import Generate
from crypten_llm.session.thin import Side, token_bytes

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine
    from crypten_llm.engines.passing import Padded
    from crypten_llm.session.plan import Plan
    from eviction.operations import Handle


class CountedSide(Side):
    """The dealer's, which notes how what is passed on looks."""

    def __init__(self) -> None:
        self.shown: list[list[Padded]] = []

    def pass_on(self, engine: Engine, handle: Handle, client: int) -> list[Padded] | None:
        self.shown.append(engine.pass_on(handle, client, None))
        return None

    def client_bytes(self, plan: Plan, vocabulary: int) -> dict[str, tuple[int, int]]:
        """By phase, bytes that the client of this request has sent and received, headers included."""
        size, chunks = token_bytes(vocabulary), range(plan.chunk, plan.prompt_tokens + plan.chunk, plan.chunk)
        read = [thin_words.Read(min(done, plan.prompt_tokens), plan.prompt_tokens) for done in chunks]
        sent = _said([Generate((plan,))]) + HEADER.size + plan.prompt_tokens * size
        first, *others = [self._received(each) for each in self.shown]
        words = (HEADER.size + 1 + size) * len(others)
        return {"prefill": (sent, _said([thin_words.Accepted(), *read]) + first), "decode": (words, sum(others))}

    def _received(self, shown: Sequence[Padded]) -> int:
        return _said([thin_words.shown(shown)]) + sum(HEADER.size + each.nbytes for each in shown)


def _said(messages: Sequence[Any]) -> int:
    return sum(HEADER.size + len(encode_json(message)) for message in messages)
