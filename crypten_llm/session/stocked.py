"""A request that takes what was dealt before it came: which block, that both parties have it, and that nobody waits.

Owns a party's side of a stock within a session. The client offers blocks that fit its request, the owner says which of
them it has too, and from then on neither half will be found again (``protocols.dealer.stock``). Sections of the request
then draw from the block's keys, and no dealer follows it. Without a block in stock the request goes as any other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from msgspec import structs

import crypten_llm
from crypten_llm import limits, program
from crypten_llm.errors import LeftRange, UsageError, shown
from crypten_llm.links.transport import bytes_of
from crypten_llm.precisions import DEFAULT
from crypten_llm.protocols.dealer.material import CHANNEL
from crypten_llm.protocols.dealer.randomness import KEY_BYTES
from crypten_llm.protocols.dealer.stock import GRACE_SECONDS, Half, Stock
from crypten_llm.session import messages, series
from crypten_llm.session.admission import WARNING
from crypten_llm.session.prompted import Step

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport
    from crypten_llm.models.llama import Llama
    from crypten_llm.protocols.dealer.manifest import Facts
    from crypten_llm.protocols.dealer.tape import Tape
    from crypten_llm.session.party import Party
    from crypten_llm.session.plan import Plan, Turns
    from crypten_llm.session.prompted import Answer, Progress
    from crypten_llm.session.request import Taken
    from crypten_llm.session.settings import LaunchConfig, ProtocolConfig


class Stocked:
    """stock: None where this party keeps none. signers: whose blocks are taken: of producers' keys where
    links are under TLS; else anybody's that both parties have. precision: of the session.
    """

    def __init__(self, stock: Stock | None = None, signers: Sequence[str] = (), precision: str = DEFAULT) -> None:
        self.stock, self.signers, self._precision = stock, signers, precision
        self.series = ""  # of the session's weights
        self.block: Tape | None = None  # of the request that runs
        self._masks: bytes | None = None  # at the owner, of its weights
        self._chosen: Tape | None = None  # for the request that comes

    @classmethod
    def of(cls, protocol: ProtocolConfig, launch: LaunchConfig, transport: Transport, is_local: bool) -> Stocked:
        """Raises UsageError as ``Stock``, and for certificates that cannot be read."""
        if not launch.stock or transport.rank >= 2:
            return cls()
        signers: list[str] = []
        if launch.tls:
            from crypten_llm.links.signatures import public_keys  # plain links need no X.509
            from crypten_llm.links.tls import producers

            signers = [key for role in producers(launch.tls) for key in public_keys(launch.tls, role)]
            if not signers:
                raise UsageError(
                    f"--stock: {launch.tls} has the certificate of no producer; pin it (keys 'producer 1')"
                )
        return cls(Stock(launch.stock, transport.rank, is_local), signers, protocol.precision)

    @property
    def chosen(self) -> str:
        """The block of the request that comes."""
        return self._chosen.manifest.id if self._chosen else ""

    @property
    def name(self) -> str:
        """Of the block of the request that runs."""
        return self.block.manifest.id if self.block else ""

    # While the model is shared.

    def with_series(self, party: Party, announced: messages.Announced) -> messages.Announced:
        """At the owner: what it announces of its model, with the masks' series where it keeps a stock."""
        if self.stock is None:
            return announced
        engine: Any = party.engine
        facts = {
            "version": crypten_llm.__version__,
            "program": program.digest(),
            "torch": str(torch.__version__),
            "device": engine.runtime.device.type,
            "engine": asdict(engine.config),
            "scales": announced.norm_scales,
        }
        weights = party.notary.weights
        found = series.of_weights(self.stock.folder, weights, announced.config, str(party.mode), self._precision, facts)
        self._masks = found.masks
        return structs.replace(announced, series=found.name)

    def masking_weights(self, party: Party, name: str) -> AbstractContextManager[None]:
        """A with block in which the weights are masked as the series of this name says. Its key goes to the dealer.

        Raises UsageError, at a client that keeps a stock, where the owner keeps none.
        """
        self.series = name
        if not name:
            if self.stock is not None:
                raise UsageError("--stock: the owner keeps no stock; start it with --stock as well, or leave it out")
            return nullcontext()
        engine: Any = party.engine
        transport, dealer = party.transport, party.compute_parties
        assert transport is not None, "an engine with a dealer has links"
        key = self._masks
        if party.rank == dealer:
            told = transport.recv(party.owner, (KEY_BYTES,), torch.uint8, channel=CHANNEL)
            key = bytes(bytes_of(told))
        elif key is not None:
            transport.send(dealer, torch.frombuffer(bytearray(key), dtype=torch.uint8), channel=CHANNEL)
        masking: AbstractContextManager[None] = engine.masking_weights(key)
        return masking

    def owning(self, model: Llama) -> Llama:
        """The model, of which no weight is masked later than now where blocks are dealt for its masks.

        A norm of heads is, else, where it is first needed.
        """
        engine: Any = model.engine
        for attention in (block.self_attn for block in model.blocks if self.series and block.self_attn.has_head_norms):
            for norm in (attention.q_norm, attention.k_norm):
                engine.own_norm(norm.weight, attention.head_dim)
        return model

    # Between requests.

    def take(self, party: Party, plans: Sequence[Plan], turns: Turns) -> Sequence[Plan]:
        """At the client: the plans as they are run; with a block, of one that fits, which ``supplied`` gives out."""
        self._chosen = None
        if self.stock is None or len(plans) != 1 or turns or not (offered := self.fitting(party, plans[0])):
            return plans
        transport, stock = party.transport, self.stock
        assert transport is not None, "an engine with a dealer has links"
        asked = messages.Offered(tuple((half.id, half.digest) for half, _ in offered))
        transport.announce(party.client, [party.owner], asked)
        chosen = transport.recv_json(party.owner, messages.Chosen).block
        for half, plan in offered:
            if half.id == chosen:
                self._chosen = self._taken(party, stock, half)
                return [plan] if self._chosen else plans
        if chosen:
            raise transport.unexpected(party.owner, "which block is taken")
        return plans

    def _taken(self, party: Party, stock: Stock, half: Half) -> Tape | None:
        """None for one that another process has, or that cannot be used; this party is told why."""
        engine: Any = party.engine
        assert party.transport is not None, "an engine with a dealer has links"
        try:
            return stock.take(half, party.transport, asdict(engine.config), self.signers)
        except UsageError as error:
            print(shown(f"{WARNING}block {half.id} is not taken: {error}"), file=sys.stderr, flush=True)
            return None

    def fitting(self, party: Party, plan: Plan) -> list[tuple[Half, Plan]]:
        """Blocks that this request can take, with what it is run as: those that waste least first, the oldest of them.

        Of one prompt, as the model can run it.
        """
        if self.stock is None:
            return []
        able, as_run = [], dict[tuple, "Plan | None"]()
        for half in self.stock.halves():
            shape = tuple(half.plan.items())
            if shape not in as_run and half.series == self.series:
                made = fitted(half.plan, plan)
                as_run[shape] = made if made and is_worth_it(made) and _runs(party, made) else None
            if half.series == self.series and (found := as_run[shape]):
                able.append((half, found))
        able.sort(key=lambda each: (each[1].rows, each[0].plan["max_new_tokens"]))
        return able[: limits.OFFERED]

    def hear(self, party: Party, said: messages.Offered | messages.Stocks) -> None:
        """At the owner."""
        transport, stock = party.transport, self.stock
        assert transport is not None, "an engine with a dealer has links"
        if isinstance(said, messages.Stocks):
            mine = messages.Stocks(() if stock is None else self._ids(stock))
            transport.send_json(party.client, mine)
            self._drop_lone(said.ids)
            return
        self._leave()
        there = {} if stock is None else {half.id: half for half in stock.halves() if half.series == self.series}
        for name, digest in said.blocks:
            half = there.get(name)
            if stock is not None and half is not None and half.digest == digest:
                self._chosen = self._taken(party, stock, half)
                if self._chosen:
                    break
        transport.send_json(party.client, messages.Chosen(self.chosen))

    def reconcile(self, party: Party) -> None:
        """At the client: each party drops the halves of which the other has none, and those of other weights."""
        if self.stock is None:
            return
        transport = party.transport
        assert transport is not None, "an engine with a dealer has links"
        transport.announce(party.client, [party.owner], messages.Stocks(self._ids(self.stock)))
        self._drop_lone(transport.recv_json(party.owner, messages.Stocks).ids)

    def _ids(self, stock: Stock) -> tuple[str, ...]:
        return tuple(half.id for half in stock.halves() if half.series == self.series)[: limits.BLOCKS]

    def _drop_lone(self, theirs: Sequence[str]) -> None:
        if self.stock is None:
            return
        there, since = set(theirs), time.time_ns() - int(GRACE_SECONDS * 1e9)
        for half in self.stock.halves():
            if half.series != self.series or (half.id not in there and half.made < since):
                self.stock.drop(half.id)

    # While one runs.

    @contextmanager
    def supplied(self, party: Party, name: str, plans: Sequence[Plan]) -> Iterator[None]:
        """Around a request: what was chosen for it, if anything, is used and closed. name: of the block, as the client
        says it. Raises PartyError, at the owner, for another than was chosen, and a request that it is not for.
        """
        block, self._chosen = self._chosen, None
        if block is None or not name:
            if block is not None:
                block.close()
            if name:
                raise self._unexpected(party)
            yield
            return
        peers: list[int] = party.peers
        engine: Any = party.engine
        try:
            if block.manifest.id != name or len(plans) != 1 or fitted(block.manifest.plan, plans[0]) != plans[0]:
                raise self._unexpected(party)
            party.peers, self.block = [rank for rank in peers if rank < party.compute_parties], block
            with engine.supplied(block):
                yield
        finally:
            party.peers, self.block = peers, None
            block.close()

    def _unexpected(self, party: Party) -> Exception:
        assert party.transport is not None, "an engine with a dealer has links"
        return party.transport.unexpected(party.client, "a request of the block that was chosen")

    def _leave(self) -> None:
        """What was chosen for a request that never came is not kept."""
        if self._chosen is not None:
            self._chosen.close()
            self._chosen = None


def fitted(dealt: Facts, plan: Plan) -> Plan | None:
    """The plan as it is run with a block for ``dealt``, if it can be: read as long as that with pads, where the cache
    is padded, and in the same room.
    """
    wanted, most = plan.facts() | {"padded": dealt.get("padded", 0)}, dealt.get("max_new_tokens", 0)
    rows = dealt.get("prompt_tokens", 0)
    if not isinstance(rows, int) or not isinstance(most, int) or plan.max_new_tokens > most:
        return None
    others = [name for name in dealt if name not in ("prompt_tokens", "max_new_tokens")]
    pads = rows - plan.prompt_tokens
    if any(dealt[name] != wanted.get(name) for name in others) or not 0 <= pads <= limits.PADDED:
        return None
    made = replace(plan, pads=pads, padded=wanted["padded"])
    if pads and not made.padded:
        return None
    is_alike = made.max_new_tokens == 1 or made.room() == replace(made, max_new_tokens=most).room()
    return made if is_alike else None


def is_worth_it(plan: Plan) -> bool:
    """Whether its pads cost less than a dealer would: up to as many as the prompt has tokens, or to the end of a first
    chunk, which takes the same rounds.
    """
    return plan.rows <= max(2 * plan.prompt_tokens, plan.chunk)


def _runs(party: Party, plan: Plan) -> bool:
    """Whether the model can run it, and this machine hold it; pads must not move positions to other frequencies."""
    try:
        party.check_plans([plan])
    except UsageError:
        return False
    most = len(plan.public_prefix) + plan.rows + plan.max_new_tokens
    return not plan.pads or most <= party.model.frequencies_hold


def run(
    party: Party, plans: Sequence[Plan], answers: Sequence[Answer], taken: Taken, turns: Turns
) -> Generator[Progress | Step, None, None]:
    """At the client: one request to its end, from stock where there is a block for it; every rank's counters and the
    block's name go to ``taken``. With ``hide_length`` nothing is left to be sent when the first ``Step`` is yielded.
    """
    held: list[Step] = []
    hides, stocked = any(plan.hide_length for plan in plans), party.stocked
    plans = stocked.take(party, plans, turns)
    taken.block, taken.plans = stocked.chosen, plans
    try:
        with stocked.supplied(party, taken.block, plans):
            for event in party.request_together(plans, answers, turns):
                if hides and isinstance(event, Step):
                    held.append(event)
                else:
                    yield event
            taken.ranks += party.collect_statistics()
    except LeftRange:  # all parties have ended, and what came before is right
        yield from held
        raise
    yield from held
