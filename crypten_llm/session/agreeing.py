"""Parties agree on what all must have alike before anything secret is sent."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from crypten_llm.errors import UsageError
from crypten_llm.roles import OWNER
from crypten_llm.session.settings import Agreement

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport


def compare(transport: Transport, mine: Agreement) -> None:
    """Raises UsageError when this party's settings differ from the owner's."""
    if transport.rank == OWNER:
        for peer in range(1, transport.world):
            transport.send_json(peer, asdict(mine))
        return
    theirs = transport.recv_json(OWNER, Agreement)
    for field in fields(Agreement):
        here, there = getattr(mine, field.name), getattr(theirs, field.name)
        if here != there:
            raise UsageError(
                f"the parties disagree on {field.name}: {here!r} at {transport.name(transport.rank)}, {there!r} at "
                f"{transport.name(OWNER)}; start every party with the same settings"
            )
