"""How a party's file of a tape is laid out: what the dealer writes and the party reads alike.

A tape is a folder of two, ``owner`` and ``client``, each to be carried to that party alone: its file (``owner.tape``)
and ``manifest.json``, which is public. A file begins with what is overwritten when it is used, in one sector of a disk:
MAGIC, when it was burned, the length of the header and the file's key. Then come the header (JSON: the manifest and its
signature, whose file this is, and size and SHA-256 of each section) and the sections one behind the other, every piece
padded to whole words, all encrypted under the key. Owns this layout; ``recording`` writes it, ``tape`` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

from crypten_llm.links.signatures import LONGEST
from crypten_llm.protocols.dealer.manifest import NAMES, Manifest, NotARecord, from_json, record
from crypten_llm.protocols.dealer.randomness import KEY_BYTES, derive_key

MAGIC = b"crypten-llm-tape"
BEGIN = struct.Struct(f"<16s24sQ{KEY_BYTES}s")  # MAGIC, when it was burned, the header's length, the key
UNUSED = bytes(24)  # in the place of when it was burned
WORD = 8
MAX_HEADER = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


class NotATape(Exception):
    """A file that does not begin like a tape."""


@dataclass(frozen=True)
class Header:
    """party: whose file it is. sections: by label, in order, bytes and SHA-256 of what the file holds."""

    manifest: Manifest
    signature: bytes
    party: str
    sections: dict[str, tuple[int, str]]

    @classmethod
    def read(cls, text: bytes) -> Header:
        """Raises NotARecord."""
        found = record(from_json(text), {"manifest": dict, "signature": str, "party": str, "sections": dict})
        sections: dict[str, tuple[int, str]] = {}
        for label, entry in found["sections"].items():
            if type(entry) is not list or len(entry) != 2:
                raise NotARecord("a section has a size and a digest")
            one = record({"label": label, "size": entry[0], "digest": entry[1]}, _SECTION)
            if one["size"] % WORD or not _DIGEST.fullmatch(one["digest"]):
                raise NotARecord("a section has whole words and a SHA-256")
            sections[label] = one["size"], one["digest"]
        try:
            signature = bytes.fromhex(found["signature"])
        except ValueError:
            raise NotARecord("a signature is written in hex") from None
        return cls(Manifest.read(found["manifest"]), signature, found["party"], sections)

    def text(self) -> bytes:
        parts = {"manifest": asdict(self.manifest), "signature": self.signature.hex()}
        return json.dumps({**parts, "party": self.party, "sections": self.sections}, separators=(",", ":")).encode()

    def digest(self, key: bytes) -> str:
        """Of a whole file with this header and key."""
        what = [self.party, hashlib.sha256(key).hexdigest(), [[label, *s] for label, s in self.sections.items()]]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all sections."""
        return sum(size for size, _ in self.sections.values())


_SECTION: dict[str, type] = {"label": str, "size": int, "digest": str}


@dataclass(frozen=True)
class Begin:
    """How a file begins. burned: when, or nothing. start: where its sections do."""

    burned: str
    key: bytes
    header: bytes
    start: int


def begin(header: bytes, key: bytes, length: int) -> bytes:
    """The start of a file: all that stands before its sections. length: what the header is filled up to with blanks."""
    return (BEGIN.pack(MAGIC, UNUSED, length, key) + header.ljust(length)).ljust(padded(BEGIN.size + length), b"\0")


def room_for(header: Header) -> int:
    """The length of a header that is complete but for its digests, its signer's name included, and its signature."""
    return len(header.text()) + 2 * LONGEST


def ashes(when: str, length: int) -> bytes:
    """What a used file begins with: no key."""
    return BEGIN.pack(MAGIC, when.encode(), length, bytes(KEY_BYTES))


def open_file(path: Path, flags: int) -> int:
    """A descriptor of a file as it lies on a disk: a pipe or a device would be waited for. Raises OSError, NotATape."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotATape
    return fd


def read_begin(fd: int) -> Begin:
    """Raises NotATape, and NotARecord for what begins like one."""
    first = os.pread(fd, BEGIN.size, 0)
    if not first.startswith(MAGIC):
        raise NotATape
    if len(first) < BEGIN.size:
        raise NotARecord("cut")
    _, burned, length, key = BEGIN.unpack(first)
    if length > MAX_HEADER:
        raise NotARecord("a header beyond its cap")
    header = os.pread(fd, length, BEGIN.size)
    if len(header) < length:
        raise NotARecord("cut")
    when = burned.rstrip(b"\0").decode("ascii", "replace")
    if not when.isprintable() or "\ufffd" in when:
        raise NotARecord("no date")
    return Begin(when, key, header, padded(BEGIN.size + length))


def padded(count: int) -> int:
    """Bytes that a piece of ``count`` takes in a file."""
    return -(-count // WORD) * WORD


def path_in(folder: Path, party: int) -> Path:
    """A party's file in the folder that is carried to it."""
    return folder / NAMES[party] / f"{NAMES[party]}.tape"


def sync(folder: Path) -> None:
    """Returns when the disk knows the names in ``folder``."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def material_key(key: bytes, label: str) -> bytes:
    """What a section is encrypted under: as short lived as the file's key, and no stream's."""
    return derive_key(key, f"material of {label}")
