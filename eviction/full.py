"""Policy ``full``: every token stays in the cache. The reference that every other policy is measured against."""

from dataclasses import dataclass
from typing import ClassVar

from eviction.policy import Policy


@dataclass(frozen=True)
class Full(Policy):
    """Keeps everything and attends to everything; has no settings."""

    name: ClassVar[str] = "full"
    when: ClassVar[str] = "never"
    shared_over: ClassVar[str] = "all"
    cost: ClassVar[str] = "none; attention over all rows"
    acts: ClassVar[bool] = False
    goes_on: ClassVar[bool] = True
    style: ClassVar[tuple[str, str, str]] = ("#000000", "", "-")
