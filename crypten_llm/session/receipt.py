"""What a request's receipt is: of each party one part, which it has signed, and what parts must have in common.

Owns the records and their comparison. ``notary`` makes them at the parties, ``verification`` reads them afterwards.
A receipt holds neither prompt nor answer, and no digest of either alone.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from crypten_llm import limits, records
from crypten_llm.errors import UsageError
from crypten_llm.links.transcript import Seen
from crypten_llm.records import Count, Digest, Record, Word, Words
from crypten_llm.session.plan import Plan, Turn
from crypten_llm.session.settings import Agreement

if TYPE_CHECKING:
    from crypten_llm.links.signatures import Signer

PARTIES, REVEALED = 100, 10_000  # at most
Facts = Annotated[dict[Word, bool | Count | float | Words], Meta(max_length=64)]


class Revealed(Record, frozen=True):
    """An entry of the ledger: what whom was told, why, and how often while the request ran; the load's part with it."""

    what: Words
    to: Word
    why: Words
    times: Count


class Span(Record, frozen=True):
    """One direction of a link: all of the session when the request began, and when it had ended."""

    before: Seen
    after: Seen


class Passed(Record, frozen=True):
    """What a party sent to another one, and received from it."""

    sent: Span
    received: Span


class Model(Record, frozen=True):
    """config: SHA-256 of the announced configuration. tokenizer: the announced digest of the vocabulary. weights: the
    owner's commitment to them, at it alone (``notary``). outside: which of the engine's ranges it leaves.
    """

    config: Digest
    tokenizer: Digest | None
    weights: Digest | None
    outside: Words


class Part(Record, frozen=True):
    """What one party says of a request.

    role: its name. parties: of all that make a part. made: when, by its clock, UTC. program: digest of its code.
    settings: those that all had to agree on. tape: the id of the tape that took the dealer's place, or nothing.
    request, place: which of the session, and where it stood among those that ran side by side. plans: of its prompts,
    of a public prefix the length. asked: SHA-256 of the whole plans. turn: of a conversation. revealed: the ledger.
    links: by the other party's name.
    """

    form: Literal["crypten-llm receipt 1"]
    role: Word
    parties: Annotated[tuple[Word, ...], Meta(min_length=1, max_length=PARTIES)]
    made: Word
    program: Digest
    settings: Agreement
    tape: Word
    model: Model
    request: Count
    place: Count
    plans: Annotated[tuple[Facts, ...], Meta(max_length=limits.PROMPTS)]
    asked: Digest
    turn: Turn | None
    revealed: Annotated[tuple[Revealed, ...], Meta(max_length=REVEALED)]
    links: Annotated[dict[Word, Passed], Meta(max_length=PARTIES)]

    def text(self) -> bytes:
        """What is signed: the compact JSON of these fields in this order, behind a name of its own."""
        return b"crypten-llm receipt " + records.encode(self)


class Signed(Record, frozen=True):
    """A part, the public key that has signed it, and the signature in base 64; both None where a party has no key."""

    part: Part
    key: Words | None
    signature: Word | None

    @classmethod
    def by(cls, part: Part, signer: Signer | None) -> Signed:
        if signer is None:
            return cls(part, None, None)
        return cls(part, signer.public, base64.b64encode(signer.sign(part.text())).decode())


Parts = Annotated[tuple[Signed, ...], Meta(max_length=limits.PROMPTS)]


class Receipt(Record, frozen=True):
    """One request's, a part of each party."""

    parts: Annotated[tuple[Signed, ...], Meta(min_length=1, max_length=PARTIES)]


class Receipts(Record, frozen=True):
    """A file, or what an endpoint gives: of each answer that was asked for at once, its receipt."""

    receipts: Annotated[tuple[Receipt, ...], Meta(min_length=1, max_length=limits.PROMPTS)]

    def write(self, path: str | Path) -> None:
        """Raises UsageError where that cannot be written."""
        try:
            Path(path).write_bytes(records.encode(self) + b"\n")
        except OSError as error:
            raise UsageError(f"cannot write {path} ({error.strerror}); name another file for the receipt") from None


def digest(value: Any) -> str:
    """SHA-256 of a record, or of what JSON knows, with the names of objects in order."""
    return hashlib.sha256(records.encode(records.in_order(value))).hexdigest()


def digest_of_plans(plans: Sequence[Plan], turn: Turn | None) -> str:
    return digest({"plans": list(plans), "turn": turn})


ALIKE = {
    "program": "program",
    "settings": "settings",
    "tape": "tape",
    "parties": "list of parties",
    "request": "number of the request",
    "place": "place of the request",
    "plans": "plans",
    "asked": "whole plans",
    "turn": "turn of a conversation",
    "revealed": "ledger of reveals",
}
OF_THE_MODEL = {"config": "model's configuration", "tokenizer": "tokenizer's vocabulary", "outside": "model's ranges"}


def disagreements(parts: Sequence[Part]) -> list[str]:
    """What these say of the request that is not the same at all of them, in words; nothing if it is."""
    found = [words for name, words in ALIKE.items() if len({records.encode(getattr(p, name)) for p in parts}) > 1]
    return found + [words for name, words in OF_THE_MODEL.items() if len({getattr(p.model, name) for p in parts}) > 1]


def broken_links(parts: Sequence[Part]) -> Iterator[tuple[str, str]]:
    """Sender and receiver of each direction of a link of which they have not seen the same."""
    for one, other in combinations(parts, 2):
        for sender, receiver in ((one, other), (other, one)):
            left, came = sender.links.get(receiver.role), receiver.links.get(sender.role)
            if left is None or came is None or left.sent != came.received:
                yield sender.role, receiver.role
