"""What a party passes on to somebody who is no party: a value behind a pad that it does not know itself.

Owns how such words travel and what is made of them, for whom they are meant. It knows no engine and no kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Pad = Callable[[tuple[int, ...], int], Tensor]
"""Uniform words of a shape, of which so many low bits are used."""


@dataclass(frozen=True)
class Padded:
    """words: the value plus a pad, modulo 2^bits, int64 at who passes it on and ``None`` elsewhere. fraction: how many
    of the value's bits are behind the point; below zero, what it counts is 2^-fraction.
    """

    words: Tensor | None
    shape: tuple[int, ...]
    bits: int
    fraction: int

    @property
    def nbytes(self) -> int:
        """On its way: whole bytes a word."""
        return math.prod(self.shape) * -(-self.bits // 8)

    def packed(self) -> Tensor:
        """The words as uint8 [nbytes], the low byte first."""
        assert self.words is not None, "who passes words on has them"
        return self.words.contiguous().view(torch.uint8).view(-1, 8)[:, : -(-self.bits // 8)].reshape(-1)

    def value(self, data: Tensor, pad: Tensor) -> Tensor:
        """The value, float32, of words that came as ``packed``, behind this pad."""
        words = torch.zeros(math.prod(self.shape), 8, dtype=torch.uint8)
        words[:, : -(-self.bits // 8)] = data.view(len(words), -1)
        signed = (words.view(torch.int64).view(self.shape) - pad) << 64 - self.bits >> 64 - self.bits
        return signed.double().div(2.0**self.fraction).float()
