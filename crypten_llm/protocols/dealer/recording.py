"""At the dealer: material goes to the files of a tape, made before the parties meet.

Owns their writing: how large they will be, and that a folder gets its name only when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from msgspec.structs import replace

from crypten_llm import records
from crypten_llm.errors import OneTimeError, UsageError
from crypten_llm.links.signatures import Signer
from crypten_llm.links.transport import bytes_of
from crypten_llm.protocols.dealer.layout import (
    BEGIN,
    MAX_HEADER,
    WORD,
    Header,
    begin,
    material_key,
    padded,
    path_in,
    room_for,
    sync,
)
from crypten_llm.protocols.dealer.manifest import NAMES, PARTIES, Manifest
from crypten_llm.protocols.dealer.randomness import Cipher, fresh_key
from crypten_llm.units import size as for_people

if TYPE_CHECKING:
    from types import TracebackType

_NO_DIGEST = "0" * 64


class _Written:
    """What is written has no needs: it takes any program, at any pace."""

    unit = WORD

    def expect(self, verb: str, facts: dict, request: int) -> None:
        pass

    def flush(self, party: int) -> None:
        pass


class Sizes(_Written):
    """At a dealer that computes nothing (``counting``): how many bytes each section will take at each party."""

    def __init__(self) -> None:
        self.sections: dict[str, list[int]] = {}

    def begin(self, label: str) -> None:
        if label in self.sections:
            raise OneTimeError(f"section {label!r} is begun twice: it would use its masks twice")
        self._now = self.sections[label] = [0, 0]

    def add(self, party: int, count: int) -> None:
        self._now[party] += padded(count)

    def end(self) -> None:
        pass

    def total(self, party: int) -> int:
        return sum(sizes[party] for sizes in self.sections.values())


class _File:
    """One party's file while it is written."""

    def __init__(self, path: Path, header: Header, key: bytes) -> None:
        self.header, self._key, self._sections = header, key, dict(header.sections)
        self._length = room_for(header)
        if self._length > MAX_HEADER:
            raise UsageError(
                f"a tape of {len(self._sections):,} sections is too long; deal fewer requests or tokens at once"
            )
        path.parent.mkdir(0o700)
        self._file: Any = open(path, "xb", buffering=1 << 20)  # closed by ``close``
        os.fchmod(self._file.fileno(), 0o600)

    def reserve(self) -> None:
        """All the room that it will take: a full disk says so now."""
        start = padded(len(begin(b"", self._key, self._length)))
        os.posix_fallocate(self._file.fileno(), 0, start + self.header.size)
        self._file.seek(start)

    def begin(self, label: str) -> None:
        self._label, self._count, self._hash = label, 0, hashlib.sha256()
        self._cipher = Cipher(material_key(self._key, label))

    def write(self, data: torch.Tensor) -> int:
        """Returns how many bytes that took."""
        piece = torch.zeros(padded(data.numel()), dtype=torch.uint8)
        piece[: data.numel()] = data
        piece = self._cipher.apply(piece)
        self._hash.update(bytes_of(piece))
        self._file.write(bytes_of(piece))
        self._count += piece.numel()
        return piece.numel()

    def end(self) -> None:
        announced, _ = self._sections[self._label]
        if self._count != announced:
            raise OneTimeError(f"section {self._label!r}: {self._count} bytes were dealt, {announced} announced")
        self._sections[self._label] = announced, self._hash.hexdigest()

    def digest(self) -> str:
        self.header = replace(self.header, sections=self._sections)
        return self.header.digest(self._key)

    def finish(self, manifest: Manifest, signature: bytes) -> None:
        self._file.flush()
        header = replace(self.header, manifest=manifest, signature=signature.hex())
        os.pwrite(self._file.fileno(), begin(records.encode(header), self._key, self._length), 0)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.raw.close()  # what is still buffered goes with the folder


class Recording(_Written):
    """At a dealer that runs alone: material goes to a folder that gets its name when it is complete.

    Use as a context. Raises UsageError when the folder cannot be written; nothing is left behind then.
    """

    def __init__(
        self,
        out: Path,
        manifest: Manifest,
        sizes: Sizes,
        progress: Callable[[int], object] = lambda count: None,
        signer: Signer | None = None,
    ) -> None:
        """progress: called with the number of bytes of each piece. signer: a fresh key unless given."""
        self.out, self.manifest, self.sizes, self.progress = Path(out), manifest, sizes, progress
        self.signer = signer or Signer.fresh()
        self.keys = [fresh_key() for _ in PARTIES]
        self._files: list[_File] = []

    def __enter__(self) -> Self:
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
                self._files.append(_File(path_in(self._partial, party), self._header(party), self.keys[party]))
            for file in self._files:
                file.reserve()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def bytes(self, party: int) -> int:
        """Of a party's file, before it is written."""
        header = self._header(party)
        return padded(BEGIN.size + room_for(header)) + header.size

    def _header(self, party: int) -> Header:
        """Complete but for digests and signature."""
        blank = replace(self.manifest, signer=self.signer.public, files=dict.fromkeys(NAMES, _NO_DIGEST))
        sections = {label: (sizes[party], _NO_DIGEST) for label, sizes in self.sizes.sections.items()}
        return Header(blank, "", NAMES[party], sections)

    def begin(self, label: str) -> None:
        for file in self._files:
            file.begin(label)

    def write(self, party: int, data: torch.Tensor) -> None:
        self.progress(self._files[party].write(data.cpu()))

    def end(self) -> None:
        for file in self._files:
            file.end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        except OSError as failure:
            error = failure
            raise self._cannot_write(failure) from None
        finally:
            for file in self._files:
                file.close()
            if self._partial.exists():
                shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._cannot_write(error) from None

    def _finish(self) -> None:
        digests = {NAMES[party]: file.digest() for party, file in zip(PARTIES, self._files, strict=True)}
        self.manifest, signature = self.manifest.signed_by(self.signer, digests)
        for party, file in zip(PARTIES, self._files, strict=True):
            file.finish(self.manifest, signature)
            folder = path_in(self._partial, party).parent
            public = records.plain(self.manifest) | {"bytes": file.header.size}
            (folder / "manifest.json").write_text(json.dumps(public, indent=1) + "\n")
            sync(folder)
        os.rename(self._partial, self.out)
        sync(self.out.parent)

    def _cannot_write(self, error: OSError) -> UsageError:
        needed = for_people(sum(self.sizes.total(party) for party in PARTIES))
        return UsageError(
            f"cannot write a tape of {needed} to {self.out}: {error.strerror}; make room there or name another folder "
            "(--out). Nothing was left behind"
        )
