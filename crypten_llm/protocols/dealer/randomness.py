"""Every random bit that hides a secret: ChaCha20 with keys of 256 bits from the operating system.

Owns the streams. No other module draws a share or a mask, and ``torch.Generator`` is never used near a secret
(it is MT19937: predictable after 624 outputs). A stream's counter of 64 bits only moves forward, so no key stream byte
is ever used twice; in a child of the process that made it, it draws nothing more. The bytes come from the kernels of
the stream's device.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from crypten_llm.errors import OneTimeError
from crypten_llm.kernels import ring
from crypten_llm.process import Owned

KEY_BYTES = 32
_BUFFER = 1 << 13  # words
_SMALL = 1 << 9  # words: draws up to here are cut from a buffer, to save calls of the kernel


def fresh_key() -> bytes:
    """A new 256-bit key from the operating system."""
    return os.urandom(KEY_BYTES)


def derive_key(key: bytes, label: str) -> bytes:
    """An independent key for another purpose: SHA-256(key, label)."""
    return hashlib.sha256(key + label.encode()).digest()


@dataclass(frozen=True)
class Mark:
    """Where a stream is behind a program whose kernels were captured. bytes: where these read their key."""

    bytes: Any
    place: int
    kept: torch.Tensor
    used: int
    position: int


class Stream:
    """A key stream that two processes holding the same key read alike, as tensors on ``device``.

    Both must draw the same sizes in the same order. Everything is cut from ``words``; ``position`` is the number
    of bytes taken so far.

    Raises OneTimeError at every draw after a fork, in the child.
    """

    def __init__(self, key: bytes, device: torch.device | str = "cpu") -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a stream's key has {KEY_BYTES} bytes, not {len(key)}")
        self.device = torch.device(device)
        self._bytes: Any = ring.on(device).KeyStream(key)  # of a device with graphs, one that can lend its key
        self._kept = torch.empty(0, dtype=torch.int64, device=self.device)  # words of key stream for small draws
        self._used = 0  # of those
        self._owned = Owned()
        self.position = 0

    def words(self, count: int) -> torch.Tensor:
        """The next ``count`` uniform words, int64 [count], writable, in memory that nothing else refers to."""
        self._owned.check("a stream of masks")
        self.position += 8 * count
        if count > _SMALL:
            return self._bytes.fill(8 * count).view(torch.int64)
        if self._kept.numel() - self._used < count:
            self._kept, self._used = self._bytes.fill(8 * _BUFFER).view(torch.int64), 0
        start, self._used = self._used, self._used + count
        return self._kept[start : self._used]

    # Of programs whose kernels were captured (``captured``): they draw what they drew then, under the key that is lent.

    def mark(self) -> Mark:
        """Where it is, for streams with which the captured kernels run again."""
        return Mark(self._bytes, self._bytes.place, self._kept, self._used, self.position)

    def lend_key(self, mark: Mark) -> None:
        """To the captured kernels, which are about to run. Raises OneTimeError where anything was drawn before."""
        self._owned.check("a stream of masks")
        if self.position:
            raise OneTimeError("captured kernels draw from the beginning of a section, of which some is drawn already")
        mark.bytes.take_key(self._bytes)

    def go_on(self, mark: Mark) -> None:
        """Behind what the captured kernels have drawn."""
        self._bytes.place, self.position = mark.place, mark.position
        self._kept, self._used = mark.kept.clone(), mark.used

    def draw(self, count: int) -> torch.Tensor:
        """``count`` uniform bytes, uint8; whole words are taken for them."""
        return self.words((count + 7) // 8).view(torch.uint8)[:count]

    def ring(self, size: Sequence[int] | int, bits: int = 64) -> torch.Tensor:
        """Uniform elements of Z_2^bits of shape ``size``, as int64, non-negative below 64 bits; above, as limbs."""
        shape = (size,) if isinstance(size, int) else size
        if bits <= 64:
            return ring.low_bits(self.words(math.prod(shape)).view(shape), bits)
        limbs = ring.limbs(bits)
        drawn = self.words(math.prod(shape) * limbs).view(*shape, limbs)
        if bits % 64:
            drawn[..., -1].bitwise_and_((1 << (bits % 64)) - 1)
        return drawn

    def below(self, size: Sequence[int] | int, modulus: int) -> torch.Tensor:
        """Integers in [0, modulus) of shape ``size``, as int64: 63 bits modulo a small number, so that one is likelier
        than another by less than modulus / 2^63.
        """
        return self.ring(size, 63) % modulus

    def bits(self, size: Sequence[int] | int, bitlength: int) -> torch.Tensor:
        """``ring`` with its bounds checked: ``bitlength`` from 1 to 64."""
        if not 1 <= bitlength <= 64:
            raise ValueError(f"bitlength is 1 to 64, not {bitlength}")
        return self.ring(size, bitlength)

    def table(self, size: Sequence[int] | int, bits: int) -> torch.Tensor:
        """Uniform words of 8, 16, 32 or 64 bits of shape ``size``, held as ``kernels.ring.TABLE_WORDS`` says."""
        shape = (size,) if isinstance(size, int) else tuple(size)
        return self.draw(math.prod(shape) * bits // 8).view(ring.TABLE_WORDS[bits]).view(shape)


class Cipher:
    """Encrypts and decrypts what lies on a disk: bytes in their order, however they are cut."""

    def __init__(self, key: bytes) -> None:
        self._bytes = ring.on("cpu").KeyStream(key)

    def apply(self, data: torch.Tensor) -> torch.Tensor:
        """The next bytes, uint8, in memory of their own."""
        return self._bytes.fill(data.numel(), data)
