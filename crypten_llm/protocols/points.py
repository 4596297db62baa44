"""Keys of a point: what a thin client sends in the place of a token id, so that two parties hold its one-hot vector.

Owns their making and their reading. Of a token the client makes two keys; each party expands its own to a bit an entry
of the vocabulary, and the xor of both is the one-hot vector, of which neither learns anything. A key is a seed of 16
bytes and *corrections*, which both keys have in common: a binary tree of seeds whose leaves are ``LEAF`` bits wide. Off
the path to the token both parties' nodes are alike, so that their bits cancel.

Boyle, Gilboa and Ishai, "Function Secret Sharing: Improvements and Extensions" (CCS 2016), Figure 1 with the early
termination of section 3.2.3, for shares by xor. The pseudo-random generator is SHAKE-128 of a seed: ``hashlib`` has it
everywhere, so that a thin client needs no kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crypten_llm.kernels import ring

SEED = 16  # bytes
LEAF = 512  # bits
NUMBER = 4  # bytes: which of the seeds that client and owner have in common a key begins with
_NODE, _LEAF = b"\x00", b"\x01"  # before a seed: what is made of it
_ZEROS = bytes(SEED)


def depth(vocabulary: int) -> int:
    """Levels of the tree."""
    return (-(-vocabulary // LEAF) - 1).bit_length()


def corrections_size(vocabulary: int) -> int:
    """Bytes of corrections: of each level a seed and two bits, and a leaf."""
    return (SEED + 1) * depth(vocabulary) + LEAF // 8


def make(token: int, vocabulary: int, first: bytes, second: bytes) -> bytes:
    """The corrections of the keys that begin with these seeds, the owner's first; each seed serves one token.

    Source: see above, algorithm Gen. Raises: ValueError for an id outside the vocabulary.
    """
    if not 0 <= token < vocabulary:
        raise ValueError(f"token id {token} is not in a vocabulary of {vocabulary}")
    seeds, controls, made = [first, second], [0, 1], bytearray()
    levels, leaf = depth(vocabulary), token // LEAF
    for level in range(levels):
        nodes = [_children(seed) for seed in seeds]
        keep = leaf >> (levels - 1 - level) & 1
        (_, flags), (_, others) = nodes
        lost = _xor(nodes[0][0][1 - keep], nodes[1][0][1 - keep])
        flips = [flags[side] ^ others[side] ^ (side == keep) for side in (0, 1)]  # the path's differ, the others agree
        made += lost + bytes([flips[0] | flips[1] << 1])
        for which, (children, its) in enumerate(nodes):
            seeds[which] = _xor(children[keep], lost if controls[which] else _ZEROS)
            controls[which] = its[keep] ^ (controls[which] & flips[keep])
    bits = _leaf(seeds[0]) ^ _leaf(seeds[1]) ^ 1 << token % LEAF
    return bytes(made + bits.to_bytes(LEAF // 8, "little"))


def read(seed: bytes, corrections: bytes, control: bool, vocabulary: int) -> bytes:
    """All leaves of a key, one behind the other; control: whether it is the second.

    Source: see above, algorithm EvalAll.
    """
    levels, leaves = depth(vocabulary), -(-vocabulary // LEAF)
    row = [(seed, int(control))]
    for level in range(levels):
        place = (SEED + 1) * level
        lost, flips = corrections[place : place + SEED], corrections[place + SEED]
        below = []
        for parent, its in row:
            children, flags = _children(parent)
            for side in (0, 1):
                below.append(
                    (_xor(children[side], lost), flags[side] ^ (flips >> side & 1))
                    if its
                    else (children[side], flags[side])
                )
        row = below[: -(-leaves >> (levels - 1 - level))]
    last = int.from_bytes(corrections[-LEAF // 8 :], "little")
    return b"".join((_leaf(parent) ^ (last if its else 0)).to_bytes(LEAF // 8, "little") for parent, its in row)


def bits(keys: Sequence[tuple[bytes, bytes]], control: bool, vocabulary: int) -> Tensor:
    """A party's part of one-hot vectors, words [count, V / 64 rounded up]; keys: seed and corrections of each."""
    words = ring.limbs(vocabulary)
    rows = bytearray(b"".join(read(*key, control, vocabulary)[: 8 * words] for key in keys))
    return torch.frombuffer(rows, dtype=torch.int64).view(len(keys), words)


def _children(seed: bytes) -> tuple[tuple[bytes, bytes], tuple[int, int]]:
    made = hashlib.shake_128(_NODE + seed).digest(2 * SEED + 1)
    return (made[:SEED], made[SEED : 2 * SEED]), (made[-1] & 1, made[-1] >> 1 & 1)


def _leaf(seed: bytes) -> int:
    return int.from_bytes(hashlib.shake_128(_LEAF + seed).digest(LEAF // 8), "little")


def _xor(x: bytes, y: bytes) -> bytes:
    return (int.from_bytes(x, "little") ^ int.from_bytes(y, "little")).to_bytes(SEED, "little")


@dataclass
class Points:
    """Tokens that neither party knows, at one role.

    size: bytes that one sends the other of each. part, sent: at who sends, its words [count, V / 64 rounded up], and
    bytes [count, size]. read: at the other, its own words from these bytes. The dealer has the size alone.
    """

    size: int
    part: Tensor | None = None
    sent: Tensor | None = None
    read: Callable[[Tensor], Tensor] | None = None
