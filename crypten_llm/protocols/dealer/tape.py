"""At a party: material from its file of a tape, which is used once.

Owns the life of that file. A mask hides one value. So a party's file is *burned* before its first mask is drawn: on
disk it becomes, at once and for good, a header that says so; the material lives on without a name for as long as the
process reads it. Whatever ends that process, no second run finds the key. What this cannot see is a copy of the folder:
never copy a tape back.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import weakref
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import crypten_llm
from crypten_llm.errors import UsageError
from crypten_llm.protocols.dealer.manifest import (
    FORMAT,
    LENGTH,
    MAGIC,
    NAMES,
    before_key,
    checksum,
    command,
    fingerprint,
    padded,
    program,
    sync,
)
from crypten_llm.protocols.dealer.material import CHANNEL
from crypten_llm.protocols.dealer.randomness import KEY_BYTES
from crypten_llm.roles import CLIENT, OWNER

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport


MAX_HEADER = 64 << 20
AHEAD = 1 << 18  # bytes that are read at once, so that a step's many small pieces take few calls of the system
_NOTHING = torch.empty(0, dtype=torch.uint8)
_PIECE = 4 << 20  # bytes at a time when a file is checked
_UPPER_BOUNDS = ("max_new_tokens", "steps")  # a run may stop before the tape ends


def locate(path: str | Path, party: int) -> Path:
    """The file of ``party`` in the tape that a folder or a file names, ready to be used.

    Raises UsageError for what is no tape, another party's, of another version, or used.
    """
    path = Path(path).expanduser()
    path = path / f"{NAMES[party]}.tape" if path.is_dir() else path
    path = path.resolve()  # what is burned is the file and not a link to it
    try:
        with open(path, "rb") as file:
            _check_header(path, _read_header(path, file.fileno())[0], party)
    except OSError as error:
        raise _no_tape(path, error) from None
    return path


def _no_tape(path: Path, error: OSError) -> UsageError:
    return UsageError(f"no tape at {path}: {error.strerror}; give --tape the folder that 'deal' wrote, or this party's")


def _read_header(path: Path, fd: int) -> tuple[dict, int]:
    """The header, and where it ends."""
    start = len(MAGIC) + LENGTH.size
    begin = os.pread(fd, start, 0)
    if len(begin) < start or not begin.startswith(MAGIC):
        raise UsageError(f"{path} is not a tape; give --tape the folder that 'deal' wrote, or this party's file in it")
    (length,) = LENGTH.unpack(begin[len(MAGIC) :])
    try:
        if length > MAX_HEADER:
            raise ValueError
        return json.loads(os.pread(fd, length, start)), start + length
    except ValueError:
        raise _damaged(path) from None


def _damaged(path: Path) -> UsageError:
    return UsageError(f"{path} is damaged; nothing was used: copy it from the dealer again, or deal another tape")


def _check_header(path: Path, header: dict, party: int) -> None:
    dealt_by = [header.get(name) for name in ("format", "version", "program")]
    if dealt_by != [FORMAT, crypten_llm.__version__, program()]:
        raise UsageError(
            f"{path} was dealt by version {header['version']} (code {header.get('program')}), this is "
            f"{crypten_llm.__version__} (code {program()}); deal another with this version: "
            f"{command(header['verb'], header['plan'])}"
        )
    if header["party"] != NAMES[party]:
        raise UsageError(f"{path} is the {header['party']}'s; give the {NAMES[party]} {NAMES[party]}.tape alone")
    if header["burned"]:
        raise UsageError(
            f"tape {header['id']} was used on {header['burned']}, and its masks hide one run only; deal another: "
            f"{command(header['verb'], header['plan'])}"
        )


class Tape:
    """At a party: material from its file."""

    def __init__(self, path: str | Path, party: int, transport: Transport) -> None:
        """Opens and checks the file; nothing is used yet. Raises UsageError as ``locate`` does, and for damage."""
        self.path, self._transport = locate(path, party), transport
        self._fd = os.open(self.path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._fd)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.path} is in use by another process; every run needs its own tape") from None
        self.header, end = _read_header(self.path, self._fd)
        self.manifest = {k: v for k, v in self.header.items() if k not in ("party", "burned", "key", "sections")}
        self._sections = self.header["sections"]
        names = os.fstat(self._fd).st_nlink
        if names == 0:  # burned by another process since it was opened
            locate(path, party)
        if names > 1:
            raise UsageError(
                f"{self.path} has {names} names (hard links), and a tape that is burned under one would stay under the "
                "other; remove all but one"
            )
        self._verify()
        self.keys = [os.pread(self._fd, KEY_BYTES, end)]
        if checksum(self.keys[0]) != self.header["key"]:
            raise _damaged(self.path)
        self._burned = False
        self._position = self._stop = 0
        self._ahead, self._used = _NOTHING, 0  # what has been read of the section, and how much of that is taken

    def _verify(self) -> None:
        """Compares every section with its checksum: a bad copy is found before the tape is used."""
        piece = bytearray(_PIECE)
        for offset, size, expected in self._sections.values():
            crc = 0
            for start in range(offset, offset + size, _PIECE):
                view = memoryview(piece)[: min(_PIECE, offset + size - start)]
                if os.preadv(self._fd, [view], start) != len(view):
                    raise _damaged(self.path)
                crc = zlib.crc32(view, crc)
            if f"{crc:08x}" != expected:
                raise _damaged(self.path)

    def compare(self, engine: dict) -> None:
        """Raises UsageError when this party's tape is not for ``engine``, or not the other party's tape."""
        self._same("engine", engine, self.manifest["engine"], "this program")
        other = OWNER + CLIENT - self._transport.rank
        self._transport.send_json(other, self.manifest)
        theirs = self._transport.recv_json(other, dict)
        for name, mine in self.manifest.items():
            self._same(name, theirs.get(name), mine, self._transport.name(other))

    def _same(self, name: str, there: object, here: object, who: str) -> None:
        if there != here:
            raise UsageError(
                f"the tape's {name} is {here!r} at {self._transport.name(self._transport.rank)}, {there!r} at {who}; "
                f"give both parties the files of one tape: {self._remedy()}"
            )

    def expect(self, verb: str, facts: dict, request: int) -> None:
        """Raises UsageError when the tape was dealt for something else; nothing is used.

        verb: "model" (``facts`` is its config.json), or that of a request (``facts`` is its plan, ``request`` its
        number in this session).
        """
        if verb == "model":
            if fingerprint(facts) != self.manifest["config"]:
                raise UsageError(
                    f"the tape's config is {self.manifest['config']}, the model's {fingerprint(facts)}: it was dealt "
                    f"for another architecture; deal one from this model's config.json: {self._remedy()}"
                )
            return
        wanted = command(verb, facts)
        if verb != self.manifest["verb"]:
            raise UsageError(f"the tape is for {self.manifest['verb']!r}, not for {verb!r}; deal another: {wanted}")
        for name, here in self.manifest["plan"].items():
            there = facts.get(name)
            if there > here if name in _UPPER_BOUNDS else there != here:
                raise UsageError(
                    f"{name} is {there!r}, but the tape is for {self._plan()}; deal one that fits: {wanted}"
                )
        if request > self.manifest["requests"]:
            raise UsageError(
                f"the tape is for {self.manifest['requests']} requests, and this is number {request}; deal a longer "
                f"one: {wanted} --requests {request}"
            )

    def _plan(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.manifest["plan"].items())

    def _remedy(self) -> str:
        return command(self.manifest["verb"], self.manifest["plan"])

    def begin(self, label: str) -> None:
        """Goes to a section, wherever the last one was left. A section is used once."""
        if not self._burned:
            self._burn()
        assert label in self._sections, f"section {label!r} is not on the tape, or was used before"
        offset, size, _ = self._sections.pop(label)
        self._position, self._stop = offset, offset + size
        self._ahead, self._used = _NOTHING, 0
        os.posix_fadvise(self._fd, self._stop, size, os.POSIX_FADV_WILLNEED)  # the next one is probably alike

    def read(self, count: int) -> torch.Tensor:
        size, start = padded(count), self._used
        assert self._position + size <= self._stop, "the program needs more than this section of the tape holds"
        if start + size > self._ahead.numel():
            self._read_ahead(size)
            start = 0
        self._used, self._position = start + size, self._position + size
        self._transport.meter.count(CHANNEL, 0, 0, 0, count, 0.0)
        return self._ahead[start : start + count]

    def _read_ahead(self, least: int) -> None:
        """The next bytes of the section, in new memory: what was read before belongs to those who read it."""
        memory = bytearray(max(least, min(AHEAD, self._stop - self._position)))
        if os.preadv(self._fd, [memory], self._position) != len(memory):
            raise _damaged(self.path)
        self._ahead = torch.frombuffer(memory, dtype=torch.uint8)

    def end(self) -> None:
        assert self._position == self._stop, "the program needed less than this section of the tape holds"

    def _burn(self) -> None:
        """Replaces the file by one that holds neither key nor material; returns when the disk has it."""
        header = {**self.header, "burned": time.strftime("%Y-%m-%d at %H:%M:%S"), "key": "", "sections": {}}
        ashes = self.path.with_suffix(".burning")
        try:
            with open(ashes, "wb") as file:
                file.write(before_key(header))
                file.flush()
                os.fsync(file.fileno())
            os.replace(ashes, self.path)
            sync(self.path.parent)
        except OSError as error:
            raise UsageError(
                f"cannot burn the tape {self.path}: {error.strerror}; its folder must be writable, as it is used once"
            ) from None
        self._burned = True
