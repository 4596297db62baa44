"""Kernels in Triton: a message each way between two GPUs of a host (``kernels.mailbox``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1 << 13  # bytes of a program, which has a flag of its own
SLOT = 32 << 20  # bytes of the longest message
FLAGS = SLOT // BLOCK
DATA = 8 * FLAGS  # where the first slot begins, behind the flags of both
BYTES = DATA + 2 * SLOT


@triton.jit(do_not_specialize=["sent", "due", "step", "polls"], do_not_specialize_on_alignment=["message", "arrived"])
def _swap(
    message, arrived, addresses, epochs, failures, sent, due, step, polls,
    B: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """addresses: int64, where the other's mailbox is, and one's own. epochs: int64, messages so far. failures: the
    first one that never came. A program writes its part and its flag, then waits for the other's: those that are
    launched first wait for those that the other launches first. Slots take turns: who sends the next but one has had
    the next, which is sent by who has read this one.
    """
    i = tl.program_id(0)
    epoch = tl.load(epochs) + step + 1
    slot = epoch & 1
    theirs, mine = tl.load(addresses), tl.load(addresses + 1)
    at = i.to(tl.int64) * B + tl.arange(0, B)
    data = 8 * F + slot * S
    part = tl.load(message + at, at < sent, 0)
    tl.store((theirs + data).to(tl.pointer_type(tl.uint8)) + at, part, at < sent)
    tl.debug_barrier()
    tag = epoch.to(tl.int32)
    place = slot * F + i
    tl.atomic_xchg(theirs.to(tl.pointer_type(tl.int32)) + place, tag, sem="release", scope="sys")
    flag = mine.to(tl.pointer_type(tl.int32)) + place
    left = tl.where(tl.load(failures) == 0, polls.to(tl.int64), 0)
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    while (seen != tag) & (left > 0):
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        left -= 1
    if seen != tag:
        tl.store(failures, epoch)
    tl.debug_barrier()
    other = tl.load((mine + data).to(tl.pointer_type(tl.uint8)) + at, at < due, 0, volatile=True)
    tl.store(arrived + at, other, at < due)


def swap(
    message: Tensor, count: int, addresses: Tensor, epochs: Tensor, step: int, failures: Tensor, polls: int
) -> Tensor:
    """What the other GPU sends, uint8 [count], while it is sent ``message``: the ``step``-th of this launch."""
    arrived = torch.empty(count, dtype=torch.uint8, device=epochs.device)
    programs = max(1, triton.cdiv(max(message.numel(), count), BLOCK))
    _swap[(programs,)](
        message, arrived, addresses, epochs, failures, message.numel(), count, step, polls,
        BLOCK, FLAGS, SLOT, num_warps=8,
    )  # fmt: skip
    return arrived
