"""At a party: material from its file of a tape, which is used once.

Owns the life of that file. A mask hides one value. So a party's file is *burned* before its first mask is drawn: its
key, under which all that it holds is encrypted, is overwritten where it lies, and the disk has that before anything is
used. Whatever ends the process, no second run finds the key, and who takes the disk later reads nothing of what was
answered. What has been read is overwritten with zeros as well. What this cannot see is a copy: never copy a tape back.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import crypten_llm
from crypten_llm import program
from crypten_llm.errors import OneTimeError, UsageError
from crypten_llm.links.signatures import fingerprint as fingerprint_of_key
from crypten_llm.links.transport import bytes_of
from crypten_llm.process import Owned
from crypten_llm.protocols.dealer.layout import (
    WORD,
    Begin,
    Header,
    NotATape,
    ashes,
    material_key,
    open_file,
    padded,
    path_in,
    read_begin,
)
from crypten_llm.protocols.dealer.manifest import NAMES, Manifest, command, fingerprint
from crypten_llm.protocols.dealer.material import CHANNEL
from crypten_llm.protocols.dealer.randomness import Cipher
from crypten_llm.records import Extract, Malformed, decode
from crypten_llm.roles import CLIENT, OWNER

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport


AHEAD = 1 << 18  # bytes that are read at once, so that a step's many small pieces take few calls of the system
_NOTHING = torch.empty(0, dtype=torch.uint8)
_PIECE = 4 << 20  # bytes at a time when a file is checked
_ZEROS = bytes(_PIECE)
_UPPER_BOUNDS = ("max_new_tokens", "steps")  # a run may stop before the tape ends
_SHOWN = 200  # characters of a value in a message


def locate(path: str | Path, party: int, is_local: bool = False) -> Path:
    """The file of ``party`` in the tape that a folder or a file names, ready to be used.

    is_local: whether all parties run on this machine, which then has both files.

    Raises UsageError for what is no tape, another party's, of another version, or used, and for a folder with the
    other party's file where that runs elsewhere: who has both files can read what the other party masks.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        own = path / f"{NAMES[party]}.tape"
        path = own if own.exists() else path_in(path, party)
    path = path.resolve()  # what is burned is the file and not a link to it
    try:
        fd = open_file(path, os.O_RDONLY)
    except OSError as error:
        raise _no_tape(path, error) from None
    except NotATape:
        raise _not_a_tape(path) from None
    try:
        _checked(path, fd, party)
    finally:
        os.close(fd)
    if not is_local:
        _alone(path, party)
    return path


def _alone(path: Path, party: int) -> None:
    """Raises UsageError where the other party's file lies beside this one's, as ``deal`` has written both."""
    other = OWNER + CLIENT - party
    folder = path.parent
    for found in (folder / f"{NAMES[other]}.tape", path_in(folder, other), path_in(folder.parent, other)):
        if os.path.lexists(found):
            raise UsageError(
                f"{found} is the {NAMES[other]}'s file and must not be on the {NAMES[party]}'s host, which could read "
                f"with it what the {NAMES[other]} keeps secret; carry the folder '{NAMES[party]}' alone here, and deal "
                "another tape if this one has been here whole"
            )


def _no_tape(path: Path, error: OSError) -> UsageError:
    return UsageError(f"no tape at {path}: {error.strerror}; give --tape the folder that 'deal' wrote, or this party's")


def _not_a_tape(path: Path) -> UsageError:
    return UsageError(
        f"{path} is not a tape of this version; give --tape the folder that 'deal' wrote, or this party's file in it"
    )


def _damaged(path: Path) -> UsageError:
    return UsageError(f"{path} is damaged; nothing was used: copy it from the dealer again, or deal another tape")


def _checked(path: Path, fd: int, party: int) -> tuple[Begin, Header]:
    """The start of a file that this party can use: of this program, its own, not used, and signed as it says."""
    try:
        begun = read_begin(fd)
        _check_program(path, begun.header)
        header: Header = decode(begun.header, Header)
    except NotATape:
        raise _not_a_tape(path) from None
    except Malformed:
        raise _damaged(path) from None
    manifest = header.manifest
    if header.party != NAMES[party]:
        raise UsageError(f"{path} is the {header.party}'s; give the {NAMES[party]} {NAMES[party]}.tape alone")
    if begun.burned:
        raise UsageError(
            f"tape {manifest.id} was used on {begun.burned}, and its masks hide one run only; deal another: "
            f"{command(manifest.verb, manifest.plan)}"
        )
    if not header.is_signed or manifest.files[header.party] != header.digest(begun.key):
        raise _damaged(path)
    return begun, header


class _Dealt(Extract, frozen=True):
    """What dealt a tape, in whatever version's header."""

    version: Any = None
    program: Any = None


class _Outline(Extract, frozen=True):
    manifest: _Dealt


def _check_program(path: Path, header: bytes) -> None:
    """Another version's header may have other names: what dealt it is looked at first. Raises Malformed."""
    found: _Dealt = decode(header, _Outline).manifest
    if None in (found.version, found.program):
        raise Malformed("no manifest")
    dealt, here = (found.version, found.program), (crypten_llm.__version__, program.digest())
    if dealt != here:
        raise UsageError(
            f"{path} was dealt by version {_short(dealt[0])} (code {_short(dealt[1], 16)}), this is {here[0]} (code "
            f"{_short(here[1], 16)}); deal another with this version: python -m crypten_llm deal"
        )


def _short(value: object, longest: int = _SHOWN) -> str:
    """A value in a message, cut."""
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


class Tape:
    """At a party: material from its file."""

    unit, window = WORD, 1 << 20

    def __init__(
        self, path: str | Path, party: int, transport: Transport, is_local: bool = False, signers: Sequence[str] = ()
    ) -> None:
        """Opens and checks the file; nothing is used yet. is_local: see ``locate``. signers: the public keys of whoever
        must have dealt it, any of them, where they are known.

        Raises UsageError as ``locate`` does, for damage, and for a tape that another key has signed.
        """
        self.path, self._transport = locate(path, party, is_local), transport
        try:
            self._fd = open_file(self.path, os.O_RDWR)
        except OSError as error:
            raise UsageError(
                f"cannot burn the tape {self.path}: {error.strerror}; it must be writable, as it is used once"
            ) from None
        self._eraser = ThreadPoolExecutor(1, thread_name_prefix="eraser")  # beside the work
        self._erased: Future[None] | None = None  # the last that was asked of it
        self.close = weakref.finalize(self, _leave, self._fd, self._eraser)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.path} is in use by another process; every run needs its own tape") from None
        begun, header = _checked(self.path, self._fd, party)  # once more: nobody else burns it from now on
        self.manifest, self._length = header.manifest, len(begun.header)
        if signers and self.manifest.signer not in signers:
            trusted = " or ".join(map(fingerprint_of_key, signers))
            raise UsageError(
                f"tape {self.manifest.id} is not signed by the dealer's key, of {trusted}, but by "
                f"that of {fingerprint_of_key(self.manifest.signer)}; have the dealer deal it with --tls DIR, or send "
                "its dealer.crt again"
            )
        self._sections: dict[str, tuple[int, int]] = {}  # by label, where it starts and stops
        self._verify(begun.start, header)
        self.keys = [begun.key]
        self._burned = False
        self._position = self._stop = 0
        self._ahead, self._used = _NOTHING, 0  # what has been read of the section, and how much of that is taken
        self._piece = torch.empty(AHEAD, dtype=torch.uint8)  # as it is on the disk
        self._owned = Owned()

    def _verify(self, start: int, header: Header) -> None:
        """Compares every section with its digest: a bad copy is found before the tape is used."""
        piece = bytearray(_PIECE)
        for label, (size, expected) in header.sections.items():
            self._sections[label] = start, start + size
            found = hashlib.sha256()
            for place in range(start, start + size, _PIECE):
                view = memoryview(piece)[: min(_PIECE, start + size - place)]
                if os.preadv(self._fd, [view], place) != len(view):
                    raise _damaged(self.path)
                found.update(view)
            if found.hexdigest() != expected:
                raise _damaged(self.path)
            start += size
        if os.fstat(self._fd).st_size != start:
            raise _damaged(self.path)

    def compare(self, engine: dict) -> None:
        """Raises UsageError when this party's tape is not for ``engine``, or not the other party's tape: a manifest
        names the digests of both files and the key that signed them.
        """
        self._same("engine", engine, self.manifest.engine, "this program")
        other = OWNER + CLIENT - self._transport.rank
        self._transport.send_json(other, self.manifest)
        theirs = self._transport.recv_json(other, Manifest)
        for name in Manifest.__struct_fields__:
            self._same(name, getattr(theirs, name), getattr(self.manifest, name), self._transport.name(other))

    def _same(self, name: str, there: object, here: object, who: str) -> None:
        if there != here:
            raise UsageError(
                f"the tape's {name} is {_short(repr(here))} at {self._transport.name(self._transport.rank)}, "
                f"{_short(repr(there))} at {who}; give both parties the files of one tape: {self._remedy()}"
            )

    def expect(self, verb: str, facts: dict, request: int) -> None:
        """Raises UsageError when the tape was dealt for something else; nothing is used.

        verb: "model" (``facts`` is its config.json), or that of a request (``facts`` is its plan, ``request`` its
        number in this session).
        """
        if verb == "model":
            if fingerprint(facts) != self.manifest.config:
                raise UsageError(
                    f"the tape's config is {self.manifest.config}, the model's {fingerprint(facts)}: it was dealt "
                    f"for another architecture; deal one from this model's config.json: {self._remedy()}"
                )
            return
        wanted = command(verb, facts)
        if verb != self.manifest.verb:
            raise UsageError(f"the tape is for {self.manifest.verb!r}, not for {verb!r}; deal another: {wanted}")
        for name, here in self.manifest.plan.items():
            there: Any = facts.get(name)
            is_bound = name in _UPPER_BOUNDS and isinstance(here, int) and isinstance(there, int)
            if there > here if is_bound else there != here:
                raise UsageError(
                    f"{name} is {there!r}, but the tape is for {self._plan()}; deal one that fits: {wanted}"
                )
        if request > self.manifest.requests:
            raise UsageError(
                f"the tape is for {self.manifest.requests} requests, and this is number {request}; deal a longer "
                f"one: {wanted} --requests {request}"
            )

    def _plan(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.manifest.plan.items())

    def _remedy(self) -> str:
        return command(self.manifest.verb, self.manifest.plan)

    def begin(self, label: str) -> None:
        """Goes to a section, wherever the last one was left. Raises OneTimeError for one that was used before, or that
        there is not, and in a child of the process that opened the tape.
        """
        self._owned.check("a tape")
        if label not in self._sections:
            raise OneTimeError(f"section {label!r} is not on the tape, or was used before")
        if not self._burned:
            self._burn()
        self._position, self._stop = self._sections.pop(label)
        self._cipher = Cipher(material_key(self.keys[0], label))
        self._ahead, self._used = _NOTHING, 0
        size = self._stop - self._position
        os.posix_fadvise(self._fd, self._stop, size, os.POSIX_FADV_WILLNEED)  # the next one is probably alike

    def read(self, count: int, counted: int | None = None) -> torch.Tensor:
        """The next bytes of the section; counted: of them, where they are several pieces. Raises OneTimeError where it
        has no more.
        """
        self._owned.check("a tape")
        size, start = padded(count), self._used
        if self._position + size > self._stop:
            raise OneTimeError("the program needs more than this section of the tape holds")
        if start + size > self._ahead.numel():
            self._read_ahead(size)
            start = 0
        self._used, self._position = start + size, self._position + size
        self._transport.meter.count(CHANNEL, 0, 0, 0, count if counted is None else counted, 0.0)
        return self._ahead[start : start + count]

    def receive_ahead(self) -> bool:
        """Nothing is coming: it is all here."""
        return False

    def _read_ahead(self, least: int) -> None:
        """The next bytes of the section, in new memory of this party's device: what was read before belongs to those
        who read it. In the file they become zeros, which the disk has at the latest when the tape is closed.
        """
        left = self._ahead[self._used :]
        count, place = max(least, min(AHEAD, self._stop - self._position)) - left.numel(), self._position + left.numel()
        if self._piece.numel() < count:
            self._piece = torch.empty(count, dtype=torch.uint8)
        fresh = self._piece[:count]
        if os.preadv(self._fd, [bytes_of(fresh)], place) != fresh.numel():
            raise _damaged(self.path)
        self._wait_for_eraser()
        self._erased = self._eraser.submit(_erase, self._fd, place, fresh.numel())
        read = self._transport.staging.to_device(self._cipher.apply(fresh))
        self._ahead = torch.cat([left, read]) if left.numel() else read

    def _wait_for_eraser(self) -> None:
        if self._erased is None:
            return
        try:
            self._erased.result()
        except OSError as error:
            raise UsageError(
                f"cannot overwrite what was read of the tape {self.path}: {error.strerror}; its key is gone, so that "
                "nobody can read the rest: deal another tape to another disk"
            ) from None

    def end(self) -> None:
        """All that was read of the section is zeros in the file now. Raises OneTimeError where the section has more."""
        self._wait_for_eraser()
        if self._position != self._stop:
            raise OneTimeError("the program needed less than this section of the tape holds")

    def _burn(self) -> None:
        """Overwrites the key, and says when; returns when the disk has it."""
        try:
            os.pwrite(self._fd, ashes(time.strftime("%Y-%m-%d at %H:%M:%S"), self._length), 0)
            os.fsync(self._fd)
        except OSError as error:
            raise UsageError(f"cannot burn the tape {self.path}: {error.strerror}; nothing was used") from None
        self._burned = True


def _erase(fd: int, place: int, count: int) -> None:
    for start in range(0, count, _PIECE):
        os.pwrite(fd, memoryview(_ZEROS)[: count - start], place + start)


def _leave(fd: int, eraser: ThreadPoolExecutor) -> None:
    """Returns when the disk has the zeros of all that was read."""
    eraser.shutdown()
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
