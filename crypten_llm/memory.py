"""What this machine has for a process, and the refusal of work that would not fit.

Owns that figure. It is what the system could give without swapping, or less where a container or a limit of the process
says so. A prediction that is held against it counts what is sure to be needed and no more, so that nothing is refused
that would have run.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

from crypten_llm.errors import UsageError
from crypten_llm.units import size

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of version 2, of version 1


def available() -> int:
    """Bytes that this process may still take."""
    found = [_of_system(), *map(_of_group, _CGROUPS), _of_process()]
    return max(0, min(bytes_ for bytes_ in found if bytes_ is not None))


def check(needed: int, what: str) -> None:
    """Raises UsageError when ``what`` needs more bytes than there are."""
    if needed > (there := available()):
        raise UsageError(
            f"{what} needs {size(needed)} of memory and this machine has {size(there)} left; ask for less, or use a "
            "machine with more"
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
