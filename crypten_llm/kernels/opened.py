"""Memory of a GPU that is open to a process on a GPU of the same host, and kernels that wait for what comes there.

Owns how it is opened, how long a kernel waits, and what did not come. It is allocated by itself, in whole pages: a
handle opens all of an allocation to whoever has it, so none of torch's may be handed out, and CUDA puts what is smaller
than a page with others on one, of which the handle then opens the beginning.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import cache

import torch
from torch import Tensor

HANDLE_BYTES = 64
POLLS_A_SECOND = 1_000_000  # at least so many
_PAGE = 2 << 20  # bytes
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


def card_of(device: torch.device) -> str:
    """The number that the driver gives a card, by which two processes see that they are on one."""
    return str(torch.cuda.get_device_properties(device).uuid)


class _Raw:
    """A word at an address, as torch is told of other libraries' memory."""

    def __init__(self, address: int | None) -> None:
        self.__cuda_array_interface__ = {"shape": (1,), "typestr": "<i8", "data": (address, False), "version": 3}


class OpenedMemory:
    """Bytes of ``device``, ``size`` at least and 0 at first, and those that another process has opened. handle: opens
    one's own to it.

    Methods raise RuntimeError where CUDA does.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._device = device
        self._mine, self._theirs = ctypes.c_void_p(), ctypes.c_void_p()
        size = -(-size // _PAGE) * _PAGE
        _call("cudaMalloc", ctypes.byref(self._mine), ctypes.c_size_t(size))
        _call("cudaMemset", self._mine, 0, ctypes.c_size_t(size))
        handle = _Handle()
        _call("cudaIpcGetMemHandle", ctypes.byref(handle), self._mine)
        weakref.finalize(self, _free, self._mine, self._theirs).atexit = False  # then the driver frees it
        self.handle = ctypes.string_at(ctypes.byref(handle), HANDLE_BYTES)
        torch.cuda.synchronize(device)
        self._word = torch.as_tensor(_Raw(self._mine.value), device=device)
        self._aside = torch.cuda.Stream(device)

    def word(self) -> int:
        """The first of one's own, int64, as it is now: whatever has been launched is not waited for."""
        with torch.cuda.stream(self._aside):
            return int(self._word.item())

    def open(self, handle: bytes) -> Tensor:
        """Opens what this handle is of; where that is, and one's own: int64 [2], for kernels."""
        given = _Handle.from_buffer_copy(handle)
        _call("cudaIpcOpenMemHandle", ctypes.byref(self._theirs), given, ctypes.c_uint(_PEER_ACCESS))
        addresses = [self._theirs.value or 0, self._mine.value or 0]
        return torch.tensor(addresses, dtype=torch.int64, device=self._device)


class Waiting:
    """Of a process's kernels that wait for another's. seconds: how long each waits.

    failures: int64 [1], for kernels: not 0 from where one waited in vain; none waits behind it. polls: how often one
    looks.
    """

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.polls = min(2**31 - 1, int(seconds * POLLS_A_SECOND))
        self.failures = torch.zeros(1, dtype=torch.int64, device=device)
        self._done = torch.cuda.Event()

    def mark(self) -> None:
        """``is_done`` speaks of what was launched before this."""
        self._done.record()

    def is_done(self) -> bool:
        """Whether the device has done it."""
        return bool(self._done.query())

    def failed(self) -> bool:
        """Whether anything did not come in time; waits for the device."""
        return bool(self.failures.item())
