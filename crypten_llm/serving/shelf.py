"""Receipts of the last answers, until somebody fetches them.

Owns which are kept, and for whom. They are in memory alone and hold no prompt and no answer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from crypten_llm.serving.refusals import Refusal
from crypten_llm.session.receipt import Receipts
from crypten_llm.session.request import Result

KEPT = 1000  # of some 10 kB


class Shelf:
    """For the endpoint's loop. Who asks with an API key gets receipts of that key's answers alone."""

    def __init__(self, room: int = KEPT) -> None:
        self._room = room
        self._kept: OrderedDict[tuple[str, str], Receipts] = OrderedDict()

    def put(self, key: str, name: str, results: Sequence[Result]) -> None:
        """key: of the caller. name: the answer's id. Nothing where the engine has no other party."""
        found = tuple(result.receipt for result in results if result.receipt is not None)
        if len(found) == len(results):
            self._kept[key, name] = Receipts(found)
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)

    def get(self, key: str, name: str) -> Receipts:
        """Raises Refusal where there is none."""
        try:
            return self._kept[key, name]
        except KeyError:
            raise Refusal(
                404,
                f"there is no receipt of {name[:80]!r}; they are of private answers that were read to their end, and "
                f"the last {self._room} are kept",
            ) from None
