"""At the dealer: material goes to the files of a tape, made before the parties meet.

Owns their writing: how large they will be, and that a folder gets its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from crypten_llm.errors import UsageError
from crypten_llm.links.transport import bytes_of
from crypten_llm.protocols.dealer.manifest import NAMES, PARTIES, before_key, checksum, padded, sync
from crypten_llm.protocols.dealer.randomness import KEY_BYTES, fresh_key
from crypten_llm.units import size as for_people

if TYPE_CHECKING:
    from types import TracebackType


class _Written:
    """What is written has no needs: it takes any program, at any pace."""

    def expect(self, verb: str, facts: dict, request: int) -> None:
        pass

    def flush(self, party: int) -> None:
        pass


class Sizes(_Written):
    """At a dealer that computes nothing (``counting``): how many bytes each section will take at each party."""

    def __init__(self) -> None:
        self.sections: dict[str, list[int]] = {}

    def begin(self, label: str) -> None:
        assert label not in self.sections, f"section {label!r} is begun twice: it would use its masks twice"
        self._now = self.sections[label] = [0, 0]

    def add(self, party: int, count: int) -> None:
        self._now[party] += padded(count)

    def end(self) -> None:
        pass

    def total(self, party: int) -> int:
        return sum(sizes[party] for sizes in self.sections.values())


class Recording(_Written):
    """At a dealer that runs alone: material goes to a folder that gets its name when it is complete.

    Use as a context. Raises UsageError when the folder cannot be written; nothing is left behind then.
    """

    def __init__(
        self, out: Path, manifest: dict, sizes: Sizes, progress: Callable[[int], object] = lambda count: None
    ) -> None:
        """progress: called with the number of bytes of each piece."""
        self.out, self.manifest, self.sizes, self.progress = Path(out), manifest, sizes, progress
        self.keys = [fresh_key() for _ in PARTIES]
        self._files: list = []

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
                self._start(party)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _start(self, party: int) -> None:
        sections: dict[str, list] = {label: [0, sizes[party], "0" * 8] for label, sizes in self.sizes.sections.items()}
        key = checksum(self.keys[party])
        header = {**self.manifest, "party": NAMES[party], "burned": "", "key": key, "sections": sections}
        offset = padded(len(before_key(header)) + 16 * len(sections) + KEY_BYTES)
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
        rest = bytes(padded(size) - size)
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
            for file, *_ in self._files:
                file.raw.close()  # what is still buffered goes with the folder
            if self._partial.exists():
                shutil.rmtree(self._partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._cannot_write(error) from None

    def _finish(self) -> None:
        for (file, header, _), key in zip(self._files, self.keys, strict=True):
            file.flush()
            os.pwrite(file.fileno(), before_key(header) + key, 0)
            os.fsync(file.fileno())
        files = {f"{header['party']}.tape": _summary(header) for _, header, _ in self._files}
        text = json.dumps({**self.manifest, "files": files}, indent=1)
        (self._partial / "manifest.json").write_text(text + "\n")
        os.rename(self._partial, self.out)
        sync(self.out.parent)

    def _cannot_write(self, error: OSError) -> UsageError:
        needed = for_people(sum(self.sizes.total(party) for party in PARTIES))
        return UsageError(
            f"cannot write a tape of {needed} to {self.out}: {error.strerror}; make room there or name another folder "
            "(--out). Nothing was left behind"
        )


def _summary(header: dict) -> dict:
    """Size of the material, and a checksum of its sections' checksums."""
    sections = header["sections"].values()
    checksums = "".join(crc for _, _, crc in sections)
    return {"bytes": sum(size for _, size, _ in sections), "checksum": checksum(checksums.encode())}
