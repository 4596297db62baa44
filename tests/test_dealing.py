"""A dealer that runs along: it computes ahead, cannot deadlock with the parties, and deals what a tape would hold.

And what is dealt: shares of any width that add up, in as many bytes as their bits need.
"""

import math
import socket
import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import key, run

from crypten_llm.errors import OneTimeError, PartyError
from crypten_llm.kernels.ring import TABLE_WORDS, low_bits
from crypten_llm.links.meter import Meter
from crypten_llm.links.staging import Staging
from crypten_llm.links.transport import Transport
from crypten_llm.protocols.dealer import material, randomness
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.manifest import make_manifest
from crypten_llm.protocols.dealer.material import FRAME, Sending
from crypten_llm.protocols.dealer.recording import Recording, Sizes
from crypten_llm.protocols.dealer.roles import Dealer
from crypten_llm.protocols.dealer.runtime import PARTIES, Piece
from crypten_llm.protocols.dealer.tape import Tape
from crypten_llm.roles import CLIENT, DEALER, OWNER

WORDS = 1 << 16  # in one value: several messages, and more than a socket's buffers hold
ODD = 8 * WORDS + 8  # bytes of keys: the last of them do not fill a message


def open_bytes(runtime, count):
    """Both parties send ``count`` masked zeros of 8 bits and wait for each other; the dealer draws the mask."""
    mask = runtime.mask((count,), 8)
    zeros = runtime.share((count,), lambda: torch.zeros(count, dtype=torch.int64))
    runtime.exchange([Piece((count,), 8, runtime.transport.meter.cell, zeros, mask.held)])


def mixed(runtime, times=12):
    """Values, keys and openings in turn; each opening makes the parties wait for each other. Returns the values."""
    values = []
    for i in range(times):
        values.append(runtime.deal((WORDS,), lambda i=i: torch.full((WORDS,), i)).held)
        open_bytes(runtime, WORDS)
        keys = runtime.deal_common([((ODD,), torch.uint8)], lambda i=i: [torch.full((ODD,), i, dtype=torch.uint8)])
        assert all((tensor == i).all() for tensor in keys)
        values.append(runtime.deal((1,), lambda i=i: torch.tensor([i])).held)
        open_bytes(runtime, 1)
    return values


@pytest.mark.parametrize("frames", [1, 256])
def test_no_deadlock_however_little_may_wait(monkeypatch, frames):
    monkeypatch.setattr(material, "AHEAD", frames * FRAME)
    owner, client, known = run(mixed).results
    assert all(torch.equal(a + b, c) for a, b, c in zip(owner, client, known, strict=True))


def test_the_dealer_computes_ahead_within_a_section():
    """Nobody reads before the dealer has made everything; it does not wait for readers."""
    computed = threading.Event()

    def job(runtime):
        if runtime.role != DEALER:
            assert computed.wait(15), "the dealer waits to be read"
        values = [runtime.deal((WORDS,), lambda: torch.ones(WORDS, dtype=torch.int64)).held for _ in range(20)]
        computed.set()
        return sum(values).sum().item()

    owner, client, known = run(job).results
    assert owner + client == known == 20 * WORDS


def test_the_dealer_waits_when_too_much_is_unread(monkeypatch):
    monkeypatch.setattr(material, "AHEAD", 4 * FRAME)
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
    runtime = Dealer(dealer, [key(0, 0), key(0, 1)])
    with pytest.raises(PartyError, match=r"rank 1 \(client\)"):
        for i in range(2000):
            runtime.begin(f"section {i}")
            runtime.deal((WORDS,), lambda: torch.zeros(WORDS, dtype=torch.int64))
            runtime.end()
    dealer.close()
    sockets[OWNER][1].close()


def test_a_dealer_alone_makes_what_a_live_one_sends(tmp_path):
    live = run(mixed, 2, seed=3, section="test")
    sizes = Sizes()
    manifest = make_manifest({}, {}, "generate", {}, 1)
    links = SimpleNamespace(rank=DEALER, meter=Meter(), staging=Staging(), passed=lambda pieces: None)

    def dealt_by(runtime):
        runtime.begin("test")
        mixed(runtime, 2)
        runtime.end()

    dealt_by(Counting(links, sizes))  # a recording needs to know the sizes
    recording = Recording(tmp_path / "tape", manifest, sizes)
    recording.keys = [key(3, 0), key(3, 1)]
    with recording:
        dealt_by(Dealer(links, recording.keys, recording))
    for party in (OWNER, CLIENT):
        mine = Tape(tmp_path / "tape", party, links, is_local=True)
        mine.begin("test")
        sent = b"".join(frame.payload for frame in live.frames[DEALER] if frame.target == party)
        assert bytes(mine.read(len(sent)).numpy()) == sent
        mine.end()


def test_sizes_are_known_without_computing():
    def forbidden():
        raise AssertionError("something was computed")

    sizes = Sizes()
    runtime = Counting(None, sizes)
    runtime.begin("one")
    mask = runtime.mask((2, 3))
    assert mask.held.is_meta and mask.client.is_meta and runtime.mask_of(OWNER, (2,)).is_meta
    dealt = runtime.deal((2, 3), forbidden)
    assert dealt.held.shape == dealt.client.shape == (2, 3)
    runtime.deal_common([((3,), torch.uint8)], forbidden)
    runtime.deal((3,), forbidden, 20)
    runtime.deal_table((3, 4), 16, forbidden)
    runtime.end()
    assert sizes.sections == {"one": [8, 48 + 8 + 8 + 24]}


def test_messages_end_where_the_program_says():
    """Their number and sizes, which the report counts, do not depend on how fast anybody is."""
    first, second = (run(mixed, 3) for _ in range(2))
    shapes = [[(frame.target, len(frame.payload)) for frame in outcome.frames[DEALER]] for outcome in (first, second)]
    assert shapes[0] == shapes[1]
    assert max(size for _, size in shapes[0]) == FRAME


def test_ends_wait_until_all_has_left():
    """After a section its links are free for other messages."""

    class Slow:
        staging = Staging()

        def __init__(self):
            self.sent = 0

        def send_stream(self, party, data, channel):
            threading.Event().wait(0.01)
            self.sent += data.numel()

    links = Slow()
    sending = Sending(links)
    sending.write(CLIENT, torch.zeros(5 * FRAME + 3, dtype=torch.uint8))
    sending.end()
    assert links.sent == 5 * FRAME + 3


# What is dealt.


class Counts:
    """Where ``Counting`` tells sizes."""

    def __init__(self):
        self.bytes = [0, 0]

    def begin(self, label):
        pass

    def add(self, party, count):
        self.bytes[party] += count

    def flush(self, party):
        pass

    def end(self):
        pass


def counted(job):
    """Bytes of material for the owner and for the client, computed from shapes alone."""
    counts = Counts()
    job(Counting(None, counts))
    return counts.bytes


def check_dealt(shape, bits):
    """Shares of random words and of the ring's edges add up modulo 2^bits, and take ceil(count bits / 8) bytes."""
    words = torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(bits))
    edges = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1 << min(bits - 1, 62)])[: words.numel()]
    words.view(-1)[: len(edges)] = edges

    def job(runtime):
        return runtime.deal(shape, words.clone, bits)

    outcome = run(job)
    owner, client, dealer = outcome.results
    assert owner.shape == client.shape == dealer.shape == torch.Size(shape)
    assert torch.equal(low_bits(owner.held + client.held, bits), low_bits(words, bits))
    assert torch.equal(dealer.held, words), "the dealer goes on with the value"
    assert torch.equal(low_bits(dealer.client, bits), client.held), "and knows the client's share"
    for part in (owner, client):
        assert part.client is None
    size = -(-math.prod(shape) * bits // 8)
    assert [outcome.sent(DEALER, party) for party in PARTIES] == counted(job) == [0, size]
    return owner.held, client.held


@pytest.mark.parametrize("bits", range(1, 65))
def test_values_of_every_width(bits):
    """An odd count, so that the last byte is not full. Each share alone is spread over the ring."""
    for held in check_dealt((13, 31), bits):
        for bit in range(bits):
            assert 100 < int((held >> bit & 1).sum()) < 303, "13 x 31 bits, half of them ones but for ten deviations"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 6), max_size=3).map(tuple), st.integers(1, 64))
def test_values_of_any_shape_and_width(shape, bits):
    check_dealt(shape, bits)


@pytest.mark.parametrize("bits", TABLE_WORDS)
def test_tables_of_every_width(bits):
    """The client's is what the dealer makes of the owner's, word for word, in the words' bytes."""
    shape = (3, 5, 8)

    def job(runtime):
        return runtime.deal_table(shape, bits, lambda words: 5 - words)

    outcome = run(job)
    owner, client, dealer = outcome.results
    assert dealer is None and owner.dtype == client.dtype == TABLE_WORDS[bits]
    assert torch.equal(client, 5 - owner) and len(owner.unique()) > 50
    assert [outcome.sent(DEALER, party) for party in PARTIES] == counted(job) == [0, 3 * 5 * bits]


def test_what_both_parties_have_in_common():
    sizes = [((3, 2), torch.int64), ((5,), torch.uint8), ((0, 4), torch.int64)]
    made = [torch.arange(6).view(3, 2) - 3, torch.arange(250, 255, dtype=torch.uint8), torch.empty(0, 4).long()]

    def job(runtime):
        return runtime.deal_common(sizes, lambda: made)

    outcome = run(job)
    owner, client, dealer = outcome.results
    assert dealer == []
    for mine, theirs, expected in zip(owner, client, made, strict=True):
        assert torch.equal(mine, expected) and torch.equal(theirs, expected) and mine.dtype == expected.dtype
    assert [outcome.sent(DEALER, party) for party in PARTIES] == counted(job) == [53, 53]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (lambda runtime: runtime.deal((3,), lambda: torch.zeros(2).long()), r"dealt \(2,\), announced \(3,\)"),
        (lambda runtime: runtime.deal_table((3, 4), 8, lambda words: words[:2]), r"dealt \(2, 4\), announced \(3, 4\)"),
        (
            lambda runtime: runtime.deal_common([((3,), torch.uint8)], lambda: [torch.zeros(3).long()]),
            "tensors of another size were announced",
        ),
    ],
)
def test_what_was_not_announced_is_not_dealt(job, message):
    with pytest.raises(OneTimeError, match=message):
        run(job)


def test_a_stream_gives_no_word_twice_whatever_sizes_are_drawn():
    """Small draws come from a buffer and large ones do not, and the buffer runs out between them."""
    small, buffer = randomness._SMALL, randomness._BUFFER
    sizes = [1, small, small + 1, small - 1, *[small] * (buffer // small), 3, buffer + 1, 2]
    first, second = (randomness.Stream(key(0, 0)) for _ in range(2))
    drawn = [first.words(size) for size in sizes]
    assert [len(words) for words in drawn] == sizes and first.position == 8 * sum(sizes)
    assert all(torch.equal(words, second.words(size)) for words, size in zip(drawn, sizes, strict=True))
    assert len(torch.cat(drawn).unique()) == sum(sizes)
