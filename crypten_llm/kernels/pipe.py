"""A pipe from one GPU of a host to another: bytes are written into the reader's memory, and read in their order.

Owns both ends: where each is, and that neither passes the other. What is read is launched, and kernels wait for it on
the reader's card; the writer, who may be far ahead, waits for room on its processor, so that no card spins meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from crypten_llm.kernels.cuda_choice import triton
from crypten_llm.kernels.opened import OpenedMemory, Waiting

PIECES = 8  # that the room is written and given back in, at least


class _End:
    """handle: opens this end's memory to the other process. unit: bytes of which there is always a whole number."""

    def __init__(self, device: torch.device, room: bool) -> None:
        self._kernels = triton("triton_pipe")
        self._memory = OpenedMemory(device, self._kernels.HEADER + room * self._kernels.ROOM)
        self.handle, self.unit = self._memory.handle, int(self._kernels.WORD)
        self._piece = self._kernels.ROOM // self._kernels.WORD // PIECES
        self._position = 0  # words behind which this end is

    def open(self, handle: bytes) -> None:
        """The other end's memory."""
        self._addresses = self._memory.open(handle)


class Inlet(_End):
    """Where bytes are written. pause: called again and again while there is no room, with the seconds since the reader
    last went on.
    """

    def __init__(self, device: torch.device, pause: Callable[[float], None]) -> None:
        super().__init__(device, room=False)
        self._pause, self._read = pause, 0

    def write(self, data: Tensor) -> None:
        """uint8, of whole units, contiguous, and aligned to one. The reader is told."""
        for words in data.view(torch.int64).split(self._piece):
            start, self._position = self._position, self._position + words.numel()
            self._wait(self._position - PIECES * self._piece)
            self._kernels.write(words, self._addresses, start)
            self._kernels.tell(self._addresses, self._position)

    def _wait(self, due: int) -> None:
        """Until the reader is at ``due`` words."""
        went_on = time.perf_counter()
        while self._read < due:
            read = self._memory.word()
            if read == self._read:
                self._pause(time.perf_counter() - went_on)
            else:
                self._read, went_on = read, time.perf_counter()


class Outlet(_End):
    """Where they are read. waiting: of this process's kernels."""

    def __init__(self, device: torch.device, waiting: Waiting) -> None:
        super().__init__(device, room=True)
        self._waiting, self._told = waiting, 0

    def read(self, count: int) -> Tensor:
        """The next ``count`` bytes and those that fill their last unit: uint8, in memory of their own."""
        words, pieces = -(-count // self.unit), list[Tensor]()
        while words or not pieces:
            size = min(words, self._piece)
            words -= size
            start, self._position = self._position, self._position + size
            self._kernels.wait(self._addresses, self._waiting.failures, self._position, self._waiting.polls)
            pieces.append(self._kernels.read(size, self._addresses, start))
            if self._position - self._told >= self._piece:
                self._tell()
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).view(torch.uint8)[:count]

    def _tell(self) -> None:
        """The writer how far has been read."""
        self._told = self._position
        self._kernels.tell(self._addresses, self._told)
