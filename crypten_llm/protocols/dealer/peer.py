"""A way around the sockets for two parties on two GPUs of one host: messages go from card to card.

Owns how the parties open it to each other, over the link that they have already. What is said with it is what would be
said over that link, and counted as that. It hides nothing from the host, on which both parties and both cards are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import torch
from msgspec import Meta

from crypten_llm.errors import PartyError, UsageError, first_line
from crypten_llm.kernels.mailbox import HANDLE_BYTES, Mailbox
from crypten_llm.records import Record

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport

LEAVE = "give each a card of its own (--device cuda:0,cuda:1), or leave --peer-memory out"
PATIENCE = 0.2  # seconds of a wait for the device after which the links are looked at, now and then


class Offer(Record, frozen=True):
    """A party's card, by the number that the driver gives it, and the handle of its mailbox, in hexadecimal digits."""

    card: Annotated[str, Meta(max_length=100)]
    handle: Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * HANDLE_BYTES}}}$")]


def connect(transport: Transport, other: int, device: torch.device) -> Mailbox:
    """This party's mailbox, open to the other and tried. Both call this.

    Raises UsageError on a processor, on one card for both, and where the cards do not reach each other.
    """
    if device.type != "cuda":
        raise UsageError(f"--peer-memory is for GPUs, and this party computes on {device.type}; {LEAVE}")
    try:
        mailbox = Mailbox(device, transport.timeout)
        transport.send_json(other, Offer(mailbox.card, mailbox.handle.hex()))
        theirs = transport.recv_json(other, Offer)
        if theirs.card == mailbox.card:
            raise UsageError(
                f"--peer-memory: owner and client are on one card, where each would be in the other's way; {LEAVE}"
            )
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
    return mailbox


def wait(transport: Transport, mailbox: Mailbox, other: int) -> None:
    """Until the device has done all that was launched. Raises PartyError where a message did not come in time, or the
    other party has gone.
    """
    mailbox.mark()
    looked = time.perf_counter()
    while not mailbox.is_done():
        time.sleep(0)
        if time.perf_counter() - looked > PATIENCE:
            transport.check_open()
            looked = time.perf_counter()
    if mailbox.failed():
        raise PartyError(
            f"{transport.name(other)} wrote nothing to this card's memory for {transport.timeout:g} s "
            f"({transport.meter.where}); start all parties again"
        )
