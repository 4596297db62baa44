"""Whole runs of the command line in their own process group, and what is left of them afterwards."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import forked

ROOT = Path(__file__).parents[1]
GENERATE = ["-m", "crypten_llm", "generate", "--offline", "--threads", "1"]


def _listen_to_interrupts() -> None:
    """Where these tests run in the background, a shell has told all to ignore Ctrl-C, which would be inherited."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Program:
    """A started command, given as arguments of Python. Use as a context: nothing survives it.

    It is a fork of a process that has imported the package (see ``forked``), which saves seconds. A new Python runs it
    where a test asks for one (``fresh``): for what happens while a program starts or ends, or what is started as a
    user would. A ``stdout`` of its own always comes with a new Python.
    """

    def __init__(self, *arguments, stdout=subprocess.PIPE, fresh=False, **environment):
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER"))}
        environment = {**clean, "OMP_NUM_THREADS": "1", **environment}
        if not fresh and stdout == subprocess.PIPE:
            self.process = forked.program(arguments, environment, ROOT)
            return
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_listen_to_interrupts,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None or self.left():
            with suppress(ProcessLookupError):  # it ended just now
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def read_until(self, text: str) -> str:
        """stderr up to the line that holds ``text``."""
        read = ""
        for line in self.process.stderr:
            read += line
            if text in line:
                return read
        raise AssertionError(f"the program ended without {text!r}:\n{read}")

    def finish(self, timeout: float = 60.0) -> tuple[int, str, str]:
        """(exit code, stdout, stderr not yet read), and no process may be left behind."""
        out, err = self.process.communicate(timeout=timeout)
        ended(self.process.pid)
        return self.process.returncode, out, err

    def left(self) -> dict[int, list[str]]:
        """Command lines of the living processes of this program's session, by process id."""
        return living(self.process.pid)

    def wait_for(self, processes: int, seconds: float = 10.0) -> None:
        """Returns once that many processes live."""
        deadline = time.monotonic() + seconds
        while len(self.left()) < processes:
            assert time.monotonic() < deadline, f"{processes} processes never lived at once"
            time.sleep(0.02)

    def pid_of(self, rank: int) -> int:
        """The process of the local party ``rank``."""
        for pid in self.left():
            place = Path("/proc", str(pid))
            told = (place / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in told or (place / "comm").read_text() == f"rank {rank}\n":
                return pid
        raise AssertionError(f"no process has rank {rank}")

    def result(self, timeout: float = 60.0) -> dict:
        """The JSON object in the last line of stdout of a run that succeeds."""
        code, out, err = self.finish(timeout)
        assert code == 0, err
        return json.loads(out.splitlines()[-1])


def living(session: int) -> dict[int, list[str]]:
    """Command lines of the living processes of a session, by process id."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, ValueError, IndexError):
            continue
    return found


def ended(session: int, seconds: float = 5.0) -> None:
    """Returns once no process of a session lives; fails when one stays."""
    deadline = time.monotonic() + seconds
    while (left := living(session)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"orphans: {left}"


def by_hand(world: int, *arguments, port: int | None = None, ranks=None) -> list[Program]:
    """One program per rank, told its place by the environment alone."""
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
    return [Program(*arguments, RANK=str(rank), **place) for rank in (range(world) if ranks is None else ranks)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def error_line(stderr: str) -> str:
    """The one error line of a program that failed as it should."""
    assert "Traceback" not in stderr, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, stderr
    return lines[0].removeprefix("error: ")
