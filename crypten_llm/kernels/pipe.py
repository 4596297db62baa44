"""A pipe from one GPU of a host to another: bytes are written into the reader's memory, and read in their order.

Owns both ends: where each is, and that neither passes the other by more than there is room for. Nobody waits on a
processor: what is written and read is launched, and the device's own kernels wait for the other side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crypten_llm.kernels.cuda_choice import triton
from crypten_llm.kernels.opened import OpenedMemory, Waiting

PIECES = 8  # that the room is written and given back in, at least


class _End:
    """handle: opens this end's memory to the other process."""

    def __init__(self, device: torch.device, waiting: Waiting, room: bool) -> None:
        self._kernels, self._waiting = triton("triton_pipe"), waiting
        self._memory = OpenedMemory(device, self._kernels.HEADER + room * self._kernels.ROOM)
        self.handle, self.unit = self._memory.handle, int(self._kernels.WORD)
        self._piece = self._kernels.ROOM // self._kernels.WORD // PIECES
        self._position = 0  # words behind which this end is
        self._known = 0  # words up to which this end may go, as it knows

    def open(self, handle: bytes) -> None:
        """The other end's memory."""
        self._addresses = self._memory.open(handle)

    def _wait(self, due: int) -> None:
        """For the other side to be at ``due`` words, on the device."""
        self._kernels.wait(self._addresses, self._waiting.failures, due, self._waiting.polls)


class Inlet(_End):
    """Where bytes are written."""

    def __init__(self, device: torch.device, waiting: Waiting) -> None:
        super().__init__(device, waiting, room=False)

    def write(self, data: Tensor) -> None:
        """uint8, of whole units, contiguous, and aligned to one. The reader is told."""
        for words in data.view(torch.int64).split(self._piece):
            start, self._position = self._position, self._position + words.numel()
            if self._position > self._known + PIECES * self._piece:
                self._known = self._position - PIECES * self._piece
                self._wait(self._known)
            self._kernels.write(words, self._addresses, start)
            self._kernels.tell(self._addresses, self._position)


class Outlet(_End):
    """Where they are read."""

    def __init__(self, device: torch.device, waiting: Waiting) -> None:
        super().__init__(device, waiting, room=True)
        self._told = 0

    def read(self, count: int) -> Tensor:
        """The next ``count`` bytes and those that fill their last unit: uint8, in memory of their own."""
        words, pieces = -(-count // self.unit), list[Tensor]()
        while words or not pieces:
            size = min(words, self._piece)
            words -= size
            start, self._position = self._position, self._position + size
            self._wait(self._position)
            pieces.append(self._kernels.read(size, self._addresses, start))
            if self._position - self._told >= self._piece:
                self._tell()
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(torch.uint8)[:count]

    def _tell(self) -> None:
        """The writer how far has been read."""
        self._told = self._position
        self._kernels.tell(self._addresses, self._told)
