"""What the command lines share: errors of one line, exit codes, and what is read from arguments and files.

Owns how a process ends. stdout carries the result, everything about the run goes to stderr; an error is one line on
stderr and a non-zero exit. torch is not imported here, so that a typing error is answered at once.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from crypten_llm import limits
from crypten_llm.errors import UsageError, did_you_mean, exit_code, last_words, shown


class Parser(argparse.ArgumentParser):
    """argparse with its errors as our one line, a suggestion for an option that it does not know, and options that
    several commands have.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            option = word.partition("=")[0]
            self.error(f"unknown option {option!r}; {did_you_mean(option, self._option_string_actions)}".rstrip("; "))
        return namespace, unknown

    def add_model(self) -> None:
        what = "'shipped', a Hugging Face folder, a GGUF file, or a hub id (default: shipped)"
        self.add_argument("--model", default="shipped", help=what)

    def add_policy_settings(self) -> None:
        what = "a setting of the policy; repeatable"
        self.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=what)

    def add_chunk(self) -> None:
        what = "prompt tokens per prefill pass (default: 128)"
        self.add_argument("--chunk", type=int, default=128, metavar="T", help=what)

    def add_padded(self, default: int | None = 0) -> None:
        """default: ``None`` where a device says it."""
        usual = "256 on a GPU, else 0" if default is None else default
        what = f"count the answer's cache as a multiple of N rows, 0 for those there are (default: {usual})"
        self.add_argument("--padded", type=int, default=default, metavar="N", help=what)

    def add_json(self) -> None:
        self.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")

    def add_offline_and_verbose(self) -> None:
        self.add_argument("--offline", action="store_true", help="never ask a model hub")
        self.add_verbose()

    def add_verbose(self) -> None:
        self.add_argument("--verbose", action="store_true", help="show tracebacks")


def run(parser: Callable[[], Parser], argv: list[str] | None = None) -> int:
    """Runs the command that ``argv`` names, ``arguments.run(arguments)``; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings on a closed store are no help to a user
    _replace_what_stdout_cannot_show()
    arguments = None
    try:
        arguments = parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, OSError):
            _silence_stdout()
        if isinstance(error, BrokenPipeError):
            return 1  # who read our output has left; not ours to complain
        if "--verbose" in argv or getattr(arguments, "verbose", False):
            print(shown(traceback.format_exc()), end="", file=sys.stderr)
        print(f"error: {last_words(error)}", file=sys.stderr, flush=True)
        return exit_code(error)


def _replace_what_stdout_cannot_show() -> None:
    """An answer may hold any character; where the terminal's encoding lacks one, the rest is shown all the same."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _silence_stdout() -> None:
    """What could not be written is not tried again at exit, where it would print a second complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def add_command(commands: Any, name: str, run: Callable, help: str) -> Parser:
    """A command of a parser's ``add_subparsers``: ``run`` takes its arguments."""
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def read_text(option: str, path: str) -> str:
    """The text of the file that ``option`` names; raises UsageError."""
    try:
        with open(path, encoding="utf-8") as file:  # whatever it is: a person named it, and may mean a pipe
            text = file.read(limits.TEXT + 1)
        if len(text) > limits.TEXT:
            raise UsageError(f"{option}: {path} has more than {limits.TEXT:,} characters; give a shorter text")
        return text
    except OSError as error:
        raise UsageError(f"{option}: cannot read {path} ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option}: {path} is not UTF-8 text; convert it first") from None


def whole_numbers(option: str, text: str) -> list[int]:
    """Numbers with commas or space between them; raises UsageError."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"{option} takes whole numbers separated by commas; {error}") from None
