"""Frames, duplex transfers, counters, public messages and streams, on loopback sockets with one thread per party."""

import threading

import pytest
import torch
from transports import error_of, header, together

from crypten_llm.errors import PartyError
from crypten_llm.links.frames import DTYPES, HEADER
from crypten_llm.links.transport import bytes_of

# Tensors


def test_the_bytes_of_a_tensor_are_its_memory():
    x = torch.zeros(3, 2, dtype=torch.int64)
    view = bytes_of(x)
    view[:8] = (5).to_bytes(8, "little")
    assert x[0, 0] == 5 and len(view) == 48 and len(bytes_of(x[:0])) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape_arrives(mesh, dtype, shape):
    a, b = mesh()
    x = torch.randint(0, 2 if dtype == torch.bool else 100, shape).to(dtype)
    a.send(1, x)
    y = b.recv(0, shape, dtype)
    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, y)


def test_extreme_values_are_bit_exact(mesh):
    a, b = mesh()
    x = torch.tensor([-(2**63), 2**63 - 1, -1, 0])
    f = torch.tensor([float("inf"), -0.0, 1e-45])
    a.send(1, x)
    a.send(1, f)
    assert torch.equal(b.recv(0, (4,), torch.int64), x)
    assert torch.equal(b.recv(0, (3,), torch.float32).view(torch.int32), f.view(torch.int32))


def test_strided_and_gradient_tensors_arrive(mesh):
    a, b = mesh()
    x = torch.arange(24.0).reshape(4, 6).t()[::2].requires_grad_()
    a.send(1, x)
    assert torch.equal(b.recv(0, x.shape, x.dtype), x.detach())


def test_exchange_is_duplex_at_64_mb(mesh):
    a, b = mesh()
    x, y = torch.full((8 << 20,), 7), torch.arange(8 << 20)
    from_b, from_a = together(lambda: a.exchange(1, x), lambda: b.exchange(0, y))
    assert torch.equal(from_b, y) and torch.equal(from_a, x)


def test_all_exchange_many_mixes_shapes_and_dtypes_in_one_message(mesh):
    a, b = mesh()
    xs = [torch.arange(6).reshape(2, 3), torch.tensor(1.5), torch.zeros(0, dtype=torch.uint8), torch.tensor([True])]
    ys = [-xs[0], torch.tensor(2.5), xs[2], torch.tensor([False])]
    from_b, from_a = together(lambda: a.all_exchange_many([1], xs)[1], lambda: b.all_exchange_many([0], ys)[0])
    assert all(map(torch.equal, from_b, ys)) and all(map(torch.equal, from_a, xs))
    assert (a.meter.snapshot().online.messages, a.meter.snapshot().online.rounds) == (1, 1)


def test_all_exchange_many_takes_more_tensors_than_one_system_call(mesh):
    a, b = mesh()
    xs = [torch.full((3,), i) for i in range(1500)]
    from_b, _ = together(lambda: a.all_exchange_many([1], xs)[1], lambda: b.all_exchange_many([0], [-x for x in xs])[0])
    assert all(torch.equal(y, -x) for x, y in zip(xs, from_b, strict=True))


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_all_exchange_among_three(mesh, size):
    parties = mesh(3)

    def job(party):
        others = [r for r in range(3) if r != party.rank]
        return lambda: party.all_exchange(others, torch.full((size,), party.rank))

    for rank, received in enumerate(together(*map(job, parties))):
        assert {peer: set(t.tolist()) for peer, t in received.items()} == {r: {r} for r in range(3) if r != rank}
    assert all(party.meter.snapshot().online.rounds == 1 for party in parties)


def test_unsupported_dtype_is_our_bug(mesh):
    a, _ = mesh()
    with pytest.raises(TypeError, match=r"torch\.float64.* do not travel: convert"):
        a.send(1, torch.zeros(1, dtype=torch.float64))


# Counters


def test_counters_are_exact_to_the_byte(mesh):
    a, b, dealer = mesh(3)
    x = torch.zeros(10, dtype=torch.int64)
    with a.meter.phase("decode"):
        a.send(1, x)
        b.recv(0, x.shape, x.dtype)
        together(lambda: a.exchange(1, x[:3]), lambda: b.exchange(0, x[:3]))
        dealer.send(0, x.to(torch.uint8), channel="dealer")
        a.recv(2, (10,), torch.uint8, channel="dealer")
        b.send_json(0, {"ok": 1})
        a.recv_json(1)
    h, text = HEADER.size, len('{"ok":1}')
    online = a.meter.snapshot().online
    assert (online.messages, online.rounds) == (2, 2)
    assert (online.bytes_sent, online.bytes_received) == (h + 80 + h + 24, h + 24 + h + text)
    given = a.meter.snapshot().dealer
    assert (given.messages, given.rounds, given.bytes_sent, given.bytes_received) == (0, 1, 0, h + 10)
    theirs = b.meter.snapshot().online
    assert (theirs.messages, theirs.rounds) == (2, 2)
    assert (theirs.bytes_sent, theirs.bytes_received) == (online.bytes_received, online.bytes_sent)
    assert (dealer.meter.snapshot().dealer.rounds, dealer.meter.snapshot().dealer.bytes_sent) == (0, h + 10)
    assert [row["bytes_sent"] for row in a.meter.table() if row["phase"] == "decode"] == [online.bytes_sent]


def test_counted_bytes_are_those_on_the_socket(against_raw):
    transport, raw = against_raw
    transport.send(1, torch.zeros(5))
    transport.send_json(1, [1, 2])
    transport.close()
    raw.settimeout(1)
    data = b""
    while chunk := raw.recv(4096):
        data += chunk
    assert len(data) == transport.meter.snapshot().online.bytes_sent == 2 * HEADER.size + 20 + 5


def test_waiting_time_is_counted(mesh):
    a, b = mesh()
    timer = threading.Timer(0.1, lambda: a.send(1, torch.zeros(1)))
    timer.start()
    b.recv(0, (1,), torch.float32)
    timer.join()
    assert 0.05 < b.meter.snapshot().online.wait_seconds < 2


# JSON


def test_json_round_trip(mesh):
    a, b = mesh()
    obj = {"prompt length": 7, "budgets": [0.1, None], "name": "Łlama"}
    a.send_json(1, obj)
    assert b.recv_json(0) == obj


def test_json_above_the_limit_is_refused_before_it_is_read(mesh):
    a, b = mesh()
    a.send_json(1, "x" * 98)
    message = error_of(lambda: b.recv_json(0, max_bytes=99))
    assert "sent JSON message number 0 of 100 bytes during setup" in message
    assert "expected JSON message number 0 of at most 99 bytes" in message


@pytest.mark.parametrize("text", [b"{", b"\xff", b"", b"[" * 100_000], ids=["cut", "no utf-8", "empty", "deep"])
def test_malformed_json(against_raw, text):
    transport, raw = against_raw
    raw.sendall(header(kind=2, dtype=0, size=len(text)) + text)
    assert "rank 1 (client) sent something else than what is due (not valid JSON: " in error_of(
        lambda: transport.recv_json(1)
    )


def test_json_wait_may_outlast_the_timeout(mesh):
    a, b = mesh(timeout=0.2)
    a.beat([1])
    timer = threading.Timer(0.6, lambda: a.send_json(1, "late"))
    timer.start()
    assert b.recv_json(0, timeout=float("inf")) == "late"
    timer.join()


# Public messages to all


@pytest.mark.parametrize("peers", [[1], [1, 2]])
def test_what_is_announced_is_the_same_at_all(mesh, peers):
    parties = mesh(3)
    message = {"stop": False}
    assert parties[0].announce(0, peers, message) == message
    for peer in peers:
        assert parties[peer].announce(0, None, None) == message
    sent, size = parties[0].meter.snapshot().online, HEADER.size + len('{"stop":false}')
    assert (sent.messages, sent.rounds, sent.bytes_sent) == (len(peers), 0, len(peers) * size)
    assert all(parties[peer].meter.snapshot().online.rounds == 1 for peer in peers)


@pytest.mark.parametrize("other", [["stop"], None, 1])
def test_something_else_than_an_announcement(mesh, other):
    a, b = mesh()
    a.send_json(1, other)
    message = error_of(lambda: b.announce(0, [0], None))
    assert message.startswith("rank 0 (owner) sent something else than what is due (not of its kind: Expected `object`")
    assert message.endswith(
        " during setup: the parties run different programs; start all of them with the same version and the same "
        "settings"
    )


def test_an_announcement_may_outlast_the_timeout(mesh):
    a, b = mesh(timeout=0.2)
    a.beat([1])
    timer = threading.Timer(0.6, lambda: a.announce(0, [1], {"verb": "close"}))
    timer.start()
    assert b.announce(0, [0], None, timeout=float("inf")) == {"verb": "close"}
    timer.join()


# Streams


@pytest.mark.parametrize("cuts", [[12], [5, 7], [1] * 12, [0, 12]], ids=str)
def test_a_stream_is_read_in_any_portions(mesh, cuts):
    a, b = mesh()
    whole, reader = torch.arange(12, dtype=torch.uint8), b.stream_from(0, 12, "dealer")
    reader.begin("section")
    for piece in whole.split(cuts):
        a.send_stream(1, piece, channel="dealer")
    assert [reader.read(count).tolist() for count in (0, 3, 8, 1)] == [[], [0, 1, 2], [*range(3, 11)], [11]]
    reader.end()
    seen = b.meter.snapshot().dealer
    assert (seen.rounds, seen.bytes_received) == (len(cuts), len(cuts) * HEADER.size + 12)


def test_a_stream_that_goes_on_after_its_section(mesh):
    a, b = mesh()
    a.send_stream(1, torch.zeros(4, dtype=torch.uint8))
    reader = b.stream_from(0, 4)
    reader.read(3)
    with pytest.raises(PartyError, match=r"rank 0 \(owner\) sent more than this section needs"):
        reader.end()


def test_a_piece_above_the_limit_is_refused(mesh):
    a, b = mesh()
    a.send_stream(1, torch.zeros(5, dtype=torch.uint8))
    assert "of 5 bytes during setup, expected stream message number 0 of at most 4 bytes" in (
        error_of(lambda: b.stream_from(0, 4).read(1))
    )
