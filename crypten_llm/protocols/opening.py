"""Secrets and wires: additive shares with a scale and a valid width, and their masked openings.

Owns what the protocols exchange: x + r for a fresh uniform mask r. Everything a value is needed for, products,
truncation, lifting to 64 bits, functions, comparisons, follows from that one opening.

A ``Secret`` holds x * 2^scale modulo 2^width. Opening it modulo 2^ring with a truncation of t bits gives M, and

    x >> t  =  (M >> t) - (r >> t) + c * msb(r),   c = 2^(ring - t) * (1 - msb(M)),

up to one unit of rounding, unbiased, for |x| < 2^(ring - 2) (an offset of 2^(ring - 2) makes x non-negative). Modulo
2^(ring - t) the last term vanishes: a *narrow* wire, public part minus one mask. With the dealer's shares of r >> t
and msb(r), the whole of it holds modulo 2^64: a *lifted* wire, linear in two masks with public coefficients.

Protocols are generators: they yield what they want opened and are sent the wires, ``(wire,) = yield [Opening(x)]``.
``Rounds`` is the session of openings that they share. A protocol that is started goes on to its first request at once,
and waits there; a round opens what all of them have asked for, in the order in which they were started, in one message
each way, and takes each to its next request. So what does not depend on each other travels together, whoever asked for
it: the new rows of a cache with the next layer's scores, and one sequence's openings with another's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
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
class Wire:
    """An opened secret: x = public + sum of coefficient * mask, modulo 2^width, at ``scale``.

    public: what both parties see (``None`` at the dealer). masks: (coefficient, mask) pairs; a coefficient is the
    number -1 or a public tensor (``None`` at the dealer).
    """

    public: Tensor | None
    masks: list[tuple[Any, Parts]]
    scale: int
    width: int
    bits: int
    raw: Tensor | None = field(default=None, repr=False)  # M, for functions of the whole opening
    mask: Parts | None = field(default=None, repr=False)  # r

    @property
    def shape(self) -> torch.Size:
        return self.masks[0][1].shape

    @property
    def first(self) -> Tensor:
        """What this role holds of the first mask, whose coefficient is -1."""
        return self.masks[0][1].held

    def reshape(self, *shape: int) -> Wire:
        return self.map(lambda t: t.reshape(*shape))

    def transpose(self, first: int, second: int) -> Wire:
        return self.map(lambda t: t.transpose(first, second))

    def map(self, change: Callable[[Tensor], Tensor]) -> Wire:
        """The wire with ``change``, which must be linear, applied to each of its tensors; it is no whole opening."""
        masks = [(change(c) if isinstance(c, Tensor) else c, mask.map(change)) for c, mask in self.masks]
        public = None if self.public is None else change(self.public)
        return Wire(public, masks, self.scale, self.width, self.bits)


@dataclass(frozen=True)
class Opening:
    """What to open: ``secret`` modulo 2^ring after which ``truncate`` bits are dropped; ``lifted`` or narrow.

    function: keep M and r for ``smooth`` or a comparison; no wire is made, and |x| may fill the ring (a period).

    Reveals: x + r modulo 2^ring for a fresh mask r uniform modulo 2^ring: a uniform value, to both parties.
    Error: rounding by less than one unit of the new scale, unbiased; none without truncation.
    Cost: ring bits an element each way, packed; dealer, where bits are dropped, ring - truncate bits an element, and of
    a lifted wire 128 (none of an opening of 64 bits that drops none).
    Raises: Overflow when the declared |x| does not fit the ring, or the share is not valid there.
    Source: a masked opening as in Ben-Efraim et al. (Turbospeedz, ACNS 2019); truncation with a wrap bit as in
    Escudero et al. (CRYPTO 2020), section 5.1, here without the wrap bit where the narrower ring is enough.

    The rounding follows from M and the bits of x that are dropped, so whoever learned the result of a single
    truncation exactly, beside M, would learn something of those bits. Only logits are ever opened.
    """

    secret: Secret
    truncate: int = 0
    lifted: bool = False
    ring: int | None = None
    function: bool = False

    @property
    def size(self) -> int:
        """Bits of the ring."""
        return self.ring or self.secret.width

    @property
    def is_exact(self) -> bool:
        """Whether M = x + r is a wire as it is, modulo its own ring."""
        return not self.truncate and (self.size == 64 or not self.lifted)

    def check(self) -> None:
        """Raises Overflow."""
        size, secret = self.size, self.secret
        if size > secret.width:
            raise Overflow(f"a share valid modulo 2^{secret.width} cannot be opened modulo 2^{size}")
        if self.function and (self.truncate or self.lifted):
            raise Overflow("an opening for a function drops no bits and is not lifted")
        if not 0 <= self.truncate <= max(0, size - 2):
            raise Overflow(f"cannot drop {self.truncate} bits of an opening of {size}: give 0 to {size - 2}")
        if not self.function and secret.bits + secret.scale > size - 2:
            raise Overflow(
                f"|x| < 2^{secret.bits} at scale 2^{secret.scale} needs {secret.bits + secret.scale + 2} bits, "
                f"but the opening has {size}"
            )

    def prepare(self, runtime: Runtime, cell: Cell) -> tuple[Piece, Callable[[Tensor | None], Wire]]:
        """What travels, and what makes a wire of the sum."""
        self.check()
        size, shape = self.size, self.secret.shape
        mask = runtime.mask(shape, size)
        offset = 0 if self.function or self.is_exact else 1 << (size - 2)
        piece = Piece(tuple(shape), size, cell, self.secret.share, mask.held, offset)
        return piece, lambda public: self._wire(runtime, mask, public)

    def _wire(self, runtime: Runtime, mask: Parts, public: Tensor | None) -> Wire:
        secret, size, cut, shape = self.secret, self.size, self.truncate, mask.shape
        if self.function:
            return Wire(None, [(-1, mask)], secret.scale, size, secret.bits, raw=public, mask=mask)
        if self.is_exact:  # each party has its share of the mask already
            return Wire(public, [(-1, mask)], secret.scale, size, secret.bits, public, mask)
        width = 64 if self.lifted else size - cut
        dropped = runtime.deal(shape, lambda: ring.shift_right(mask.held, cut), width)
        masks: list[tuple[Any, Parts]] = [(-1, dropped)]
        shown = coefficient = None
        if public is not None:
            shown, coefficient = runtime.kernels.cut(public, cut, 1 << (size - 2 - cut), size, self.lifted)
        if self.lifted:
            masks.append((coefficient, runtime.deal(shape, lambda: ring.top_bit(mask.held, size))))
        return Wire(shown, masks, secret.scale - cut, width, secret.bits, public, mask)


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
    """This party's part of x without the public one: the sum of coefficient * mask."""
    total = -x.first
    for coefficient, mask in x.masks[1:]:
        total.addcmul_(coefficient, mask.held)
    return total


def as_secret(runtime: Runtime, wire: Wire) -> Secret:
    """The shares that a wire stands for; local. Of a lifted wire, valid modulo 2^64."""
    return Secret(shares_of(runtime, wire), wire.scale, wire.width, wire.bits)


def plain(opened: Wire) -> Wire:
    """What was opened whole for a function, as the narrow wire modulo its own ring that it also is; local."""
    mask = opened.mask
    assert mask is not None, "this is a view, of which the whole opening is not known"
    return Wire(opened.raw, [(-1, mask)], opened.scale, opened.width, opened.bits, opened.raw, mask)


def shares_of(runtime: Runtime, x: Wire) -> Tensor:
    """Additive shares behind a wire, valid modulo its ring; local."""

    def share() -> Tensor:
        assert x.public is not None, "what was opened for a function is no wire"
        return runtime.plus(masked(x), x.public)

    return runtime.share(x.shape, share)


def joined(wires: list[Wire], dim: int) -> Wire:
    """Narrow wires of one scale, one behind the other."""
    first = wires[0]
    publics: list[Any] = [wire.public for wire in wires]
    public = None if first.public is None else torch.cat(publics, dim)
    parts = [wire.masks[0][1] for wire in wires]
    clients: list[Any] = [part.client for part in parts]
    client = None if parts[0].client is None else torch.cat(clients, dim)
    mask = Parts(torch.cat([part.held for part in parts], dim), client)
    return Wire(public, [(-1, mask)], first.scale, min(wire.width for wire in wires), first.bits)


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
