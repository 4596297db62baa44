"""Whoever is missing or hangs, no wait for it is without end; each ends with its message, or at once on Ctrl-C."""

import re
import signal
import socket
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from meetings import ROLES, assert_connected, meet
from programs import Program, free_port

from crypten_llm.errors import PartyError
from crypten_llm.links import rendezvous
from crypten_llm.links.store import Store, Wait
from crypten_llm.links.tls import Links, make_key

pytestmark = pytest.mark.usefixtures("no_torchrun")


# Who is missing


def test_missing_parties_are_named(hosted):
    _, port = hosted
    (error,) = meet(port, ranks=(1,), is_master=False, timeout=0.3)
    assert isinstance(error, PartyError)
    assert str(error) == (
        "rank 0 (owner), rank 2 (dealer) did not come within 0.3 s: start every party with the same MASTER_ADDR and "
        "MASTER_PORT, and raise the timeout if they only need longer"
    )


def test_every_party_names_the_missing_one(port):
    for error in meet(port, ranks=(0, 1), timeout=0.4):
        assert isinstance(error, PartyError)


def test_no_store(port, capfd):
    (error,) = meet(port, ranks=(1,), timeout=0.3)
    assert isinstance(error, PartyError)
    assert str(error) == (
        f"no rendezvous store at 127.0.0.1:{port} after 0.3 s (Connection refused): start rank 0 (owner) and check "
        "MASTER_ADDR and MASTER_PORT"
    )
    assert capfd.readouterr().err == ""  # torch would print stack traces


def test_late_store_is_found(port):
    with ThreadPoolExecutor(1) as pool:
        early = pool.submit(meet, port, ranks=(1,), world=2)
        time.sleep(0.3)
        (zero,) = meet(port, ranks=(0,), world=2)
        assert_connected([zero, *early.result()])


def test_store_that_goes_away(hosted):
    class Gone:
        def check(self, keys):
            raise RuntimeError("Connection reset by peer\nException raised from recvBytes")

    _, port = hosted
    store = Store("127.0.0.1", port, False, "rank 0 (owner)", Wait(5), "x/")
    store._store = Gone()
    with pytest.raises(PartyError) as caught:
        store.get("key")
    assert str(caught.value) == (
        f"the rendezvous store at 127.0.0.1:{port} went away (Connection reset by peer): the party or launcher that "
        "hosts it stopped, start all parties again"
    )


@pytest.fixture
def stopped():
    """A port where a process hosts a store, and what stops that process as a debugger or a lost network would."""
    program = """
        from torch.distributed import TCPStore
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        print(store.port, flush=True)
        input()
    """
    with Program("-c", textwrap.dedent(program)) as host:  # which ends it also where it is stopped
        port = int(host.process.stdout.readline())

        def stop():
            host.process.send_signal(signal.SIGSTOP)
            threads = list(Path(f"/proc/{host.process.pid}/task").glob("*/stat"))
            while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in threads):
                time.sleep(0.01)  # until then one of them may still answer

        yield port, stop


STORE = (
    r"the rendezvous store at 127.0.0.1:{} did not answer {} within {} s: the party or launcher that hosts it hangs, or"
)


def test_store_that_hangs_is_named(stopped):
    port, stop = stopped
    store = Store("127.0.0.1", port, False, "rank 0 (owner)", Wait(0.5), "x/")
    store.put("key", "value")
    stop()
    calls = {
        "check 'key'": lambda: store.get("key"),
        "set 'key'": lambda: store.put("key", "other"),
        "compare_set 'job'": lambda: store.put_first("job", "mine"),
        "add 'claim/1'": lambda: store.add("claim/1"),
    }
    for operation, call in calls.items():
        started = time.monotonic()
        with pytest.raises(PartyError, match=STORE.format(port, operation, 0.5)):
            call()
        assert time.monotonic() - started < 3


def test_parties_of_a_store_that_hangs_end(stopped):
    port, stop = stopped
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(meet, port, ranks=(1,), is_master=False, timeout=3)
        time.sleep(1)
        stop()
        (error,) = job.result(timeout=10)
    assert isinstance(error, PartyError)
    assert re.match(STORE.format(port, "check '(address/[02]|stop)'", 3), str(error))


def test_ctrl_c_ends_the_wait_for_a_store_that_hangs(stopped):
    port, stop = stopped
    program = f"""
        from crypten_llm.links.rendezvous import connect
        try:
            connect(1, 3, {ROLES}, "127.0.0.1", {port}, 60.0, while_waiting=lambda: print("waiting", flush=True))
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    with Program("-c", textwrap.dedent(program)) as party:
        assert party.process.stdout.readline() == "waiting\n"
        time.sleep(0.5)
        stop()
        time.sleep(0.2)
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


def waits(silent, hosted, folder):
    """Every wait of the rendezvous, for parties of which one has died or hangs, as a function of its `Wait`."""
    names, place = ["rank 0 (owner)", "rank 1 (client)"], silent.getsockname()
    entry = {"host": place[0], "port": place[1], "token": "00" * 16}
    for role in ROLES:
        make_key(folder, role)

    def store(wait):
        return Store("127.0.0.1", hosted.port, False, names[0], wait, "x/")

    def barrier(wait):
        with socket.create_connection(place) as sock:
            rendezvous._barrier({1: sock}, names, wait)

    return {
        "the store's port": lambda wait: Store("127.0.0.1", free_port(), False, names[0], wait, "x/"),
        "the store": lambda wait: Store(*place, False, names[0], wait, "x/"),
        "the directory": lambda wait: rendezvous._read_directory(store(wait), names, 1, wait),
        "a connection": lambda wait: rendezvous._answer(silent, names, 0, 2, bytes(16), {}, {}, wait, None),
        "a greeting": lambda wait: rendezvous._dial(names, 0, entry, 1, 2, bytes(16), wait, None),
        "TLS": lambda wait: rendezvous._dial(names, 0, entry, 1, 2, bytes(16), wait, Links(folder, ROLES, 1)),
        "all links": barrier,
    }


@pytest.mark.parametrize(
    "what", ["the store's port", "the store", "the directory", "a connection", "a greeting", "TLS", "all links"]
)
def test_a_child_that_ends_stops_every_wait(what, silent, hosted, ending, tmp_path):
    started = time.monotonic()
    with pytest.raises(ChildEnded):
        waits(silent, hosted[0], tmp_path)[what](ending)
    assert time.monotonic() - started < 5


def test_a_child_that_published_its_address_and_died_stops_the_wait(hosted):
    store, port = hosted
    store.set("crypten_llm//0/address/1", '{"host": "127.0.0.1", "port": 1, "token": ""}')
    looks = []

    def look():
        looks.append(time.monotonic())
        if looks[-1] - looks[0] > 0.3:
            raise PartyError("rank 1 (client) was ended by SIGKILL")

    (error,) = meet(port, ranks=(0,), world=2, is_master=False, timeout=20, while_waiting=look)
    assert str(error) == "rank 1 (client) was ended by SIGKILL"
    assert looks[-1] - looks[0] < 5
