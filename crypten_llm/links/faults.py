"""What is said of a peer that is gone, silent or sent something else, and the last words of a party that stops.

Owns the errors of a link and the abort frame, which one party writes (`say_goodbye`) and the others find behind what
they had not read yet (`last_words`). Nothing here runs while all goes well.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from crypten_llm.errors import PartyError
from crypten_llm.links.frames import (
    ABORT,
    BOUNDED,
    DTYPE_NAMES,
    HEADER,
    KIND_NAMES,
    MAGIC,
    MAX_ABORT_BYTES,
    MIXED,
    TENSOR,
)

if TYPE_CHECKING:
    from crypten_llm.links.link import Incoming, Link, Specs


LAST_WORDS_SECONDS = 1.0  # how long to look for a peer's abort frame after its link broke
SAME_PROGRAM = "the parties run different programs; start all of them with the same version and the same settings"


# A peer that stops.


def say_goodbye(link: Link, message: str) -> None:
    """Tell the peer at `link` why this party stops. Best effort, never raises for a link that is gone."""
    text = message.encode()[:MAX_ABORT_BYTES]
    if not link.owned.is_here:  # the link goes on in the process that was forked
        return
    try:
        if not link.mid_frame and link.sending.acquire(timeout=LAST_WORDS_SECONDS):
            try:
                link.sock.settimeout(LAST_WORDS_SECONDS)
                link.sock.sendall(link.owed + HEADER.pack(MAGIC, ABORT, MIXED, 0, len(text), 0) + text)
            finally:
                link.sending.release()  # who waits for it finds that nothing may follow
        # Closing with unread input resets the connection, which could destroy what was just sent.
        link.sock.shutdown(socket.SHUT_WR)
        link.sock.setblocking(False)
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while link.sock.recv(1 << 20) and time.monotonic() < deadline:
            pass
    except OSError:
        pass


def gone(link: Link, where: str) -> PartyError:
    """The error for a broken link: the peer's own message when one is still in the input."""
    link.hush()
    text = last_words(link.sock)
    if text is not None:
        return stopped(link.name, text)
    return PartyError(f"{link.name} closed the connection during {where}: its own output says why it stopped")


def stopped(name: str, text: bytes | bytearray) -> PartyError:
    """The error for a peer that said so; text: the payload of its abort frame."""
    line = bytes(text).decode(errors="replace").strip()
    return PartyError(f"{name} stopped: {line or 'no reason given'}")


def last_words(sock: socket.socket) -> bytes | None:
    """The text of an abort frame that waits behind unread frames in the input of a broken link, or None.

    Called when sending failed: the peer may have said why before it closed.
    """
    deadline = time.monotonic() + LAST_WORDS_SECONDS  # of all of it, however it comes

    def read(count: int) -> bytes:
        data = b""
        while len(data) < count:
            sock.settimeout(max(1e-3, deadline - time.monotonic()))
            chunk = sock.recv(min(count - len(data), 1 << 20))
            if not chunk or time.monotonic() > deadline:
                raise ConnectionResetError
            data += chunk
        return data

    try:
        while True:
            magic, kind, _, _, size, _ = HEADER.unpack(read(HEADER.size))
            if magic != MAGIC:
                return None
            if kind == ABORT:
                return read(min(size, MAX_ABORT_BYTES))
            while size:
                size -= len(read(min(size, 1 << 16)))
    except OSError:
        return None


# A peer that is silent.


def silent(names: list[str], did: str, seconds: float, where: str, endless: bool = False) -> PartyError:
    """The error for peers from which nothing came, or one that took nothing, for so long; of an `endless` wait, no sign
    of life either.
    """
    if endless:
        return PartyError(
            f"{' and '.join(names)} gave no sign of life for {seconds:g} s during {where}, while its next request was "
            "waited for: it hangs, was stopped, or its network is down; start all parties again"
        )
    return PartyError(
        f"{' and '.join(names)} {did} nothing for {seconds:g} s during {where}: look at that "
        "party's own output, and raise the timeout if it only needs longer"
    )


# A peer that sent something else.


def another_frame(frame: Incoming, header: tuple, where: str) -> PartyError:
    """The error for a header (as unpacked) that is not of the `frame` that is due."""
    magic, kind, dtype, sequence, size, _ = header
    came = "bytes of another protocol"
    if magic == MAGIC:
        came = _describe(kind, dtype, sequence, f"{size} bytes")
    most = f"{'at most ' if frame.kind in BOUNDED else ''}{frame.nbytes} bytes"
    due = _describe(frame.kind, frame.dtype, frame.link.received.frames & 0xFFFFFFFF, most, frame.specs)
    return PartyError(f"{frame.link.name} sent {came} during {where}, expected {due}: {SAME_PROGRAM}")


def _describe(kind: int, dtype: int, sequence: int, size: str, specs: Specs = ()) -> str:
    """A frame in words: "int64 tensor message number 5 of 64 bytes, shape (2, 4)"."""
    name = KIND_NAMES.get(kind, f"unknown kind {kind}")
    if kind == TENSOR:
        name = f"{DTYPE_NAMES.get(dtype, f'dtype {dtype}')} {name}"
    shapes = f", shape {' and '.join(str(tuple(shape)) for shape, _ in specs)}" if specs else ""
    return f"{name} message number {sequence} of {size}{shapes}"


def unexpected(name: str, due: str, where: str) -> PartyError:
    """The error for a message that says something else than what is due, in words."""
    return PartyError(f"{name} sent something else than {due} during {where}: {SAME_PROGRAM}")


def altered(name: str, reason: str, where: str) -> PartyError:
    """The error for what TLS refuses."""
    return PartyError(
        f"what came from {name} during {where} is not as it was sent ({reason}): something between the two changes it; "
        "look at that party's own output too"
    )


def emulated_by_one(name: str) -> PartyError:
    return PartyError(
        f"only one of this party and {name} emulates a network: give every party the same network setting"
    )
