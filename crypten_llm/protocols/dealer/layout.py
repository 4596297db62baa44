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
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from crypten_llm.links.signatures import LONGEST
from crypten_llm.protocols.dealer.manifest import NAMES, Manifest, Party
from crypten_llm.protocols.dealer.randomness import KEY_BYTES, derive_key
from crypten_llm.records import Count, Digest, Malformed, Record, Word, encode

MAGIC = b"crypten-llm-tape"
BEGIN = struct.Struct(f"<16s24sQ{KEY_BYTES}s")  # MAGIC, when it was burned, the header's length, the key
UNUSED = bytes(24)  # in the place of when it was burned
WORD = 8
MAX_HEADER = 4 << 20
Size = Annotated[Count, Meta(multiple_of=WORD)]


class NotATape(Exception):
    """A file that does not begin like a tape."""


class Header(Record, frozen=True):
    """signature: of the manifest, in hex. party: whose file it is. sections: by label, in order, bytes and SHA-256 of
    what the file holds.
    """

    manifest: Manifest
    signature: Annotated[str, Meta(max_length=2 * LONGEST, pattern="^([0-9a-f]{2})*$")]
    party: Party
    sections: dict[Word, tuple[Size, Digest]]

    @property
    def is_signed(self) -> bool:
        return self.manifest.is_signed(bytes.fromhex(self.signature))

    def digest(self, key: bytes) -> str:
        """Of a whole file with this header and key."""
        what = [self.party, hashlib.sha256(key).hexdigest(), [[label, *s] for label, s in self.sections.items()]]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all sections."""
        return sum(size for size, _ in self.sections.values())


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
    return len(encode(header)) + 2 * LONGEST


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
    """Raises NotATape, and Malformed for what begins like one."""
    first = os.pread(fd, BEGIN.size, 0)
    if not first.startswith(MAGIC):
        raise NotATape
    if len(first) < BEGIN.size:
        raise Malformed("cut")
    _, burned, length, key = BEGIN.unpack(first)
    if length > MAX_HEADER:
        raise Malformed("a header beyond its cap")
    header = os.pread(fd, length, BEGIN.size)
    if len(header) < length:
        raise Malformed("cut")
    when = burned.rstrip(b"\0").decode("ascii", "replace")
    if not when.isprintable() or "\ufffd" in when:
        raise Malformed("no date")
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
