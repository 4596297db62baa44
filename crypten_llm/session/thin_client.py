"""A thin client: no party, no weights and no shares, but a link to the helper and a key in common with the owner.

Owns the client's side. It stands where a ``Party`` stands in a session: a prompt's tokens leave it as keys of points,
and what it chooses a token from comes behind pads of its own. ``thin`` says what the parties make of that.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.base import HELD, Held
from crypten_llm.errors import LeftRange, PartyError, UsageError, public_words
from crypten_llm.links import keyring
from crypten_llm.links.meter import Meter, peak_bytes
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.rope import unchanged_up_to
from crypten_llm.protocols import points
from crypten_llm.records import plain
from crypten_llm.roles import CLIENT
from crypten_llm.session import doors, messages, scheduler, thin_words
from crypten_llm.session.doors import Introduction
from crypten_llm.session.local_helper import LOCAL, LocalHelper
from crypten_llm.session.plan import Plan, Turns
from crypten_llm.session.prompted import Answer, Progress, Prompted, Step
from crypten_llm.session.report import Counters, added, ledger
from crypten_llm.session.reveal import choice_of
from crypten_llm.session.stocked import Stocked
from crypten_llm.session.thin import KEY, TOKENS, pad_of, seed_of
from crypten_llm.session.thin_words import GO_ON, STOP

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport
    from crypten_llm.session.bench import Shape
    from crypten_llm.session.receipt import Receipt
    from crypten_llm.session.settings import LaunchConfig, ProtocolConfig

HELPER = 0  # its rank on the link between the two


class Ledger:
    """What was revealed, as the helper's own ledger has it."""

    def __init__(self, entries: Sequence[Any]) -> None:
        self._entries = [plain(each) for each in entries]

    def as_list(self) -> list[dict]:
        return [dict(entry) for entry in self._entries]


class ThinParty:
    """In the place of a ``Party``, at a client that is none; its methods are those of the same name there.

    link: to the helper. key: that the owner has been told. ready: the model's public facts.
    """

    compute_parties = 2
    rank = CLIENT  # of the helper, for what it keeps of this client

    def __init__(self, link: Transport, key: bytes, ready: thin_words.Ready, protocol: ProtocolConfig) -> None:
        self.transport, self.mode = link, protocol.mode
        config = LlamaConfig.from_dict(ready.config)
        self.model = SimpleNamespace(config=config, frequencies_hold=unchanged_up_to(config))
        self.engine = self.notary = self  # what a session asks of either is here
        self.tokens_digest, self.outside = ready.tokens, ready.outside
        self.stocked = Stocked()  # none: parties alone have halves of a block
        self.reveals = self.load_reveals = Ledger(ready.revealed)
        self.kept: dict[int, Any] = {}
        self._key, self._numbers, self._pads = key, 0, 0
        self._ranks: list[dict] = []
        self._receipt: Receipt | None = None

    @property
    def meter(self) -> Meter:
        return self.transport.meter

    # What a session asks of a party before a request.

    def request_load(self, folder: Any = None, progress: bool = False) -> None:
        """Nothing: the model has been shared."""

    def expect(self, verb: str, *plans: Any) -> None:
        """Raises UsageError for what a thin client cannot ask for."""
        if verb == "bench":
            raise UsageError("a bench is of the parties; start it without --helper")

    def holds(self, rank: int) -> Held:
        """What the helper keeps: the client keeps nothing."""
        return HELD

    def check_sampling(self, temperature: float) -> None:
        """Any will do."""

    def check_plans(self, plans: Sequence[Plan], turns: Turns = (), running: Sequence[int] = ()) -> None:
        """Raises UsageError for what does not fit the model, and for more than a thin client asks for at once."""
        if len(plans) != 1:
            raise UsageError(f"a thin client asks one prompt at a time, and {len(plans)} are given")
        for plan in plans:
            plan.check(self.model.config, turns[0] if turns else None)
            if self._numbers + plan.prompt_tokens + plan.max_new_tokens >= TOKENS:
                raise UsageError("this session has asked for as many tokens as it can; open another")

    # A request.

    def request_together(
        self, plans: Sequence[Plan], answers: Sequence[Answer], turns: Turns = ()
    ) -> Generator[Progress | Step, None, None]:
        """Raises UsageError where the helper refuses it, LeftRange and PartyError as a party's."""
        (plan,), (answer,), turn = plans, answers, turns[0] if turns else None
        self.transport.meter = Meter()
        with self.meter.phase("prefill"), self.meter.operation("request"):
            self._send(messages.Generate((plan,), tuple(turns)))
            if isinstance(said := self._hear(thin_words.Accepted | thin_words.Refused), thin_words.Refused):
                raise UsageError(f"the helper refuses: {said.reason}")
            self._send_keys(b"", answer.prompt_ids)
        there: Any = self  # where a party's own things are asked for
        cache: Any = SimpleNamespace(length=turn.cached_tokens if turn else 0)
        prompted = Prompted(there, plan, answer, cache, 0, turn)
        yield from self._tokens(prompted)
        if turn is not None:
            seen = prompted.steps - 1 if turn.keeps_answer else 0  # the last token no step has seen
            held = turn.cached_tokens + len(plan.public_prefix) + plan.prompt_tokens + seen
            self.kept[turn.conversation] = SimpleNamespace(length=held)

    def request_open(
        self, first: Sequence[scheduler.Newcomer], door: scheduler.Door
    ) -> Generator[scheduler.Event, None, None]:
        """Requests that others may join: here they have their turns, one after another."""
        coming, place, ranks, revealed = list(first), 0, list[dict](), list[list[dict]]()
        loaded = self.load_reveals.as_list()
        while coming:
            plan, turn, answer = coming.pop(0)
            assert answer is not None, "the client has it"
            for event in self.request_together([plan], [answer], [turn] if turn else []):
                yield replace(event, prompt=place)
            ranks = added(ranks, self.collect_statistics())
            revealed.append(self.reveals.as_list())
            for conversation in door.dropped():
                self.request_forget(conversation)
            joining = door.newcomers(len(coming))
            behind = place + 1 + len(coming)
            coming += joining
            taken = tuple(range(behind, behind + len(joining)))
            yield scheduler.Counted((place,), taken, Counters(ranks, ledger(loaded, revealed)))
            place += 1

    def _tokens(self, prompted: Prompted) -> Generator[Progress | Step, None, None]:
        answer, phase, started = prompted.answer, "prefill", perf_counter()
        assert answer is not None, "the client has it"
        while True:
            with self.meter.phase(phase), self.meter.operation(f"token {prompted.steps}"):
                event = self._hear(thin_words.Event)
                value = self._value(event) if isinstance(event, thin_words.Shown) else None
            match event:
                case thin_words.Read(done, total):
                    yield Progress(done, total)
                case thin_words.Left(reason):
                    raise LeftRange(reason)
                case thin_words.Ended(ranks, revealed, receipt):
                    self._ranks, self.reveals, self._receipt = plain(ranks), Ledger(revealed), receipt
                    return
                case thin_words.Shown():
                    if step := prompted.take(value, started):
                        yield step
                    started, phase = perf_counter(), "decode"
                    ends = not prompted.plan.hide_length and (answer.finished or answer.abandoned)
                    if not prompted.is_last:
                        with self.meter.phase(phase), self.meter.operation(f"token {prompted.steps}"):
                            self._send_keys(bytes([STOP if ends else GO_ON]), [answer.token_id])
                    if prompted.is_last or ends:
                        phase = "counters"  # which are no part of what they count

    def _send_keys(self, before: bytes, ids: Sequence[int]) -> None:
        """Keys of these tokens, behind a word."""
        vocabulary, sent = self.model.config.vocab_size, bytearray(before)
        for token in ids:
            self._numbers += 1
            own = secrets.token_bytes(points.SEED)
            corrections = points.make(token, vocabulary, seed_of(self._key, self._numbers), own)
            sent += own + self._numbers.to_bytes(points.NUMBER, "little") + corrections
        self.transport.send(HELPER, torch.frombuffer(sent, dtype=torch.uint8))

    def _value(self, shown: thin_words.Shown) -> torch.Tensor:
        """What the next token is chosen from. Raises PartyError for what this mode does not show."""
        vocabulary, found = self.model.config.vocab_size, []
        due = [(self.mode.count,)] * 2 if self.mode.count else [(1,) if self.mode.kind == "tokens" else (1, vocabulary)]
        if [form.shape for form in shown.forms] != due:
            raise self.transport.unexpected(HELPER, "what a token is chosen from")
        for form in shown.forms:
            padded = form.padded()
            data = self.transport.recv(HELPER, (padded.nbytes,), torch.uint8)
            self._pads += 1
            found.append(padded.value(data, pad_of(self._key, self._pads, padded.shape)))
        return choice_of(found, self.mode, vocabulary)

    # What a session asks of a party after a request.

    def collect_statistics(self) -> list[dict]:
        """Every rank's counters, and this client's own as the last."""
        own = {"rank": len(self._ranks), "thin": True, "table": self.meter.table(), "peak_bytes": peak_bytes()}
        return [*self._ranks, own]

    def take(self, place: int) -> Receipt | None:
        """Of the last request, what all parties have signed; this client makes no part."""
        receipt, self._receipt = self._receipt, None
        return receipt

    def forget(self, conversation: int) -> None:
        self.kept.pop(conversation, None)

    def request_forget(self, conversation: int) -> None:
        self.forget(conversation)
        self._send(messages.Forget(conversation))

    def request_bench(self, shape: Shape) -> dict:
        raise UsageError("a bench is of the parties; start it without --helper")

    def close(self) -> None:
        self._send(messages.Close())

    def _send(self, message: Any) -> None:
        self.transport.send_json(HELPER, message)

    def _hear(self, kind: Any) -> Any:
        """What the helper says next, as long as it lives: parties compute in between."""
        return self.transport.recv_json(HELPER, kind, timeout=math.inf)


def join(protocol: ProtocolConfig, launch: LaunchConfig, model_folder: str) -> tuple[Any, Transport, Any]:
    """A ``ThinParty`` at these parties, once it is this client's turn; its link, and the parties if they are started
    here, of which the owner opens ``model_folder``.

    Raises UsageError where the parties were started otherwise, PartyError where they do not answer.
    """
    if launch.helper_at != LOCAL:
        party = _joined(protocol, launch, os.environ)
        return party, party.transport, None
    children = LocalHelper(protocol, launch, model_folder)
    try:
        children.meet()
        at = replace(launch, helper_at=children.helper_at, owner_at=children.owner_at)
        party = _joined(protocol, at, {**os.environ, keyring.VARIABLE: children.secret})
    except BaseException:
        children.stop(failed=True)
        raise
    return party, party.transport, children


def _joined(protocol: ProtocolConfig, launch: LaunchConfig, env: Mapping[str, str]) -> ThinParty:
    if protocol.tape:
        raise UsageError("what is dealt is the parties' own; leave --tape out")
    helper, owner = doors.place_of("--helper", launch.helper_at), doors.place_of("--owner", launch.owner_at)
    session, key = secrets.token_hex(32), secrets.token_bytes(KEY)
    link = doors.knock(protocol, launch, helper, session, env)
    try:
        link.beat([HELPER])
        _due(link, thin_words.Admitted)
        doors.introduce(protocol, launch, owner, Introduction(session, key.hex()), env)
        ready = _due(link, thin_words.Ready)
        try:
            return ThinParty(link, key, ready, protocol)
        except UsageError as error:
            raise PartyError(f"{link.name(HELPER)} tells of a model that cannot be run here: {error}") from None
    except BaseException as error:
        link.abort(public_words(error))
        raise


def _due(link: Transport, kind: Any) -> Any:
    said = link.recv_json(HELPER, kind | thin_words.Refused)
    if isinstance(said, thin_words.Refused):
        raise UsageError(f"the helper refuses: {said.reason}")
    return said
