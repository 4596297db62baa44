"""Networks by name, and the time that an emulated one takes."""

import socket
import time

import pytest
import torch
from transports import ROLES, error_of, socket_pair, together

from crypten_llm.errors import UsageError
from crypten_llm.links.network import NETWORKS, Network, parse_network
from crypten_llm.links.transport import Transport


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
