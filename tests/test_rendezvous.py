"""Parties meet on loopback; wrong starts and the environment have their messages."""

import os
import socket
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from meetings import ROLES, SECRET, assert_connected, meet
from programs import Program

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links import rendezvous, sockets
from crypten_llm.links.greeting import FACTS, HELLO, MAGIC, Greeter, Stranger
from crypten_llm.links.meeting import attend
from crypten_llm.links.rendezvous import connect, read_environment, run_of
from crypten_llm.links.waiting import Wait

ONE = Greeter(1, ROLES, "", SECRET)


@pytest.mark.parametrize("hub", [0, 1, 2])
def test_three_parties_meet(port, hub):
    parties = meet(port, hub=hub)
    assert [party.rank for party in parties] == [0, 1, 2]
    assert parties[0].name(2) == "rank 2 (dealer)"
    assert_connected(parties)


def test_nobody_listens_afterwards(port):
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


def test_a_listener_that_was_there_before(port):
    """As a local run has it: its port is told to the others, and nobody else can have taken it."""
    listener = sockets.listen("127.0.0.1")
    place = listener.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(meet, place, ranks=(0, 2), hub=1)
        (client,) = meet(place, ranks=(1,), hub=1, listener=listener)
        owner, dealer = others.result()
    assert_connected([owner, client, dealer])


def test_runs_at_one_place_do_not_mix(port):
    """A process of an earlier start of a launcher, which was not ended, does not take the new one's place."""
    with ThreadPoolExecutor(1) as pool:
        stale = pool.submit(meet, port, ranks=(1,), run="job/0")
        parties = meet(port, run="job/1")
        (error,) = stale.result()
    assert isinstance(error, PartyError) and "rank 0 (owner)" in str(error)
    assert_connected(parties)


# Wrong starts


def test_unknown_host():
    with pytest.raises(UsageError, match=r"MASTER_ADDR='no\.such\.host\.invalid' (is no known host|cannot be reached)"):
        connect(1, 2, ROLES[:2], "no.such.host.invalid", 29500, 1.0)


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        taken = listener.getsockname()[1]
        (error,) = meet(taken, ranks=(0,))
    assert isinstance(error, UsageError)
    assert str(error) == (
        f"port {taken} is in use on this machine, perhaps by another run: give every party another MASTER_PORT, or "
        "this one another --link-port"
    )


def test_a_party_is_reached_at_the_port_that_it_was_given(port):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        own = listener.getsockname()[1]
        owner, client, dealer = meet(port, own_port=own, timeout=1.0)
    assert isinstance(client, UsageError) and f"port {own} is in use" in str(client)
    assert isinstance(owner, PartyError) and isinstance(dealer, PartyError)
    parties = meet(port, own_port=own)
    with socket.socket(fileno=os.dup(parties[2]._links[1].fd)) as dialled:
        assert dialled.getpeername()[1] == own
    assert_connected(parties)


def test_same_rank_twice(port):
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(meet, port, ranks=(0, 1))
        time.sleep(0.3)
        (error,) = meet(port, ranks=(1,))
        assert isinstance(error, UsageError)
        assert str(error).startswith("rank 1 (client) was already started by another process: give each process")
        (dealer,) = meet(port, ranks=(2,))
        assert_connected([*job.result(), dealer])  # the run itself goes on


def test_a_party_that_ended_may_come_again(port):
    with ThreadPoolExecutor(1) as pool:
        owner = pool.submit(meet, port, ranks=(0,))
        rendezvous.dial(ONE, 0, ("127.0.0.1", port), Wait(5), patient=True).close()
        others = meet(port, ranks=(1, 2))
        assert_connected([*owner.result(), *others])


def test_world_sizes_differ_and_nobody_waits(port):
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(meet, port, ranks=(0, 2), world=3, timeout=20)
        time.sleep(0.2)
        (error,) = meet(port, ranks=(1,), world=2, timeout=20)
        owner, dealer = first.result()
    assert all(isinstance(each, UsageError) for each in (error, owner, dealer))
    assert str(error) == (
        "the parties disagree on the world size: rank 1 (client) was started with 2, rank 0 (owner) with 3; start "
        "every party with the same command and version"
    )
    assert str(owner) == str(dealer)
    assert "world size: rank 0 (owner) was started with 3, rank 1 (client) with 2" in str(owner)
    assert time.monotonic() - started < 5


def test_versions_differ():
    """Whoever dialled says it; who is dialled believes no stranger that it should stop for."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(HELLO.pack(MAGIC, 9, 0, 3, 0, b"owner", bytes(16), bytes(32)))
        with pytest.raises(UsageError) as caught:
            ONE.dial(ours, 0, Wait(5))
    assert str(caught.value) == (
        "the parties disagree on the protocol version: rank 1 (client) was started with 3, rank 0 (owner) with 9; "
        "start every party with the same command and version"
    )
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(HELLO.pack(MAGIC, 9, 0, 3, 0, b"owner", bytes(16), bytes(32)))
        with pytest.raises(Stranger, match="it is of another run or version"):
            ONE.answer(ours, {0}, Wait(5))


def test_an_unreachable_listener(port):
    with pytest.raises(PartyError, match=rf"rank 0 \(owner\) cannot be reached at 127.0.0.1:{port} within 2 s \(Conn"):
        rendezvous.dial(ONE, 0, ("127.0.0.1", port), Wait(2))


def test_a_party_that_never_connects(port):
    """It is told where the client listens, and stays away."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(meet, port, ranks=(0, 1), timeout=0.6)
        sock = rendezvous.dial(Greeter(2, ROLES, "", SECRET), 0, ("127.0.0.1", port), Wait(5), patient=True)
        attend(sock, Greeter(2, ROLES, "", SECRET), 0, ("127.0.0.1", 0), Wait(5))
        owner, client = job.result()
        sock.close()
    assert str(client).startswith("rank 2 (dealer) did not connect within 0.6 s: look at its own output")
    assert "did not finish connecting within 0.6 s" in str(owner)


def test_party_that_dies_before_all_are_connected():
    ours, theirs = socket.socketpair()
    theirs.close()
    with pytest.raises(PartyError, match=r"rank 1 \(client\) did not finish connecting within 3 s"):
        rendezvous._barrier({1: ours}, ["rank 0 (owner)", "rank 1 (client)"], Wait(3))
    ours.close()


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        "{}",
        "{x}",
        "[" * 65535,
        '{"type":"places","of":[]}',
        '{"type":"places","of":[["127.0.0.1",1],["127.0.0.1",1],["127.0.0.1",70000]]}',
        '{"type":"places","of":[["127.0.0.1",1],["127.0.0.1",1],["a\\nb",1]]}',
        '{"type":"stop","reason":"\\u001b[2J","is_usage":true}',
    ],
)
def test_what_the_host_says_is_checked(told):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sent = FACTS.pack(len(told)) + told.encode()
        threading.Thread(target=theirs.sendall, args=(sent,), daemon=True).start()
        with pytest.raises(PartyError, match=r"did not say within 1 s that .* \((what it says next is|it says where) "):
            attend(ours, ONE, 0, ("127.0.0.1", 1), Wait(1))


# The environment


GOOD = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}


def test_read_environment():
    assert read_environment(GOOD) == (1, 3, "10.0.0.5", 29500)
    assert read_environment(GOOD | {"MASTER_ADDR": "localhost"})[2] == "127.0.0.1"


def test_under_torchrun_parties_meet_beside_its_own_store():
    agent = GOOD | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert read_environment(agent)[2:] == ("10.0.0.5", 29501)
    assert read_environment(agent | {"LOCAL_WORLD_SIZE": "3"})[2:] == ("127.0.0.1", 29501)
    assert read_environment(agent | {"LOCAL_WORLD_SIZE": "2"})[2:] == ("10.0.0.5", 29501)
    first, again = ({"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": count} for count in "01")
    assert run_of(first) != run_of(again) and run_of({}) == run_of({})


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
        ({"MASTER_PORT": "65535"}, "MASTER_PORT=65535 is out of range: give one from 1 to 65534"),
    ],
)
def test_malformed_environment(change, message):
    env = {name: value for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(UsageError) as caught:
        read_environment(env)
    assert str(caught.value).startswith(message)
