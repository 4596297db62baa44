"""The roles: the one place where the three processes differ.

Owns owner, client and dealer. The dealer runs the same program as the two parties; where they hold shares, it holds
masks. Of what it deals, the owner expands its share from a key it has in common with the dealer, and the client is sent
the correction. Nothing ever travels to the dealer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from crypten_llm.errors import OneTimeError
from crypten_llm.kernels import ring
from crypten_llm.links.staging import Staging
from crypten_llm.protocols.dealer import peer
from crypten_llm.protocols.dealer.material import CHANNEL, FRAME, Sending
from crypten_llm.protocols.dealer.randomness import fresh_key
from crypten_llm.protocols.dealer.runtime import PARTIES, Parts, Piece, Public, Runtime, Size, Words
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.roles import CLIENT, DEALER, OWNER

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport


class Party(Runtime):
    """A compute party: it holds shares."""

    other: ClassVar[int]  # the other party

    def __init__(
        self, transport: Transport, keys: list[bytes], material: Any = None, device: torch.device | str = "cpu"
    ) -> None:
        """material: where it comes from; a live dealer's when ``None``."""
        given = transport.stream_from(DEALER, FRAME, CHANNEL) if material is None else material
        super().__init__(transport, keys, given, device)
        self._is_live = material is None
        if self._is_live:
            self.begin("setup")

    def open_memory(self) -> None:
        self.waiting = peer.waiting_on(self.device, self.transport.timeout)
        self.mailbox = peer.connect(self.transport, self.other, self.device, self.waiting)
        if self._is_live:
            self._material = peer.tap(self.transport, self.device, self.waiting) or self._material

    def mask(self, shape: Sequence[int], bits: int = 64) -> Parts:
        return Parts(self._streams[0].ring(shape, bits))

    def mask_ones(self, shape: Sequence[int], bits: int) -> Parts:
        return Parts(self._streams[0].ring(shape, bits))

    def mask_below(self, shape: Sequence[int], modulus: int) -> Parts:
        return Parts(self._streams[0].below(shape, modulus))

    def mask_of(self, party: int, shape: Sequence[int]) -> Tensor | None:
        return self._streams[0].ring(shape) if self.role == party else None

    def deal_common(self, sizes: list[Size], value: Callable[[], list[Tensor]]) -> list[Tensor]:
        counts = [math.prod(shape) * dtype.itemsize for shape, dtype in sizes]
        return [self._material.read(n).view(dtype).view(shape) for n, (shape, dtype) in zip(counts, sizes, strict=True)]

    def less(self, mask: Parts, carry: Parts, size: int) -> Parts:
        return Parts(mask.held - (carry.held << size))

    def input(self, source: int, shape: Sequence[int], value: Callable[[], Tensor]) -> Tensor:
        return value() if self.role == source else torch.zeros(tuple(shape), dtype=torch.int64, device=self.device)

    def exchange(self, pieces: list[Piece]) -> list[Tensor | None]:
        hidden = [self._outgoing(piece) for piece in pieces]
        packed = [data for _, data in hidden if data is not None]
        message = packed[0] if len(packed) == 1 else torch.cat(packed or [_NOTHING])
        due = [piece.size if piece.sender is None else piece.sent_by(self.other) for piece in pieces]
        swap = self._swap or self.transport.swap
        theirs = swap(self.other, message, sum(due), self._cells(pieces))
        results, start = [], 0
        for piece, (value, _), size in zip(pieces, hidden, due, strict=True):
            results.append(self._incoming(piece, value, theirs[start : start + size]))
            start += size
        return results

    def _cells(self, pieces: list[Piece]) -> dict[tuple, list[int]]:
        """By (phase, kind), the bytes of pieces that are sent and received elsewhere than in the step in progress."""
        cells: dict[tuple, list[int]] = {}
        here = self.transport.meter.cell
        for piece in pieces:
            if piece.cell == here:
                continue
            counted = cells.setdefault(piece.cell, [0, 0])
            counted[0] += piece.sent_by(self.role)
            counted[1] += piece.sent_by(self.other)
        return cells

    def _outgoing(self, piece: Piece) -> tuple[Tensor | None, Tensor | None]:
        """Of an opening this party's part, and what it sends; of what it sends alone, the latter."""
        if piece.sender is None:
            if piece.share is None or piece.mask is None:
                raise OneTimeError("an opening comes with its share and its mask; nothing was sent")
            if piece.is_wide:
                ones = piece.modulus is not None
                return self.kernels.hide_wide(piece.share, piece.mask, self._offset(piece), piece.bits, ones)
            if piece.modulus is not None:
                value = (piece.share + piece.mask) % piece.modulus
                return value.reshape(-1), self.kernels.pack(value, piece.bits)
            return self.kernels.hide(piece.share, piece.mask, self._offset(piece), piece.bits)
        if piece.sender == self.role:
            assert piece.share is not None, "who sends alone has what it sends"
            return None, self.kernels.pack(piece.share, piece.bits)
        return None, None

    def _offset(self, piece: Piece) -> int:
        return 0

    def _incoming(self, piece: Piece, value: Tensor | None, packed: Tensor) -> Tensor | None:
        if value is not None and piece.is_wide:
            return self.kernels.show_wide(value, packed, piece.bits, piece.modulus is not None, piece.shape)
        if value is not None and piece.modulus is not None:
            return (value.view(piece.shape) + self.kernels.unpack(packed, piece.bits, piece.shape)) % piece.modulus
        if value is not None:
            return self.kernels.show(value, packed, piece.bits, piece.shape)
        if piece.sender == self.role:
            return None
        return self.kernels.unpack(packed, piece.bits, piece.shape)


class Owner(Party):
    """The party that knows the weights: its shares are drawn, and it adds what is public."""

    role, other = OWNER, CLIENT
    rounds_up = True

    def deal(self, shape: Sequence[int], value: Callable[[], Tensor], bits: int = 64) -> Parts:
        return Parts(self._streams[0].ring(shape, max(bits, 64)))

    def deal_ones(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Parts:
        return Parts(self._streams[0].ring(shape, bits))

    def deal_table(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Tensor | None:
        return self._streams[0].table(shape, bits)

    def share(
        self, shape: Sequence[int], owner: Callable[[], Tensor], client: Callable[[], Tensor] | None = None
    ) -> Tensor:
        return owner()

    def plus(self, share: Words, public: Public) -> Words:
        known: Any = public() if callable(public) else public
        return share + known

    def drop(self, share: Words, count: int) -> Words:
        return (share + ((1 << count) - 1)) >> count if count else share

    def _offset(self, piece: Piece) -> int:
        return piece.offset


class Client(Party):
    """The party that knows the prompt: its shares are the owner's corrections."""

    role, other = CLIENT, OWNER
    rounds_up = False

    def deal(self, shape: Sequence[int], value: Callable[[], Tensor], bits: int = 64) -> Parts:
        data = self._material.read(ring.packed_size(math.prod(shape), bits))
        return Parts(self.kernels.unpack(data, bits, tuple(shape)))

    def deal_ones(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Parts:
        return self.deal(shape, lambda: torch.empty(0), bits)

    def deal_table(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Tensor | None:
        data = self._material.read(math.prod(shape) * bits // 8)
        return data.view(ring.TABLE_WORDS[bits]).view(tuple(shape))

    def share(
        self, shape: Sequence[int], owner: Callable[[], Tensor], client: Callable[[], Tensor] | None = None
    ) -> Tensor:
        return (client or owner)()

    def plus(self, share: Words, public: Public) -> Words:
        return share

    def drop(self, share: Words, count: int) -> Words:
        return share >> count if count else share


class Dealer(Runtime):
    """The role that makes the material. It sees shapes, and knows every mask."""

    role = DEALER

    def __init__(
        self, transport: Transport, keys: list[bytes], material: Any = None, device: torch.device | str = "cpu"
    ) -> None:
        """material: where it goes; to live parties when ``None``."""
        super().__init__(transport, keys, material or Sending(transport), device)
        if material is None:
            self.begin("setup")

    def open_memory(self) -> None:
        self._material = peer.pour(self.transport, self.device) or self._material

    def mask(self, shape: Sequence[int], bits: int = 64) -> Parts:
        owner, client = (stream.ring(shape, bits) for stream in self._streams)
        if bits > 64:
            return Parts(self.kernels.add_wide(owner, client, bits), client)
        return Parts(ring.low_bits(owner + client, bits), client)

    def mask_ones(self, shape: Sequence[int], bits: int) -> Parts:
        owner, client = (stream.ring(shape, bits) for stream in self._streams)
        return Parts(self.kernels.add_ones(owner, client, bits), client)

    def mask_below(self, shape: Sequence[int], modulus: int) -> Parts:
        owner, client = (stream.below(shape, modulus) for stream in self._streams)
        return Parts((owner + client) % modulus, client)

    def mask_of(self, party: int, shape: Sequence[int]) -> Tensor | None:
        return self._streams[party].ring(shape)

    def deal(self, shape: Sequence[int], value: Callable[[], Tensor], bits: int = 64) -> Parts:
        result = value()
        held = result.shape if bits <= 64 else result.shape[:-1]
        _as_announced(held, shape)
        drawn = self._streams[OWNER].ring(shape, max(bits, 64))
        correction = result - drawn if bits <= 64 else self.kernels.subtract_wide(result, drawn, bits)
        self._material.write(CLIENT, self.kernels.pack(correction, bits))
        return Parts(result, correction)

    def deal_ones(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Parts:
        made = turned(self._streams[OWNER].ring(shape, bits))
        _as_announced(made.shape[:-1], shape)
        self._material.write(CLIENT, self.kernels.pack(made, bits))
        return Parts(made)

    def deal_table(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Tensor | None:
        made = turned(self._streams[OWNER].table(shape, bits))
        _as_announced(made.shape, shape)
        self._material.write(CLIENT, made.contiguous().view(-1).view(torch.uint8))
        return None

    def deal_common(self, sizes: list[Size], value: Callable[[], list[Tensor]]) -> list[Tensor]:
        made = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in value()]
        counts = [math.prod(shape) * dtype.itemsize for shape, dtype in sizes]
        if [tensor.numel() for tensor in made] != counts:
            raise OneTimeError("tensors of another size were announced")
        for party in (CLIENT, OWNER):  # the owner will wait for the client, which by then must have what came before
            for tensor in made:
                self._material.write(party, tensor)
            self._material.flush(party)
        return []

    def share(
        self, shape: Sequence[int], owner: Callable[[], Tensor], client: Callable[[], Tensor] | None = None
    ) -> Tensor:
        return shape_only(shape)

    def plus(self, share: Words, public: Public) -> Words:
        return share

    def drop(self, share: Words, count: int) -> Words:
        return share

    def less(self, mask: Parts, carry: Parts, size: int) -> Parts:
        return mask  # the dealer holds the integer

    def input(self, source: int, shape: Sequence[int], value: Callable[[], Tensor]) -> Tensor:
        return shape_only(shape)

    def known_to_dealer(self, mask: Tensor | None) -> Tensor | None:
        return mask

    def exchange(self, pieces: list[Piece]) -> list[Tensor | None]:
        return [None] * len(pieces)


def _as_announced(dealt: Sequence[int], announced: Sequence[int]) -> None:
    """What the parties do not expect would put all that follows out of step."""
    if tuple(dealt) != tuple(announced):
        raise OneTimeError(f"dealt {tuple(dealt)}, announced {tuple(announced)}")


ROLES: dict[int, type[Party] | type[Dealer]] = {OWNER: Owner, CLIENT: Client, DEALER: Dealer}
_NOTHING = torch.empty(0, dtype=torch.uint8)


def make(transport: Transport, material: Any = None, device: torch.device | str = "cpu") -> Runtime:
    """The runtime of this rank over a connected transport. material: of a tape (``tape``), or ``None`` where a dealer
    runs along, who then gives each party a key. device: where its tensors are, and what it sends and receives comes
    from and goes.
    """
    kind = ROLES[transport.rank]
    transport.staging = Staging(device)
    return kind(transport, agree_on_keys(transport) if material is None else material.keys, material, device)


def agree_on_keys(transport: Transport) -> list[bytes]:
    """The dealer draws a key for each party; returns what a runtime wants on this rank."""
    if transport.rank == DEALER:
        keys = [fresh_key() for _ in PARTIES]
        for party, key in zip(PARTIES, keys, strict=True):
            transport.send(party, torch.frombuffer(bytearray(key), dtype=torch.uint8), channel=CHANNEL)
        return keys
    return [bytes(transport.recv(DEALER, (32,), torch.uint8, channel=CHANNEL).tolist())]
