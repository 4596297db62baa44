"""Every random bit that hides a secret: AES-256 in counter mode, keyed by the operating system.

Owns the streams. No other module draws a share or a mask, and ``torch.Generator`` is never used near a secret
(it is MT19937: predictable after 624 outputs). A stream's counter only moves forward, so no key stream byte is
ever used twice. AES comes from OpenSSL through ``cryptography``.
"""

import hashlib
import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
_CHUNK = 1 << 20
_ZEROS = bytes(_CHUNK)
_BUFFER = 1 << 16
_SMALL = 1 << 12  # draws up to here are cut from a buffer, to save calls into OpenSSL


def fresh_key() -> bytes:
    """A new 256-bit key from the operating system."""
    return os.urandom(KEY_BYTES)


def derive_key(key: bytes, label: str) -> bytes:
    """An independent key for another purpose: SHA-256(key, label)."""
    return hashlib.sha256(key + label.encode()).digest()


class Stream:
    """A key stream that two processes holding the same key read alike.

    Both must draw the same sizes in the same order. ``position`` is the number of bytes handed out so far.
    """

    device = torch.device("cpu")

    def __init__(self, key: bytes):
        if len(key) != KEY_BYTES:
            raise ValueError(f"a stream's key has {KEY_BYTES} bytes, not {len(key)}")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._small = np.empty(0, dtype=np.uint8)  # key stream kept for small draws
        self.position = 0

    def draw(self, count: int) -> np.ndarray:
        """``count`` uniform bytes, as a writable uint8 array that nothing else refers to."""
        self.position += count
        if count > _SMALL:
            return self._generate(count)
        if self._small.size < count:
            self._small = self._generate(_BUFFER)
        taken, self._small = self._small[:count], self._small[(count + 7) & ~7 :]  # words stay aligned
        return taken

    def _generate(self, count: int) -> np.ndarray:
        buffer = np.empty(count + 15, dtype=np.uint8)  # update_into wants room for one block more
        view = memoryview(buffer)
        for start in range(0, count, _CHUNK):
            size = min(_CHUNK, count - start)
            self._encryptor.update_into(memoryview(_ZEROS)[:size], view[start : start + size + 15])
        return buffer[:count]

    def ring(self, size) -> torch.Tensor:
        """Uniform elements of Z_2^64 of shape ``size``, as int64."""
        shape = _shape(size)
        raw = self.draw(8 * math.prod(shape))
        return torch.from_numpy(raw.view(np.int64)).view(shape)

    def bits(self, size, bitlength: int) -> torch.Tensor:
        """Uniform integers in [0, 2^bitlength) of shape ``size``, as int64; ``bitlength`` from 1 to 64."""
        if not 1 <= bitlength <= 64:
            raise ValueError(f"bitlength is 1 to 64, not {bitlength}")
        if bitlength == 64:
            return self.ring(size)
        return self.ring(size) & ((1 << bitlength) - 1)


def _shape(size) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)
