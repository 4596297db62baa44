"""Roles, masks and correlations: the one place where the three processes differ.

Owns the roles. The dealer runs the same program as the two parties; where they hold shares, it holds masks. ``mask``
gives each party its part of a fresh uniform mask and the dealer the whole of it; ``deal`` turns a value that only the
dealer can compute into additive shares: the owner expands its share from a key it has in common with the dealer, the
client is sent the correction. Nothing ever travels to the dealer.

What a role does with shares is told to ``share`` and ``plus``, and what is sent goes through ``exchange``: a protocol
says what each party computes and sends, and asks nobody who it is.

The program is cut into sections; each has its own streams and its own stretch of the material, so that a section can
be skipped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.material import CHANNEL, FRAME, Sending
from crypten_llm.protocols.dealer.randomness import Stream, derive_key, fresh_key
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.roles import CLIENT, DEALER, OWNER

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport

PARTIES = (OWNER, CLIENT)
Size = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor
Public = int | Tensor | Callable[[], Tensor] | None  # see ``Runtime.plus``
Held = TypeVar("Held")
Words = TypeVar("Words", int, Tensor)


@dataclass(slots=True)
class Parts:
    """What a role holds of a mask, or of a dealt value. held: a party's part; the dealer's whole. client: the client's
    part, which the dealer knows (``None`` at a party).
    """

    held: Tensor
    client: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.held.shape

    def map(self, change: Callable[[Tensor], Tensor]) -> Parts:
        """Both, changed by what is linear in them."""
        return Parts(change(self.held), None if self.client is None else change(self.client))


@dataclass(slots=True)
class Piece:
    """What a message carries of one value, modulo 2^bits.

    sender: ``None`` where both parties send share + mask (+ a public offset, once); else the one that sends ``share``
    as it is. cell: the (phase, kind) that its bytes are counted in. Above 64 bits share and mask are limbs. modulus:
    where that is not 2^bits, 2^bits - 1 or a number below 2^63.
    """

    shape: tuple[int, ...]
    bits: int
    cell: tuple[str, str]
    share: Tensor | None = None
    mask: Tensor | None = None
    offset: int = 0
    sender: int | None = None
    modulus: int | None = None
    size: int = field(init=False)  # bytes

    def __post_init__(self) -> None:
        self.size = ring.packed_size(math.prod(self.shape), self.bits)

    @property
    def is_wide(self) -> bool:
        return self.bits > 64

    def sent_by(self, party: int) -> int:
        """Bytes that this party sends of it."""
        return self.size if self.sender in (None, party) else 0


class Runtime(ABC):
    """One role's view: its streams, its link to the other party, and the material that it makes or uses."""

    role: ClassVar[int]

    def __init__(
        self, transport: Transport, keys: list[bytes], material: Any, device: torch.device | str = "cpu"
    ) -> None:
        """keys: [own key] at a party, [the owner's, the client's] at the dealer."""
        self.transport = transport
        self.device = torch.device(device)
        self.kernels = ring.on(device)
        self.section = ""
        self._keys = keys
        self._material = material
        self._streams: list[Stream] = []
        self._begun: set[str] = set()

    # Sections.

    def begin(self, label: str) -> None:
        """Starts a section: fresh streams that depend on ``label`` alone, so that all roles start it alike."""
        assert label not in self._begun, f"section {label!r} is begun twice: it would use its masks twice"
        self._begun.add(label)
        self.end()
        self._material.begin(label)
        self.section = label
        self._streams = [self._stream(key, label) for key in self._keys]

    def end(self) -> None:
        """Ends a section: all its material has been made, or used."""
        if self.section:
            self._material.end()
        self.section = ""

    def _stream(self, key: bytes, label: str) -> Stream:
        return Stream(derive_key(key, label), self.device)

    # Masks and correlations.

    @abstractmethod
    def mask(self, shape: Sequence[int], bits: int = 64) -> Parts:
        """A fresh mask, uniform modulo 2^bits; limbs above 64 bits."""

    @abstractmethod
    def mask_ones(self, shape: Sequence[int], bits: int) -> Parts:
        """A fresh mask, uniform modulo 2^bits - 1, limbs."""

    @abstractmethod
    def mask_below(self, shape: Sequence[int], modulus: int) -> Parts:
        """A fresh mask, uniform modulo a small number: words; each party's are off by less than modulus / 2^63."""

    @abstractmethod
    def mask_of(self, party: int, shape: Sequence[int]) -> Tensor | None:
        """A mask uniform modulo 2^64 that ``party`` and the dealer know and the other party does not (``None``)."""

    @abstractmethod
    def deal(self, shape: Sequence[int], value: Callable[[], Tensor], bits: int = 64) -> Parts:
        """Additive shares modulo 2^bits of ``value()``, which only the dealer computes; above 64 bits limbs.

        Dealer material: bits / 8 bytes an element, packed, to the client.
        """

    @abstractmethod
    def deal_ones(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Parts:
        """Additive shares modulo 2^bits - 1, limbs: uniform ones at the owner, and what ``turned`` makes of those, the
        value less them, at the client; called by the dealer alone, which gets no value back. Dealer material: as
        ``deal``'s.
        """

    @abstractmethod
    def deal_table(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Words of 8, 16, 32 or 64 bits: uniform ones at the owner, and what ``turned`` makes of those at the client.

        turned: called by the dealer alone, which gets ``None``; it may write into what it is given. So the two can
        share a table in any group. Dealer material: the words' bytes, to the client.
        """

    @abstractmethod
    def deal_common(self, sizes: list[Size], value: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tensors of ``value()``, which only the dealer computes, at both parties; at the dealer, nothing.

        sizes: (shape, dtype) of each. Dealer material: their bytes, to each party.
        """

    def blocks(self, count: int, size: int) -> Iterator[slice]:
        """Stretches of ``count`` elements, for what is dealt and used a block at a time."""
        for start in range(0, count, size) or [0]:
            yield slice(start, min(start + size, count))

    # What is done with shares.

    @abstractmethod
    def share(
        self, shape: Sequence[int], owner: Callable[[], Tensor], client: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """This party's share, as ``owner`` or ``client`` (by default the same) computes it; at the dealer its shape."""

    @abstractmethod
    def plus(self, share: Words, public: Public) -> Words:
        """Shares of x + public, from shares of x: the owner adds it. public: a number, a tensor of words or ``None``
        at whoever does not know it, or a function that gives it.
        """

    @abstractmethod
    def drop(self, share: Words, count: int) -> Words:
        """Shares of x / 2^count modulo 2^(w - count), from shares of x modulo 2^w: the owner's rounded up, the client's
        down. Within one unit, unbiased, exact for multiples of 2^count; it cannot fail, since what the shares' sum
        exceeds 2^w by is a multiple of 2^(w - count) afterwards.
        """

    @abstractmethod
    def less(self, mask: Parts, carry: Parts, size: int) -> Parts:
        """The mask, uniform modulo 2^size, as shares of an integer: without the carry of its two parts."""

    @abstractmethod
    def input(self, source: int, shape: Sequence[int], value: Callable[[], Tensor]) -> Tensor:
        """Shares of words that party ``source`` knows, nothing sent: its own are ``value()``, the other's are zero."""

    def public(self, words: Tensor) -> Tensor:
        """Shares of public words."""
        return self.input(OWNER, words.shape, words.clone)

    def held_by(self, party: int, value: Held | None) -> Held | None:
        """``value`` at that party, ``None`` elsewhere: what is its alone stays there."""
        return value if self.role == party else None

    def known_to_dealer(self, mask: Tensor | None) -> Tensor | None:
        """``mask`` where the dealer needs it again later; ``None`` at a party, which has no use for it any more."""
        return None

    # Messages.

    @abstractmethod
    def exchange(self, pieces: list[Piece]) -> list[Tensor | None]:
        """All pieces, in one message each way. Returns of an opening its sum, words; of what one party sends, that at
        the other, and ``None`` at itself. At the dealer ``None`` for all.
        """


class Party(Runtime):
    """A compute party: it holds shares."""

    other: ClassVar[int]  # the other party
    rounds_up: ClassVar[bool]  # what it drops of its shares; the other party rounds down

    def __init__(
        self, transport: Transport, keys: list[bytes], material: Any = None, device: torch.device | str = "cpu"
    ) -> None:
        """material: where it comes from; a live dealer's when ``None``."""
        given = transport.stream_from(DEALER, FRAME, CHANNEL) if material is None else material
        super().__init__(transport, keys, given, device)
        if material is None:
            self.begin("setup")

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
        theirs = self.transport.swap(self.other, message, sum(due), self._cells(pieces))
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
            assert piece.share is not None and piece.mask is not None, "an opening comes with its share and its mask"
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
        return -(-share >> count) if count else share

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
        assert held == torch.Size(shape), f"dealt {tuple(held)}, announced {tuple(shape)}"
        drawn = self._streams[OWNER].ring(shape, max(bits, 64))
        correction = result - drawn if bits <= 64 else self.kernels.subtract_wide(result, drawn, bits)
        self._material.write(CLIENT, self.kernels.pack(correction, bits))
        return Parts(result, correction)

    def deal_ones(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Parts:
        made = turned(self._streams[OWNER].ring(shape, bits))
        assert made.shape[:-1] == torch.Size(shape), f"dealt {tuple(made.shape[:-1])}, announced {tuple(shape)}"
        self._material.write(CLIENT, self.kernels.pack(made, bits))
        return Parts(made)

    def deal_table(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Tensor | None:
        made = turned(self._streams[OWNER].table(shape, bits))
        assert made.shape == torch.Size(shape), f"dealt {tuple(made.shape)}, announced {tuple(shape)}"
        self._material.write(CLIENT, made.contiguous().view(-1).view(torch.uint8))
        return None

    def deal_common(self, sizes: list[Size], value: Callable[[], list[Tensor]]) -> list[Tensor]:
        made = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in value()]
        counts = [math.prod(shape) * dtype.itemsize for shape, dtype in sizes]
        assert [tensor.numel() for tensor in made] == counts, "tensors of another size were announced"
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


ROLES: dict[int, type[Party] | type[Dealer]] = {OWNER: Owner, CLIENT: Client, DEALER: Dealer}
_NOTHING = torch.empty(0, dtype=torch.uint8)


def make(transport: Transport, material: Any = None, device: torch.device | str = "cpu") -> Runtime:
    """The runtime of this rank over a connected transport. material: of a tape (``tape``), or ``None`` where a dealer
    runs along, who then gives each party a key.
    """
    kind = ROLES[transport.rank]
    return kind(transport, agree_on_keys(transport) if material is None else material.keys, material, device)


def agree_on_keys(transport: Transport) -> list[bytes]:
    """The dealer draws a key for each party; returns what a runtime wants on this rank."""
    if transport.rank == DEALER:
        keys = [fresh_key() for _ in PARTIES]
        for party, key in zip(PARTIES, keys, strict=True):
            transport.send(party, torch.frombuffer(bytearray(key), dtype=torch.uint8), channel=CHANNEL)
        return keys
    return [bytes(transport.recv(DEALER, (32,), torch.uint8, channel=CHANNEL).tolist())]
