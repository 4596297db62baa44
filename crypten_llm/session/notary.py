"""At each party: what it can say of a request when that has ended, and its signature under that.

Owns the making of receipts, from what the party itself has done: it repeats nothing that another one told it. Where
links are under TLS it signs with the key of its certificate; elsewhere nobody could tell whose a key is, and the parts
go without.

The owner's part has a commitment to its weights: SHA-256 of their digest behind 32 bytes (the opening) that it alone
has, so that nobody can try out which model it is. Under TLS the opening follows from its key and that digest: the same
key and weights make the same commitment in every session, and the owner can open it to whom it likes.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from crypten_llm import program
from crypten_llm.errors import PartyError
from crypten_llm.links.faults import SAME_PROGRAM
from crypten_llm.links.transcript import Seen
from crypten_llm.links.transport import bytes_of
from crypten_llm.records import convert
from crypten_llm.session import report
from crypten_llm.session.receipt import (
    Model,
    Part,
    Passed,
    Receipt,
    Revealed,
    Signed,
    Span,
    broken_links,
    digest,
    digest_of_plans,
    disagreements,
)

if TYPE_CHECKING:
    from torch import Tensor

    from crypten_llm.links.signatures import Signer
    from crypten_llm.links.transport import Transport
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.messages import Announced
    from crypten_llm.session.party import Party
    from crypten_llm.session.plan import Plan, Turn
    from crypten_llm.session.reveal import RevealLog
    from crypten_llm.session.settings import Agreement, ProtocolConfig

Ledger = list[dict]


class Weighing:
    """A digest of weights, which are told one after another."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, value: Tensor) -> None:
        """value: as ``checkpoint.load_weights`` gives it, float32."""
        self._hash.update(f"{name} {list(value.shape)}\n".encode())
        self._hash.update(bytes_of(value.contiguous()))

    def digest(self) -> bytes:
        return self._hash.digest()


def opening_of(signer: Signer | None, weights: bytes) -> bytes:
    """What opens the commitment to weights of this digest; drawn where there is no key."""
    return secrets.token_bytes(32) if signer is None else signer.derive(b"crypten-llm opening of weights " + weights)


def commitment(opening: bytes, weights: bytes) -> str:
    return hashlib.sha256(b"crypten-llm weights " + opening + weights).hexdigest()


@dataclass(frozen=True)
class _Begun:
    """A request that runs: what it is, and what had passed and was revealed when it began."""

    request: int
    plans: tuple[Plan, ...]
    turn: Turn | None
    links: dict[int, tuple[Seen, Seen]]
    ledger: Ledger
    block: str = ""


class Notary:
    """At one party of a session; without ``transport`` one that signs nothing, for a party that is alone.

    roles: of those that make parts, by rank. agreement: what all parties agreed on. signer: with the key of this
    party's certificate.
    """

    def __init__(
        self,
        transport: Transport | None = None,
        roles: Sequence[str] = (),
        agreement: Agreement | None = None,
        tape: str = "",
        signer: Signer | None = None,
    ) -> None:
        self._transport, self._roles, self._agreement, self._tape = transport, tuple(roles), agreement, tape
        self._signer = signer
        self._model: Model | None = None
        self._begun: dict[int, _Begun] = {}
        self._weighing: Weighing | None = None
        self._receipts: dict[int, Receipt] = {}

    @classmethod
    def of(cls, transport: Transport, protocol: ProtocolConfig, tls: str, tape: str = "") -> Notary:
        """tls: folder of keys under which the links are, if any. CrypTen's dealer knows no requests and signs none."""
        roles = protocol.roles if protocol.engine == "wire" else protocol.roles[: protocol.compute_parties]
        signer = None
        if tls:
            from crypten_llm.links.signatures import Signer  # plain links need no X.509

            signer = Signer.of_role(tls, roles[transport.rank])
        return cls(transport, roles, protocol.agreement(), tape, signer)

    @property
    def is_silent(self) -> bool:
        return self._transport is None

    @property
    def running(self) -> tuple[int, ...]:
        """Places of requests that have begun and are not signed."""
        return tuple(self._begun)

    def weigher(self) -> Callable[[str, Tensor], None]:
        """At the owner, what is told each weight while the model is read."""
        if self.is_silent:
            return lambda name, value: None
        self._weighing = Weighing()
        return self._weighing.add

    @property
    def weights(self) -> bytes:
        """At the owner: the digest of what the weigher was told."""
        assert self._weighing is not None, "the weights were read"
        return self._weighing.digest()

    def stand_for(self, config: LlamaConfig, announced: Announced, reveals: RevealLog) -> None:
        """The model that is being shared; the owner has weighed it."""
        if self.is_silent:
            return
        reveals.told("commitment to the weights", "client", "receipts say whether the model is the same")
        weighing, self._weighing = self._weighing, None
        weights = None
        if weighing is not None:
            found = weighing.digest()
            weights = commitment(opening_of(self._signer, found), found)
        self._model = Model(digest(config.to_dict()), announced.tokens, weights, announced.outside)

    def note(self, reveals: RevealLog, ended: Sequence[int]) -> None:
        """Into the ledger, before it is signed."""
        if ended and not self.is_silent:
            reveals.told("digests of each party's messages, and its clock", "client", "its part of the receipt")

    def begin(self, party: Party, plans: Sequence[Plan], turn: Turn | None = None, place: int = 0) -> None:
        if self._transport is not None:
            before = self._transport.seen(), party.reveals.as_list()
            facts = party.requests, tuple(plans), turn, *before, party.stocked.name
            self._begun[place] = _Begun(*facts)

    def start(self) -> None:
        """Another request to the parties: what was not signed will not be."""
        self._begun.clear()
        self._receipts.clear()

    def take(self, place: int) -> Receipt | None:
        """At the client: of the request at this place, which has been collected."""
        return self._receipts.pop(place, None)

    def sign(self, party: Party, ended: Sequence[int]) -> tuple[Signed, ...]:
        """This party's parts of the receipts of these requests, at the same place in the program as all others'."""
        if (transport := self._transport) is None:
            return ()
        seen, ledger, loaded = transport.seen(), party.reveals.as_list(), party.load_reveals.as_list()
        parts = []
        for place in ended:
            begun = self._begun.pop(place)
            revealed = report.Counters([], ledger).since(report.Counters([], begun.ledger), loaded).revealed
            parts.append(Signed.by(self._part(transport, begun, place, seen, revealed), self._signer))
        return tuple(parts)

    def gather(self, ended: Sequence[int], parts: dict[int, tuple[Signed, ...]]) -> None:
        """At the client, what all parties have signed of these requests, by rank.

        Raises PartyError where they have not seen the same.
        """
        if (transport := self._transport) is None:
            return
        for rank, theirs in parts.items():
            if [(p.part.role, p.part.place) for p in theirs] != [(self._roles[rank], place) for place in ended]:
                raise transport.unexpected(rank, "its part of the receipts")
        for at, place in enumerate(ended):
            receipt = self._receipts[place] = Receipt(tuple(parts[rank][at] for rank in sorted(parts)))
            self._check([each.part for each in receipt.parts], transport)

    def _check(self, parts: list[Part], transport: Transport) -> None:
        for sender, receiver in broken_links(parts):
            sent, came = (transport.name(self._roles.index(role)) for role in (sender, receiver))
            raise PartyError(
                f"{sent} sent something else than what reached {came}, so that the answer may be wrong: something "
                "between them changes data, or one of them lies; start all parties again, with --tls"
            )
        if differ := disagreements(parts):
            raise PartyError(f"the parties' receipts of the answer differ in the {differ[0]}; {SAME_PROGRAM}")

    def _part(
        self, transport: Transport, begun: _Begun, place: int, seen: dict[int, tuple[Seen, Seen]], revealed: Ledger
    ) -> Part:
        assert self._agreement is not None and self._model is not None, "a request comes after both"
        links, roles = {}, self._roles[:2] if begun.block else self._roles  # no dealer follows what is from stock
        for peer, role in enumerate(roles):
            if peer != transport.rank:
                sent, received = map(Span, begun.links[peer], seen[peer])
                links[role] = Passed(sent, received)
        return Part(
            form="crypten-llm receipt 1",
            role=self._roles[transport.rank],
            parties=roles,
            made=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            program=program.digest(),
            settings=self._agreement,
            tape=begun.block or self._tape,
            model=self._model,
            request=begun.request,
            place=place,
            plans=tuple(plan.facts() for plan in begun.plans),
            asked=digest_of_plans(begun.plans, begun.turn),
            turn=begun.turn,
            revealed=tuple(convert(entry, Revealed) for entry in revealed),
            links=links,
        )
