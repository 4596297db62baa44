"""Conversations whose caches the parties keep between requests, each for the caller who had it.

Owns which there are, whose they are, with which of them a request goes on, and which are dropped. All of that is
decided here, at the client: token ids never leave it. The others hear that a request goes on with a conversation, by
its number, after how many tokens, and which are dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING

from crypten_llm import limits
from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import render_chat
from crypten_llm.serving.fair_queue import Caller, FairQueue
from crypten_llm.session import sizes
from crypten_llm.session.plan import Turn, parse_policy
from crypten_llm.session.spoken import Spoken

if TYPE_CHECKING:
    from crypten_llm.serving.job import Job
    from crypten_llm.session.api import PrivateLlama
    from crypten_llm.session.request import Asked, Result


@dataclass(frozen=True)
class Keeping:
    """conversations: most that are kept, 0 for none. minutes: for so long without a further turn. gigabytes: of all
    their caches, at a compute party. Raises UsageError."""

    conversations: int = 8
    minutes: float = 30.0
    gigabytes: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.conversations <= limits.CONVERSATIONS:
            raise UsageError(f"--keep is {self.conversations}; it must be 0, for none, to {limits.CONVERSATIONS}")
        for option, value in (("--keep-minutes", self.minutes), ("--keep-gigabytes", self.gigabytes)):
            if not value > 0:
                raise UsageError(f"{option} is {value:g}; it must be more than 0 (--keep 0 keeps nothing)")


@dataclass(eq=False)
class Held:
    """A conversation that nobody goes on with now. public: how many of its first tokens are a public prefix. used: when
    its last turn ended."""

    number: int
    caller: Caller
    spoken: Spoken
    public: int
    used: float


@dataclass(eq=False)
class Talk:
    """A request that may go on with a conversation, or begin one. rendered: all of it, as the chat template writes it.
    fresh: as it is run without a cache; asked: as it would be run now, with what is ``held``. is_kept: whether it was
    given a conversation, and room for it."""

    caller: Caller
    rendered: str
    fresh: Asked
    asked: Asked
    held: Held | None = None
    is_kept: bool = False


class Kept:
    """queue: where requests wait, whose conversations are neither dropped nor given to others. For any threads; what is
    dropped, and who begins, is decided in the session's."""

    def __init__(self, keeping: Keeping, queue: FairQueue[Job], clock: Callable[[], float] = monotonic) -> None:
        self._keeping, self._queue, self._clock = keeping, queue, clock
        self._held: list[Held] = []
        self._running: list[Talk] = []  # those with a conversation
        self._dropped: list[int] = []
        self._changing = threading.RLock()

    def __len__(self) -> int:
        return len(self._held)

    def talk(self, llama: PrivateLlama, caller: Caller, asked: Sequence[Asked]) -> Talk | None:
        """What these come down to, where they are one answer to a conversation; None where nothing is kept of them.

        Under a policy that drops rows, an answer over a kept cache would be another than over a fresh one.
        """
        if not self._keeping.conversations or len(asked) != 1 or not asked[0].request.templated:
            return None
        (fresh,) = asked
        if parse_policy(fresh.plan.policy).acts:
            return None
        rendered = render_chat(llama.tokenizer, fresh.request.conversation, fresh.request.tools)
        found = self._longest(llama, caller, rendered, [*fresh.plan.public_prefix, *fresh.ids])
        if found is not None:
            held, ids = found
            cached = list(held.spoken.cached)
            turn = Turn(held.number, len(cached), _keeps_answer(fresh))
            with suppress(UsageError):  # the model wrote its answer in more tokens than the context has room for
                going = llama.prepare(fresh.request, ([], ids[len(cached) :]), cached, turn)
                return Talk(caller, rendered, fresh, replace(going, before_public=held.public), held)
        return Talk(caller, rendered, fresh, fresh)

    def _longest(
        self, llama: PrivateLlama, caller: Caller, rendered: str, ids: list[int]
    ) -> tuple[Held, list[int]] | None:
        """The caller's conversation that holds most of what is asked, and all ids of the request."""
        with self._changing:
            wanted = self._wanted()
            own = [held for held in self._held if held.caller == caller and held not in wanted]
        found = None
        for held in own:
            all_ids = held.spoken.continued(llama.tokenizer, rendered, ids)
            longer = found is None or len(held.spoken.cached) > len(found[0].spoken.cached)
            if longer and held.spoken.begins(all_ids) and len(all_ids) <= llama.party.model.frequencies_hold:
                found = held, all_ids
        return found

    def _wanted(self) -> list[Held]:
        """What requests that wait go on with."""
        return [job.talk.held for job in self._queue.items() if job.talk and job.talk.held]

    def begin(self, llama: PrivateLlama, asked: Asked, talk: Talk | None) -> Asked:
        """What is run now; old conversations are dropped where there is no room for it. talk: of it, if it has one."""
        with self._changing:
            self.expire(llama)
            if talk is not None:
                going = talk.held in self._held
                if going and talk.held:
                    self._held.remove(talk.held)
                asked = talk.asked if going else talk.fresh
                talk.is_kept = self._has_room(llama, asked)
                if not going and talk.is_kept:
                    asked = replace(asked, turn=Turn(next(llama.conversations), 0, _keeps_answer(asked)))
                talk.asked = asked
                if asked.turn:
                    self._running.append(talk)
            while not _fits(llama, asked) and self._drop_oldest(llama):
                pass
        return asked

    def end(self, llama: PrivateLlama, talk: Talk, result: Result | None) -> None:
        """Of a request that was begun; result: None where it did not come to its end, which drops what it had."""
        with self._changing:
            if talk not in self._running:
                return
            self._running.remove(talk)
            asked, turn = talk.asked, talk.asked.turn
            assert turn is not None, "it runs in a conversation"
            if result is not None and talk.is_kept:
                prompt = [*asked.before, *asked.plan.public_prefix, *asked.ids]
                cached = len(prompt) + (len(result.token_ids) - 1 if turn.keeps_answer else 0)
                cache = llama.party.kept.get(turn.conversation)
                if cache is not None and cache.length == cached:
                    given = talk.rendered, prompt, result.token_ids, result.text, cached
                    spoken = Spoken.after(llama.tokenizer, *given)
                    public = asked.before_public + len(asked.plan.public_prefix)
                    self._held.append(Held(turn.conversation, talk.caller, spoken, public, self._clock()))
                    return
            self._drop(llama, turn.conversation)

    def expire(self, llama: PrivateLlama) -> None:
        """Drops what nobody has gone on with for long."""
        with self._changing:
            wanted, since = self._wanted(), self._clock() - 60 * self._keeping.minutes
            for held in [held for held in self._held if held.used < since and held not in wanted]:
                self._held.remove(held)
                self._drop(llama, held.number)

    def dropped(self) -> list[int]:
        """Conversations of which the other parties have not heard yet that they are dropped, each told once."""
        with self._changing:
            told, self._dropped = self._dropped, []
        return told

    def clear(self) -> None:
        """Of a session that has ended nothing is left."""
        with self._changing:
            self._held, self._running, self._dropped = [], [], []

    def _has_room(self, llama: PrivateLlama, asked: Asked) -> bool:
        """Whether its conversation can be kept: the oldest are dropped for it, unless it could not be even then."""
        party = llama.party
        of_token = sizes.of_token(llama.config, party.engine.holds(party.rank).cached)
        most = self._keeping.gigabytes * 1e9 / max(1, of_token)
        running = [talk.asked for talk in self._running]
        needed = sum(map(_tokens, [*running, asked]))
        if needed > most or len(running) >= self._keeping.conversations:
            return False
        while (
            len(self._held) + len(running) >= self._keeping.conversations
            or sum(len(held.spoken.cached) for held in self._held) + needed > most
        ):
            if not self._drop_oldest(llama):
                return False
        return True

    def _drop_oldest(self, llama: PrivateLlama) -> bool:
        wanted = self._wanted()
        able = [held for held in self._held if held not in wanted]
        if not able:
            return False
        oldest = min(able, key=lambda held: held.used)
        self._held.remove(oldest)
        self._drop(llama, oldest.number)
        return True

    def _drop(self, llama: PrivateLlama, number: int) -> None:
        """Here at once, so that its memory is free; the others hear of it with what the client says next."""
        llama.party.forget(number)
        self._dropped.append(number)


def _keeps_answer(asked: Asked) -> bool:
    """Not where its length is hidden, nor where a stop text may cut it: the next turn then has less of it than the
    cache would hold."""
    return not asked.plan.hide_length and not asked.request.stops


def _tokens(asked: Asked) -> int:
    """That its cache may come to hold."""
    plan = asked.plan
    return len(asked.before) + len(plan.public_prefix) + plan.prompt_tokens + plan.max_new_tokens


def _fits(llama: PrivateLlama, asked: Asked) -> bool:
    try:
        llama.party.check_plans([asked.plan], [asked.turn])
    except UsageError:
        return False
    return True
