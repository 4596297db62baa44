"""What a request has cost at every party, and the receipts of those that have ended: how the client comes to know.

Owns these messages. All parties know when they are due.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crypten_llm.links.meter import Counters, peak_bytes
from crypten_llm.roles import OWNER
from crypten_llm.session.receipt import Parts

if TYPE_CHECKING:
    from crypten_llm.session.party import Party


class Told(Counters, total=False):
    """What a party tells the client: its counters, and its parts of receipts of requests that have ended."""

    receipts: Parts


def count(party: Party, ended: Sequence[int]) -> list[dict]:
    """At the client every rank's counters, the dealer's last, if one takes part; at others nothing.

    ended: places of requests of which the client gets a receipt (``Notary.take``). Raises PartyError, at the client,
    where the parties have not seen the same.
    """
    party.notary.note(party.reveals, ended)
    mine = statistics(party)
    if party.transport is None:
        return [mine]
    if signed := party.notary.sign(party, ended):
        mine["receipts"] = signed
    if not party.is_client:
        party.transport.send_json(party.client, mine)
        return []
    ranks = {party.rank: mine}
    for rank in party.peers:
        ranks[rank] = party.transport.recv_json(rank, Told)
    party.notary.gather(ended, {rank: told.pop("receipts", ()) for rank, told in ranks.items()})
    if "dealer" in ranks[party.owner]:
        ranks[party.compute_parties] = ranks[party.owner].pop("dealer")
    return [ranks[rank] for rank in sorted(ranks)]


def statistics(party: Party) -> dict:
    """A party's public counters since ``fresh_meter``, without clocks but at the client; party 0 adds the dealer's.

    Reveals: each party's peak memory, to the client.
    """
    meter = party.engine.meter
    table = meter.table() if party.is_client else meter.counts()
    entry = {"rank": party.rank, "table": table, "peak_bytes": peak_bytes()}
    if party.transport is not None:
        party.reveals.told("peak memory of each party", "client", "its report names it")
    if party.rank == OWNER and party.engine.dealer is not None:
        entry["dealer"] = party.engine.dealer.ask_statistics()
    return entry
