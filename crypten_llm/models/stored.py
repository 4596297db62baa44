"""A tensor of a checkpoint that has not been read yet, whatever kind of file holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Stored:
    """shape: as torch has it. kind: the number format's name in its file; known: whether it can be read as numbers.

    read: the tensor, of any float type.
    """

    shape: tuple[int, ...]
    kind: str
    known: bool
    read: Callable[[], torch.Tensor]
