"""A peer that sends something else, is silent, gone, or says why it stops; every case has its message."""

import math
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from transports import error_of, header, together

from crypten_llm.errors import PartyError
from crypten_llm.links.faults import LAST_WORDS_SECONDS, last_words
from crypten_llm.links.frames import DTYPES, JSON

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
    payload = header(size=480_000) + bytes(480_000)

    def trickle():
        for i in range(0, len(payload), 80_000):
            time.sleep(0.1)
            raw.sendall(payload[i : i + 80_000])

    _, received = together(trickle, lambda: transport.recv(1, (60_000,), torch.int64))
    assert not received.any()


@pytest.mark.parametrize("endless", [False, True])
def test_a_byte_now_and_then_is_no_progress(against_raw, endless):
    transport, raw = against_raw
    ended = threading.Event()

    def drip():
        for byte in header(kind=JSON, dtype=0, size=2):
            if ended.wait(0.1):
                return
            raw.sendall(bytes([byte]))

    dripping = threading.Thread(target=drip)
    dripping.start()
    started = time.monotonic()
    with transport.meter.phase("decode"):
        message = error_of(lambda: transport.recv_json(1, timeout=math.inf if endless else None))
    assert 0.4 < time.monotonic() - started < 1.5
    assert message.startswith(f"rank 1 (client) {'gave no sign of life' if endless else 'sent nothing'} for 0.5 s")
    assert "during decode" in message
    ended.set()
    dripping.join()


def test_last_words_that_drip_are_not_waited_for(against_raw):
    """A peer that takes nothing more, and whose unread frames come byte by byte."""
    transport, raw = against_raw
    link, ended = transport._links[1], threading.Event()

    def drip():
        with suppress(OSError):
            raw.sendall(header(size=1 << 40))
            while not ended.wait(0.05):
                raw.sendall(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    started = time.monotonic()
    assert last_words(link.sock) is None
    assert time.monotonic() - started < 1.5 * LAST_WORDS_SECONDS
    ended.set()
    dripping.join()


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
    assert error_of(lambda: b.recv(0, (), torch.int64)) == "rank 0 (owner) stopped: line one line two\\x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"), [("", "no reason given"), ("é" * 900, "é" * 900), ("é" * 5000, "é [...] é")]
)
def test_abort_texts_of_odd_length(mesh, text, shown):
    a, b = mesh()
    a.abort(text)
    message = error_of(lambda: b.recv(0, (), torch.int64))
    assert message.startswith("rank 0 (owner) stopped: ") and shown in message and len(message) < 2010


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
    with pytest.raises(PartyError, match="rank 0 has no open link to rank 1"):
        a.send(1, torch.zeros(1))


def test_a_peer_that_is_gone_is_seen_without_a_message(mesh):
    """By who waits for nobody: what has come in meanwhile stays for the next message."""
    mine, theirs, third = mesh(3)
    theirs.send_json(0, {"a": 1})
    theirs.beat([0])
    for _ in range(2):
        mine.check_open()
    assert mine.recv_json(1) == {"a": 1}
    third.abort("no memory")
    assert error_of(mine.check_open) == "rank 2 (dealer) stopped: no memory"
    theirs.close()
    assert "rank 1 (client) closed the connection" in error_of(mine.check_open)
