"""Secrets and wires: additive shares with a scale and a valid width, and their masked openings.

Owns what the protocols exchange: x + r for a fresh uniform mask r. Everything a value is needed for, products,
lifting to wider rings, functions, comparisons, follows from that one opening.

A ``Secret`` holds x * 2^scale modulo 2^width. Low bits are dropped before it is opened, and locally: one party rounds
its share up, the other down, and what that leaves is valid modulo as many bits less (``Runtime.drop``). Opening x
modulo 2^n gives M = x + r: an *exact* wire, public part minus one mask, of which each party has its part. With
|x| < 2^(n-2) it can be *lifted* to a wider ring 2^w. An offset makes x non-negative; with the dealer's shares, modulo
2^(w-n), of the carry c of the mask's two parts and of its top bit b,

    x  =  M - 2^(n-2) - (r0 + r1 - 2^n c) + 2^n (1 - msb(M)) b   modulo 2^w:

linear in two secrets with public coefficients.

Protocols are generators: they yield what they want opened and are sent the wires, ``(wire,) = yield [Opening(x)]``.
``Rounds`` is the session of openings that they share. A protocol that is started goes on to its first request at once,
and waits there; a round opens what all of them have asked for, in the order in which they were started, in one message
each way, and takes each to its next request. So what does not depend on each other travels together, whoever asked for
it: the new rows of a cache with the next layer's scores, and one sequence's openings with another's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.links.meter import Cell, Meter, Scope
from crypten_llm.protocols.dealer.roles import Parts, Piece, Runtime


class Overflow(AssertionError):
    """An operation whose result would not fit its ring; the message names it."""


class Secret:
    """Additive shares of integers x * 2^scale, valid modulo 2^width; at the dealer, a shape (torch's meta device).

    bits: |x| < 2^bits, declared by whoever made it, so that overflow can be refused before anything is sent. opened:
    the wire that it was opened as, where it is kept.
    """

    __slots__ = ("share", "scale", "width", "bits", "opened")

    def __init__(self, share: Tensor, scale: int, width: int, bits: int) -> None:
        self.share, self.scale, self.width, self.bits = share, scale, width, bits
        self.opened: Wire | None = None

    @property
    def shape(self) -> torch.Size:
        return self.share.shape

    def like(self, share: Tensor) -> Self:
        """Other shares of the same scale, width and bits."""
        return type(self)(share, self.scale, self.width, self.bits)

    def reshape(self, *shape: int) -> Self:
        return self.like(self.share.reshape(*shape))

    def permute(self, *order: int) -> Self:
        return self.like(self.share.permute(*order))

    def transpose(self, first: int, second: int) -> Self:
        return self.like(self.share.transpose(first, second))

    def __getitem__(self, index: Any) -> Self:
        return self.like(self.share[index])

    def __neg__(self) -> Self:
        return self.like(-self.share)

    def at_scale(self, scale: int) -> Self:
        """The same values with more fractional bits; what was valid modulo 2^w now is modulo that much more."""
        more = scale - self.scale
        if not more:
            return self
        return type(self)(self.share << more, scale, min(64, self.width + more), self.bits)

    def become(self, other: Secret) -> None:
        """Takes over ``other``'s shares of the same value."""
        self.share, self.scale, self.width, self.bits = other.share, other.scale, other.width, other.bits
        self.opened = None


@dataclass
class Wrap:
    """What a lifted wire adds where its mask has wrapped: ``coefficient``, 2^size or 0, times a dealt bit.

    coefficient: public, ``None`` at the dealer. bit: the top bit of the mask, shares modulo 2^(width - size).
    """

    coefficient: Tensor | None
    bit: Parts
    size: int

    def map(self, change: Callable[[Tensor], Tensor]) -> Wrap:
        return Wrap(None if self.coefficient is None else change(self.coefficient), self.bit.map(change), self.size)


@dataclass
class Wire:
    """An opened secret: x = public - mask, modulo 2^width, at ``scale``; of a lifted one, plus its ``wrap``.

    public: what both parties see (``None`` at the dealer). mask: at a party its share of the mask.
    """

    public: Tensor | None
    mask: Parts
    scale: int
    width: int
    bits: int
    wrap: Wrap | None = None

    @property
    def shape(self) -> torch.Size:
        return self.mask.shape

    @property
    def seen(self) -> Tensor:
        """The public part, at a party."""
        assert self.public is not None, "parties have opened it"
        return self.public

    def reshape(self, *shape: int) -> Wire:
        return self.map(lambda t: t.reshape(*shape))

    def transpose(self, first: int, second: int) -> Wire:
        return self.map(lambda t: t.transpose(first, second))

    def map(self, change: Callable[[Tensor], Tensor]) -> Wire:
        """The wire with ``change``, which must be linear, applied to each of its tensors."""
        public = None if self.public is None else change(self.public)
        wrap = None if self.wrap is None else self.wrap.map(change)
        return Wire(public, self.mask.map(change), self.scale, self.width, self.bits, wrap)


@dataclass(frozen=True)
class Opening:
    """What to open: ``secret`` modulo 2^ring, of which ``truncate`` bits are dropped first; exact or lifted.

    lifted: to modulo 2^lifted, where that is more than what is opened; 0 is not. function: |x| may fill the ring,
    which is the period of a function, or the ring of what is meant modulo it.

    Reveals: x + r modulo 2^n for a fresh mask r uniform modulo 2^n, n = ring - truncate: a uniform value, to both.
    Error: rounding by less than one unit of the new scale, unbiased; none without truncation.
    Cost: n bits an element each way, packed; dealer, of a lifted wire alone, 2 (lifted - n) bits an element.
    Raises: Overflow when the declared |x| does not fit what is opened, or the share is not valid there.
    Source: a masked opening as in Ben-Efraim et al. (Turbospeedz, ACNS 2019); the wrap bit as in Escudero et al.
    (CRYPTO 2020), section 5.1; truncation of additive shares as in SecureML (S&P 2017), section 4.1, on a ring that
    loses the dropped bits, so that it never fails.

    The rounding follows from M and the bits of x that are dropped, so whoever learned the result of a single
    truncation exactly, beside M, would learn something of those bits. Only logits are ever opened.
    """

    secret: Secret
    truncate: int = 0
    lifted: int = 0
    ring: int | None = None
    function: bool = False

    @property
    def size(self) -> int:
        """Bits that are opened."""
        return (self.ring or self.secret.width) - self.truncate

    @property
    def is_exact(self) -> bool:
        """Whether M = x + r is a wire as it is, modulo its own ring."""
        return self.lifted <= self.size

    def check(self) -> None:
        """Raises Overflow."""
        size, secret = self.size, self.secret
        if size + self.truncate > secret.width:
            raise Overflow(f"a share valid modulo 2^{secret.width} cannot be opened modulo 2^{size + self.truncate}")
        if self.function and self.lifted:
            raise Overflow("an opening for a function is not lifted")
        least = 1 if self.function else 2
        if self.truncate < 0 or size < least:
            raise Overflow(
                f"cannot drop {self.truncate} bits of an opening of {size + self.truncate}: give 0 to "
                f"{size + self.truncate - least}"
            )
        needs = secret.bits + secret.scale - self.truncate + 2
        if not self.function and needs > size:
            raise Overflow(
                f"|x| < 2^{secret.bits} at scale 2^{secret.scale - self.truncate} needs {needs} bits, but the opening "
                f"has {size}"
            )

    def prepare(self, runtime: Runtime, cell: Cell) -> tuple[Piece, Callable[[Tensor | None], Wire]]:
        """What travels, and what makes a wire of the sum."""
        self.check()
        size, secret = self.size, self.secret
        mask = runtime.mask(secret.shape, size)
        offset = 0 if self.is_exact else 1 << (size - 2)
        share = runtime.drop(secret.share, self.truncate)
        piece = Piece(tuple(secret.shape), size, cell, share, mask.held, offset)
        return piece, lambda public: self._wire(runtime, mask, public)

    def _wire(self, runtime: Runtime, mask: Parts, public: Tensor | None) -> Wire:
        secret, size = self.secret, self.size
        scale = secret.scale - self.truncate
        if self.is_exact:
            return Wire(public, mask, scale, size, secret.bits)
        wrapped = runtime.deal((2, *mask.shape), lambda: _carry_and_top(mask, size), self.lifted - size)
        carry, bit = wrapped.map(lambda t: t[0]), wrapped.map(lambda t: t[1])
        whole = runtime.less(mask, carry, size)
        shown = coefficient = None
        if public is not None:
            shown, coefficient = runtime.kernels.unwrap(public, size)
        return Wire(shown, whole, scale, self.lifted, secret.bits, Wrap(coefficient, bit, size))


def _carry_and_top(mask: Parts, size: int) -> Tensor:
    """At the dealer: whether the two parts of a mask wrapped, and its top bit."""
    assert mask.client is not None, "the dealer knows both parts"
    return torch.stack([(mask.held < mask.client).long(), ring.top_bit(mask.held, size)])


@dataclass(frozen=True)
class Message:
    """What one party sends the other as it is: it must hide what it carries itself, or be meant for the other's eyes.

    words: at the sender, of which the low ``bits`` travel. The other party is sent them in the place of a wire.
    """

    sender: int
    shape: tuple
    bits: int
    words: Tensor | None

    def prepare(self, runtime: Runtime, cell: Cell) -> tuple[Piece, Callable[[Tensor | None], Tensor | None]]:
        return Piece(self.shape, self.bits, cell, self.words, sender=self.sender), lambda words: words


Request = Opening | Message
Result = TypeVar("Result")
Protocol = Generator[list[Request], list[Any], Result]  # yields what it wants opened and is sent the wires
Finish = Iterator[tuple[Callable[[Tensor | None], Any], Tensor | None]]  # for each request what makes its wire, of what


def masked(x: Wire) -> Tensor:
    """This party's part of x without the public one."""
    total = -x.mask.held
    if x.wrap is not None:
        assert x.wrap.coefficient is not None, "parties have opened it"
        total.addcmul_(x.wrap.coefficient, x.wrap.bit.held)
    return total


def as_secret(runtime: Runtime, wire: Wire) -> Secret:
    """The shares that a wire stands for; local."""
    return Secret(shares_of(runtime, wire), wire.scale, wire.width, wire.bits)


def shares_of(runtime: Runtime, x: Wire) -> Tensor:
    """Additive shares behind a wire, valid modulo its ring; local."""
    return runtime.share(x.shape, lambda: runtime.plus(masked(x), x.seen))


def joined(wires: list[Wire], dim: int) -> Wire:
    """Exact wires of one scale, one behind the other."""
    first = wires[0]
    publics: list[Any] = [wire.public for wire in wires]
    public = None if first.public is None else torch.cat(publics, dim)
    parts = [wire.mask for wire in wires]
    clients: list[Any] = [part.client for part in parts]
    client = None if parts[0].client is None else torch.cat(clients, dim)
    mask = Parts(torch.cat([part.held for part in parts], dim), client)
    return Wire(public, mask, first.scale, min(wire.width for wire in wires), first.bits)


class Running:
    """A protocol under way. ``requests``: what it waits for. ``is_done``: then ``result`` is what it returned."""

    __slots__ = ("protocol", "scope", "requests", "is_done", "result")

    def __init__(self, protocol: Protocol[Any], scope: Scope) -> None:
        self.protocol, self.scope = protocol, scope
        self.requests: list[Request] = []
        self.is_done = False
        self.result: Any = None


class Rounds:
    """One role's protocols under way, over its runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._running: list[Running] = []
        self._strands: dict[greenlet, Running | None] = {}  # programs side by side, and what each waits for

    @property
    def is_shared(self) -> bool:
        """Whether programs run side by side."""
        return bool(self._strands)

    @property
    def _meter(self) -> Meter:
        return self.runtime.transport.meter

    def start(self, protocol: Protocol[Any]) -> Running:
        """Takes a protocol to its first request, which joins the next round."""
        running = Running(protocol, self._meter.scope)
        self._advance(running, None)
        if not running.is_done:
            self._running.append(running)
        return running

    def finish(self, running: Running) -> Any:
        """Runs rounds until this protocol is done; returns its result."""
        while not running.is_done:
            strand = getcurrent()
            if strand in self._strands:
                self._strands[strand] = running
                strand.parent.switch()
            else:
                self._round()
        return running.result

    def run(self, protocol: Protocol[Result]) -> Result:
        """``start`` and ``finish``."""
        return self.finish(self.start(protocol))

    def open(self, *openings: Opening) -> list[Wire]:
        """The wires of these, and a round of everything that waits."""
        return self.run(_opened(list(openings)))

    def side_by_side(self, programs: list[Callable[[], Result]]) -> list[Result]:
        """Runs programs that know nothing of each other, and shares their rounds: whenever all that have not ended wait
        for one, one message carries what all of them open. Returns what each returned.

        They take turns in the order in which they are given, alike on every role. A program that raises ends all, and
        what they had asked for is forgotten.
        """
        assert not self._strands, "programs side by side are not nested"
        before = list(self._running)
        hub, results, outer = getcurrent(), {}, self._meter.exchange_scopes([self._meter.scope])
        strands = [greenlet(program, hub) for program in programs]
        scopes = {strand: [outer[-1]] for strand in strands}
        self._strands = dict.fromkeys(strands)
        try:
            while self._strands:
                for strand, waits in list(self._strands.items()):
                    if waits is not None and not waits.is_done:
                        continue
                    self._meter.exchange_scopes(scopes[strand])
                    given = strand.switch()
                    scopes[strand] = self._meter.exchange_scopes([outer[-1]])
                    if strand.dead:
                        results[strand] = given
                        del self._strands[strand]
                if any(waits is not None and not waits.is_done for waits in self._strands.values()):
                    self._round()
        finally:
            left, self._strands = list(self._strands), {}
            for strand in left:  # after an error: each leaves the steps that it was in
                self._meter.exchange_scopes(scopes[strand])
                strand.throw()
            if left:
                self._running = [item for item in self._running if item in before]
            self._meter.exchange_scopes(outer)
        return [results[strand] for strand in strands]

    def _round(self) -> None:
        """Opens all that is asked for, and takes every protocol one request further."""
        running, self._running = self._running, []
        assert running, "no protocol is under way: what is waited for will never come"
        prepared = [
            request.prepare(self.runtime, (item.scope.phase, item.scope.kind))
            for item in running
            for request in item.requests
        ]
        opened = self.runtime.exchange([piece for piece, _ in prepared]) if prepared else []
        finish = zip([finish for _, finish in prepared], opened, strict=True)
        for item in running:
            self._advance(item, finish)
            if not item.is_done:
                self._running.append(item)

    def _advance(self, item: Running, finish: Finish | None) -> None:
        """finish: gives for each request what makes its wire, and of what; ``None`` at the start."""
        meter = self._meter
        if item.scope is meter.scope:
            self._resume(item, finish)
        else:
            with meter.within(item.scope):
                self._resume(item, finish)

    def _resume(self, item: Running, finish: Finish | None) -> None:
        try:
            if finish is None:
                item.requests = next(item.protocol)
            else:
                wires = [make(of) for make, of in itertools.islice(finish, len(item.requests))]
                item.requests = item.protocol.send(wires)
        except StopIteration as end:
            item.is_done, item.result, item.requests = True, end.value, []


def _opened(openings: list[Request]) -> Protocol[list[Wire]]:
    return (yield openings)
