"""A section's program at one role, captured once and run again with fresh masks and fresh material.

Owns what is between the kernels: on a GPU a program of a thousand small kernels waits for Python, which says the same
every time. What it says is captured (``kernels.graphs``), cut where a message is exchanged, and from then on the pieces
are launched as they are. Every address is that of the capture, so before they run, the section's keys, its material and
the program's inputs are put where the captured kernels read them. A draw's place in a stream is the same in every
section and the section's key is another, so no mask serves twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from crypten_llm.errors import OneTimeError, UsageError
from crypten_llm.protocols.dealer.peer import wait
from crypten_llm.roles import CLIENT, DEALER, OWNER

if TYPE_CHECKING:
    from crypten_llm.kernels.graphs import Graphs
    from crypten_llm.links.meter import Cells, Scope
    from crypten_llm.protocols.dealer.randomness import Mark
    from crypten_llm.protocols.dealer.runtime import Runtime

Result = TypeVar("Result")
ALIGNED = 16  # bytes at whose multiples numbers of any kind may begin


@dataclass(frozen=True)
class _Part:
    """Bytes ``start`` to ``stop`` of a room's memory, of which ``counted`` are material."""

    room: Tensor
    start: int
    stop: int
    counted: int

    @property
    def memory(self) -> Tensor:
        return self.room[self.start : self.stop]

    @property
    def size(self) -> int:
        return self.stop - self.start

    def and_then(self, other: _Part) -> _Part | None:
        """Both as one, where the other lies right behind this one."""
        if self.room is not other.room or self.stop != other.start:
            return None
        return _Part(self.room, self.start, other.stop, self.counted + other.counted)


class _Room:
    """Memory of the device in which pieces of material lie as they travel, each in whole units of bytes; it stays where
    it is. size: bytes of all of them. zeros: what a piece does not fill of its last unit.

    It is made before anything is captured: in memory of the captured kernels' own, what they wrote there before would
    be written over what has been read into it.
    """

    def __init__(self, device: torch.device, unit: int, size: int, zeros: bool) -> None:
        make = torch.zeros if zeros and unit > 1 else torch.empty
        self._memory, self._unit, self._used = make(size, dtype=torch.uint8, device=device), unit, 0

    def take(self, count: int) -> _Part:
        """For the next piece, of ``count`` bytes."""
        start, self._used = self._used, self._used + whole(count, self._unit)
        if self._used > self._memory.numel():
            raise OneTimeError("a section that is captured takes more material than the one before it, and is no like")
        return _Part(self._memory, start, self._used, count)


def whole(count: int, unit: int) -> int:
    """Bytes of as many units as ``count`` bytes need."""
    return -(-count // unit) * unit


class _InOneSection:
    """What a program is given for its section's material: it neither begins nor ends it."""

    def begin(self, label: str) -> None:
        raise OneTimeError(f"section {label!r} begins within what is captured of another")

    def end(self) -> None:
        raise OneTimeError("a section ends within what is captured of it")


class _Gauge(_InOneSection):
    """In the place of a section's material: how much of it there is, in bytes of whole units. taken: at a party;
    written: at the dealer, for each party.
    """

    def __init__(self, material: Any) -> None:
        self._material = material
        self.taken, self.written = 0, {OWNER: 0, CLIENT: 0}

    def read(self, count: int, counted: int | None = None) -> Tensor:
        self.taken += whole(count, self._material.unit)
        given: Tensor = self._material.read(count, counted)
        return given

    def write(self, party: int, data: Tensor) -> None:
        self.written[party] += whole(data.numel(), self._material.unit)
        self._material.write(party, data)

    def flush(self, party: int) -> None:
        self._material.flush(party)


class _Reads(_InOneSection):
    """At a party: where captured kernels read material.

    windows: all of it in its order, in pieces that are read at a time; a later stretch may begin in the last of an
    earlier one. new: what the stretch that is being captured will read.
    """

    def __init__(self, device: torch.device, unit: int, size: int, window: int) -> None:
        self._room, self._window = _Room(device, unit, size, zeros=False), window
        self.windows: list[_Part] = []
        self.new: list[_Part] = []

    def read(self, count: int, counted: int | None = None) -> Tensor:
        part = self._room.take(count)
        if count:
            self.new.append(part)
            last = self.windows[-1] if self.windows else None
            longer = last.and_then(part) if last is not None and last.size < self._window else None
            if longer is None:
                self.windows.append(part)
            else:
                self.windows[-1] = longer
        given = part.memory[:count]
        return given.clone() if part.start % ALIGNED else given


class _Writes(_InOneSection):
    """At the dealer: where captured kernels leave material. parts: in its order; ``None`` where it is flushed."""

    def __init__(self, device: torch.device, unit: int, sizes: dict[int, int]) -> None:
        self._rooms = {party: _Room(device, unit, size, zeros=True) for party, size in sizes.items()}
        self.parts: list[tuple[int, _Part | None]] = []

    def write(self, party: int, data: Tensor) -> None:
        part = self._rooms[party].take(data.numel())
        part.memory[: data.numel()].copy_(data)
        before, last = self.parts[-1] if self.parts else (party, None)
        longer = last.and_then(part) if before == party and last is not None else None
        if longer is None:
            self.parts.append((party, part))
        else:
            self.parts[-1] = party, longer

    def flush(self, party: int) -> None:
        self.parts.append((party, None))


@dataclass
class _Swap:
    """A message each way. arrived: where captured kernels read what the other party sent; of a link, memory of the
    processor, as the message is.
    """

    other: int
    message: Tensor
    count: int
    cells: Cells
    scope: Scope
    arrived: Tensor | None = None


@dataclass
class _Stretch:
    """Kernels up to a message, or to the end. windows: how many of the material's they read, and those before."""

    launch: Callable[[], None]
    windows: int
    swap: _Swap | None = None


class Captured:
    """One program of sections that are alike: ``measure`` runs it as it is in the first of them, ``capture`` in the
    second, ``replay`` in every other.

    Each is called right behind the section's begin. The program finds its inputs in tensors that stay where they are,
    and so does its result, until the next section writes over it. It may not wait for the device, and takes nothing
    from the processor but constants that are on the device already (``Runtime.constant``).
    """

    def __init__(self, runtime: Runtime, graphs: Graphs) -> None:
        self._runtime, self._graphs = runtime, graphs
        self._posted: list[_Swap] = []  # messages that captured kernels exchange themselves
        self._material: Any = runtime.material  # of the section that is run
        self._gauge = _Gauge(self._material)
        self._stretches: list[_Stretch] = []
        self._loaded = 0  # windows, in the section that is run
        self._marks: list[Mark] = []

    def measure(self, program: Callable[[], Result]) -> Result:
        """What the program returns, which also compiles kernels and moves constants; its material is measured."""
        self._gauge = _Gauge(self._runtime.material)
        with self._runtime.replaced(self._gauge, None):
            return program()

    def capture(self, program: Callable[[], Result]) -> Result:
        """What the program returns."""
        runtime, self._material = self._runtime, self._runtime.material
        unit = self._material.unit
        is_dealer = runtime.role == DEALER
        self._reads = _Reads(runtime.device, unit, self._gauge.taken, 0 if is_dealer else self._material.window)
        self._writes = _Writes(runtime.device, unit, self._gauge.written)
        mine = self._writes if is_dealer else self._reads
        with self._graphs.apart(), runtime.replaced(mine, self._post if runtime.mailbox else self._swap):
            try:
                self._graphs.begin()
                result = program()
                if runtime.mailbox:
                    runtime.mailbox.advance(len(self._posted))
                self._end()
            except BaseException:
                self._graphs.abandon()
                raise
        self._marks = [stream.mark() for stream in runtime.streams]
        self._finish()
        return result

    def replay(self) -> None:
        """The program's kernels and messages, with what belongs to the section that has begun."""
        runtime = self._runtime
        self._material, self._loaded = runtime.material, 0
        for stream, mark in zip(runtime.streams, self._marks, strict=True):
            stream.lend_key(mark)
        with self._graphs.apart():
            for stretch in self._stretches:
                self._load(stretch.windows)
                stretch.launch()
                if stretch.swap is not None:
                    self._travel(stretch.swap)
        for stream, mark in zip(runtime.streams, self._marks, strict=True):
            stream.go_on(mark)
        self._finish()

    def _end(self) -> _Stretch:
        """Ends the stretch that is being captured, and runs it."""
        stretch = _Stretch(self._graphs.end(), len(self._reads.windows))
        self._stretches.append(stretch)
        for part in self._reads.new:
            part.memory.copy_(self._material.read(part.size, part.counted))
        self._reads.new.clear()
        stretch.launch()
        return stretch

    def _swap(self, other: int, message: Tensor, count: int, cells: Cells) -> Tensor:
        """Over the link: it ends a stretch."""
        graphs, transport = self._graphs, self._runtime.transport
        if not graphs.has_room(message.numel()):
            self._end()
            graphs.make_room(message.numel())
            graphs.begin()
        sent = graphs.sent(message)
        stretch = self._end()
        graphs.wait()
        arrived = transport.swap_here(other, sent, count, cells)
        stretch.swap = _Swap(other, sent, count, cells, transport.meter.scope, arrived)
        graphs.begin()
        return graphs.arrived(arrived)

    def _post(self, other: int, message: Tensor, count: int, cells: Cells) -> Tensor:
        """From card to card: captured with all else."""
        mailbox, scope = self._runtime.mailbox, self._runtime.transport.meter.scope
        assert mailbox is not None, "the parties have mailboxes"
        try:
            arrived = mailbox.swap(message, count, len(self._posted))
        except ValueError as error:
            raise UsageError(f"--peer-memory: {error}; leave it out") from None
        self._posted.append(_Swap(other, message, count, cells, scope))
        return arrived

    def _travel(self, swap: _Swap) -> None:
        self._graphs.wait()
        transport = self._runtime.transport
        with transport.meter.within(swap.scope):
            transport.swap_here(swap.other, swap.message, swap.count, swap.cells, swap.arrived)

    def _load(self, windows: int) -> None:
        for window in self._reads.windows[self._loaded : windows]:
            window.memory.copy_(self._material.read(window.size, window.counted), non_blocking=True)
        self._loaded = max(self._loaded, windows)

    def _finish(self) -> None:
        """At a party: what went from card to card is there, and counted. At the dealer: the section's material is sent,
        as the program gave it.
        """
        transport = self._runtime.transport
        if self._posted and self._runtime.waiting:
            wait(transport, self._runtime.waiting, self._posted[0].other, self._material.receive_ahead)
        for swap in self._posted:
            with transport.meter.within(swap.scope):
                transport.count_swap(swap.message.numel(), swap.count, swap.cells)
        for party, part in self._writes.parts:
            if part is None:
                self._material.flush(party)
            else:
                self._material.write(party, part.memory)
