"""Reading files that somebody else may have written: none of them may hang a process or exhaust its memory.

Owns what is opened: regular files, links to such among them, up to a size. A FIFO waits for a writer that never comes,
and a device never ends. JSON becomes records here (see ``records``).
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from crypten_llm import limits, records
from crypten_llm.errors import UsageError
from crypten_llm.units import size


def check_regular(path: str | Path) -> None:
    """Raises UsageError for what a library that opens ``path`` itself would wait for; nothing for what is not there."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _irregular(path)


def check_folder(folder: str | Path) -> None:
    """``check_regular`` of all that a folder holds."""
    for entry in Path(folder).iterdir():
        check_regular(entry)


def read(path: str | Path, most: int = limits.SETTINGS_BYTES) -> bytes:
    """The bytes of a regular file. Raises UsageError for another, a larger, and one that cannot be read."""
    try:
        # Without waiting: opening a FIFO would.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        state = os.fstat(fd)
        if stat.S_ISDIR(state.st_mode):
            raise UsageError(f"{path}: cannot be read (it is a folder)")
        if not stat.S_ISREG(state.st_mode):
            raise _irregular(path)
        if state.st_size > most:
            raise UsageError(f"{path} has {size(state.st_size)}; a file of its kind has {size(most)} at most")
        with open(fd, "rb", closefd=False) as file:
            return file.read(most)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    finally:
        os.close(fd)


def read_json(path: str | Path, kind: Any = dict[str, Any], most: int = limits.SETTINGS_BYTES) -> Any:
    """The ``kind`` that a JSON file holds, an object if nothing is said. Raises UsageError as ``read``, or if not."""
    try:
        return records.decode(read(path, most), kind)
    except records.Malformed as error:
        raise UsageError(f"{path}: {error}") from None


def _irregular(path: str | Path) -> UsageError:
    return UsageError(f"{path} is no regular file (a FIFO, a socket or a device); put the file itself there")
