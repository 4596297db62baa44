"""Memory of a GPU that a process on another GPU of the same host writes to: messages that no processor touches.

Owns that memory, which holds nothing but messages, how the other process comes to it, and what has gone wrong. It is
allocated by itself: a handle opens all of an allocation to whoever has it, so none of torch's may be handed out.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache

import torch
from torch import Tensor

from crypten_llm.kernels.cuda_choice import triton

HANDLE_BYTES = 64
POLLS_A_SECOND = 1_000_000  # at least so many
_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


@cache
def _runtime() -> ctypes.CDLL:
    """CUDA's runtime, which torch has loaded."""
    return ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")


def _call(name: str, *arguments: object) -> None:
    if code := getattr(_runtime(), name)(*arguments):
        describe = _runtime().cudaGetErrorString
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"{name}: {describe(code).decode()}")


def _free(mine: ctypes.c_void_p, theirs: ctypes.c_void_p) -> None:
    """Lets both go. What CUDA says to it is no matter: nobody uses them any more."""
    if theirs.value:
        _runtime().cudaIpcCloseMemHandle(theirs)
    _runtime().cudaFree(mine)


class Mailbox:
    """One's own mailbox and the other party's. seconds: how long a message may take.

    handle: opens one's own to the other process. card: on which it is. Methods raise RuntimeError where CUDA does.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self._kernels = triton("triton_mailbox")
        self._polls = min(2**31 - 1, int(seconds * POLLS_A_SECOND))
        self._mine, self._theirs = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cudaMalloc", ctypes.byref(self._mine), ctypes.c_size_t(self._kernels.BYTES))
        _call("cudaMemset", self._mine, 0, ctypes.c_size_t(self._kernels.BYTES))
        handle = _Handle()
        _call("cudaIpcGetMemHandle", ctypes.byref(handle), self._mine)
        weakref.finalize(self, _free, self._mine, self._theirs).atexit = False  # then the driver frees it
        self.handle = ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)
        self._state = torch.zeros(2, dtype=torch.int64, device=device)
        self._nothing = torch.empty(0, dtype=torch.uint8, device=device)
        self.card = str(torch.cuda.get_device_properties(device).uuid)
        self._done = torch.cuda.Event()
        torch.cuda.synchronize(device)

    def open(self, handle: bytes) -> None:
        """The mailbox that this handle opens."""
        given = _Handle.from_buffer_copy(handle)
        _call("cudaIpcOpenMemHandle", ctypes.byref(self._theirs), given, ctypes.c_uint(_PEER_ACCESS))
        addresses = [self._theirs.value or 0, self._mine.value or 0]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=self._state.device)

    def swap(self, message: Tensor, count: int, step: int) -> Tensor:
        """Sends uint8 ``message``; returns the other's, ``count`` bytes. step: how many were swapped since ``advance``.

        Raises ValueError for one that is too long. What never came is said by ``failed``.
        """
        if max(message.numel(), count) > self._kernels.SLOT:
            raise ValueError(f"{max(message.numel(), count):,} bytes do not fit a mailbox of {self._kernels.SLOT:,}")
        given = message if message.numel() else self._nothing
        return self._kernels.swap(given, count, self._addresses, self._state, step, self._polls)

    def advance(self, count: int) -> None:
        """Behind as many messages."""
        self._state[:1] += count

    def mark(self) -> None:
        """``is_done`` speaks of what was launched before this."""
        self._done.record()

    def is_done(self) -> bool:
        """Whether the device has done it."""
        return bool(self._done.query())

    def failed(self) -> bool:
        """Whether a message did not come in time; waits for the device."""
        return bool(self._state[1].item())
