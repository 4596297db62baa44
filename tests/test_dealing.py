"""A dealer that runs along: it computes ahead, cannot deadlock with the parties, and deals what a tape would hold."""

import socket
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from wire_parties import key, run

from crypten_llm.errors import PartyError
from crypten_llm.links.meter import Meter
from crypten_llm.links.transport import Transport
from crypten_llm.protocols.dealer import roles as dealing
from crypten_llm.protocols.dealer import tape
from crypten_llm.roles import CLIENT, DEALER, OWNER, Sending

WORDS = 1 << 16  # in one value: several messages, and more than a socket's buffers hold
ODD = 8 * WORDS + 8  # bytes of keys: the last of them do not fill a message


def open_bytes(runtime, count):
    """Both parties send ``count`` masked zeros of 8 bits and wait for each other; the dealer draws the mask."""
    mask = runtime.mask((count,), 8)
    if not runtime.is_dealer:
        runtime.exchange(mask.to(torch.uint8))


def mixed(runtime, times=12):
    """Values, keys and openings in turn; each opening makes the parties wait for each other. Returns the values."""
    values = []
    for i in range(times):
        values.append(runtime.deal((WORDS,), lambda i=i: torch.full((WORDS,), i)))
        open_bytes(runtime, WORDS)
        keys = runtime.deal_arrays([((ODD,), np.uint8)], lambda i=i: [np.full(ODD, i, np.uint8)])
        assert all((array == i).all() for array in keys)
        values.append(runtime.deal((1,), lambda i=i: torch.tensor([i])))
        open_bytes(runtime, 1)
    return values


@pytest.mark.parametrize("frames", [1, 256])
def test_no_deadlock_however_little_may_wait(monkeypatch, frames):
    monkeypatch.setattr(dealing, "AHEAD", frames * dealing.FRAME)
    owner, client, known = run(mixed).results
    assert all(torch.equal(a + b, c) for a, b, c in zip(owner, client, known, strict=True))


def test_the_dealer_computes_ahead_within_a_section():
    """Nobody reads before the dealer has made everything; it does not wait for readers."""
    computed = threading.Event()

    def job(runtime):
        if not runtime.is_dealer:
            assert computed.wait(15), "the dealer waits to be read"
        values = [runtime.deal((WORDS,), lambda: torch.ones(WORDS, dtype=torch.int64)) for _ in range(20)]
        computed.set()
        return sum(values).sum().item()

    owner, client, known = run(job).results
    assert owner + client == known == 20 * WORDS


def test_the_dealer_waits_when_too_much_is_unread(monkeypatch):
    monkeypatch.setattr(dealing, "AHEAD", 4 * dealing.FRAME)
    made, started, resume = [], threading.Event(), threading.Event()

    def value(i):
        made.append(i)
        if i == 2:
            started.set()
        return torch.zeros(WORDS, dtype=torch.int64)

    def job(runtime):
        if runtime.role == CLIENT:
            assert started.wait(15)
            resume.wait(0.3)  # time in which the dealer could make all
            seen.append(len(made))
        for i in range(40):
            runtime.deal((WORDS,), lambda i=i: value(i))

    seen = []
    run(job)
    assert len(made) == 40 and seen[0] < 20, "the dealer's memory would grow with the section"


def test_a_party_that_leaves_ends_the_dealer():
    """The error of the thread that sends is raised where the dealer computes."""
    sockets = [socket.socketpair() for _ in range(2)]
    names = ("owner", "client", "dealer")
    dealer = Transport(DEALER, names, {party: ours for party, (ours, _) in enumerate(sockets)}, timeout=5)
    sockets[CLIENT][1].close()
    runtime = Runtime(DEALER, dealer, [key(0, 0), key(0, 1)])
    with pytest.raises(PartyError, match=r"rank 1 \(client\)"):
        for i in range(2000):
            runtime.begin(f"section {i}")
            runtime.deal((WORDS,), lambda: torch.zeros(WORDS, dtype=torch.int64))
            runtime.end()
    dealer.close()
    sockets[OWNER][1].close()


def test_a_dealer_alone_makes_what_a_live_one_sends(tmp_path):
    live = run(mixed, 2, seed=3, section="test")
    sizes = tape.Sizes()
    manifest = tape.make_manifest({}, {}, "generate", {}, 1)
    links = type("Links", (), {"rank": DEALER, "meter": Meter()})()
    recording = tape.Recording(tmp_path / "tape", manifest, sizes)
    recording.keys = [key(3, 0), key(3, 1)]
    for material in (nullcontext(sizes), recording):  # the second needs what the first finds out
        with material as material:
            runtime = Runtime(DEALER, links, material.keys, material)
            runtime.begin("test")
            mixed(runtime, 2)
            runtime.end()
    for party in (OWNER, CLIENT):
        mine = tape.Tape(tmp_path / "tape", party, links)
        mine.begin("test")
        sent = b"".join(frame.payload for frame in live.frames[DEALER] if frame.target == party)
        assert mine.read(len(sent)).tobytes() == sent
        mine.end()


def test_sizes_are_known_without_computing():
    def forbidden():
        raise AssertionError("something was computed")

    sizes = tape.Sizes()
    runtime = Runtime(DEALER, None, [], sizes)
    runtime.begin("one")
    assert runtime.mask((2, 3)).is_meta and runtime.mask_of(OWNER, (2,)).is_meta
    assert runtime.deal((2, 3), forbidden).shape == (2, 3)
    runtime.deal_arrays([((3,), np.uint8)], forbidden)
    runtime.end()
    assert sizes.sections == {"one": [8, 48 + 8]}


def test_messages_end_where_the_program_says():
    """Their number and sizes, which the report counts, do not depend on how fast anybody is."""
    first, second = (run(mixed, 3) for _ in range(2))
    shapes = [[(frame.target, len(frame.payload)) for frame in outcome.frames[DEALER]] for outcome in (first, second)]
    assert shapes[0] == shapes[1]
    assert max(size for _, size in shapes[0]) == dealing.FRAME


def test_ends_wait_until_all_has_left():
    """After a section its links are free for other messages."""

    class Slow:
        def __init__(self):
            self.sent = 0

        def send_stream(self, party, data, channel):
            threading.Event().wait(0.01)
            self.sent += data.numel()

    links = Slow()
    sending = Sending(links)
    sending.write(CLIENT, np.zeros(5 * dealing.FRAME + 3, dtype=np.uint8))
    sending.end()
    assert links.sent == 5 * dealing.FRAME + 3
