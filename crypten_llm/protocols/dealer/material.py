"""Material on its way: what a live dealer makes goes to the parties while they compute.

Owns the dealer's couriers, and what is asked of whoever gives or takes material: a live dealer's stream
(``Transport.stream_from``), a tape (``tape``), whoever counts. What is written and read are bytes, uint8 tensors.
"""

from __future__ import annotations

import queue
import threading
from typing import Protocol

import torch

from crypten_llm.links.transport import Transport, bytes_of
from crypten_llm.roles import CLIENT, OWNER

FRAME = 1 << 18  # bytes of material a message
AHEAD = 64 << 20  # bytes for one party that may wait to be sent
CHANNEL = "dealer"


class Given(Protocol):
    """At a party: where its material comes from. unit: bytes of which each piece takes a whole number. window: bytes
    that are best read at a time, about.
    """

    unit: int
    window: int

    def begin(self, label: str) -> None:
        """Goes to the section of that label."""

    def read(self, count: int, counted: int | None = None) -> torch.Tensor:
        """The next ``count`` bytes, in memory of their own. counted: of them, where they are several pieces."""

    def receive_ahead(self) -> bool:
        """For who waits for something else: takes in what is coming; whether there was anything."""

    def end(self) -> None:
        """All of the section has been used."""


class Taken(Protocol):
    """At the dealer: where its material goes. unit: as of ``Given``."""

    unit: int

    def begin(self, label: str) -> None:
        """Starts a section."""

    def write(self, party: int, data: torch.Tensor) -> None:
        """Bytes for one party."""

    def flush(self, party: int) -> None:
        """What ``party`` may need before the dealer makes more."""

    def end(self) -> None:
        """All of the section has been made."""


class _Courier:
    """Material on its way to one party: gathered into messages of up to ``FRAME`` bytes, sent by a thread of its own.

    Where messages end depends on the program alone. The dealer waits for a party only when ``AHEAD`` bytes do. From a
    device beside the processor what makes a message comes in one copy.
    """

    def __init__(self, transport: Transport, party: int) -> None:
        self._transport, self._party = transport, party
        self._frame, self._filled = memoryview(bytearray(FRAME)), 0
        self._there: list[torch.Tensor] = []  # on the device, still to be copied
        self._bytes_there = 0
        self._frames: queue.Queue[memoryview | None] = queue.Queue(AHEAD // FRAME)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None  # while a section is under way

    def write(self, data: torch.Tensor) -> None:
        if not self._transport.staging.is_apart:
            self._gather(data)
            return
        self._there.append(data)
        self._bytes_there += data.numel()
        if self._filled + self._bytes_there >= FRAME:
            self._fetch()

    def _fetch(self) -> None:
        """Gathers what is still on the device."""
        pieces, self._there, self._bytes_there = self._there, [], 0
        if pieces:
            self._gather(self._transport.staging.to_host(torch.cat(pieces)))

    def _gather(self, data: torch.Tensor) -> None:
        source, start, size = bytes_of(data), 0, data.numel()
        if size < FRAME - self._filled:  # most pieces are small
            self._frame[self._filled : self._filled + size] = source
            self._filled += size
            return
        while start < size:
            take = min(size - start, FRAME - self._filled)
            self._frame[self._filled : self._filled + take] = source[start : start + take]
            self._filled += take
            start += take
            if self._filled == FRAME:
                self._dispatch()

    def flush(self) -> None:
        """Sends what has been written, without waiting for it to leave."""
        self._fetch()
        self._dispatch()

    def _dispatch(self) -> None:
        self._check()
        if not self._filled:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, name=f"material for party {self._party}", daemon=True)
            self._thread.start()
        self._frames.put(self._frame[: self._filled])
        self._frame, self._filled = memoryview(bytearray(FRAME)), 0

    def drain(self) -> None:
        """Returns once everything has left: the link is free for other messages."""
        self.flush()
        if self._thread is not None:
            self._frames.put(None)
            self._thread.join()
            self._thread = None
        self._check()

    def _send(self) -> None:
        while (frame := self._frames.get()) is not None:
            try:
                if not self._error:
                    data = torch.frombuffer(frame, dtype=torch.uint8)
                    self._transport.send_stream(self._party, data, channel=CHANNEL)
            except BaseException as error:
                self._error = error

    def _check(self) -> None:
        """Raises, in the thread that computes, what went wrong in the one that sends."""
        if self._error:
            raise self._error


class Sending:
    """At the dealer: material goes to the parties while they compute.

    Within a section the dealer waits only for room in a queue, and nobody can wait for the dealer then: a party that
    does not read waits for the other party, whose material up to that step has left the dealer (``flush``).
    """

    unit = 1

    def __init__(self, transport: Transport) -> None:
        self._couriers = [_Courier(transport, party) for party in (OWNER, CLIENT)]

    def begin(self, label: str) -> None:
        pass

    def write(self, party: int, data: torch.Tensor) -> None:
        self._couriers[party].write(data)

    def flush(self, party: int) -> None:
        self._couriers[party].flush()

    def end(self) -> None:
        for party in (CLIENT, OWNER):
            self._couriers[party].drain()
