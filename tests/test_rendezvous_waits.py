"""Whoever is missing or hangs, no wait for it is without end; each ends with its message, or at once on Ctrl-C."""

import signal
import socket
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from meetings import ROLES, SECRET, assert_connected, meet
from programs import Program

from crypten_llm.errors import PartyError
from crypten_llm.links import meeting, rendezvous
from crypten_llm.links.greeting import Greeter
from crypten_llm.links.tls import Links, make_key
from crypten_llm.links.waiting import Wait

OWNER, CLIENT = (Greeter(rank, ROLES, "", SECRET) for rank in (0, 1))


# Who is missing


def test_missing_parties_are_named_to_all_who_came(port):
    owner, client = meet(port, ranks=(0, 1), timeout=0.4)
    assert isinstance(owner, PartyError) and isinstance(client, PartyError)
    assert str(owner) == (
        "rank 2 (dealer) did not come within 0.4 s: start every party with the same MASTER_ADDR and MASTER_PORT, and "
        "raise the timeout if they only need longer"
    )
    assert str(client) == str(owner)


def test_nobody_hosts_the_meeting(port, capfd):
    (error,) = meet(port, ranks=(1,), timeout=0.3)
    assert isinstance(error, PartyError)
    assert str(error) == (
        f"rank 0 (owner) cannot be reached at 127.0.0.1:{port} within 0.3 s (Connection refused): start rank 0 (owner) "
        "and check MASTER_ADDR and MASTER_PORT"
    )
    assert capfd.readouterr().err == ""


def test_a_late_host_is_found(port):
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(meet, port, ranks=(1,), world=2)
        time.sleep(0.3)
        (zero,) = meet(port, ranks=(0,), world=2)
        assert_connected([zero, *early.result()])


def test_a_host_that_goes_away_is_named(port):
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(meet, port, ranks=(1,), timeout=20)
        with socket.create_server(("127.0.0.1", port)) as listener:
            sock = OWNER.answer(listener.accept()[0], {1, 2}, Wait(5))[1]
        sock.close()
        (error,) = job.result(timeout=10)
    assert isinstance(error, PartyError)
    assert str(error).startswith("rank 0 (owner) did not say within 20 s that all parties have come (")


def test_ctrl_c_ends_the_wait_for_a_host_that_hangs(port):
    program = f"""
        from crypten_llm.links.rendezvous import connect
        try:
            connect(1, 3, {ROLES}, "127.0.0.1", {port}, 60.0, secret={SECRET},
                    while_waiting=lambda: print("waiting", flush=True))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    with socket.create_server(("127.0.0.1", port)), Program("-c", textwrap.dedent(program)) as party:
        assert party.process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        party.process.send_signal(signal.SIGINT)
        code, out, err = party.finish(timeout=10)
    assert (code, out.splitlines()[-1], err) == (0, "interrupted", "")


# What is looked after meanwhile


class ChildEnded(Exception):
    pass


@pytest.fixture
def ending():
    """A wait that would be long, but that its look ends soon."""
    ends = time.monotonic() + 0.3

    def look():
        if time.monotonic() > ends:
            raise ChildEnded

    return Wait(20, look)


@pytest.fixture
def silent():
    """A listener at which everyone is let in and nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def waits(silent, port, folder):
    """Every wait of the rendezvous, for parties of which one has died or hangs, as a function of its `Wait`."""
    names, place = ["rank 0 (owner)", "rank 1 (client)"], silent.getsockname()
    for role in ROLES:
        make_key(folder, role)
    secured = Greeter(1, ROLES, "", b"", Links(folder, ROLES, 1))

    def barrier(wait):
        with socket.create_connection(place) as sock:
            rendezvous._barrier({1: sock}, names, wait)

    def directory(wait):
        with socket.create_connection(place) as sock:
            meeting.attend(sock, CLIENT, 0, place, wait)

    return {
        "the host": lambda wait: rendezvous.dial(CLIENT, 0, ("127.0.0.1", port), wait, patient=True),
        "the parties": lambda wait: meeting.host(silent, OWNER, place, wait),
        "the directory": directory,
        "a greeting": lambda wait: rendezvous.dial(CLIENT, 0, place, wait),
        "TLS": lambda wait: rendezvous.dial(secured, 0, place, wait),
        "all links": barrier,
    }


@pytest.mark.parametrize("what", ["the host", "the parties", "the directory", "a greeting", "TLS", "all links"])
def test_a_child_that_ends_stops_every_wait(what, silent, port, ending, tmp_path):
    started = time.monotonic()
    with pytest.raises(ChildEnded):
        waits(silent, port, tmp_path)[what](ending)
    assert time.monotonic() - started < 5


def test_a_child_that_came_and_died_stops_the_wait(port):
    looks = []

    def look():
        looks.append(time.monotonic())
        if looks[-1] - looks[0] > 0.5:
            raise PartyError("rank 1 (client) was ended by SIGKILL")

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(meet, port, ranks=(0,), timeout=20, while_waiting=look)
        rendezvous.dial(CLIENT, 0, ("127.0.0.1", port), Wait(5), patient=True).close()
        (error,) = job.result(10)
    assert str(error) == "rank 1 (client) was ended by SIGKILL"
    assert looks[-1] - looks[0] < 5
