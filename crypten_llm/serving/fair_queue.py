"""Who is next: a bounded queue in which callers take turns, whoever asks how much.

Owns the order. Keys take turns, and within a key its users do; requests of one user stay in theirs. Each key has room
of its own, so that no key can fill it for the others.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
ROOM = 8  # answers that grow at the same time, where nothing else is said


@dataclass(frozen=True)
class Caller:
    """key: the name of the API key, "" where there is none. user: who that says it is."""

    key: str = ""
    user: str = ""


class QueueFull(Exception):
    """There is no room for one more of this key."""


class FairQueue(Generic[Item]):
    """room: most items of a key that wait. For any threads."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._waiting: OrderedDict[str, OrderedDict[str, deque[Item]]] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self.items())

    def items(self) -> list[Item]:
        """All that wait, in no order."""
        with self._changed:
            return self._all()

    def _all(self) -> list[Item]:
        return [item for users in self._waiting.values() for items in users.values() for item in items]

    def put(self, caller: Caller, item: Item) -> None:
        """Raises QueueFull; nothing has happened then."""
        with self._changed:
            users = self._waiting.get(caller.key, OrderedDict())
            if self._closed or sum(map(len, users.values())) >= self.room:
                raise QueueFull
            self._waiting.setdefault(caller.key, OrderedDict()).setdefault(caller.user, deque()).append(item)
            self._changed.notify()

    def take(self, seconds: float) -> Item | None:
        """The next, or None where none comes in that time or the queue has been closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, seconds)
            if self._closed or not self._waiting:
                return None
            key, users = self._waiting.popitem(last=False)
            user, items = users.popitem(last=False)
            item = items.popleft()
            if items:  # whoever has had a turn is last now
                users[user] = items
            if users:
                self._waiting[key] = users
            return item

    def discard(self, item: Item) -> bool:
        """Takes it out; whether it was waiting."""
        with self._changed:
            for key, users in self._waiting.items():
                for user, items in users.items():
                    if item in items:
                        items.remove(item)
                        if not items:
                            del users[user]
                        if not users:
                            del self._waiting[key]
                        return True
        return False

    def close(self) -> list[Item]:
        """No more comes in or out from now on; what waited."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            found = self._all()
            self._waiting.clear()
            return found
