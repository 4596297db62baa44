"""Tapes: a dealer's material in files, made before the parties meet and used by them once.

Owns the files and their life. A tape is a folder: ``owner.tape`` and ``client.tape``, each for that party alone, and
``manifest.json``, which is public. A party's file holds MAGIC, the length of its header (8 bytes), the header (JSON:
the manifest, and offset, size and CRC-32 of each section), the party's key, and the material in the order in which the
program asks for it, every piece padded to whole words.

A mask hides one value. So a party's file is *burned* before its first mask is drawn: on disk it becomes, at once and
for good, a header that says so; the material lives on without a name for as long as the process reads it. Whatever
ends that process, no second run finds the key. What this cannot see is a copy of the folder: never copy a tape back.
"""

import fcntl
import hashlib
import json
import os
import shutil
import struct
import time
import weakref
import zlib
from functools import cache
from pathlib import Path

import torch

import crypten_llm
import eviction
from crypten_llm.errors import UsageError
from crypten_llm.kernels.ring import bytes_of
from crypten_llm.protocols.dealer.material import CHANNEL
from crypten_llm.protocols.dealer.randomness import KEY_BYTES, fresh_key
from crypten_llm.roles import CLIENT, OWNER, role_names
from crypten_llm.session.report import size as for_people

FORMAT = 1
PARTIES = (OWNER, CLIENT)
NAMES = role_names(len(PARTIES))[: len(PARTIES)]
MAGIC = b"crypten-llm tape"
LENGTH = struct.Struct("<Q")
WORD = 8
MAX_HEADER = 64 << 20
_PIECE = 4 << 20  # bytes at a time when a file is checked
_PROGRAM = ("*.py", "*.json", "weights/*.safetensors")  # the last are of trained policies
_UPPER_BOUNDS = ("max_new_tokens", "steps")  # a run may stop before the tape ends
_NOT_IN_A_TAPE = ("hide_length",)  # changes nothing that is dealt
_NOT_IN_A_FINGERPRINT = ("bos_token_id", "eos_token_id")  # as little; generation_config.json may change them


def make_manifest(engine: dict, config: dict, verb: str, plan: dict, requests: int) -> dict:
    """What a tape is for: public, and what must be alike on all sides.

    engine: the engine's settings. config: the model's config.json. verb, plan: the request, as the client announces it.
    """
    return {
        "format": FORMAT,
        "version": crypten_llm.__version__,
        "program": program(),
        "engine": engine,
        "config": fingerprint(config),
        "verb": verb,
        "plan": {name: value for name, value in plan.items() if name not in _NOT_IN_A_TAPE},
        "requests": requests,
        "id": fresh_key()[:8].hex(),
    }


@cache
def program() -> str:
    """Fingerprint of the code: material means something only to the program that it was dealt for, line by line."""
    code = hashlib.sha256()
    for package in (Path(crypten_llm.__file__).parent, Path(eviction.__file__).parent):
        for path in sorted(path for kind in _PROGRAM for path in package.rglob(kind)):
            code.update(f"{path.relative_to(package.parent)}\n".encode() + path.read_bytes())
    return code.hexdigest()[:16]


def fingerprint(config: dict) -> str:
    """Of what decides in a model's public configuration what is dealt."""
    architecture = {name: value for name, value in config.items() if name not in _NOT_IN_A_FINGERPRINT}
    return _checksum(json.dumps(architecture, sort_keys=True).encode())


def command(verb: str, plan: dict) -> str:
    """The command that deals a tape for ``plan``."""
    first = "--bench" if verb == "bench" else "--model MODEL"
    options = [f"--{name.replace('_', '-')} {value}" for name, value in plan.items() if name not in _NOT_IN_A_TAPE]
    return " ".join(["python -m crypten_llm deal", first, *options, "--out DIR"])


def _padded(count: int) -> int:
    return -(-count // WORD) * WORD


# At the dealer.


class _Written:
    """What is written has no needs: it takes any program, at any pace."""

    def expect(self, verb: str, facts: dict, request: int) -> None:
        pass

    def flush(self, party: int) -> None:
        pass


class Sizes(_Written):
    """At a dealer that computes nothing (``counting``): how many bytes each section will take at each party."""

    def __init__(self):
        self.sections: dict[str, list[int]] = {}

    def begin(self, label: str) -> None:
        assert label not in self.sections, f"section {label!r} is begun twice: it would use its masks twice"
        self._now = self.sections[label] = [0, 0]

    def add(self, party: int, count: int) -> None:
        self._now[party] += _padded(count)

    def end(self) -> None:
        pass

    def total(self, party: int) -> int:
        return sum(sizes[party] for sizes in self.sections.values())


class Recording(_Written):
    """At a dealer that runs alone: material goes to a folder that gets its name when it is complete.

    Use as a context. Raises UsageError when the folder cannot be written; nothing is left behind then.
    """

    def __init__(self, out: Path, manifest: dict, sizes: Sizes, progress=lambda count: None):
        """progress: called with the number of bytes of each piece."""
        self.out, self.manifest, self.sizes, self.progress = Path(out), manifest, sizes, progress
        self.keys = [fresh_key() for _ in PARTIES]
        self._files: list = []

    def __enter__(self):
        try:
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise UsageError(f"{self.out} is there already; a tape is never overwritten: name a new folder (--out)")
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._partial = self.out.parent / f".{self.out.name}.{os.getpid()}.partial"
            self._partial.mkdir(0o700)
        except OSError as error:
            raise self._cannot_write(error) from None
        try:
            for party in PARTIES:
                self._start(party)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _start(self, party: int) -> None:
        sections = {label: [0, sizes[party], "0" * 8] for label, sizes in self.sizes.sections.items()}
        key = _checksum(self.keys[party])
        header = {**self.manifest, "party": NAMES[party], "burned": "", "key": key, "sections": sections}
        offset = _padded(len(MAGIC) + LENGTH.size + len(_dump(header)) + 16 * len(sections) + KEY_BYTES)
        for entry in sections.values():
            entry[0] = offset
            offset += entry[1]
        file = open(self._partial / f"{NAMES[party]}.tape", "xb", buffering=1 << 20)  # closed by __exit__
        os.fchmod(file.fileno(), 0o600)
        self._files.append((file, header, [0, 0]))  # the last: bytes and CRC-32 of the section so far
        os.posix_fallocate(file.fileno(), 0, offset)  # a full disk says so now
        file.seek(min((entry[0] for entry in sections.values()), default=offset))

    def begin(self, label: str) -> None:
        self._label = label

    def write(self, party: int, data: torch.Tensor) -> None:
        file, _, state = self._files[party]
        size = data.numel()
        rest = bytes(_padded(size) - size)
        for piece in (bytes_of(data), rest):
            file.write(piece)
            state[1] = zlib.crc32(piece, state[1])
        state[0] += size + len(rest)
        self.progress(size + len(rest))

    def end(self) -> None:
        for _, header, state in self._files:
            entry = header["sections"][self._label]
            assert state[0] == entry[1], f"section {self._label!r}: {state[0]} bytes were dealt, {entry[1]} announced"
            entry[2] = f"{state[1]:08x}"
            state[:] = [0, 0]

    def __exit__(self, kind, error, trace):
        try:
            if error is None:
                self._finish()
        except OSError as failure:
            error = failure
            raise self._cannot_write(failure) from None
        finally:
            for file, *_ in self._files:
                file.raw.close()  # what is still buffered goes with the folder
            if self._partial.exists():
                shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._cannot_write(error) from None

    def _finish(self) -> None:
        for (file, header, _), key in zip(self._files, self.keys, strict=True):
            file.flush()
            text = _dump(header)
            os.pwrite(file.fileno(), MAGIC + LENGTH.pack(len(text)) + text + key, 0)
            os.fsync(file.fileno())
        files = {f"{header['party']}.tape": _summary(header) for _, header, _ in self._files}
        text = json.dumps({**self.manifest, "files": files}, indent=1)
        (self._partial / "manifest.json").write_text(text + "\n")
        os.rename(self._partial, self.out)
        _sync(self.out.parent)

    def _cannot_write(self, error: OSError) -> UsageError:
        needed = for_people(sum(self.sizes.total(party) for party in PARTIES))
        return UsageError(
            f"cannot write a tape of {needed} to {self.out}: {error.strerror}; make room there or name another folder "
            "(--out). Nothing was left behind"
        )


def _dump(header: dict) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _summary(header: dict) -> dict:
    """Size of the material, and a checksum of its sections' checksums."""
    sections = header["sections"].values()
    checksum = _checksum("".join(crc for _, _, crc in sections).encode())
    return {"bytes": sum(size for _, size, _ in sections), "checksum": checksum}


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# At a party.


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

    def __init__(self, path: str | Path, party: int, transport):
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
        if _checksum(self.keys[0]) != self.header["key"]:
            raise _damaged(self.path)
        self._burned = False
        self._position = self._stop = 0

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
        theirs = self._transport.recv_json(other)
        for name, mine in self.manifest.items():
            self._same(name, theirs.get(name), mine, self._transport.name(other))

    def _same(self, name: str, there, here, who: str) -> None:
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
        os.posix_fadvise(self._fd, self._stop, size, os.POSIX_FADV_WILLNEED)  # the next one is probably alike

    def read(self, count: int) -> torch.Tensor:
        out, size = torch.empty(_padded(count), dtype=torch.uint8), _padded(count)
        assert self._position + size <= self._stop, "the program needs more than this section of the tape holds"
        if size and os.preadv(self._fd, [bytes_of(out)], self._position) != size:
            raise _damaged(self.path)
        self._position += size
        self._transport.meter.count(CHANNEL, 0, 0, 0, count, 0.0)
        return out[:count]

    def end(self) -> None:
        assert self._position == self._stop, "the program needed less than this section of the tape holds"

    def _burn(self) -> None:
        """Replaces the file by one that holds neither key nor material; returns when the disk has it."""
        header = {**self.header, "burned": time.strftime("%Y-%m-%d at %H:%M:%S"), "key": "", "sections": {}}
        text, ashes = _dump(header), self.path.with_suffix(".burning")
        try:
            with open(ashes, "wb") as file:
                file.write(MAGIC + LENGTH.pack(len(text)) + text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(ashes, self.path)
            _sync(self.path.parent)
        except OSError as error:
            raise UsageError(
                f"cannot burn the tape {self.path}: {error.strerror}; its folder must be writable, as it is used once"
            ) from None
        self._burned = True
