"""A debug mode: masks that may never hide two things.

Owns the check, for tests and for the wary. A mask is safe once: two openings under the same mask show the difference
of what they hide. An audited runtime computes and sends the same, and refuses, with the step's name:

- to give a stretch of a stream again, whatever led back to it: a section begun twice under one label, two labels
  with one key, a stream that was rebuilt;
- a mask whose words were handed out before, wherever they came from;
- an opening that is not hidden by a mask of its own: the whole of one, as it was drawn, uniform over the ring that is
  opened, in the same section, and for nothing before. It may have been drawn long before its message.

It sees masks and messages, not what is computed between: that the mask is added is for the tests of ``opening`` to
show. What one party sends as it is has no mask here; ``protocols.products`` says what hides it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from crypten_llm.errors import CryptenLLMError
from crypten_llm.kernels import ring
from crypten_llm.links.transport import bytes_of
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.dealer.randomness import Stream, derive_key
from crypten_llm.roles import DEALER

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport
    from crypten_llm.protocols.dealer.runtime import Parts, Piece, Runtime


TELLING = 96  # bits of a mask from which equal words are no coincidence


class MaskReused(CryptenLLMError, AssertionError):
    """Randomness that was already used, or that nobody drew, was about to hide something else."""


class Drawn(NamedTuple):
    """A mask that hides nothing yet: the tensor, which is kept so that its memory is no other mask's, uniform modulo
    ``modulus``; ``digest`` of its words as they were drawn; and ``where`` that was.
    """

    mask: torch.Tensor
    modulus: int
    digest: bytes
    where: str


@dataclass
class Audit:
    """What one role has drawn and sent behind masks.

    read: by stream key, bytes read. masks: by digest of a row of words, which draw it was and where. waiting: masks of
    the section that no message has used yet, by where they are in memory. draws, words: masks handed out, and their
    words. messages: those of openings that were sent. unused: masks that hid nothing when their section ended.
    """

    read: dict[bytes, int] = field(default_factory=dict, repr=False)
    masks: dict[bytes, tuple[int, str]] = field(default_factory=dict, repr=False)
    waiting: dict[int, Drawn] = field(default_factory=dict, repr=False)
    draws: int = 0
    words: int = 0
    messages: int = 0
    unused: int = 0

    def draw(self, mask: torch.Tensor, modulus: int, where: str) -> None:
        """Notes a mask, uniform modulo ``modulus``, that was handed out; raises MaskReused when it was before."""
        self.draws += 1
        self.words += mask.numel()
        for row in _rows(mask, (modulus - 1).bit_length()):
            drawn, before = self.masks.setdefault(_digest(row), (self.draws, where))
            if drawn != self.draws:
                raise MaskReused(f"a mask in {where!r} is the one that hid a value in {before!r}; draw a fresh one")

    def keep(self, mask: torch.Tensor, modulus: int, where: str) -> None:
        """``draw`` of a mask that will hide an opening."""
        self.draw(mask, modulus, where)
        if mask.numel():
            self.waiting[mask.data_ptr()] = Drawn(mask, modulus, _digest(bytes_of(mask)), where)

    def send(self, pieces: list[Piece], where: str) -> None:
        """Notes a message of openings; raises MaskReused where one is not hidden by a mask of its own."""
        self.messages += 1
        for piece in pieces:
            reason = self._use(piece)
            if reason:
                count, modulus = math.prod(piece.shape), piece.modulus or 1 << piece.bits
                raise MaskReused(
                    f"an opening of {count} numbers modulo {_named(modulus)} in {where!r} {reason}; draw one mask for "
                    "each number that is opened, each time it is opened"
                )

    def _use(self, piece: Piece) -> str:
        """Spends the mask of an opening; returns why it may not."""
        if not math.prod(piece.shape):
            return ""
        assert piece.mask is not None, "an opening comes with its mask"
        drawn = self.waiting.pop(piece.mask.data_ptr(), None)
        if drawn is None:
            return "is hidden by what was not drawn as a mask, or has hidden something before"
        words = math.prod(piece.shape) * ring.limbs(piece.bits)
        if not drawn.mask.numel() == piece.mask.numel() == words or not piece.mask.is_contiguous():
            return f"is hidden by {piece.mask.numel()} words, of a mask of {drawn.mask.numel()} of {drawn.where!r}"
        if drawn.modulus != (piece.modulus or 1 << piece.bits):
            return f"is hidden by a mask modulo {_named(drawn.modulus)} of {drawn.where!r}"
        if drawn.digest != _digest(bytes_of(drawn.mask)):
            return f"is hidden by a mask that was changed since it was drawn in {drawn.where!r}"
        return ""

    def end(self) -> None:
        """Forgets the section's masks that hid nothing: they may not hide what comes later."""
        self.unused += len(self.waiting)
        self.waiting.clear()

    def to_dict(self) -> dict:
        read = sum(self.read.values())
        counts = {"masks": self.draws, "words": self.words, "unused": self.unused, "messages": self.messages}
        return {"streams": len(self.read), "stream_bytes": read, **counts}


def _digest(row: memoryview) -> bytes:
    return hashlib.blake2b(row, digest_size=12).digest()


def _named(modulus: int) -> str:
    """A number as its power of two where it is one or just below one."""
    bits = modulus.bit_length()
    return {1 << bits - 1: f"2^{bits - 1}", (1 << bits) - 1: f"2^{bits} - 1"}.get(modulus, str(modulus))


def _rows(mask: torch.Tensor, bits: int) -> Iterator[memoryview]:
    """Bytes of each row that is long enough to tell, or of the whole mask. bits: of a number, which may be limbs."""
    width = mask.shape[-1] if mask.dim() else 1
    told = width * bits // ring.limbs(bits)
    rows = mask.reshape(-1, width) if told >= TELLING and mask.numel() else mask.reshape(1, -1)
    if rows.shape[-1] * bits // ring.limbs(bits) >= TELLING:
        memory = bytes_of(rows.contiguous())
        size = len(memory) // len(rows)
        yield from (memory[start : start + size] for start in range(0, len(memory), size))


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
            return self._drawn(super().mask(shape, bits), 1 << bits)

        def mask_ones(self, shape: Sequence[int], bits: int) -> Parts:
            return self._drawn(super().mask_ones(shape, bits), (1 << bits) - 1)

        def mask_below(self, shape: Sequence[int], modulus: int) -> Parts:
            return self._drawn(super().mask_below(shape, modulus), modulus)

        def _drawn(self, mask: Parts, modulus: int) -> Parts:
            if not mask.held.is_meta:
                note = self.audit.draw if self.role == DEALER else self.audit.keep
                note(mask.held, modulus, self._where())
            return mask

        def mask_of(self, party: int, shape: Sequence[int]) -> torch.Tensor | None:
            mask = super().mask_of(party, shape)
            if mask is not None and not mask.is_meta:
                self.audit.draw(mask, 1 << 64, self._where())  # it hides what is sent to one party, not an opening
            return mask

        def exchange(self, pieces: list[Piece]) -> list[torch.Tensor | None]:
            opened = [piece for piece in pieces if piece.sender is None]
            if opened and self.role != DEALER:
                self.audit.send(opened, self._where())
            return super().exchange(pieces)

        def end(self) -> None:
            self.audit.end()
            super().end()

        def _where(self) -> str:
            return f"{self.section}, {self.transport.meter.where}"

    return Audited


def audit(transport: Transport) -> Any:
    """An audited runtime over ``transport``, for a live dealer's run."""
    return audited(roles.ROLES[transport.rank])(transport, roles.agree_on_keys(transport))
