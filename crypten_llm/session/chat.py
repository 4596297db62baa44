"""A conversation in turns: what was said, and the cache that all parties keep of it.

Owns that a turn goes on exactly where the last one ended (``spoken`` says where that is). Where the conversation as its
template writes it does not begin with what the cache holds, the cache begins anew, which is told first: with what it
costs, and never silently.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from crypten_llm.errors import UsageError
from crypten_llm.models.tokenizer import encode_rendered, render_chat
from crypten_llm.session.conversation import system_of
from crypten_llm.session.plan import Turn, parse_policy
from crypten_llm.session.prompted import Answer, Progress, Step, check_chat
from crypten_llm.session.public import cut_chat
from crypten_llm.session.request import Request, Result, Taken, result_of
from crypten_llm.session.settings import check_names
from crypten_llm.session.spoken import Spoken
from crypten_llm.units import size

if TYPE_CHECKING:
    from crypten_llm.session.api import PrivateLlama
    from crypten_llm.session.settings import ProtocolConfig

_NOT_OF_A_CHAT = ("prompt", "input_ids", "messages", "chat", "system", "public_prefix")


@dataclass(frozen=True)
class Restart:
    """The cache begins anew: the conversation as its template writes it now does not begin with what the cache holds.

    shared: tokens up to the first difference, of ``cached`` in the cache. prompt_tokens: to be prefilled now, all of
    the conversation but its public beginning. seconds, bytes_sent: what that will about take, by the prefills of the
    turns so far; ``None`` before.
    """

    shared: int
    cached: int
    prompt_tokens: int
    seconds: float | None = None
    bytes_sent: int | None = None

    def __str__(self) -> str:
        cost = ""
        if self.seconds is not None and self.bytes_sent is not None:
            sent = f" and {size(self.bytes_sent)} sent a party" if self.bytes_sent else ""
            cost = f", about {self.seconds:.1f} s{sent}"
        return (
            "the chat template writes the turns so far otherwise than the cache has them, from token "
            f"{self.shared + 1} of {self.cached}: the cache begins anew ({self.prompt_tokens} tokens to prefill{cost})"
        )


def check(request: Request, protocol: ProtocolConfig) -> None:
    """Raises UsageError for what no conversation can go on with; needs no model."""
    if protocol.tape:
        raise UsageError(
            "a tape is dealt for a prompt of known length, and a chat has turns of any; leave --tape (tape=) out"
        )
    if request.hide_length:
        raise UsageError(
            "hide_length hides nothing in a chat: the next turn's length tells that of the answer; leave it out"
        )
    check_chat(parse_policy(request.policy))


class Chat:
    """A conversation with the model of a session; made by ``PrivateLlama.chat``.

    ``send`` or ``stream`` a text, as often as wanted; ``messages`` has what was said. All parties keep the cache of
    keys and values as shares, so that a turn costs its own tokens and the answer's, not those of all turns before. A
    policy leaves rows of earlier turns as they are; one that cannot is refused.

    A stream that is left early leaves what was read of the answer in the conversation. ``close`` (or a with block) has
    the parties drop the cache.
    """

    def __init__(self, llama: PrivateLlama, number: int, system: str | None, arguments: dict[str, Any]) -> None:
        """Raises UsageError where there is no chat template, or for arguments with which no conversation can go on."""
        known = [field.name for field in fields(Request) if field.name not in _NOT_OF_A_CHAT]
        check_names("argument", arguments, known)
        self._llama, self._number, self._arguments = llama, number, arguments
        check(self._request("a"), llama.protocol)
        self._spent: tuple[int, float, int] = (0, 0.0, 0)  # on prefills so far: tokens, seconds, bytes sent
        self.results: list[Result] = []  # of each turn; one that was left early has the reason "left"
        self.reset(system)
        self._parts(render_chat(llama.tokenizer, [*self.messages, {"role": "user", "content": "a"}]))

    def reset(self, system: str | None = None) -> None:
        """Begins a new conversation, after ``system`` if that is given; the cache begins anew with the next turn."""
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]
        self._spoken = Spoken()

    @property
    def _cached(self) -> list[int]:
        """Ids that the parties' cache holds."""
        return list(self._spoken.cached)

    @property
    def system(self) -> str | None:
        """The text before all turns."""
        return system_of(self.messages)

    def _request(self, text: str) -> Request:
        return Request(text, chat=True, **self._arguments)

    def stream(self, text: str) -> Generator[Restart | Progress | Step, None, Result]:
        """The answer to what the user says next: as ``PrivateLlama.stream``, and a ``Restart`` first where one is due.

        Raises UsageError for a turn that cannot be run, which leaves the conversation as it was.
        """
        llama, request = self._llama, self._request(text)
        llama._check_free()
        said = [*self.messages, {"role": "user", "content": text}]
        rendered = render_chat(llama.tokenizer, said)
        public, rest = self._parts(rendered)
        ids = self._spoken.continued(llama.tokenizer, rendered, [*public, *rest])
        before, restart = self._cached, None
        if before and not self._spoken.begins(ids):
            shared = next((i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), len(ids))
            new = len(ids) - len(public)
            restart, before = Restart(shared, len(before), new, *self._price(new)), []
        start = len(before) or len(public)
        turn = Turn(self._number, len(before))
        asked = llama.prepare(request, (ids[len(before) : start], ids[start:]), before, turn)
        if restart is not None:
            yield restart
        taken, read = Taken(), list[str]()
        try:
            events = llama.run([asked], taken=taken)
            yield from self._read(events, read)
        finally:
            self._note(said, rendered, ids, taken.answers[0] if taken.answers else None, "".join(read))
            if taken.answers and llama.is_open:
                self._count(llama.results([asked], taken)[0])
        llama.result = self.results[-1]
        return self.results[-1]

    def _read(self, events: Generator[Progress | Step, None, Any], read: list[str]) -> Iterator[Progress | Step]:
        """The events, noting the texts that were handed on."""
        with contextlib.closing(events):
            for event in events:
                if isinstance(event, Step):
                    read.append(event.text)
                yield event

    def _parts(self, rendered: str) -> tuple[list[int], list[int]]:
        """Ids of what the template wrote: of its public beginning, if it has one, and of the rest."""
        if self._arguments.get("public_system"):
            return cut_chat(self._llama.tokenizer, rendered, self.system)
        return [], encode_rendered(self._llama.tokenizer, rendered)

    def _note(self, said: list[dict], rendered: str, ids: list[int], answer: Answer | None, text: str) -> None:
        """Takes what was said into the conversation, and notes what the parties' cache holds of it."""
        drawn = [] if answer is None or answer.failed else answer.token_ids
        if drawn:
            self.messages = [*said, {"role": "assistant", "content": text}]
        cache, held = self._llama.party.kept.get(self._number), len([*ids, *drawn[:-1]])
        cached = held if cache is not None and cache.length == held else 0
        self._spoken = Spoken.after(self._llama.tokenizer, rendered, ids, drawn, text, cached)

    def _count(self, result: Result) -> None:
        self.results.append(result)
        if result.seconds["prefill"] is not None:
            tokens, seconds, sent = self._spent
            bytes_sent = max(result.cost.bytes_sent(("prefill",)))
            self._spent = tokens + result.prompt_tokens, seconds + result.seconds["prefill"], sent + bytes_sent

    def _price(self, tokens: int) -> tuple[float | None, int | None]:
        spent, seconds, sent = self._spent
        return (seconds * tokens / spent, sent * tokens // spent) if spent else (None, None)

    def send(self, text: str) -> Result:
        """The whole answer to what the user says next."""
        return result_of(self.stream(text))

    def close(self) -> None:
        """Has all parties drop the cache. A turn that comes later begins it anew."""
        if self._cached:
            self._spoken = Spoken()
            self._llama.forget(self._number)

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
