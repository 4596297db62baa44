"""CUDA graphs: kernels that were launched once, in their order, and are launched again all at once.

Owns captures of one device. What is captured runs only when it is replayed, on the addresses that it was captured with:
whoever replays it has put there what is to be computed on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

ROOM = 4 << 20  # bytes of the processor's memory for what leaves captured programs, at least


class Graphs:
    """Captures that share memory: they are to be replayed in the order in which they were captured."""

    def __init__(self, device: torch.device) -> None:
        self._stream, self._pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._device = device
        self._room = torch.empty(0, dtype=torch.uint8)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """On a stream of their own, behind all that was launched before and ahead of all that will be."""
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        with torch.cuda.stream(self._stream):
            yield
        outside.wait_stream(self._stream)

    def begin(self) -> None:
        """What is launched from now on is captured. Nothing may wait for the device until ``end``."""
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        """Returns what launches all that was captured since ``begin``."""
        assert self._graph is not None, "a capture ends after it began"
        graph, self._graph = self._graph, None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # between two messages there may be nothing
            graph.capture_end()
        return graph.replay

    # What travels: pinned memory of the processor, from and to which captured kernels copy.

    def has_room(self, count: int) -> bool:
        """Whether as many bytes may be ``sent``."""
        return self._room.numel() >= count

    def make_room(self, count: int) -> None:
        """For so many bytes; not while anything is captured."""
        self._room = torch.empty(max(ROOM, count), dtype=torch.uint8, pin_memory=True)

    def sent(self, message: Tensor) -> Tensor:
        """Bytes of the device where the processor will find them, once they were launched and waited for."""
        here, self._room = self._room.split([message.numel(), self._room.numel() - message.numel()])
        return here.copy_(message, non_blocking=True)

    def arrived(self, message: Tensor) -> Tensor:
        """Pinned bytes of the processor on the device, copied again at each launch."""
        if not message.numel():
            return torch.empty(0, dtype=torch.uint8, device=self._device)
        return message.to(self._device, non_blocking=True)

    def wait(self) -> None:
        """Until all that was launched is done."""
        torch.cuda.current_stream().synchronize()

    def abandon(self) -> None:
        """After an error: the device is as if nothing had been captured."""
        if self._graph is not None:
            graph, self._graph = self._graph, None
            try:
                graph.capture_end()
            except RuntimeError:  # it is what ended the capture
                pass
