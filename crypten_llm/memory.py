"""What this machine, or a GPU of it, has for a process, and the refusal of work that would not fit.

Owns that figure. It is what the system could give without swapping, or less where a container or a limit of the process
says so; on a GPU it is what its driver says is free, and what torch keeps of it unused. A prediction that is held
against it counts what is sure to be needed and no more, so that nothing is refused that would have run.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from crypten_llm.errors import UsageError
from crypten_llm.units import size

if TYPE_CHECKING:
    import torch

ON_A_CARD = "give parties a card each (--device cuda:0,cuda:1,cpu), take a card with more, or --device cpu"
_MEMINFO = Path("/proc/meminfo")
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of version 2, of version 1


def available() -> int:
    """Bytes that this process may still take."""
    found = [_of_system(), *map(_of_group, _CGROUPS), _of_process()]
    return max(0, min(bytes_ for bytes_ in found if bytes_ is not None))


def of_card(device: torch.device | str) -> tuple[int, int]:
    """Bytes that this process may still take on a GPU, and all that it has."""
    import torch  # not where a command line is read

    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def left(device: torch.device | str) -> int:
    """Bytes that this process may still take on a device."""
    return of_card(device)[0] if str(device).startswith("cuda") else available()


def check(needed: int, what: str, device: torch.device | str = "cpu", there: int | None = None) -> None:
    """Raises UsageError when ``what`` needs more bytes than there are on a device, by default those ``left`` on it."""
    on_a_card = str(device).startswith("cuda")
    there = left(device) if there is None else there
    if needed > there:
        where, advice = (str(device), ON_A_CARD) if on_a_card else ("this machine", "use a machine with more")
        raise UsageError(
            f"{what} needs {size(needed)} of memory and {where} has {size(there)} left; ask for less, or {advice}"
        )


def _of_system() -> int:
    try:
        for line in _MEMINFO.read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _of_group(limit: str) -> int | None:
    """A container's memory, all of it: what it uses includes a page cache that it would give back."""
    try:
        return int(Path(limit).read_text("ascii"))
    except (OSError, ValueError):  # no container, or "max"
        return None


def _of_process() -> int | None:
    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if most == resource.RLIM_INFINITY else most
