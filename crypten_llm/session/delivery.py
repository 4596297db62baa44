"""How blocks come to a stock: what a producer and the keeper of a party's stock say to each other.

Owns the words and both ends of one link. A producer has a link to each keeper and sends each its own halves. It asks
the owner's keeper for the series, and the client's what is wanted; reserves room for both halves, deals, sends both,
and only when both have come whole and were compared with what was signed, has both settled, the owner's first.
Whatever ends a link ends what came half-way on it. A half that settled alone, because its producer died between two
words, is never taken, and its party drops it (``stocked``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from msgspec import Meta

from crypten_llm import limits
from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.links.transport import Transport, bytes_of
from crypten_llm.protocols.dealer.manifest import NAMES
from crypten_llm.protocols.dealer.stock import look
from crypten_llm.protocols.dealer.tape import Tape
from crypten_llm.records import Count, Record, Tokens, Word, Words
from crypten_llm.roles import OWNER
from crypten_llm.session import series
from crypten_llm.session.plan import DEFAULT_CHUNK, Plan, parse_policy

if TYPE_CHECKING:
    from crypten_llm.protocols.dealer.stock import Stock

PARTY, PRODUCER = 0, 1  # ranks on such a link
PIECE = 1 << 20  # bytes of a half that travel at once
Blocks = Annotated[int, Meta(ge=1, le=limits.BLOCKS)]
Id = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]


class Level(Record, frozen=True):
    """How many blocks of a shape are wanted in stock. Lengths are the longest that a block serves, ``public_prefix`` is
    of so many tokens; the other fields are a plan's."""

    prompt_tokens: Tokens
    max_new_tokens: Tokens
    blocks: Blocks
    chunk: Tokens = DEFAULT_CHUNK
    policy: Words = "full"
    public_prefix: Annotated[int, Meta(ge=0, le=limits.TOKENS)] = 0
    reveal: Word = "logits"
    temperature: float = 0.0

    def plan(self) -> Plan:
        """As it is dealt: in one room, whatever is asked for, where the cache is padded. Raises UsageError."""
        first = (self.prompt_tokens, self.max_new_tokens, self.chunk, True, self.policy, (0,) * self.public_prefix)
        plan = Plan(*first, self.reveal, self.temperature)
        rows = self.public_prefix + self.prompt_tokens + self.max_new_tokens
        return replace(plan, padded=0 if rows > limits.PADDED or parse_policy(plan.policy).acts else rows)


# What a producer says.


class Said(Record, frozen=True, tag_field="verb"):
    """Told apart by "verb"."""


class Ask(Said, frozen=True, tag="ask"):
    """At the owner's: which series? At the client's: what is wanted of this one?"""

    series: Word = ""


class Reserve(Said, frozen=True, tag="reserve"):
    """Room for a half of so many bytes."""

    id: Id
    size: Count


class Deliver(Said, frozen=True, tag="deliver"):
    """The half that room was reserved for comes now, in messages of ``PIECE`` bytes."""


class Settle(Said, frozen=True, tag="settle"):
    """The other half has come too: it is in stock now."""


class Discard(Said, frozen=True, tag="discard"):
    """It will never come, or is not to be used."""


FromProducer = Ask | Reserve | Deliver | Settle | Discard


class Terms(Record, frozen=True):
    """The owner's answer to ``Ask``; nothing where no model was shared with this stock yet."""

    series: series.Series | None = None


class Order(Record, frozen=True):
    """The client's answer to ``Ask``: of which shape a block is wanted most, if any. missing: blocks, of all shapes.
    filled: the emptiest shape's part of what is wanted."""

    plan: Plan | None = None
    missing: Count = 0
    filled: float = 1.0


class Answer(Record, frozen=True):
    """To all else. refused: why not; empty for yes."""

    refused: Words = ""


# At a party.


@dataclass
class _Coming:
    """What a producer has been asked for, and has reserved. size: of the half, bytes."""

    plan: Plan | None = None
    id: str = ""
    size: int = 0
    is_whole: bool = False


class Keeper:
    """A party's end of links to producers, each followed in a thread of its own.

    levels: at the client, what is wanted. most: bytes that all halves may take. signers: public keys of producers,
    whose halves alone are taken; anybody's where links prove no keys. told: called with the id and size of each half
    that has settled.
    """

    def __init__(
        self,
        stock: Stock,
        levels: Sequence[Level] = (),
        most: float = float("inf"),
        signers: Sequence[str] = (),
        told: Callable[[str, int], object] = lambda name, size: None,
    ) -> None:
        self.stock, self.most, self.signers, self.told = stock, most, signers, told
        self.levels = [(level, level.plan()) for level in levels]
        self.producers = 0
        self._coming: dict[int, _Coming] = {}
        self._changing = threading.RLock()
        self._lock = stock.kept_alone()

    def follow(self, transport: Transport) -> None:
        """One producer, until it leaves; what it has not finished is gone then. Raises PartyError where it fails."""
        mine, which = _Coming(), id(transport)
        with self._changing:
            self._coming[which] = mine
            self.producers += 1
        try:
            while True:
                said = transport.recv_json(PRODUCER, FromProducer, timeout=float("inf"))
                transport.send_json(PRODUCER, self._answer(mine, said, transport))
        finally:
            with self._changing:
                self._discard(mine)
                del self._coming[which]
                self.producers -= 1

    def _answer(self, mine: _Coming, said: FromProducer, transport: Transport) -> Terms | Order | Answer:
        if isinstance(said, Ask):
            if self.stock.party == OWNER:
                return Terms(series.read(self.stock.folder))
            with self._changing:
                return self._order(mine, said.series)
        try:
            match said:
                case Reserve(name, size):
                    with self._changing:
                        self._reserve(mine, name, size)
                case Deliver():
                    self._receive(mine, transport)
                case Settle():
                    self._settle(mine)
                case Discard():
                    with self._changing:
                        self._discard(mine)
        except UsageError as error:
            with self._changing:
                self._discard(mine)
            return Answer(str(error)[:1000])
        return Answer()

    def wanted(self, name: str) -> list[tuple[Level, Plan, int, int]]:
        """Of each level what is in stock of that series, and what producers are dealing."""
        there = [half.plan for half in self.stock.halves() if half.series == name]
        with self._changing:
            dealt = [coming.plan for coming in self._coming.values() if coming.plan]
        found = []
        for level, plan in self.levels:
            facts = {fact: value for fact, value in plan.facts().items() if fact not in ("hide_length", "pads")}
            found.append((level, plan, there.count(facts), dealt.count(plan)))
        return found

    def _order(self, mine: _Coming, name: str) -> Order:
        self._discard(mine)
        self.stock.drop_others(name)
        found = self.wanted(name)
        missing = sum(max(0, level.blocks - have - dealt) for level, _, have, dealt in found)
        filled = min((have / level.blocks for level, _, have, _ in found), default=1.0)
        able = [((have + dealt) / level.blocks, plan) for level, plan, have, dealt in found]
        emptiest = min(able, key=lambda each: each[0], default=(1.0, None))
        if emptiest[0] < 1:
            mine.plan = emptiest[1]
        return Order(mine.plan, missing, filled)

    def _reserve(self, mine: _Coming, name: str, size: int) -> None:
        self._discard(mine, keeps_order=True)
        self.stock.arriving(name)
        others = sum(coming.size for coming in self._coming.values())
        taken = sum(half.size for half in self.stock.halves()) + others
        if taken + size > self.most:
            raise UsageError(f"the {NAMES[self.stock.party]}'s stock is full: {taken:,} bytes of {self.most:,.0f}")
        if any(coming.id == name for coming in self._coming.values()):
            raise UsageError(f"block {name} is being delivered by another producer")
        mine.id, mine.size, mine.is_whole = name, size, False

    def _receive(self, mine: _Coming, transport: Transport) -> None:
        if not mine.id or mine.is_whole:
            raise transport.unexpected(PRODUCER, "a half that room was reserved for")
        path, left = self.stock.arriving(mine.id), mine.size
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                while left:
                    piece = transport.recv(PRODUCER, (min(PIECE, left),), torch.uint8)
                    left -= piece.numel()
                    file.write(bytes_of(piece))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # the rest is on its way, and nobody's
            while left:
                left -= transport.recv(PRODUCER, (min(PIECE, left),), torch.uint8).numel()
            raise UsageError(f"the {NAMES[self.stock.party]}'s stock cannot be written ({error.strerror})") from None
        self._check(path)
        mine.is_whole = True

    def _check(self, path: Path) -> None:
        """Raises UsageError for what is no half of this party's stock, or not as its dealer has signed it."""
        half = None
        try:
            half = look(path, self.stock.party)
        except Exception as error:  # whatever such a file may hold
            raise UsageError(f"what was delivered is no half of a block ({type(error).__name__})") from None
        if half is None:
            raise UsageError(f"what was delivered is no unused half of the {NAMES[self.stock.party]}'s")
        links: Any = None  # of a tape that is only compared with its digests
        Tape(path, self.stock.party, links, True, self.signers, half.series).close()

    def _settle(self, mine: _Coming) -> None:
        if not mine.is_whole:
            raise UsageError("no half has come whole")
        with self._changing:
            self.stock.settle(mine.id)
            self.told(mine.id, mine.size)
            mine.id, mine.size, mine.is_whole, mine.plan = "", 0, False, None

    def _discard(self, mine: _Coming, keeps_order: bool = False) -> None:
        if mine.id:
            self.stock.abandon(mine.id)
        mine.id, mine.size, mine.is_whole = "", 0, False
        if not keeps_order:
            mine.plan = None


# At a producer.


class Line:
    """A producer's link to one party's keeper. Raises PartyError where that fails, and ``Refused`` where it says no."""

    def __init__(self, transport: Transport, party: int) -> None:
        self.transport, self.party = transport, party
        transport.beat([PARTY])

    def terms(self) -> series.Series | None:
        """At the owner's keeper."""
        return self._ask(Ask(), Terms).series

    def order(self, name: str) -> Order:
        """At the client's keeper."""
        return self._ask(Ask(name), Order)

    def reserve(self, name: str, size: int) -> None:
        self._say(Reserve(name, size))

    def deliver(self, path: Path) -> None:
        """Sends the file, of the size that was reserved."""
        self.transport.send_json(PARTY, Deliver())
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE):
                self.transport.send(PARTY, torch.frombuffer(bytearray(piece), dtype=torch.uint8))
        self._heed()

    def settle(self) -> None:
        self._say(Settle())

    def discard(self) -> None:
        self._say(Discard())

    def _ask(self, said: Said, kind: Any) -> Any:
        self.transport.send_json(PARTY, said)
        return self.transport.recv_json(PARTY, kind)

    def _say(self, said: Said) -> None:
        self.transport.send_json(PARTY, said)
        self._heed()

    def _heed(self) -> None:
        if refused := self.transport.recv_json(PARTY, Answer).refused:
            raise Refused(f"the {NAMES[self.party]}'s keeper: {refused}")


class Refused(CryptenLLMError):
    """A keeper does not take what is offered; the link goes on."""
