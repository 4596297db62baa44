"""What a thin client and its helper say to each other, each message one type; all public but keys and padded words.

Owns these types. Requests are those of the parties (``messages``): the helper repeats them to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from crypten_llm import limits
from crypten_llm.engines.passing import Padded
from crypten_llm.links.meter import Row
from crypten_llm.records import Count, Record, Word, Words
from crypten_llm.session.messages import Close, Forget, Generate
from crypten_llm.session.receipt import REVEALED, Receipt, Revealed

GO_ON, STOP = 0, 1  # before each key of an answer's token: whether there is one

Request = Generate | Forget | Close


class Refused(Record, frozen=True, tag="refused"):
    """What was asked is not done, and why; nothing has happened."""

    reason: Words


class Admitted(Record, frozen=True, tag="admitted"):
    """Another client's turn has ended, and it is this one's: the owner waits for its key."""


class Ready(Record, frozen=True, tag="ready"):
    """The owner has it, and requests can be made; the public facts of the model, as all parties know them."""

    config: dict[str, Any]
    tokens: Word | None
    outside: Words
    revealed: Annotated[tuple[Revealed, ...], Meta(max_length=REVEALED)]


class Accepted(Record, frozen=True, tag="accepted"):
    """A request can be run: its prompt's keys are waited for."""


class Read(Record, frozen=True, tag="read"):
    """So many of the prompt's tokens are in the cache."""

    done: Count
    total: Count


class Form(Record, frozen=True):
    """How a padded value looks; see ``Padded``."""

    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=limits.VOCABULARY)], ...], Meta(max_length=2)]
    bits: Annotated[int, Meta(ge=1, le=64)]
    fraction: Annotated[int, Meta(ge=-64, le=64)]

    def padded(self) -> Padded:
        return Padded(None, self.shape, self.bits, self.fraction)


class Shown(Record, frozen=True, tag="shown"):
    """Of what the next token is chosen from; the words follow, as bytes."""

    forms: Annotated[tuple[Form, ...], Meta(min_length=1, max_length=2)]


def shown(passed: Sequence[Padded]) -> Shown:
    """How these values look."""
    return Shown(tuple(Form(each.shape, each.bits, each.fraction) for each in passed))


class Left(Record, frozen=True, tag="left"):
    """Numbers have left the engine's range; the session ends at all parties."""

    reason: Words


class TimedRow(Row, total=False):
    """A row of the helper's own, with clocks."""

    seconds: float
    wait_seconds: float
    dealer_wait_seconds: float


class Rank(TypedDict):
    """What a party has counted."""

    rank: Annotated[int, Meta(ge=0, le=100)]
    table: Annotated[list[TimedRow], Meta(max_length=10_000)]
    peak_bytes: Count


class Ended(Record, frozen=True, tag="ended"):
    """A request has ended: what it has cost every rank, the ledger, and what all parties have signed."""

    ranks: Annotated[list[Rank], Meta(max_length=100)]
    revealed: Annotated[tuple[Revealed, ...], Meta(max_length=REVEALED)]
    receipt: Receipt | None


Event = Read | Shown | Left | Ended
