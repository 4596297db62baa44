"""A debug mode: masks that may never hide two things.

Owns the check, for tests and for the wary. A mask is safe once: two openings under the same mask show the difference
of what they hide. An audited runtime computes and sends the same, and refuses, with the step's name:

- to give a stretch of a stream again, whatever led back to it: a section begun twice under one label, two labels
  with one key, a stream that was rebuilt;
- a mask whose words were handed out before, wherever they came from;
- a message of openings that is not covered, byte for byte, by masks drawn for it and used for nothing else.

It sees masks and messages, not what is computed between: that the mask drawn is the one that is added is for the tests
of ``opening`` to show.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.errors import CryptenLLMError
from crypten_llm.kernels import ring
from crypten_llm.links.transport import bytes_of
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.dealer.randomness import Stream, derive_key
from crypten_llm.roles import DEALER

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport
    from crypten_llm.protocols.dealer.roles import Parts, Piece, Runtime


TELLING = 96  # bits of a mask from which equal words are no coincidence


class MaskReused(CryptenLLMError, AssertionError):
    """Randomness that was already used was about to hide something else."""


@dataclass
class Audit:
    """What one role has drawn and sent behind masks.

    read: by stream key, bytes read. masks: by digest of a row of words, which draw it was and where. pending:
    (elements, bits) of the masks that no message has used yet, in order. draws, words: masks handed out, and their
    words. messages: openings that were sent.
    """

    read: dict[bytes, int] = field(default_factory=dict, repr=False)
    masks: dict[bytes, tuple[int, str]] = field(default_factory=dict, repr=False)
    pending: list[tuple[int, int]] = field(default_factory=list, repr=False)
    draws: int = 0
    words: int = 0
    messages: int = 0

    def draw(self, mask: torch.Tensor, bits: int, where: str) -> None:
        """Notes a mask of ``bits`` a word that was handed out; raises MaskReused when it was before."""
        self.draws += 1
        self.words += mask.numel()
        self.pending.append((mask.numel(), bits))
        for row in _rows(mask, bits):
            digest = hashlib.blake2b(row, digest_size=12).digest()
            drawn, before = self.masks.setdefault(digest, (self.draws, where))
            if drawn != self.draws:
                raise MaskReused(f"a mask in {where!r} is the one that hid a value in {before!r}; draw a fresh one")

    def send(self, size: int, where: str) -> None:
        """Notes a message of ``size`` bytes; raises MaskReused when the last masks do not cover it."""
        self.messages += 1
        covered, masks = 0, self.pending
        while masks and covered < size:
            covered += ring.packed_size(*masks.pop())
        self.pending = []
        if covered != size:
            raise MaskReused(
                f"a message of {size} bytes in {where!r} has {covered} bytes of fresh masks; draw one mask for each "
                "word that is opened, each time it is opened"
            )

    def to_dict(self) -> dict:
        read = sum(self.read.values())
        counts = {"masks": self.draws, "words": self.words, "messages": self.messages}
        return {"streams": len(self.read), "stream_bytes": read, **counts}


def _rows(mask: torch.Tensor, bits: int) -> Iterator[memoryview]:
    """Bytes of each row that is long enough to tell, or of the whole mask."""
    width = mask.shape[-1] if mask.dim() else 1
    rows = mask.reshape(-1, width) if width * bits >= TELLING and mask.numel() else mask.reshape(1, -1)
    if rows.shape[-1] * bits >= TELLING:
        yield from (bytes_of(row) for row in rows.contiguous())


class _Watched(Stream):
    """A stream that notes how far its key has been read, and refuses to read there again."""

    def __init__(self, key: bytes, label: str, read: dict[bytes, int]) -> None:
        super().__init__(key)
        self._key, self._label, self._read = key, label, read

    def words(self, count: int) -> torch.Tensor:
        done = self._read.get(self._key, 0)
        if self.position < done:
            raise MaskReused(
                f"bytes {self.position} to {self.position + 8 * count} of the stream of section {self._label!r} were "
                f"used before (it was read up to {done}): give every section its own label"
            )
        self._read[self._key] = self.position + 8 * count
        return super().words(count)


def audited(runtime_class: type[Runtime]) -> type[Any]:
    """``runtime_class`` that refuses to reuse a mask; it computes and sends the same. ``audit`` holds what it saw."""

    class Audited(runtime_class):  # type: ignore[valid-type, misc]  # a checker wants classes that it can see
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.audit = Audit()
            super().__init__(*arguments, **options)

        def _stream(self, key: bytes, label: str) -> Stream:
            return _Watched(derive_key(key, label), label, self.audit.read)

        def mask(self, shape: Sequence[int], bits: int = 64) -> Parts:
            mask = super().mask(shape, bits)
            if not mask.held.is_meta:
                self.audit.draw(mask.held, bits, self._where())
            return mask

        def mask_of(self, party: int, shape: Sequence[int]) -> torch.Tensor | None:
            mask = super().mask_of(party, shape)
            if mask is not None and not mask.is_meta:
                self.audit.draw(mask, 64, self._where())
                self.audit.pending.pop()  # it hides what is sent to one party, not an opening
            return mask

        def exchange(self, pieces: list[Piece]) -> list[torch.Tensor | None]:
            opened = [piece.size for piece in pieces if piece.sender is None]
            if opened and self.role != DEALER:
                self.audit.send(sum(opened), self._where())
            return super().exchange(pieces)

        def _where(self) -> str:
            return f"{self.section}, {self.transport.meter.where}"

    return Audited


def audit(transport: Transport) -> Any:
    """An audited runtime over ``transport``, for a live dealer's run."""
    return audited(roles.ROLES[transport.rank])(transport, roles.agree_on_keys(transport))
