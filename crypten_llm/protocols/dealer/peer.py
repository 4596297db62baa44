"""A way around the sockets for processes on GPUs of one host: messages and material go from card to card.

Owns how they open it to each other, over the link that they have already. What is said with it is what would be said
over that link, and counted as that; material, of which no messages are made, as a tape's. It hides nothing from the
host, on which all of these cards are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated

import torch
from msgspec import Meta

from crypten_llm.errors import PartyError, UsageError, first_line
from crypten_llm.kernels.mailbox import Mailbox
from crypten_llm.kernels.opened import HANDLE_BYTES, Waiting, card_of
from crypten_llm.kernels.pipe import Inlet, Outlet
from crypten_llm.protocols.dealer.piped import Pouring, Tapped
from crypten_llm.protocols.dealer.runtime import PARTIES
from crypten_llm.records import Record
from crypten_llm.roles import DEALER

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport

LEAVE = "give each a card of its own (--device cuda:0,cuda:1), or leave --peer-memory out"
MESSAGES = 50  # with which a card that both are on is tried
SLOWEST = 2e-4  # seconds of one; of processes that take turns, a turn has a millisecond or two
PAUSE = 2e-4  # seconds until a dealer looks again whether there is room
PATIENCE = 0.2  # seconds of a wait for the device after which the links are looked at, now and then


class Offer(Record, frozen=True):
    """A process's card, by the number that the driver gives it, and the handle of memory that it opens, in hexadecimal
    digits; neither of a dealer that is on no card, and sends what it deals over the links.
    """

    card: Annotated[str, Meta(max_length=100)]
    handle: Annotated[str, Meta(pattern=f"^([0-9a-f]{{{2 * HANDLE_BYTES}}})?$")]


def connect(transport: Transport, other: int, device: torch.device, waiting: Waiting) -> Mailbox:
    """This party's mailbox, open to the other and tried. Both call this.

    Raises UsageError on one card on which they take turns, and where the cards do not reach each other.
    """
    with _telling():
        mailbox = Mailbox(device, waiting)
        mine = Offer(card_of(device), mailbox.handle.hex())
        transport.send_json(other, mine)
        theirs = transport.recv_json(other, Offer)
        mailbox.open(bytes.fromhex(theirs.handle))
    numbers = torch.arange(1000, device=device)
    for count in (1000, 0):
        came = mailbox.swap(((numbers + transport.rank) & 255).to(torch.uint8)[:count], count, 0)
        mailbox.advance(1)
        wait(transport, waiting, other)
        if not torch.equal(came, ((numbers + other) & 255).to(torch.uint8)[:count]):
            raise UsageError(f"the cards of this host do not read what each other wrote; {LEAVE}")
    if theirs.card == mine.card:
        _check_pace(transport, mailbox, waiting, other)
    return mailbox


def waiting_on(device: torch.device, seconds: float) -> Waiting:
    """For what comes from another card. Raises UsageError on a processor."""
    if device.type != "cuda":
        raise UsageError(f"--peer-memory is for GPUs, and this party computes on {device.type}; {LEAVE}")
    return Waiting(device, seconds)


def tap(transport: Transport, device: torch.device, waiting: Waiting) -> Tapped | None:
    """At a party: what a live dealer on this host pours into its card's memory; none of a dealer without a card."""
    offer = transport.recv_json(DEALER, Offer)
    if not offer.handle:
        return None
    with _telling():
        outlet = Outlet(device, waiting)
        transport.send_json(DEALER, Offer(card_of(device), outlet.handle.hex()))
        outlet.open(bytes.fromhex(offer.handle))
    return Tapped(outlet, transport.meter, lambda: wait(transport, waiting, DEALER))


def pour(transport: Transport, device: torch.device) -> Pouring | None:
    """At a live dealer, as ``tap`` at both parties."""
    if device.type != "cuda":
        for party in PARTIES:
            transport.send_json(party, Offer("", ""))
        return None
    inlets = {}
    for party in PARTIES:
        with _telling():
            inlets[party] = Inlet(device, partial(_pause, transport, party))
            transport.send_json(party, Offer(card_of(device), inlets[party].handle.hex()))
            inlets[party].open(bytes.fromhex(transport.recv_json(party, Offer).handle))
    return Pouring(inlets)


def _pause(transport: Transport, party: int, seconds: float) -> None:
    """Of a dealer that is as far ahead of a party as there is room. Raises PartyError where that has read nothing for
    so long, or has gone.
    """
    transport.check_open()
    if seconds > transport.timeout:
        raise PartyError(
            f"{transport.name(party)} took nothing out of its card's memory for {transport.timeout:g} s "
            f"({transport.meter.where}); start all parties again"
        )
    time.sleep(PAUSE)


@contextmanager
def _telling() -> Iterator[None]:
    """Raises UsageError where the cards do not reach each other."""
    try:
        yield
    except RuntimeError as error:
        raise UsageError(f"the cards of this host do not share memory ({first_line(error)}); {LEAVE}") from None


def _check_pace(transport: Transport, mailbox: Mailbox, waiting: Waiting, other: int) -> None:
    """Raises UsageError where the two processes take turns on one card: a message then takes as long as a turn."""
    byte = torch.zeros(1, dtype=torch.uint8, device=transport.staging.device)
    seconds = []
    for _ in range(2):  # the first compiles nothing any more, but may wake the card
        started = time.perf_counter()
        for step in range(MESSAGES):
            mailbox.swap(byte, 1, step)
        mailbox.advance(MESSAGES)
        wait(transport, waiting, other)
        seconds.append((time.perf_counter() - started) / MESSAGES)
    if min(seconds) > SLOWEST:
        raise UsageError(
            f"--peer-memory: owner and client take turns on one card, {1e3 * min(seconds):.2g} ms a message; start "
            f"nvidia-cuda-mps-control -d on the host before, {LEAVE}"
        )


def wait(transport: Transport, waiting: Waiting, other: int, meanwhile: Callable[[], bool] = lambda: False) -> None:
    """Until the device has done all that was launched. meanwhile: what may be done before, a little at a time; whether
    there was anything to do. Raises PartyError where something did not come in time, or another process has gone.
    """
    waiting.mark()
    looked = time.perf_counter()
    while not waiting.is_done():
        if not meanwhile():
            time.sleep(0)
        if time.perf_counter() - looked > PATIENCE:
            transport.check_open()
            looked = time.perf_counter()
    if waiting.failed():
        raise PartyError(
            f"{transport.name(other)} wrote nothing to the card's memory for {transport.timeout:g} s "
            f"({transport.meter.where}); start all parties again"
        )
