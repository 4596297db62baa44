"""Roles, masks and correlations: the one place where the three processes differ.

Owns the dealer. It runs the same program as the two parties; where they hold shares, it holds masks. ``mask`` gives
each party its part of a fresh uniform mask and the dealer the whole of it; ``deal`` turns a value that only the dealer
can compute into additive shares: party 0 expands its share from a key it has in common with the dealer, party 1
is sent the correction. Nothing ever travels to the dealer.

What the dealer makes is its *material*. It goes to the parties over their links (``Sending``, ``Receiving``) or, by a
dealer that runs alone beforehand, into files (see ``tape``). The program is cut into sections; each has its own
streams and its own stretch of the material, so that a section can be skipped.
"""

import math
import queue
import threading

import numpy as np
import torch

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.randomness import Stream, derive_key, fresh_key
from crypten_llm.protocols.dealer.shapes import shape_only

PARTY0, PARTY1, DEALER = 0, 1, 2
FRAME = 1 << 18  # bytes of material a message
AHEAD = 64 << 20  # bytes for one party that may wait to be sent
CHANNEL = "dealer"


class _Courier:
    """Material on its way to one party: gathered into messages of up to ``FRAME`` bytes, sent by a thread of its own.

    Where messages end depends on the program alone. The dealer waits for a party only when ``AHEAD`` bytes do.
    """

    def __init__(self, transport, party: int):
        self._transport, self._party = transport, party
        self._frame, self._filled = np.empty(FRAME, dtype=np.uint8), 0
        self._frames: queue.Queue[np.ndarray | None] = queue.Queue(AHEAD // FRAME)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None  # while a section is under way

    def write(self, data: np.ndarray) -> None:
        start = 0
        while start < data.size:
            take = min(data.size - start, FRAME - self._filled)
            self._frame[self._filled : self._filled + take] = data[start : start + take]
            self._filled += take
            start += take
            if self._filled == FRAME:
                self.flush()

    def flush(self) -> None:
        """Sends what has been gathered, without waiting for it to leave."""
        self._check()
        if not self._filled:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send, name=f"material for party {self._party}", daemon=True)
            self._thread.start()
        self._frames.put(self._frame[: self._filled])
        self._frame, self._filled = np.empty(FRAME, dtype=np.uint8), 0

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
                    self._transport.send_stream(self._party, torch.from_numpy(frame), channel=CHANNEL)
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

    measures = False

    def __init__(self, transport):
        self._couriers = [_Courier(transport, party) for party in (PARTY0, PARTY1)]

    def begin(self, label: str) -> None:
        pass

    def write(self, party: int, data: np.ndarray) -> None:
        self._couriers[party].write(data)

    def flush(self, party: int) -> None:
        """What ``party`` may need before the dealer makes more."""
        self._couriers[party].flush()

    def end(self) -> None:
        for party in (PARTY1, PARTY0):
            self._couriers[party].drain()


class Receiving:
    """At a party: material as it comes from the dealer."""

    def __init__(self, transport):
        self._transport = transport
        self._left = np.empty(0, dtype=np.uint8)

    def begin(self, label: str) -> None:
        pass

    def read(self, count: int) -> np.ndarray:
        out, filled = np.empty(count, dtype=np.uint8), 0
        while filled < count:
            if not self._left.size:
                self._left = np.frombuffer(self._transport.recv_stream(DEALER, FRAME, channel=CHANNEL), dtype=np.uint8)
            take = min(count - filled, self._left.size)
            out[filled : filled + take] = self._left[:take]
            self._left = self._left[take:]
            filled += take
        return out

    def end(self) -> None:
        assert not self._left.size, "the dealer sent more than this section needs"


class Runtime:
    """One role's view: its streams, its link to the other party, and the material that it makes or uses.

    role: ``PARTY0`` (the owner), ``PARTY1`` (the client) or ``DEALER``.
    """

    def __init__(self, role: int, transport, keys: list[bytes], material=None):
        """keys: [own key] at a party, [party 0's, party 1's] at the dealer. material: a live dealer's when ``None``."""
        self.role = role
        self.transport = transport
        self._keys = keys
        self._streams: list[Stream] = []
        self._material = material or (Sending if role == DEALER else Receiving)(transport)
        self._section = ""
        self._begun: set[str] = set()
        self._measures = role == DEALER and self._material.measures
        self.share1: torch.Tensor | None = None  # at the dealer: party 1's part of the last mask or dealt value
        if material is None:
            self.begin("setup")

    @property
    def is_dealer(self) -> bool:
        return self.role == DEALER

    def begin(self, label: str) -> None:
        """Starts a section: fresh streams that depend on ``label`` alone, so that all roles start it alike."""
        assert label not in self._begun, f"section {label!r} is begun twice: it would use its masks twice"
        self._begun.add(label)
        self.end()
        self._material.begin(label)
        self._section = label
        self._streams = [Stream(derive_key(key, label)) for key in self._keys]

    def end(self) -> None:
        """Ends a section: all its material has been made, or used."""
        if self._section:
            self._material.end()
        self._section = ""

    # Masks and correlations.

    def mask(self, shape, bits: int = 64) -> torch.Tensor:
        """This party's part of a fresh mask modulo 2^bits; at the dealer, the mask (the parts' sum)."""
        if self._measures:
            self.share1 = shape_only(shape)
            return self.share1
        parts = [ring.low_bits(stream.ring(shape), bits) for stream in self._streams]
        if not self.is_dealer:
            return parts[0]
        self.share1 = parts[1]
        return ring.low_bits(parts[0] + parts[1], bits)

    def mask_of(self, party: int, shape) -> torch.Tensor | None:
        """A uniform mask that ``party`` and the dealer know and the other party does not (``None`` there)."""
        if self._measures:
            return shape_only(shape)
        if self.is_dealer:
            return self._streams[party].ring(shape)
        return self._streams[0].ring(shape) if self.role == party else None

    def deal(self, shape, value=None) -> torch.Tensor:
        """Additive shares modulo 2^64 of ``value()``, which only the dealer computes; there, the value itself.

        Dealer material: 8 bytes an element to party 1.
        """
        if self.role == PARTY0:
            return self._streams[0].ring(shape)
        count = math.prod(shape)
        if self.role == PARTY1:
            return torch.from_numpy(self._material.read(8 * count)).view(torch.int64).view(tuple(shape))
        if self._measures:
            self._material.add(PARTY1, 8 * count)
            self.share1 = shape_only(shape)
            return self.share1
        result = value()
        assert result.shape == torch.Size(shape), f"dealt {tuple(result.shape)}, announced {tuple(shape)}"
        self.share1 = (result - self._streams[0].ring(shape)).contiguous()
        self._material.write(PARTY1, self.share1.view(-1).view(torch.uint8).numpy())
        return result

    def deal_words(self, shape, dtype, correction=None) -> np.ndarray | None:
        """Words of an unsigned ``dtype``: uniform ones at party 0, and ``correction`` of those at party 1.

        correction: maps party 0's words to party 1's; only the dealer, which gets ``None``, calls it. So the two can
        share a table in any group. Dealer material: the words' bytes, to party 1.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if self.role == PARTY1:
            return self._material.read(size).view(dtype).reshape(shape)
        if self._measures:
            self._material.add(PARTY1, size)
            return None
        words = self._streams[0].draw(size).view(dtype).reshape(shape)
        if self.role == PARTY0:
            return words
        made = np.ascontiguousarray(correction(words))
        assert made.shape == tuple(shape) and made.dtype == dtype, f"dealt {made.shape}, announced {tuple(shape)}"
        self._material.write(PARTY1, made.view(np.uint8).reshape(-1))
        return None

    def deal_arrays(self, sizes: list[tuple], value=None) -> list[np.ndarray]:
        """The arrays of ``value()`` at both parties: what comparison keys have in common. At the dealer, nothing.

        sizes: (shape, dtype) of each. Dealer material: their bytes, to each party.
        """
        counts = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in sizes]
        if not self.is_dealer:
            read = self._material.read
            return [read(n).view(dtype).reshape(shape) for n, (shape, dtype) in zip(counts, sizes, strict=True)]
        arrays = [] if self._measures else [np.ascontiguousarray(array).view(np.uint8).reshape(-1) for array in value()]
        assert self._measures or [array.size for array in arrays] == counts, "arrays of another size were announced"
        for party in (PARTY1, PARTY0):  # party 0 will wait for party 1, which by then must have all that came before
            for count in counts if self._measures else ():
                self._material.add(party, count)
            for array in arrays:
                self._material.write(party, array)
            self._material.flush(party)
        return []

    # Party to party.

    def exchange(self, data: torch.Tensor) -> torch.Tensor:
        """The other party's bytes for ours, in one round."""
        return self.transport.exchange(1 - self.role, data)

    def overhear(self, count: int, sender: int | None = None) -> None:
        """At the dealer: ``sender``, or both parties at once, now send the other ``count`` bytes.

        It is told at each place where parties send; only a runtime that counts costs listens.
        """


def agree_on_keys(transport) -> list[bytes]:
    """The dealer draws a key for each party; returns what ``Runtime`` wants on this rank."""
    if transport.rank == DEALER:
        keys = [fresh_key(), fresh_key()]
        for party, key in enumerate(keys):
            transport.send(party, torch.frombuffer(bytearray(key), dtype=torch.uint8), channel=CHANNEL)
        return keys
    return [bytes(transport.recv(DEALER, (32,), torch.uint8, channel=CHANNEL).tolist())]
