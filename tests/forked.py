"""Programs that start at once: forks of a process that has imported what ``python -m crypten_llm`` imports.

Owns those processes. A fork takes the arguments, environment, folder, streams and session of the program that it stands
for, and from there on is that program: it ends with its exit code, signals reach it, and the parties that it starts are
its own children, forks of it. What it cannot show is a start and an interpreter's own end; tests of these start Python.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import parties

_held: list = []  # files of this process's ends of pipes, which a child forked from it must not keep open


class Forked:
    """As ``subprocess.Popen`` with text on pipes, for ``-m module ...`` or ``-c program ...``.

    context: of ``multiprocessing``. With "fork" the program is a child of this process, with "forkserver" one of the
    server's. session: whether it starts one, as with ``start_new_session``. stdout is read here (or else lost).
    """

    def __init__(self, context, arguments, environment, folder, session: bool, stdout: bool):
        self.args = [sys.executable, *map(str, arguments)]
        pipes = [context.Pipe(duplex=False) for _ in range(4)]
        theirs = [pipes[0][0], *(writing for _, writing in pipes[1:])]
        ours = [pipes[0][1], *(reading for reading, _ in pipes[1:])]
        self.stdin, self.stdout, self.stderr, begun = map(_file, ours, "wrrr")
        if not stdout:
            self.stdout.close()
            self.stdout = None
        _held[:] = [file for file in (*_held, self.stdin, self.stdout, self.stderr, begun) if file and not file.closed]
        place = environment, str(folder), session, stdout
        self._process = context.Process(target=_become, args=(self.args[1:], *theirs, *place))
        self._process.start()
        self.pid = self._process.pid
        for end in theirs:
            end.close()
        begun.read()  # returns when it has its place
        begun.close()
        self._readers: dict[str, threading.Thread] = {}
        self._read: dict[str, str] = {}

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What is left of stdout and stderr, once they and the process have ended; raises TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        streams = {name: file for name in ("stdout", "stderr") if (file := getattr(self, name))}
        self.stdin.close()
        for name, file in streams.items():
            if name not in self._readers:
                self._readers[name] = threading.Thread(target=self._read_all, args=(name, file), daemon=True)
                self._readers[name].start()
        for reader in self._readers.values():
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        for file in streams.values():
            file.close()
        self.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        return self._read.get("stdout", ""), self._read.get("stderr", "")

    def _read_all(self, name: str, file) -> None:
        self._read[name] = file.read()


def ask_no_name_server() -> None:
    """From now on this process knows the names in the hosts file alone.

    torch's store asks for the name of every peer that connects. Tests meet so often that a name server may stop
    answering, and each such question then holds the store, and all who wait for it, for five seconds.
    """
    configure = getattr(ctypes.CDLL(None), "__nss_configure_lookup", None)  # of glibc
    if configure:
        configure(b"hosts", b"files")


def program(arguments, environment: dict[str, str], folder: Path) -> Forked:
    """A program in a session of its own, whose output is read."""
    return Forked(parties.context(), arguments, environment, folder, session=True, stdout=True)


def party(arguments: list[str], environment: dict[str, str]) -> Forked:
    """In the place of ``launch.start_party`` where a test opens a session in its own process."""
    return Forked(parties.context(), _CRYPTEN_LLM + arguments, environment, os.getcwd(), session=False, stdout=False)


def _party_of_a_program(arguments: list[str], environment: dict[str, str]) -> Forked:
    """The same in a program that is a fork: its child, in its session."""
    context = multiprocessing.get_context("fork")
    return Forked(context, _CRYPTEN_LLM + arguments, environment, os.getcwd(), session=False, stdout=False)


_CRYPTEN_LLM = ["-m", "crypten_llm"]


def _file(connection, mode: str):
    """The file of one end of a pipe, which it closes."""
    file = open(os.dup(connection.fileno()), mode, encoding="utf-8", errors="replace")
    connection.close()
    return file


def _become(arguments, stdin, stdout, stderr, begun, environment, folder, session, keeps_stdout) -> None:
    """In the new process: takes the program's place and runs it."""
    if session:
        os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for file in _held:
        if not file.closed:
            os.dup2(nothing, file.fileno())  # in its place, not closed: the file still owns the number
    _held.clear()
    for number, source in enumerate((stdin.fileno(), stdout.fileno() if keeps_stdout else nothing, stderr.fileno())):
        os.dup2(source, number)
    os.close(nothing)
    for end in (stdin, stdout, stderr):
        end.close()
    text = {"encoding": "utf-8", "closefd": False}  # a fork of this one will replace them, and then they may not close
    sys.stdin, sys.stdout = open(0, **text), open(1, "w", **text)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", **text)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    Path("/proc/self/comm").write_text(
        f"rank {environment.get('RANK', 'none')}"
    )  # its environ is the server's for good
    ask_no_name_server()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from crypten_llm.session import launch

    launch.start_party = _party_of_a_program
    begun.close()
    kind, what, *rest = arguments
    sys.argv = [what if kind == "-m" else kind, *rest]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
