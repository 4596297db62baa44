"""Memory of a GPU that a process on another GPU of the same host writes to: messages that no processor touches.

Owns what a party has of its own mailbox and of the other's, and what has gone wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crypten_llm.kernels.cuda_choice import triton
from crypten_llm.kernels.opened import OpenedMemory, Waiting


class Mailbox:
    """One's own mailbox and the other party's. waiting: of this party's kernels.

    handle: opens one's own to the other process. Methods raise RuntimeError where CUDA does.
    """

    def __init__(self, device: torch.device, waiting: Waiting) -> None:
        self._kernels = triton("triton_mailbox")
        self._memory = OpenedMemory(device, self._kernels.BYTES)
        self.handle, self._waiting = self._memory.handle, waiting
        self._epoch = torch.zeros(1, dtype=torch.int64, device=device)
        self._nothing = torch.empty(0, dtype=torch.uint8, device=device)

    def open(self, handle: bytes) -> None:
        """The mailbox that this handle opens."""
        self._addresses = self._memory.open(handle)

    def swap(self, message: Tensor, count: int, step: int) -> Tensor:
        """Sends uint8 ``message``; returns the other's, ``count`` bytes. step: how many were swapped since ``advance``.

        Raises ValueError for one that is too long. What never came is said by ``Waiting.failed``.
        """
        if max(message.numel(), count) > self._kernels.SLOT:
            raise ValueError(f"{max(message.numel(), count):,} bytes do not fit a mailbox of {self._kernels.SLOT:,}")
        given = message if message.numel() else self._nothing
        waiting = self._waiting
        return self._kernels.swap(given, count, self._addresses, self._epoch, step, waiting.failures, waiting.polls)

    def advance(self, count: int) -> None:
        """Behind as many messages."""
        self._epoch += count
