"""At a party: its halves of blocks that dealers have dealt ahead of requests, each to be used once.

Owns the folder in which they lie. A block is a tape of one request, dealt for masks of weights that outlive a session
(its ``series``); each party has its own half as a file and never the other's. Whoever takes one has it alone: its id
is written down, its key overwritten and its name removed, and the disk has all that, before it is given out. So a half
that was taken is gone, whatever becomes of request and process, and an id that comes again is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crypten_llm.errors import UsageError
from crypten_llm.protocols.dealer.layout import Header, NotATape, open_file, read_begin, sync
from crypten_llm.protocols.dealer.manifest import NAMES, PARTIES, Facts, Manifest
from crypten_llm.protocols.dealer.tape import Tape
from crypten_llm.records import Malformed, decode

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport

END = ".block"
USED = "used"  # ids, one a line
GRACE_SECONDS = 60.0  # for the other half to come as well, and for the next session, before a half is dropped
ARRIVING = ".arriving"  # ends the name of what has not come whole


@dataclass(frozen=True)
class Half:
    """One party's half of a block. plan: the facts of the request that it is dealt for. digest: SHA-256 of what its
    dealer has signed, which names both halves. size: of the file, bytes. made: when it came, in nanoseconds.
    """

    id: str
    series: str
    plan: Facts
    digest: str
    size: int
    made: int


def folder_of(folder: str | Path, party: int) -> Path:
    """A party's part of a stock."""
    return Path(folder).expanduser() / NAMES[party]


def digest_of(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.text()).hexdigest()


class Stock:
    """folder: which holds a folder of this party's name, made if it is not there. is_local: whether all parties run on
    this machine, whose folders may lie side by side.

    Raises UsageError for a folder that cannot be used, and for one that has the other party's halves too: who has both
    can read what the parties mask.
    """

    def __init__(self, folder: str | Path, party: int, is_local: bool = False) -> None:
        self.folder, self.party = folder_of(folder, party), party
        for other in set(PARTIES) - {party}:
            if not is_local and os.path.lexists(found := folder_of(folder, other)):
                raise UsageError(
                    f"{found} is the {NAMES[other]}'s stock and must not be on the {NAMES[party]}'s host, which could "
                    f"read with it what the {NAMES[other]} keeps secret; give --stock a folder of this party's own"
                )
        try:
            self.folder.mkdir(0o700, parents=True, exist_ok=True)
            mode = self.folder.stat().st_mode
        except OSError as error:
            raise self._unusable(error) from None
        if mode & 0o077:
            raise UsageError(f"--stock: others than you can read {self.folder} (mode {mode & 0o777:o}); chmod 700 it")
        self._known: dict[str, Half | None] = {}  # by name; None for what is no half of this party's
        self._reading = threading.Lock()
        self._used: set[str] = set()
        self._read = 0  # bytes of the file of those
        used = self._all_used()
        for path in self.folder.glob(f"*{END}"):
            if path.stem in used:  # of a process that ended between two steps
                path.unlink(missing_ok=True)

    def halves(self) -> list[Half]:
        """Those that are there, oldest first."""
        try:
            names = [name for name in os.listdir(self.folder) if name.endswith(END)]
        except OSError as error:
            raise self._unusable(error) from None
        self._known = {name: self._known.get(name) or self._look(name) for name in names}
        used = self._all_used()
        found = [half for half in self._known.values() if half is not None and half.id not in used]
        return sorted(found, key=lambda half: (half.made, half.id))

    def has_used(self, name: str) -> bool:
        """Whether a block of this id was taken or dropped here, by any process."""
        return name in self._all_used()

    def _all_used(self) -> set[str]:
        with self._reading:
            try:
                with open(self.folder / USED, "rb") as file:
                    file.seek(self._read)
                    fresh = file.read()
            except FileNotFoundError:
                return self._used
            except OSError as error:
                raise self._unusable(error) from None
            whole = fresh[: fresh.rfind(b"\n") + 1]
            self._used.update(whole.decode("ascii", "replace").split())
            self._read += len(whole)
            return self._used

    def take(self, half: Half, transport: Transport, engine: dict, signers: Sequence[str] = ()) -> Tape:
        """The half, burned: nobody finds it any more. Its material is read from the file, which has no name now.

        Raises UsageError for one that another process has taken, that cannot be burned, or that was dealt for other
        settings than ``engine``; and as ``Tape`` does.
        """
        path = self._path(half.id)
        tape = Tape(path, self.party, transport, True, signers, half.series, is_known=True)
        try:
            if digest_of(tape.manifest) != half.digest or self.has_used(half.id):
                raise UsageError(f"{path} is not the block that it was; nothing was used")
            if tape.manifest.engine != engine:
                raise UsageError(f"{path} was dealt for other settings of the engine; nothing was used")
            self._write_off(half.id)
            tape.burn()
            path.unlink(missing_ok=True)
            sync(self.folder)
        except OSError as error:
            tape.close()
            raise self._unusable(error) from None
        except BaseException:
            tape.close()
            raise
        return tape

    def drop(self, name: str) -> None:
        """The half of this id, if it is here, will never be used."""
        path = self._path(name)
        if not path.exists():
            return
        self._write_off(name)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()

    def arriving(self, name: str) -> Path:
        """Where the half of this id is written before it is whole. Raises UsageError for an id that was here before."""
        if self.has_used(name) or self._path(name).exists():
            raise UsageError(f"block {name} was delivered here before; its masks hide one request only")
        return self.folder / f".{name}{ARRIVING}"

    def settle(self, name: str) -> None:
        """What has arrived whole is in stock from now on; the disk has it."""
        try:
            os.rename(self.folder / f".{name}{ARRIVING}", self._path(name))
            sync(self.folder)
        except OSError as error:
            raise self._unusable(error) from None

    def abandon(self, name: str) -> None:
        """What was arriving will not come whole."""
        (self.folder / f".{name}{ARRIVING}").unlink(missing_ok=True)

    def drop_others(self, series: str) -> None:
        """Drops what is of another series and has been here for a while."""
        since = time.time_ns() - int(GRACE_SECONDS * 1e9)
        for half in self.halves():
            if half.series != series and half.made < since:
                self.drop(half.id)

    def kept_alone(self) -> int:
        """For the one process to which producers deliver, as long as it holds this lock: what another has left half-way
        is removed. Raises UsageError where another does so now.
        """
        fd = os.open(self.folder / ".keeper", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise UsageError(f"another process keeps the stock in {self.folder}; end it first") from None
        for path in self.folder.glob(f".*{ARRIVING}"):
            path.unlink(missing_ok=True)
        return fd

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{END}"

    def _write_off(self, name: str) -> None:
        """Returns when the disk has it."""
        fd = os.open(self.folder / USED, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, f"{name}\n".encode())
            os.fsync(fd)
        finally:
            os.close(fd)

    def _look(self, name: str) -> Half | None:
        try:
            return look(self.folder / name, self.party)
        except (OSError, NotATape, Malformed):
            return None

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(f"--stock: cannot use {self.folder} ({error.strerror}); name a folder that you can write")


def look(path: Path, party: int) -> Half | None:
    """What a file says that it is: a half of this party's that was not used, signed as it says; None for another.

    Raises OSError, NotATape, Malformed.
    """
    with _opened(path) as fd:
        begun, found = read_begin(fd), os.fstat(fd)
        header: Header = decode(begun.header, Header)
    manifest, name = header.manifest, path.name.removesuffix(END).removesuffix(ARRIVING).removeprefix(".")
    is_whole = found.st_size == begun.start + header.size and manifest.files[header.party] == header.digest(begun.key)
    if begun.burned or header.party != NAMES[party] or manifest.id != name or not manifest.series:
        return None
    if not is_whole or not header.is_signed:
        return None
    digest = digest_of(manifest)
    return Half(manifest.id, manifest.series, manifest.plan, digest, found.st_size, found.st_mtime_ns)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = open_file(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
