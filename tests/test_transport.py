"""Frames, duplex transfers, counters, errors and emulation, on loopback sockets with one thread per party."""

import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links.network import NETWORKS, Network, parse_network
from crypten_llm.links.transport import DTYPES, HEADER, MAGIC, TENSOR, Transport

ROLES = ("owner", "client", "dealer")


def socket_pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


@pytest.fixture
def mesh():
    """Makes the connected transports of `world` parties; closes them afterwards."""
    made = []

    def make(world=2, timeout=5.0, **options):
        sockets = [{} for _ in range(world)]
        for low in range(world):
            for high in range(low + 1, world):
                sockets[low][high], sockets[high][low] = socket_pair()
        made.extend(Transport(rank, ROLES[:world], sockets[rank], timeout=timeout, **options) for rank in range(world))
        return made[-world:]

    yield make
    for transport in made:
        transport.close()


@pytest.fixture
def against_raw():
    """A party (rank 0, owner) whose peer is a bare socket in the test's hands."""
    ours, theirs = socket_pair()
    transport = Transport(0, ROLES[:2], {1: ours}, timeout=0.5)
    yield transport, theirs
    transport.close()
    theirs.close()


def together(*jobs):
    """Run one job per party at once; returns their results, raises the first failure."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(timeout=30) for future in [pool.submit(job) for job in jobs]]


def error_of(job):
    with pytest.raises(PartyError) as caught:
        job()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header(kind=TENSOR, dtype=DTYPES[torch.int64], sequence=0, size=16, magic=MAGIC):
    return HEADER.pack(magic, kind, dtype, sequence, size, 0)


# Tensors


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
    with pytest.raises(AssertionError, match=r"torch\.float64.* do not travel: convert"):
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
    assert "rank 1 (client) sent a message that is not JSON during setup" in error_of(lambda: transport.recv_json(1))


def test_json_wait_may_outlast_the_timeout(mesh):
    a, b = mesh(timeout=0.05)
    timer = threading.Timer(0.2, lambda: a.send_json(1, "late"))
    timer.start()
    assert b.recv_json(0, timeout=float("inf")) == "late"
    timer.join()


# A peer that sends something else


@pytest.mark.parametrize(
    ("frame", "came"),
    [
        (header(size=8), "int64 tensor message number 0 of 8 bytes"),
        (header(size=1 << 60), f"int64 tensor message number 0 of {1 << 60} bytes"),
        (header(dtype=DTYPES[torch.float32]), "float32 tensor message number 0 of 16 bytes"),
        (header(dtype=99), "dtype 99 tensor message number 0 of 16 bytes"),
        (header(sequence=3), "int64 tensor message number 3 of 16 bytes"),
        (header(kind=2, dtype=0), "JSON message number 0 of 16 bytes"),
        (header(kind=77), "unknown kind 77 message number 0 of 16 bytes"),
        (header(kind=3, size=1 << 40), f"abort message number 0 of {1 << 40} bytes"),
        (header(magic=b"GE"), "bytes of another protocol"),
    ],
    ids=["size", "huge", "dtype", "unknown dtype", "sequence", "JSON", "unknown kind", "huge abort", "magic"],
)
def test_mismatch_names_what_came_and_what_was_due(against_raw, frame, came):
    transport, raw = against_raw
    raw.sendall(frame)
    with transport.meter.phase("prefill"), transport.meter.operation("layer 2 softmax"):
        message = error_of(lambda: transport.recv(1, (1, 2), torch.int64))
    assert message == (
        f"rank 1 (client) sent {came} during prefill: layer 2 softmax, expected int64 tensor message number 0 of 16 "
        "bytes, shape (1, 2): the parties run different programs; start all of them with the same version and the same "
        "settings"
    )


def test_parties_of_different_shapes_both_fail(mesh):
    a, b = mesh()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(a.exchange, 1, torch.zeros(2)), pool.submit(b.exchange, 0, torch.zeros(3))]
        first, second = (error_of(lambda job=job: job.result(timeout=10)) for job in jobs)
    assert "sent float32 tensor message number 0 of 12 bytes" in first and "expected" in first
    assert "sent float32 tensor message number 0 of 8 bytes" in second


def test_sequence_numbers_advance_in_each_direction(against_raw):
    transport, raw = against_raw
    for number in range(3):
        raw.sendall(header(sequence=number, size=8) + struct.pack("<q", number))
        assert transport.recv(1, (), torch.int64).item() == number
    raw.sendall(header(sequence=2, size=8) + bytes(8))
    assert "number 2 of 8 bytes during setup, expected int64 tensor message number 3" in (
        error_of(lambda: transport.recv(1, (), torch.int64))
    )


# A peer that is silent, gone, or says why it stops


def test_silent_peer_times_out(against_raw):
    transport, _ = against_raw
    started = time.monotonic()
    with transport.meter.phase("decode"):
        message = error_of(lambda: transport.exchange(1, torch.zeros(4)))
    assert 0.5 <= time.monotonic() - started < 2
    assert message == (
        "rank 1 (client) sent nothing for 0.5 s during decode: look at that party's own output, and raise the timeout "
        "if it only needs longer"
    )


def test_peer_that_takes_nothing_times_out(against_raw):
    transport, _ = against_raw
    assert "rank 1 (client) took nothing for 0.5 s" in error_of(lambda: transport.send(1, torch.zeros(16 << 20)))


def test_only_the_silent_party_is_blamed(mesh):
    a, b, _ = mesh(3, timeout=0.3)
    b.send(0, torch.zeros(1))
    message = error_of(lambda: a.all_exchange([1, 2], torch.zeros(1)))
    assert message.startswith("rank 2 (dealer) sent nothing for 0.3 s")


def test_slow_progress_is_no_timeout(against_raw):
    transport, raw = against_raw
    payload = header(size=48) + bytes(48)

    def trickle():
        for i in range(0, len(payload), 8):
            time.sleep(0.1)
            raw.sendall(payload[i : i + 8])

    _, received = together(trickle, lambda: transport.recv(1, (6,), torch.int64))
    assert received.tolist() == [0] * 6


def test_closed_connection_fails_at_once(mesh):
    a, b = mesh(timeout=30.0)
    timer = threading.Timer(0.1, a.close)
    timer.start()
    started = time.monotonic()
    with b.meter.phase("prefill"), b.meter.operation("layer 2 softmax"):
        message = error_of(lambda: b.recv(0, (1,), torch.int64))
    timer.join()
    assert time.monotonic() - started < 2
    assert message.startswith("rank 0 (owner) closed the connection during prefill: layer 2 softmax: ")


def test_connection_cut_inside_a_frame(against_raw):
    transport, raw = against_raw
    raw.sendall(header() + bytes(3))
    raw.close()
    assert "rank 1 (client) closed the connection" in error_of(lambda: transport.recv(1, (2,), torch.int64))


def test_abort_carries_its_reason_to_every_peer(mesh):
    parties = mesh(3, timeout=30.0)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(parties[rank].recv, 0, (1,), torch.int64) for rank in (1, 2)]
        parties[0].abort("weights do not fit: use a smaller model")
        for job in jobs:
            message = error_of(lambda job=job: job.result(timeout=10))
            assert message == "rank 0 (owner) stopped: weights do not fit: use a smaller model"


def test_abort_is_read_after_what_was_sent_before(mesh):
    a, b = mesh()
    a.send(1, torch.ones(3))
    a.abort("done for")
    assert b.recv(0, (3,), torch.float32).tolist() == [1, 1, 1]
    assert error_of(lambda: b.recv(0, (3,), torch.float32)) == "rank 0 (owner) stopped: done for"


def test_abort_reaches_a_peer_that_is_sending(mesh):
    a, b = mesh(timeout=10.0)
    a.send(1, torch.ones(3))  # never read: the abort frame waits behind it
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(b.send, 0, torch.zeros(32 << 20))
        time.sleep(0.1)
        a.abort("interrupted")
        assert error_of(lambda: job.result(timeout=10)) == "rank 0 (owner) stopped: interrupted"


def test_abort_reaches_a_peer_in_a_large_exchange(mesh):
    a, b = mesh(timeout=10.0)
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(b.exchange, 0, torch.zeros(32 << 20))
        time.sleep(0.1)
        a.abort("interrupted")
        assert error_of(lambda: job.result(timeout=10)) == "rank 0 (owner) stopped: interrupted"


def test_abort_text_cannot_steer_a_terminal(mesh):
    a, b = mesh()
    a.abort("line one\nline two\x1b[2J")
    assert error_of(lambda: b.recv(0, (), torch.int64)) == "rank 0 (owner) stopped: line one line two [2J"


@pytest.mark.parametrize(("text", "size"), [("", 0), ("é" * 5000, 2048)])
def test_abort_texts_of_odd_length(mesh, text, size):
    a, b = mesh()
    a.abort(text)
    message = error_of(lambda: b.recv(0, (), torch.int64))
    assert message == "rank 0 (owner) stopped: " + ("é" * size or "no reason given")


def test_nothing_follows_a_half_sent_frame(against_raw):
    transport, raw = against_raw
    error_of(lambda: transport.send(1, torch.zeros(16 << 20)))  # times out inside the frame
    raw.settimeout(0.2)
    with pytest.raises(TimeoutError):
        while True:
            raw.recv(1 << 20)  # make room for whatever comes now
    transport.abort("timed out")
    assert raw.recv(1 << 20) == b""


def test_abort_and_close_may_be_repeated(mesh):
    a, b = mesh()
    b.close()
    a.abort("peer is gone already")
    a.abort("again")
    a.close()
    with pytest.raises(AssertionError, match="rank 0 has no open link to rank 1"):
        a.send(1, torch.zeros(1))


# Emulation


def test_emulated_latency_is_a_lower_bound(mesh):
    a, b = mesh(network=Network(rtt_ms=60, mbit=10_000))

    def job(party):
        for _ in range(3):
            party.exchange(1 - party.rank, torch.zeros(4))
        return time.monotonic()

    started = time.monotonic()
    for ended in together(lambda: job(a), lambda: job(b)):
        assert 0.09 <= ended - started < 0.5


def test_emulated_bandwidth_serialises_the_messages_of_a_link(mesh):
    a, b = mesh(network=Network(rtt_ms=0, mbit=4))  # 0.5 MB/s
    started = time.monotonic()
    for _ in range(2):
        a.send(1, torch.zeros(50_000, dtype=torch.uint8))
    sent = time.monotonic() - started
    for _ in range(2):
        b.recv(0, (50_000,), torch.uint8)
    assert sent < 0.1  # the sender goes on while its messages travel
    assert 0.2 <= time.monotonic() - started < 0.6


def test_emulated_time_passes_while_the_receiver_computes(mesh):
    a, b = mesh(network=Network(rtt_ms=600, mbit=1000))
    a.send(1, torch.zeros(1))
    time.sleep(0.32)
    started = time.monotonic()
    b.recv(0, (1,), torch.float32)
    assert time.monotonic() - started < 0.2


def test_emulation_by_one_side_only_is_refused():
    ours, theirs = socket_pair()
    emulating = Transport(0, ROLES[:2], {1: ours}, network=NETWORKS["lan"])
    other = Transport(1, ROLES[:2], {0: theirs}, timeout=1.0)
    emulating.send(1, torch.zeros(1))
    assert error_of(lambda: other.recv(0, (1,), torch.float32)) == (
        "only one of this party and rank 0 (owner) emulates a network: give every party the same network setting"
    )
    emulating.close()
    other.close()


def test_emulation_towards_another_machine_is_refused():
    class Remote(socket.socket):
        def getpeername(self):
            return ("192.0.2.7", 4000)

    ours, theirs = socket_pair()
    remote = Remote(fileno=ours.detach())
    with pytest.raises(UsageError, match=r"cannot emulate a network to rank 1 \(client\) on another machine: drop"):
        Transport(0, ROLES[:2], {1: remote}, network=NETWORKS["wan"])
    remote.close()
    theirs.close()


def test_parse_network():
    assert parse_network("lan") == Network(0.3, 1000)
    assert parse_network("wan") == Network(40, 200)
    assert parse_network("20ms,100") == parse_network("20 ms, 100") == Network(20, 100)


@pytest.mark.parametrize("text", ["lann", "20,100", "20ms", "20ms,fast", "ms,1", "", "20ms,100,3"])
def test_parse_network_says_what_it_takes(text):
    with pytest.raises(UsageError, match="is not known: give lan, wan or"):
        parse_network(text)


@pytest.mark.parametrize("text", ["-1ms,100", "1ms,0", "nanms,100", "1ms,inf"])
def test_impossible_networks(text):
    with pytest.raises(UsageError, match="is impossible: give a round trip time of 0 ms or more"):
        parse_network(text)
