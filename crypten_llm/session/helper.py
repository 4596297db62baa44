"""A helper: the second compute party, which stands for thin clients, one after another, and stays up in between.

Owns their turns. Among the parties the helper is at the client's place, so that it asks, and says when an answer ends,
as its client tells it; it has neither prompt nor answer. A client that goes, is silent for too long, or says what it
may not, ends its own turn: a running answer is ended where that is a public decision, or else goes on with its last
token to its last step. What was kept for it is dropped at all parties before the next one is let in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.errors import LeftRange, PartyError, UsageError, public_words
from crypten_llm.links.meeting import Place
from crypten_llm.links.waiting import Wait
from crypten_llm.models.tokenizer import check_ids
from crypten_llm.records import convert
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import messages, thin_words
from crypten_llm.session.doors import Entrance, Knock
from crypten_llm.session.plan import Plan, Turn, parse_policy
from crypten_llm.session.prompted import Answer, Progress, check_chat
from crypten_llm.session.receipt import Revealed
from crypten_llm.session.thin import token_bytes
from crypten_llm.session.thin_words import GO_ON, STOP

if TYPE_CHECKING:
    from crypten_llm.engines.passing import Padded
    from crypten_llm.links.transport import Transport
    from crypten_llm.session.api import PrivateLlama

Say = Callable[[str], None]


class Guest:
    """A thin client that the helper serves now: its link, and whether it is still there.

    Where it has gone, or has said what it may not, nothing more is sent and nothing comes; ``gone`` says why.
    """

    def __init__(self, link: Transport) -> None:
        self.link = link
        self.gone = ""

    def tell(self, message: Any) -> None:
        self._try("what it is told", lambda: self.link.send_json(1, message))

    def hear(self) -> thin_words.Request | None:
        """What it asks for next, however long a person thinks; ``None`` where it has gone."""
        return self._try("request", lambda: self.link.recv_json(1, thin_words.Request, timeout=math.inf))

    def bytes_of(self, count: int) -> bytes | None:
        """So many bytes of it; ``None`` where they do not come."""
        data = self._try("keys of tokens", lambda: self.link.recv(1, (count,), torch.uint8))
        return None if data is None else data.numpy().tobytes()

    def show(self, passed: list[Padded]) -> None:
        """What it chooses a token from."""
        self.tell(thin_words.shown(passed))
        for each in passed:
            self._try("what it is shown", partial(self.link.send, 1, each.packed()))

    def refuse(self, reason: str) -> None:
        self.tell(thin_words.Refused(reason))

    def _try(self, label: str, step: Callable[[], Any]) -> Any:
        if self.gone:
            return None
        try:
            with self.link.meter.phase("a client's turn"), self.link.meter.operation(label):
                return step()
        except PartyError as error:
            self.gone = str(error)
            return None


class Relayed(Answer):
    """A thin client's answer, at the helper: keys of tokens in the place of ids, and its word on whether to go on."""

    def __init__(self, guest: Guest, keys: list[bytes], size: int, plan: Plan) -> None:
        super().__init__(keys, int)
        self._guest, self._key, self._size, self._plan = guest, keys[-1], size, plan

    @property
    def token_id(self) -> Any:
        """The key of the last token; of who has gone, once more the one before."""
        return self._key

    def take(self, shown: Any, last: bool = False) -> tuple[str, None]:
        self._guest.show(shown)
        if not last and not self.finished:
            said = self._guest.bytes_of(1 + self._size)
            if said is None or said[0] == STOP:
                self.finished = not self._plan.hide_length
            elif said[0] == GO_ON:
                self._key = said[1:]
        return "", None


class Helper:
    """The helper's turns over a session that it has opened.

    say: shows a line at its terminal.
    """

    def __init__(self, llama: PrivateLlama, say: Say) -> None:
        self.llama, self.party, self.say = llama, llama.party, say
        self._entrance = Entrance.open(llama.protocol, llama.launch, CLIENT, llama.environment)
        self.places = self._entrance.place, self._ask_owner()

    def _ask_owner(self) -> Place:
        self.party.from_client(messages.Where())
        return self._transport.recv_json(OWNER, Place)

    @property
    def _transport(self) -> Transport:
        assert self.party.transport is not None, "a helper is one of several processes"
        return self.party.transport

    def serve(self) -> None:
        """Serves one client after another. Raises what ends a party, and tells the others."""
        with self.llama._guarded():
            while True:
                self._serve(*self._entrance.guest(Wait(math.inf, self._look)))

    def _serve(self, link: Transport, said: Knock) -> None:
        """One client, which hears of what ends the parties too."""
        guest = Guest(link)
        try:
            link.beat([1])
            self._turn(guest, said)
        except BaseException as error:
            link.abort(public_words(error))
            raise
        if guest.gone:
            self.say(f"a client has gone: {guest.gone}")
        link.close()

    def _look(self) -> None:
        """Raises PartyError where another party has ended."""
        self._transport.check_open()

    def _turn(self, guest: Guest, said: Knock) -> None:
        mine, theirs = self.llama.protocol.agreement(), said.settings
        for name in ("version", "program", "torch", "engine", "compute_parties", "force", "reveal", "precision"):
            if getattr(mine, name) != getattr(theirs, name):
                here, there = getattr(mine, name), getattr(theirs, name)
                guest.refuse(f"the helper has {name} {here!r} and this client {there!r}; start both alike")
                return
        guest.tell(thin_words.Admitted())
        self.party.from_client(messages.Enter(said.session))
        if not self._transport.recv_json(OWNER, bool):
            guest.refuse("this client has not come to the owner in time; is --owner the helper's owner?")
            return
        party = self.party
        ledger = convert(party.load_reveals.as_list(), tuple[Revealed, ...])
        guest.tell(thin_words.Ready(party.model.config.to_dict(), party.tokens_digest, party.outside, ledger))
        while (message := guest.hear()) is not None and not isinstance(message, messages.Close):
            if isinstance(message, messages.Forget):
                party.request_forget(message.conversation)
            else:
                self._answer(guest, message)
        for conversation in list(party.kept):
            party.request_forget(conversation)
        party.from_client(messages.Leave())

    def _answer(self, guest: Guest, message: messages.Generate) -> None:
        """One request, to its end at all parties."""
        size = token_bytes(self.party.model.config.vocab_size)
        try:
            plan, turn = self._checked(message)
        except UsageError as error:
            guest.refuse(str(error))
            return
        guest.tell(thin_words.Accepted())
        data = guest.bytes_of(plan.prompt_tokens * size)
        if data is None:
            return
        keys = [data[at : at + size] for at in range(0, len(data), size)]
        answer = Relayed(guest, keys, size, plan)
        try:
            for event in self.party.request_together([plan], [answer], [turn] if turn else []):
                if isinstance(event, Progress):
                    guest.tell(thin_words.Read(event.done, event.total))
        except LeftRange as error:
            guest.tell(thin_words.Left(str(error)))
            raise
        ranks = convert(self.party.collect_statistics(), list[thin_words.Rank])
        ledger = convert(self.party.reveals.as_list(), tuple[Revealed, ...])
        guest.tell(thin_words.Ended(ranks, ledger, self.party.notary.take(0)))

    def _checked(self, message: messages.Generate) -> tuple[Plan, Turn | None]:
        """What a client asks for, if all parties can run it. Raises UsageError: what they find themselves ends them."""
        if len(message.plans) != 1 or message.is_open:
            raise UsageError("a helper takes one prompt at a time")
        party, (plan,) = self.party, message.plans
        turn = message.turns[0] if message.turns else None
        if plan.reveal != str(party.mode):
            raise UsageError(f"it would reveal {plan.reveal}, and the parties reveal {party.mode}")
        if plan.padded:
            raise UsageError("a helper's clients have no padded answers; leave --padded out")
        check_ids(list(plan.public_prefix), party.model.config.vocab_size)
        party.engine.check_policy(parse_policy(plan.policy))
        party.engine.check_sampling(plan.temperature)
        party.expect("generate", plan)
        party.check_plans([plan], [turn] if turn else [])
        if turn is not None:
            held = party.kept.get(turn.conversation)
            if turn.cached_tokens != (held.length if held and turn.cached_tokens else 0):
                raise UsageError("it goes on with a conversation that is not here; begin it anew")
            if turn.cached_tokens:
                check_chat(parse_policy(plan.policy))
            if turn.cached_tokens and plan.public_prefix:
                raise UsageError("a public prefix comes before all turns of a conversation; begin another")
        return plan, turn

    def close(self) -> None:
        self._entrance.close()
