"""Parties meet over a real store on loopback; wrong starts and strangers have their messages."""

import contextlib
import socket
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from meetings import ROLES, assert_connected, meet
from programs import Program, free_port

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links import rendezvous
from crypten_llm.links.rendezvous import HELLO, connect, read_environment
from crypten_llm.links.store import Wait

pytestmark = pytest.mark.usefixtures("no_torchrun")


def test_three_parties_meet(port):
    parties = meet(port)
    assert [party.rank for party in parties] == [0, 1, 2]
    assert parties[0].name(2) == "rank 2 (dealer)"
    assert_connected(parties)


def test_the_store_is_gone_afterwards(port):
    parties = meet(port)
    with socket.create_server(("127.0.0.1", port)):  # free for whoever comes next
        assert_connected(parties)


def test_processes_meet_under_a_launchers_environment(port):
    program = textwrap.dedent(
        """
        import torch
        from crypten_llm.links.rendezvous import connect, read_environment
        rank, world, host, port = read_environment()
        party = connect(rank, world, ["owner", "client"], host, port, 20)
        print(party.exchange(1 - rank, torch.tensor([rank])).item())
        """
    )
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with Program("-c", program, RANK="0", **address) as zero, Program("-c", program, RANK="1", **address) as one:
        assert [process.finish(timeout=30) for process in (zero, one)] == [(0, "1\n", ""), (0, "0\n", "")]


def test_jobs_share_a_store(hosted):
    _, port = hosted
    assert_connected(meet(port, is_master=False, job="first"))
    assert_connected(meet(port, is_master=False, job="second"))


def test_torchruns_store_and_restarts(hosted, monkeypatch):
    _, port = hosted
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # rank 0 must not host one
    for restart in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        assert_connected(meet(port))


def test_port_base_is_used(port):
    base = free_port()
    parties = meet(port, ranks=(0, 1), world=2, port_base=base)
    assert parties[1]._links[0].sock.getpeername()[1] == base
    assert_connected(parties)


def test_a_translated_address_is_published_though_it_cannot_be_bound(hosted):
    store, port = hosted
    (error,) = meet(port, ranks=(1,), is_master=False, timeout=1.0, job="nat", host="192.0.2.7")
    assert isinstance(error, PartyError) and "did not come within 1 s" in str(error)
    assert b'"host": "192.0.2.7"' in store.get("crypten_llm/nat/address/1")


# Wrong starts


def test_port_where_something_else_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        (error,) = meet(taken, ranks=(1,), timeout=0.3)
    assert isinstance(error, PartyError)
    assert str(error) == (
        f"what listens at 127.0.0.1:{taken} is no rendezvous store (no answer in 0.3 s): check MASTER_ADDR "
        "and MASTER_PORT"
    )


def test_unknown_host():
    with pytest.raises(UsageError, match=r"MASTER_ADDR='no\.such\.host\.invalid' is no known host: give"):
        connect(1, 2, ROLES[:2], "no.such.host.invalid", 29500, 1.0)


def test_store_port_in_use():
    with socket.create_server(("0.0.0.0", 0)) as listener:
        taken = listener.getsockname()[1]
        (error,) = meet(taken, ranks=(0,))
    assert isinstance(error, UsageError)
    assert str(error) == (
        f"port {taken} is in use on this machine, perhaps by another rank 0 (owner), so the rendezvous store cannot "
        "open there: give every party another MASTER_PORT"
    )


def test_listening_port_in_use(hosted):
    _, port = hosted
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        (error,) = meet(port, ranks=(1,), is_master=False, port_base=taken - 1)
    assert isinstance(error, UsageError)
    assert str(error) == (
        f"port {taken} (port base {taken - 1} + rank 1) is in use on this machine: choose another port base for "
        "every party"
    )


def test_port_base_too_large(hosted):
    _, port = hosted
    (error,) = meet(port, ranks=(1,), is_master=False, port_base=65535)
    assert isinstance(error, UsageError)
    assert str(error).startswith("port base 65535 is too large: rank 1 would listen on port 65536")


def test_same_rank_twice(hosted):
    _, port = hosted
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(meet, port, ranks=(0, 1), is_master=False)
        time.sleep(0.2)
        (error,) = meet(port, ranks=(1,), is_master=False)
        assert isinstance(error, UsageError)
        assert str(error).startswith("rank 1 (client) was already started by another process: give each process")
        (dealer,) = meet(port, ranks=(2,), is_master=False)
        assert_connected([*job.result(), dealer])  # the job itself goes on


def test_world_sizes_differ_and_nobody_waits(hosted):
    _, port = hosted
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, port, ranks=(0,), world=3, is_master=False, timeout=20)
        time.sleep(0.2)
        (error,) = meet(port, ranks=(1,), world=2, is_master=False, timeout=20)
        (other,) = first.result()
    assert isinstance(error, UsageError) and str(error) == str(other)
    assert str(error) == (
        "the parties disagree on the world size: rank 1 was started with 2, another with 3; start every party with the "
        "same command and version"
    )
    assert time.monotonic() - started < 5


def test_versions_differ(hosted):
    store, port = hosted
    store.set("crypten_llm//0/job", '{"world size": 3, "roles": ["owner", "client", "dealer"]}')
    (error,) = meet(port, ranks=(1,), is_master=False)
    assert "disagree on the protocol version: rank 1 was started with 2, another with None" in str(error)


# Strangers


def test_stray_connections_are_turned_away(hosted):
    """A port scanner, a wrong token and a party of another job connect while rank 0 waits for rank 1."""
    _, port = hosted
    base = free_port()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(meet, port, ranks=(0,), world=2, is_master=False, port_base=base)
        time.sleep(0.2)
        strangers = [socket.create_connection(("127.0.0.1", base), timeout=5) for _ in range(3)]
        strangers[0].close()
        strangers[1].sendall(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
        strangers[2].sendall(HELLO.pack(rendezvous.MAGIC, rendezvous.PROTOCOL_VERSION, 1, 2, bytes(16)))
        (client,) = meet(port, ranks=(1,), world=2, is_master=False)
        (owner,) = job.result()
        for stranger in strangers[1:]:
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
            stranger.close()
    assert_connected([owner, client])


def test_wrong_listener_is_noticed():
    def answer(listener):
        sock, _ = listener.accept()
        sock.recv(HELLO.size)
        sock.sendall(bytes(HELLO.size))
        sock.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,)).start()
        entry = {"host": "127.0.0.1", "port": listener.getsockname()[1], "token": "00" * 16}
        with pytest.raises(PartyError, match=r"rank 0 \(owner\) did not complete .* \(another program answered\)"):
            rendezvous._dial(["rank 0 (owner)"], 0, entry, 1, 2, b"\x01" * 16, Wait(2), None)


def test_unreachable_listener(port):
    entry = {"host": "127.0.0.1", "port": port, "token": "00" * 16}
    with pytest.raises(PartyError, match=rf"rank 0 \(owner\) cannot be reached at 127.0.0.1:{port} \(Conn"):
        rendezvous._dial(["rank 0 (owner)"], 0, entry, 1, 2, bytes(16), Wait(2), None)


def test_party_that_publishes_but_never_connects(hosted):
    store, port = hosted
    store.set("crypten_llm//0/address/1", '{"host": "127.0.0.1", "port": 1, "token": ""}')
    (error,) = meet(port, ranks=(0,), world=2, is_master=False, timeout=0.5)
    assert str(error).startswith("rank 1 (client) did not connect within 0.5 s: look at its own output")


def test_party_that_dies_before_all_are_connected():
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(PartyError, match=r"rank 1 \(client\) did not finish connecting within 3 s"):
        rendezvous._barrier({1: ours}, ["rank 0 (owner)", "rank 1 (client)"], Wait(3))
    ours.close()


# The environment


GOOD = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}


def test_read_environment():
    assert read_environment(GOOD) == (1, 3, "10.0.0.5", 29500)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE not set: start with torchrun, or set RANK, WORLD_SIZE, MASTER_ADDR"),
        ({"RANK": None, "MASTER_PORT": " "}, "RANK and MASTER_PORT not set: start with torchrun"),
        ({"RANK": "one"}, "RANK='one' is not a whole number"),
        ({"WORLD_SIZE": "3.0"}, "WORLD_SIZE='3.0' is not a whole number"),
        ({"WORLD_SIZE": "1", "RANK": "0"}, "WORLD_SIZE=1 is too small"),
        ({"RANK": "3"}, "RANK=3 is out of range: with WORLD_SIZE=3 ranks go from 0 to 2"),
        ({"RANK": "-1"}, "RANK=-1 is out of range"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is out of range"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is out of range: ports go from 1 to 65535"),
    ],
)
def test_malformed_environment(change, message):
    env = {name: value for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(UsageError) as caught:
        read_environment(env)
    assert str(caught.value).startswith(message)
