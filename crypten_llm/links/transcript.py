"""What has passed over a link, as digests that its two ends can compare.

Owns the chains. Each direction of a link has one: SHA-256 over its frames so far, header and payload, in their order.
Whoever sends and whoever receives come to the same digest, or have not seen the same. Signs of life and last words are
no part of it: the first come when a clock says so, and after the others nothing is compared.

SHA-256 and no other: many processors have instructions for it.
"""

import hashlib
from collections.abc import Sequence

from crypten_llm.records import Count, Digest, Record

Frame = Sequence[bytes | bytearray | memoryview]  # in pieces
COPIED = 1 << 16  # bytes of a frame that is kept until its turn, though others may write into its memory
KEPT = 1 << 20  # bytes in all


class Seen(Record, frozen=True):
    """One direction of a link so far: frames, their bytes with the headers, and SHA-256 of these."""

    frames: Count
    bytes: Count
    sha256: Digest


class Chain:
    """One direction of a link. For the thread that has this direction.

    What a thread that waits has time for is left to it: frames are kept until then (``catch_up``).
    """

    __slots__ = ("frames", "bytes", "_hash", "_kept", "_size")

    def __init__(self) -> None:
        self.frames = self.bytes = 0
        self._hash = hashlib.sha256()
        self._kept: list[Frame] = []
        self._size = 0  # of what is kept

    def add(self, frame: Frame, size: int, is_its_own: bool = False) -> None:
        """The next frame, of ``size`` bytes. is_its_own: whether nobody writes into its memory any more."""
        self.frames += 1
        self.bytes += size
        if is_its_own or size <= COPIED:
            self._kept.append(frame if is_its_own else (b"".join(frame),))
            self._size += size
            if self._size <= KEPT:
                return
            frame = ()
        self.catch_up()
        self._take(frame)

    def catch_up(self) -> None:
        """Takes in what is kept."""
        if self._kept:
            for frame in self._kept:
                self._take(frame)
            self._kept.clear()
            self._size = 0

    def _take(self, frame: Frame) -> None:
        for piece in frame:
            self._hash.update(piece)

    def seen(self) -> Seen:
        """All of it until now; the chain goes on."""
        self.catch_up()
        return Seen(self.frames, self.bytes, self._hash.hexdigest())
