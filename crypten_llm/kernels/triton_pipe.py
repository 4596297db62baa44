"""Kernels in Triton: bytes that a GPU writes into another's memory, one after another (``kernels.pipe``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 8  # bytes, of which all that is written takes a whole number
ROOM = 256 << 20  # bytes that may be there before they are read
HEADER = 256  # bytes ahead of them, of which a word says how far they are written
_BLOCK = 2048  # words of a program


@triton.jit(do_not_specialize=["due", "polls"])
def _wait(addresses, failures, due, polls):
    """Until the word at one's own address is ``due`` at least."""
    flag = tl.load(addresses + 1).to(tl.pointer_type(tl.int64))
    left = tl.where(tl.load(failures) == 0, polls.to(tl.int64), 0)
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (seen < due) & (left > 0):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        left -= 1
    if seen < due:
        tl.store(failures, due)


@triton.jit(do_not_specialize=["position"])
def _tell(addresses, position):
    """The other side, in the word at its address, how far this one is, behind all that was launched before."""
    flag = tl.load(addresses).to(tl.pointer_type(tl.int64))
    tl.atomic_xchg(flag, position.to(tl.int64), sem="release", scope="sys")


@triton.jit(do_not_specialize=["start", "words"], do_not_specialize_on_alignment=["data"])
def _write(data, addresses, start, words, B: tl.constexpr, R: tl.constexpr, H: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    room = (tl.load(addresses) + H).to(tl.pointer_type(tl.int64))
    part = tl.load(data + at, at < words, 0)
    tl.store(room + (start.to(tl.int64) + at) % R, part, at < words)


@triton.jit(do_not_specialize=["start", "words"], do_not_specialize_on_alignment=["out"])
def _read(out, addresses, start, words, B: tl.constexpr, R: tl.constexpr, H: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    room = (tl.load(addresses + 1) + H).to(tl.pointer_type(tl.int64))
    part = tl.load(room + (start.to(tl.int64) + at) % R, at < words, 0, volatile=True)
    tl.store(out + at, part, at < words)


def wait(addresses: Tensor, failures: Tensor, due: int, polls: int) -> None:
    """What is launched behind this waits until the other side is at ``due`` at least."""
    _wait[(1,)](addresses, failures, due, polls, num_warps=1)


def tell(addresses: Tensor, position: int) -> None:
    """The other side that this one is at ``position``."""
    _tell[(1,)](addresses, position, num_warps=1)


def write(data: Tensor, addresses: Tensor, start: int) -> None:
    """Words, int64, to the places from ``start`` on of the other GPU's memory."""
    words = data.numel()
    if words:
        _write[(triton.cdiv(words, _BLOCK),)](data, addresses, start, words, _BLOCK, ROOM // WORD, HEADER, num_warps=8)


def read(count: int, addresses: Tensor, start: int) -> Tensor:
    """``count`` words, int64, of one's own memory."""
    out = torch.empty(count, dtype=torch.int64, device=addresses.device)
    if count:
        _read[(triton.cdiv(count, _BLOCK),)](out, addresses, start, count, _BLOCK, ROOM // WORD, HEADER, num_warps=8)
    return out
