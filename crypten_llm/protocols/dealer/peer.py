"""A way around the sockets for two parties on GPUs of one host: messages go from card to card.

Owns how the parties open it to each other, over the link that they have already. What is said with it is what would be
said over that link, and counted as that. It hides nothing from the host, on which both parties and both cards are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import torch
from msgspec import Meta

from crypten_llm.errors import PartyError, UsageError, first_line
from crypten_llm.kernels.mailbox import HANDLE_BYTES, Mailbox
from crypten_llm.records import Record

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport

LEAVE = "give each a card of its own (--device cuda:0,cuda:1), or leave --peer-memory out"
MESSAGES = 50  # with which a card that both are on is tried
SLOWEST = 2e-4  # seconds of one; of processes that take turns, a turn has a millisecond or two
PATIENCE = 0.2  # seconds of a wait for the device after which the links are looked at, now and then


class Offer(Record, frozen=True):
    """A party's card, by the number that the driver gives it, and the handle of its mailbox, in hexadecimal digits."""

    card: Annotated[str, Meta(max_length=100)]
    handle: Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * HANDLE_BYTES}}}$")]


def connect(transport: Transport, other: int, device: torch.device) -> Mailbox:
    """This party's mailbox, open to the other and tried. Both call this.

    Raises UsageError on a processor, on one card on which they take turns, and where the cards do not reach each other.
    """
    if device.type != "cuda":
        raise UsageError(f"--peer-memory is for GPUs, and this party computes on {device.type}; {LEAVE}")
    try:
        mailbox = Mailbox(device, transport.timeout)
        transport.send_json(other, Offer(mailbox.card, mailbox.handle.hex()))
        theirs = transport.recv_json(other, Offer)
        mailbox.open(bytes.fromhex(theirs.handle))
    except RuntimeError as error:
        raise UsageError(f"the cards of this host do not share memory ({first_line(error)}); {LEAVE}") from None
    numbers = torch.arange(1000, device=device)
    for count in (1000, 0):
        came = mailbox.swap(((numbers + transport.rank) & 255).to(torch.uint8)[:count], count, 0)
        mailbox.advance(1)
        wait(transport, mailbox, other)
        if not torch.equal(came, ((numbers + other) & 255).to(torch.uint8)[:count]):
            raise UsageError(f"the cards of this host do not read what each other wrote; {LEAVE}")
    if theirs.card == mailbox.card:
        _check_pace(transport, mailbox, other)
    return mailbox


def _check_pace(transport: Transport, mailbox: Mailbox, other: int) -> None:
    """Raises UsageError where the two processes take turns on one card: a message then takes as long as a turn."""
    byte = torch.zeros(1, dtype=torch.uint8, device=transport.staging.device)
    seconds = []
    for _ in range(2):  # the first compiles nothing any more, but may wake the card
        started = time.perf_counter()
        for step in range(MESSAGES):
            mailbox.swap(byte, 1, step)
        mailbox.advance(MESSAGES)
        wait(transport, mailbox, other)
        seconds.append((time.perf_counter() - started) / MESSAGES)
    if min(seconds) > SLOWEST:
        raise UsageError(
            f"--peer-memory: owner and client take turns on one card, {1e3 * min(seconds):.2g} ms a message; start "
            f"nvidia-cuda-mps-control -d on the host before, {LEAVE}"
        )


def wait(transport: Transport, mailbox: Mailbox, other: int, meanwhile: Callable[[], bool] = lambda: False) -> None:
    """Until the device has done all that was launched. meanwhile: what may be done before, a little at a time; whether
    there was anything to do. Raises PartyError where a message did not come in time, or the other party has gone.
    """
    mailbox.mark()
    looked = time.perf_counter()
    while not mailbox.is_done():
        if not meanwhile():
            time.sleep(0)
        if time.perf_counter() - looked > PATIENCE:
            transport.check_open()
            looked = time.perf_counter()
    if mailbox.failed():
        raise PartyError(
            f"{transport.name(other)} wrote nothing to this card's memory for {transport.timeout:g} s "
            f"({transport.meter.where}); start all parties again"
        )
