"""The masks of an owner's weights that outlive its sessions: what a stock is dealt for.

Owns the key that they are expanded from, and the rule that makes it safe. What is dealt for a request depends on the
masks of the weights, which a session without a stock draws anew. With one they come from a key that the owner keeps
beside its halves, and tells its dealers: the owner knows the weights, and a dealer all masks. A mask hides one value.
So the key is bound to what decides the words that it hides: the weights' digest, the configuration and the norms'
scales, the engine's settings, and the program that rounds them. The client is sent the same words then in every
session, and whatever changes any of this makes another key, with which blocks that were dealt before have no use.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from crypten_llm import files, records
from crypten_llm.errors import UsageError
from crypten_llm.precisions import PRECISIONS
from crypten_llm.protocols.dealer.layout import sync
from crypten_llm.protocols.dealer.randomness import fresh_key
from crypten_llm.records import Digest, Malformed, Record, Word, decode

FILE = "series.json"
LARGEST = 1 << 20  # bytes of it
Precision = Annotated[str, Meta(pattern=f"^({'|'.join(PRECISIONS)})$")]
Key = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class Series(Record, frozen=True):
    """key: of the weights' masks, in hex. bound: digest of what they hide. config: of the model, public. reveal,
    precision: of the session, on which the engine's settings depend.
    """

    key: Key
    bound: Digest
    config: dict[str, Any]
    reveal: Word
    precision: Precision

    @property
    def name(self) -> str:
        """By which all parties call it."""
        return hashlib.sha256(b"crypten-llm series " + self.masks).hexdigest()[:16]

    @property
    def masks(self) -> bytes:
        return bytes.fromhex(self.key)


def read(folder: Path) -> Series | None:
    """The one in use, if there is one. Raises UsageError for a file that is none."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        found: Series = decode(files.read(str(path), LARGEST), Series)
        return found
    except Malformed:
        raise UsageError(f"{path} is damaged; remove it, and the blocks of this stock with it") from None


def of_weights(folder: Path, weights: bytes, config: dict, reveal: str, precision: str, facts: dict) -> Series:
    """At the owner: the series of these weights, the one of earlier sessions if nothing has changed, or a new one.

    weights: their digest. facts: all else that decides which words are hidden.
    """
    told = {"weights": weights.hex(), "config": config, "reveal": reveal, "precision": precision, **facts}
    bound = hashlib.sha256(records.encode(records.in_order(told))).hexdigest()
    known = read(folder)
    if known is not None and known.bound == bound:
        return known
    made = Series(fresh_key().hex(), bound, config, reveal, precision)
    new = folder / f".{FILE}.{os.getpid()}"
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(records.encode(made))
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, folder / FILE)
        sync(folder)
    except OSError as error:
        raise UsageError(f"--stock: cannot write {folder / FILE} ({error.strerror}); make it writable") from None
    return made
