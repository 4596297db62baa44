"""Signs of life: whoever waits for a person notices a party that is frozen, and nothing else changes by them."""

import math
import os
import signal
import threading
import time
from contextlib import ExitStack, suppress

import pytest
import torch
from hf_models import tiny
from programs import by_hand, error_line, free_port
from transports import ROLES, error_of, socket_pair, together

from crypten_llm import PrivateLlama
from crypten_llm.links.frames import HEADER
from crypten_llm.links.link import HEARTBEAT
from crypten_llm.links.tls import Links, make_key
from crypten_llm.links.transport import Transport
from crypten_llm.session import launch
from crypten_llm.session.settings import ProtocolConfig


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for role in ROLES[:2]:
        make_key(folder, role)
    return folder


@pytest.fixture(params=["plain", "TLS"])
def pair(request, keys):
    """Makes two transports; their link is plain or under TLS."""
    made = []

    def make(timeout):
        ends = socket_pair()
        if request.param == "TLS":
            first, second = (Links(keys, ROLES[:2], rank) for rank in (0, 1))
            ends = together(lambda: first.secure(ends[0]), lambda: second.secure(ends[1], 0))
        made.extend(Transport(rank, ROLES[:2], {1 - rank: ends[rank]}, timeout=timeout) for rank in (0, 1))
        return made

    yield make
    for transport in made:
        transport.close()


def test_a_wait_without_end_ends_with_the_signs_of_life(pair):
    a, b = pair(timeout=0.3)
    a.beat([1])
    timer = threading.Timer(0.9, a._still)  # as a process that is stopped
    timer.start()
    started = time.monotonic()
    with b.meter.phase("decode"):
        message = error_of(lambda: b.recv_json(0, timeout=math.inf))
    assert 1.0 < time.monotonic() - started < 2.5
    assert message == (
        "rank 0 (owner) gave no sign of life for 0.3 s during decode, while its next request was waited for: it hangs, "
        "was stopped, or its network is down; start all parties again"
    )


def test_signs_of_life_do_not_lengthen_a_wait_for_a_result(pair):
    """A party that lives and computes for ever is named as before."""
    a, b = pair(timeout=0.4)
    a.beat([1])
    started = time.monotonic()
    assert error_of(lambda: b.recv(0, (3,), torch.int64)).startswith("rank 0 (owner) sent nothing for 0.4 s")
    assert time.monotonic() - started < 1.5


def test_signs_of_life_come_between_frames_and_are_not_counted(pair):
    """A storm of them, while both sides send and receive small and large frames."""
    a, b = pair(timeout=0.004)  # a sign every millisecond
    a.beat([1]), b.beat([0])
    a.timeout = b.timeout = 20

    def job(party, peer):
        for count in range(60):
            mine = torch.full((1 + count % 7 * 9_000,), party.rank)
            assert (party.exchange(peer, mine) == peer).all()
            time.sleep(0.001)
        time.sleep(0.05)
        party.send_json(peer, {"done": party.rank})
        return party.recv_json(peer)

    assert together(lambda: job(a, 1), lambda: job(b, 0)) == [{"done": 1}, {"done": 0}]
    assert a._links[1].beats + b._links[0].beats > 20
    payload = sum(8 * (1 + count % 7 * 9_000) for count in range(60)) + len('{"done":0}')
    assert a.meter.snapshot().online.bytes_sent == 61 * HEADER.size + payload
    assert a.meter.snapshot().online.rounds == 61


def test_a_peer_that_reads_nothing_holds_no_sign_up(pair):
    """The kernel takes a part of one, or none: what comes next is whole all the same."""
    a, b = pair(timeout=20)
    link = a._links[1]
    for _ in range(400_000):
        link.beat()
        if link.owed:
            break
    assert link.owed
    got = together(lambda: a.send(1, torch.arange(9)), lambda: b.recv(0, (9,), torch.int64))
    assert got[1].tolist() == list(range(9))


def test_a_storm_of_signs_of_life_does_not_hold_a_wait(against_raw):
    """Faster than they are read, and nothing else."""
    transport, raw = against_raw
    ended = threading.Event()

    def storm():
        with suppress(OSError):
            while not ended.is_set():
                raw.sendall(HEARTBEAT * 1000)

    storming = threading.Thread(target=storm)
    storming.start()
    started = time.monotonic()
    assert error_of(lambda: transport.recv(1, (3,), torch.int64)).startswith("rank 1 (client) sent nothing for 0.5 s")
    assert time.monotonic() - started < 3
    ended.set()
    transport.close()
    storming.join()


def test_a_process_that_was_stopped_itself_blames_nobody(mesh, monkeypatch):
    """Its clock has gone on, but it has not waited."""
    a, b = mesh(timeout=5.0)
    clock, jump = time.perf_counter, [0.0]
    monkeypatch.setattr("crypten_llm.links.transport.time.perf_counter", lambda: clock() + jump[0])

    def wake_up():
        jump[0] = 1000.0
        time.sleep(1.1)  # a turn
        a.send(1, torch.arange(2))

    timer = threading.Timer(0.1, wake_up)
    timer.start()
    assert b.recv(0, (2,), torch.int64).tolist() == [0, 1]
    timer.join()


def test_who_is_told_that_a_party_lives():
    wire, crypten = ProtocolConfig(), ProtocolConfig("crypten", compute_parties=3)
    assert [launch._followers(wire, rank) for rank in range(3)] == [[], [0, 2], []]
    assert [launch._followers(crypten, rank) for rank in range(4)] == [[3], [0, 2], [], []]
    assert launch._followers(ProtocolConfig(tape="t"), 1) == [0]


IDLE = """
import sys, time
from crypten_llm import PrivateLlama
with PrivateLlama.from_pretrained(sys.argv[1], engine=sys.argv[2], timeout=5.0, threads=1) as llama:
    llama.generate(input_ids=[5, 6, 7], max_new_tokens=1)
    print("asked", file=sys.stderr, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("engine", ["wire", pytest.param("crypten", marks=pytest.mark.slow)])
def test_a_frozen_client_does_not_hold_the_others(tmp_path, engine):
    """A client that is stopped between two requests is given up by owner and dealer."""
    model = str(tiny(tmp_path, num_hidden_layers=1)[0])
    port, party = free_port(), ["-m", "crypten_llm", "party", "--engine", engine, "--timeout", "5", "--threads", "1"]
    with ExitStack() as running:
        owner = running.enter_context(by_hand(3, *party, "--model", model, port=port, ranks=[0])[0])
        dealer = running.enter_context(by_hand(3, *party, port=port, ranks=[2])[0])
        client = running.enter_context(by_hand(3, "-c", IDLE, model, engine, port=port, ranks=[1])[0])
        client.read_until("asked")
        os.kill(client.process.pid, signal.SIGSTOP)
        started = time.monotonic()
        said = [error_line(program.finish(20)[2]) for program in (owner, dealer)]
        assert time.monotonic() - started < 12
    assert "rank 1 (client) gave no sign of life for 5 s during " in said[0]
    assert "rank 1 (client) gave no sign of life for 5 s during " in said[1]


@pytest.mark.slow
def test_a_client_that_takes_its_time_is_waited_for(tmp_path):
    """Longer than the timeout, between two requests of one session."""
    with PrivateLlama.from_pretrained(tiny(tmp_path, num_hidden_layers=1)[0], timeout=4.0, threads=1) as llama:
        first = llama.generate(input_ids=[5, 6, 7], max_new_tokens=1)
        time.sleep(5.0)
        assert llama.generate(input_ids=[5, 6, 7], max_new_tokens=1).token_ids == first.token_ids
