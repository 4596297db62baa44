"""A thin client's secrets at the parties: what owner and helper hold of its tokens, and what they pass on to it.

Owns a side of it for each role. The client is no party: it holds a link to the helper, which takes the client's place
among the parties, and a key in common with the owner, told on a link of their own. From that key come the seeds with
which the owner's keys of tokens begin (``protocols.points``), and the pads under which the owner sends, by way of the
helper, what the client is shown. So the helper sees bits that the owner's part hides and values that a pad hides; the
owner sees no more than without a helper.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from crypten_llm.errors import PartyError
from crypten_llm.protocols import points
from crypten_llm.protocols.points import NUMBER, SEED, Points
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import messages
from crypten_llm.session.doors import Entrance

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine
    from crypten_llm.engines.passing import Pad, Padded
    from crypten_llm.session.party import Party
    from crypten_llm.session.settings import LaunchConfig, ProtocolConfig
    from eviction.operations import Handle

KEY = 32  # bytes of what client and owner have in common in a session
TOKENS = 1 << 8 * NUMBER  # of a session


def token_bytes(vocabulary: int) -> int:
    """What a client sends the helper of a token: the helper's seed, the number of the owner's, and corrections."""
    return SEED + passed_bytes(vocabulary)


def passed_bytes(vocabulary: int) -> int:
    """What of it the helper passes on to the owner."""
    return NUMBER + points.corrections_size(vocabulary)


def seed_of(key: bytes, number: int) -> bytes:
    """Of the owner's key of a session's token; each number serves one token."""
    return hashlib.sha256(key + f"token {number}".encode()).digest()[:SEED]


def pad_of(key: bytes, number: int, shape: Sequence[int]) -> Tensor:
    """Uniform words of a shape, for the ``number``th value that a session's client is shown: SHAKE-256 of the key."""
    drawn = hashlib.shake_256(key + f"pad {number}".encode()).digest(8 * math.prod(shape))
    return torch.frombuffer(bytearray(drawn), dtype=torch.int64).view(*shape)


class Side:
    """The dealer's, which learns nothing of either; the others' are made of it."""

    pad: Pad | None = None

    def points(self, keys: Sequence[bytes] | None, count: int, vocabulary: int) -> Points:
        """This role's part of the next ``count`` tokens; keys: of them, as the client sent them, at the helper."""
        return Points(passed_bytes(vocabulary))

    def pass_on(self, engine: Engine, handle: Handle, client: int) -> list[Padded] | None:
        """At the helper what it is to pass on, ``None`` elsewhere. Reveals, raises: as ``Engine.pass_on``."""
        passed = engine.pass_on(handle, client, self.pad)
        return None if passed[0].words is None else passed

    def hear(self, party: Party, message: messages.Where | messages.Enter | messages.Leave) -> None:
        """What the helper says of who comes and goes."""


class HelperSide(Side):
    """The helper's."""

    def points(self, keys: Sequence[bytes] | None, count: int, vocabulary: int) -> Points:
        assert keys is not None and len(keys) == count, "the helper has a key of each token"
        own = [(key[:SEED], key[SEED + NUMBER :]) for key in keys]
        sent = torch.tensor([list(key[SEED:]) for key in keys])
        return Points(passed_bytes(vocabulary), points.bits(own, True, vocabulary), sent)


class OwnerSide(Side):
    """The owner's. entrance: where clients tell it their keys."""

    def __init__(self, entrance: Entrance) -> None:
        self._entrance = entrance
        self._key: bytes | None = None
        self._last = self._pads = 0

    def points(self, keys: Sequence[bytes] | None, count: int, vocabulary: int) -> Points:
        def read(sent: Tensor) -> Tensor:
            rows = [bytes(row) for row in sent.tolist()]
            seeds = [seed_of(self._known(), self._numbered(row)) for row in rows]
            corrections = [row[NUMBER:] for row in rows]
            found = points.bits(list(zip(seeds, corrections, strict=True)), False, vocabulary)
            return found.to(sent.device)

        return Points(passed_bytes(vocabulary), read=read)

    def _numbered(self, row: bytes) -> int:
        """Which seed a token's key begins with: a later one than all before, or once more the last."""
        number = int.from_bytes(row[:NUMBER], "little")
        if number < self._last:
            raise PartyError(
                f"rank {CLIENT} (helper) passed a token's key on that is older than the last one; start all parties "
                "again"
            )
        self._last = number
        return number

    def pad(self, shape: tuple[int, ...], bits: int) -> Tensor:
        self._pads += 1
        return pad_of(self._known(), self._pads, shape)

    def _known(self) -> bytes:
        if self._key is None:
            raise PartyError(
                f"rank {CLIENT} (helper) asks for a thin client that has not come; start all parties again"
            )
        return self._key

    def hear(self, party: Party, message: messages.Where | messages.Enter | messages.Leave) -> None:
        assert party.transport is not None, "a helper is another process"
        match message:
            case messages.Where():
                party.transport.send_json(party.client, self._entrance.place)
            case messages.Enter(session):
                self._key, self._last, self._pads = self._entrance.key_of(session, party), 0, 0
                party.transport.send_json(party.client, self._key is not None)
            case messages.Leave():
                self._key = None


def heard(party: Party, message: messages.Where | messages.Enter | messages.Leave) -> None:
    """At every party but the helper. Raises PartyError where there is none."""
    if party.thin is None:
        assert party.transport is not None, "one process hears nobody"
        raise party.transport.unexpected(party.client, "what a client asks for")
    party.thin.hear(party, message)


def side_of(protocol: ProtocolConfig, launch: LaunchConfig, rank: int) -> Side | None:
    """The side of a rank, where there is a helper; the owner's takes clients from now on.

    Raises: as ``Entrance.open``.
    """
    if not protocol.helper:
        return None
    if rank == OWNER:
        return OwnerSide(Entrance.open(protocol, launch, OWNER, os.environ))
    return HelperSide() if rank == CLIENT else Side()
