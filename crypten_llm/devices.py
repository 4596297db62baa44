"""Where a process computes: torch's devices, and whether this machine has them.

Owns how they are named on a command line. Which kernels there are for one, ``kernels.ring`` says.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from crypten_llm.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"cpu|cuda(:\d{1,3})?")


def is_name(text: object) -> bool:
    """Whether a text names a device: "cpu", "cuda", "cuda:1"."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def numbered(name: str) -> str:
    """The name with a GPU's number: "cuda" is the first."""
    return "cuda:0" if name == "cuda" else name


def usable(name: str) -> torch.device:
    """The device of that name, which becomes this thread's own of its kind.

    Raises UsageError where torch cannot compute there.
    """
    if not is_name(name):
        raise UsageError(f"device is {name!r}; it must be cpu, cuda, or one of several by cuda:N")
    import torch  # not where a command line is read

    try:
        found = torch.empty(1, device=name).device
        if found.type == "cuda":
            torch.cuda.set_device(found)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch that was built without it
        raise UsageError(
            f"torch cannot compute on device {name!r} ({first_line(error)}); use --device cpu, or a torch and a "
            "driver that have it"
        ) from None
    return found


def card(name: str) -> str | None:
    """What the driver calls the GPU of that name, "" where this machine has none; None for a processor.

    Raises UsageError for a GPU that is not among those of this machine.
    """
    if name == "cpu":
        return None
    import torch

    if not (count := torch.cuda.device_count()):
        return ""
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise UsageError(f"device is {name!r}, and the last of this machine's GPUs is cuda:{count - 1}; name another")
    return torch.cuda.get_device_name(index)


def found() -> dict[str, str]:
    """What this machine has beside the processor: by name, what it is and its memory."""
    import torch

    cards = {}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards[f"cuda:{index}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    return cards
