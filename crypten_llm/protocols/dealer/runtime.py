"""Masks, correlations, shares and messages: all that a protocol may ask of the role that runs it.

Owns what the three roles have in common; ``roles`` has what each does. ``mask`` gives each party its part of a fresh
uniform mask and the dealer the whole of it; ``deal`` turns a value that only the dealer can compute into additive
shares. What a role does with shares is told to ``share`` and ``plus``, and what is sent goes through ``exchange``: a
protocol says what each party computes and sends, and asks nobody who it is.

The program is cut into sections; each has its own streams and its own stretch of the material, so that a section can
be skipped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from crypten_llm.errors import OneTimeError
from crypten_llm.kernels import ring
from crypten_llm.process import Owned
from crypten_llm.protocols.dealer.randomness import Stream, derive_key
from crypten_llm.roles import CLIENT, OWNER

if TYPE_CHECKING:
    from crypten_llm.kernels.mailbox import Mailbox
    from crypten_llm.kernels.opened import Waiting
    from crypten_llm.links.transport import Transport

PARTIES = (OWNER, CLIENT)
Size = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor
Public = int | Tensor | Callable[[], Tensor] | None  # see ``Runtime.plus``
Swap = Callable[[int, Tensor, int, Any], Tensor]  # as ``Transport.swap``
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


def _moved(device: torch.device, known: Tensor) -> Tensor:
    return known.to(device)


class Runtime(ABC):
    """One role's view: its streams, its link to the other party, and the material that it makes or uses."""

    role: ClassVar[int]
    rounds_up: ClassVar[bool] = False  # of shares whose low bits are dropped one party's; the other rounds down

    def __init__(
        self, transport: Transport, keys: list[bytes], material: Any, device: torch.device | str = "cpu"
    ) -> None:
        """keys: [own key] at a party, [the owner's, the client's] at the dealer. device: where all of this role's
        tensors are.
        """
        self.transport = transport
        self.device = torch.device(device)
        self.kernels = ring.on(device)
        self._constants = lru_cache(maxsize=256)(partial(_moved, self.device))  # ends with this role, and what it holds
        self.section = ""
        self._keys = keys
        self._material = material
        self._swap: Swap | None = None  # in the place of the transport's
        self.mailbox: Mailbox | None = None  # of a party whose captured messages go from card to card
        self.waiting: Waiting | None = None  # such a party's kernels for what comes
        self._streams: list[Stream] = []
        self._begun: set[str] = set()
        self._owned = Owned()

    # Sections.

    def begin(self, label: str) -> None:
        """Starts a section: fresh streams that depend on ``label`` alone, so that all roles start it alike.

        Raises OneTimeError for a section that was begun before, and after a fork, in the child.
        """
        self._owned.check("the parties' randomness")
        if label in self._begun:
            raise OneTimeError(f"section {label!r} is begun twice: it would use its masks twice")
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

    @abstractmethod
    def open_memory(self) -> None:
        """What is captured from now on is exchanged from card to card, and so is all material of a live dealer that is
        on a card too (``peer``). Behind the roles' making, before anything is dealt.
        """

    # What ``captured`` puts others in the place of.

    @property
    def material(self) -> Any:
        """Where material comes from, or goes."""
        return self._material

    @property
    def streams(self) -> list[Stream]:
        """The section's: a party's own, at the dealer of both."""
        return self._streams

    @contextmanager
    def replaced(self, material: Any, swap: Swap | None) -> Iterator[None]:
        """A with block with another source or sink of material, and another way to exchange a message."""
        before = self._material, self._swap
        self._material, self._swap = material, swap
        try:
            yield
        finally:
            self._material, self._swap = before

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
        return self.input(OWNER, words.shape, self.moved(words).clone)

    # What a role knows in the clear, public or its own, is made on the processor, where nobody waits for its numbers.

    def moved(self, known: Tensor) -> Tensor:
        """Such a tensor on this role's device."""
        return known.to(self.device, non_blocking=True)

    def constant(self, known: Tensor) -> Tensor:
        """The same of one that comes again, as the same object (a tensor is equal to no other): it is moved once."""
        return self._constants(known)

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
