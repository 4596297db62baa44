"""Errors that a user can cause, how a process ends on each, and who may read them.

Owns the exception types and their exit codes. Every message is one line: what was wrong, the value, what to
do next. The command line prints it and exits; a traceback is shown only with ``--verbose``. The other parties are told
that this one stops and why, but never in words that may quote what it alone knows (``unheard``, ``public_words``).
"""

import contextlib
import difflib
import os
import re
import threading
from collections.abc import Iterable, Iterator


class CryptenLLMError(Exception):
    """An error whose message is written for the person at the terminal.

    heard: whether the other parties may read it too. Whatever a message quotes, a file's name, a field's, a peer's
    text, it stays one line that cannot steer a terminal and can be read at a glance (``one_line``).
    """

    exit_code = 1
    heard = True

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class UsageError(CryptenLLMError):
    """The command line, a setting, a model folder or a prompt is not usable as given."""

    exit_code = 2


class LeftRange(UsageError):
    """Numbers of a prompt left the range in which the engine is right; all parties know, and nothing more than that."""


class PartyError(CryptenLLMError):
    """Another party is missing, stopped, answered something else than the protocol says, or timed out.

    Its words name ranks and operations alone, so that all parties may read them.
    """

    exit_code = 3


class OneTimeError(CryptenLLMError):
    """A mask would hide two values, or dealt material would be used twice or out of step: the run ends instead."""


_LACKING = ("not enough memory", "out of memory")  # torch's words for it, of a processor and of a GPU
_WANTED = re.compile(r"CUDA out of memory\. Tried to allocate ([\d.]+ [KMG]?i?B)\b")
ENDED = "its program ended with an error; see its own output"  # all that others hear of what is not for them
LONGEST = 2000  # characters of a message; beyond that a value was quoted whole
_silence = threading.RLock()
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def exit_code(error: BaseException) -> int:
    """How a process ends on ``error``."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_code if isinstance(error, CryptenLLMError) else 1


def one_line(text: str) -> str:
    """Text for a terminal: one line, control characters written out, cut in its middle where it is too long.

    The beginning says what is wrong, the end what to do.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} [...] {text[-LONGEST // 3 :]}"
    text = "".join(" " if c in "\n\r\t" else c for c in text)
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """Text of several lines for a terminal, all else that could steer it written out."""
    return "".join(c if c in "\n\t" or not _steers(c) else repr(c)[1:-1] for c in text)


def _steers(character: str) -> bool:
    """Whether it is a control character; marks of writing direction, which answers have, are none."""
    return character < " " or "\x7f" <= character < "\xa0"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'? " for the nearest known name, or nothing when none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, to be quoted in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def a_library(what: str, remedy: str = "repair it") -> Iterator[None]:
    """Around calls of a library that raises what it likes for ``what`` it cannot use: one UsageError of it.

    One in Rust may panic, which is no Exception, and writes a stack to stderr first; that goes nowhere.
    """
    try:
        with _unheard_by_terminals():
            yield
    except (CryptenLLMError, ModuleNotFoundError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UsageError(f"{what} cannot be used ({first_line(error)}); {remedy}") from error


@contextlib.contextmanager
def _unheard_by_terminals() -> Iterator[None]:
    """Meanwhile nothing of this process reaches the files behind stdout and stderr: what a library prints there quotes
    what it reads. One thread at a time, or it would stay so.
    """
    with _silence, contextlib.ExitStack() as undo:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        undo.callback(os.close, nowhere)
        for stream in (1, 2):
            with contextlib.suppress(OSError):  # there may be none
                kept = os.dup(stream)
                undo.callback(os.close, kept)
                undo.callback(os.dup2, kept, stream)
                os.dup2(nowhere, stream)
        yield


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Around work on what one party alone knows: an error there may quote a prompt or a path, and stays with it.

    The other parties are told that this one stopped. PartyError and LeftRange pass, their words are public.
    """
    try:
        yield
    except (PartyError, LeftRange):
        raise
    except BaseException as error:
        vars(error)["heard"] = False
        raise


def public_words(error: BaseException) -> str:
    """One line for the other parties. Of an error that is ``unheard``, and of any other library's, never the text."""
    if isinstance(error, KeyboardInterrupt | ModuleNotFoundError) or _lacks_memory(error):
        return last_words(error)
    if not getattr(error, "heard", True):
        return ENDED
    if isinstance(error, CryptenLLMError):
        return last_words(error)
    if isinstance(error, OSError) and error.errno:
        return f"{os.strerror(error.errno)}; see its own output"
    return f"internal error, {type(error).__name__}; run again with --verbose for the traceback"


def last_words(error: BaseException) -> str:
    """One line for the person at this party's terminal."""
    return " ".join(one_line(_words(error)).split())


def _words(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, CryptenLLMError):
        return text
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, ModuleNotFoundError):
        return f"the package {error.name!r} is not installed; {how_to_install(error.name)}"
    if _lacks_memory(error):
        more = _WANTED.search(text)
        where = f" on the GPU for {more[1]} more; give parties a card each, or" if more else ";"
        return f"not enough memory{where} use a shorter prompt, a smaller --chunk or a smaller model"
    if isinstance(error, OSError) and error.strerror:
        place = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{place}; free the resource it names and run again"
    return f"internal error, {type(error).__name__}: {text}; run again with --verbose for the traceback"


def how_to_install(package: str | None) -> str:
    """What brings a package that this project needs, in a clone and where it was installed."""
    if (package or "").partition(".")[0] == "crypten":
        return (
            "run 'python -m pip install --no-deps crypten==0.4.1' (what it lists as its dependencies cannot be "
            "installed), or in a clone 'make install' and use .venv/bin/python"
        )
    return (
        "install this project again with its dependencies (pip install, without --no-deps), or in a clone run "
        "'make install' and use .venv/bin/python"
    )


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, CryptenLLMError):
        return False
    return isinstance(error, MemoryError) or any(words in str(error) for words in _LACKING)
