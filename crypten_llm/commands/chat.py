"""A conversation at the terminal: lines in, answers out, and what they cost at the end.

Owns the keys and the commands. Ctrl-D ends the conversation; Ctrl-C ends the answer at its next token, and pressed
again before that the conversation. stdout gets the answers; stderr the rest.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from crypten_llm.commands.show import answer, closed, mark, say, say_decoding, say_outside, who
from crypten_llm.errors import UsageError
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.chat import Chat, Restart, check
from crypten_llm.session.prompted import Progress, Step
from crypten_llm.session.report import ledger, revealed_table, turns_table
from crypten_llm.session.request import Request
from crypten_llm.session.settings import split

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS = (
    "/reset begins anew, /system TEXT begins anew after TEXT, /quit or Ctrl-D ends; // sends a text that begins with /"
)

ENDING = b"\n(the answer ends at its next token; Ctrl-C again ends the chat)\n"


def chat(system: str | None, asked: dict, model: str, tokenizer: str | None, **settings: Any) -> None:
    """Loads, then answers line by line; settings as for ``from_pretrained``, asked: fields of ``Request``."""
    request = Request("a", chat=True, **asked)  # refuses before any process starts
    protocol, _ = split(settings)
    check(request, protocol)
    say(who(protocol))
    with suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited from now on)
    with PrivateLlama.from_pretrained(model, tokenizer=tokenizer, shielded=True, **settings) as llama:
        with llama.chat(system, **asked) as talk:
            say(f"model shared in {llama.load_seconds:.1f} s")
            say_outside(llama)
            say_decoding(llama, llama.prepare(request))
            say(COMMANDS)
            _talk(llama, talk)
            loaded, turns = llama.party.load_reveals.as_list(), talk.results
    if turns:
        say()
        say(turns_table(turns))
        say()
    say(revealed_table(ledger(loaded, [turn.revealed for turn in turns])))


def _talk(llama: PrivateLlama, talk: Chat) -> None:
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            talk.reset(talk.system)
            say("a new conversation")
        elif command == "/system":
            talk.reset(rest.strip() or None)
            say("a new conversation, " + (f"after: {talk.system}" if talk.system else "without a system message"))
        elif line.startswith("/") and not line.startswith("//"):
            say(COMMANDS)
        elif line.strip():
            try:
                _turn(talk, line[1:] if line.startswith("//") else line, mark(llama))
            except UsageError as error:
                if not llama.is_open:
                    raise
                say(f"error: {error}")


def _lines() -> Iterator[str]:
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            if prompt:
                say()
            return
        except KeyboardInterrupt:
            say()  # the line is dropped, as a shell does


def _turn(talk: Chat, text: str, before: str) -> None:
    """Shows the answer as it grows, after a mark where it needs one; Ctrl-C ends it at its next token."""
    with _interrupts() as pressed, closed(talk.stream(text)) as events:
        for event in events:
            match event:
                case Restart():
                    say(str(event))
                case Progress(done, total) if total > done:
                    say(f"prefill {done} of {total} tokens")
                case Step():
                    answer(before + event.text)
                    before = ""
            if pressed:
                break
    print(flush=True)


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """A list that Ctrl-C makes longer the first time; the second time it is KeyboardInterrupt again."""
    pressed: list[bool] = []

    def press(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        os.write(sys.stderr.fileno(), ENDING)  # not print, which may be what was interrupted

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
