"""Attacks on the meeting point and the links: strangers, silence, drips, a program in between, and who could listen."""

import os
import socket
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from meetings import ROLES, SECRET, assert_connected, meet
from programs import Program, error_line

from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links import keyring, meeting
from crypten_llm.links.greeting import HELLO, MAGIC, PROTOCOL_VERSION, Greeter, Stranger
from crypten_llm.links.sockets import is_loopback
from crypten_llm.links.waiting import Wait
from crypten_llm.session import launch
from crypten_llm.session.settings import LaunchConfig, ProtocolConfig

OTHER = b"what a stranger made up, as long as it is"


@pytest.fixture
def crowded(port):
    """Makes so many connections to a meeting point, as soon as it listens; closes them afterwards."""
    made = []

    def crowd(count):
        deadline = time.monotonic() + 5
        while len(made) < count:
            assert time.monotonic() < deadline, "nobody listens"
            with suppress(ConnectionRefusedError):
                made.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        return made

    yield crowd
    for sock in made:
        sock.close()


# Who is not let in.


@pytest.mark.parametrize("posed", [0, 2])
def test_a_stranger_that_poses_as_a_party_is_dropped_and_the_run_goes_on(port, posed):
    """It knows all but the secret, and comes before the party whose place it wants."""
    with ThreadPoolExecutor(2) as pool:
        client = pool.submit(meet, port, ranks=(1,), hub=1)
        (error,) = meet(port, ranks=(posed,), hub=1, secret=OTHER)
        assert isinstance(error, PartyError) and "it does not know this run's secret" in str(error)
        others = pool.submit(meet, port, ranks=(0, 2), hub=1)
        assert_connected(sorted(client.result() + others.result(), key=lambda party: party.rank))


def test_a_stranger_that_hosts_the_meeting_is_noticed(port):
    """It has taken the place where the parties wanted to meet: neither of them goes on with it."""
    found = meet(port, secret={0: OTHER, 1: SECRET, 2: SECRET}, timeout=0.8)
    assert all(isinstance(error, PartyError) for error in found)
    assert all("rank 0 (owner) did not complete the greeting" in str(error) for error in found[1:])
    assert "2 connections were turned away" in str(found[0])


def test_a_strangers_words_stop_nobody(port, crowded):
    """Hellos of another world size, version, rank and run, and bytes that are none, all without the secret."""
    with ThreadPoolExecutor(1) as pool:
        owner = pool.submit(meet, port, ranks=(0,))
        strangers = crowded(7)
        nonce = bytes(32)
        for sock, said in zip(
            strangers,
            [
                HELLO.pack(MAGIC, PROTOCOL_VERSION, 1, 2, 0, b"client", bytes(16), nonce) + bytes(32),
                HELLO.pack(MAGIC, 9, 1, 3, 0, b"client", bytes(16), nonce) + bytes(32),
                HELLO.pack(MAGIC, PROTOCOL_VERSION, 65535, 3, 0, b"client", bytes(16), nonce) + bytes(32),
                Greeter(1, ROLES[:2], "", OTHER)._hello() + bytes(32),
                Greeter(1, ROLES, "", OTHER)._hello() + bytes(32),
                b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
                os.urandom(500),
            ],
            strict=True,
        ):
            sock.sendall(said)
        assert_connected(owner.result(0.01) if owner.done() else [*meet(port, ranks=(1, 2)), *owner.result()])
        for sock in strangers:
            with suppress(ConnectionResetError):
                while sock.recv(1000):
                    pass  # it is closed


def relay(source, target):
    with suppress(OSError):
        while chunk := source.recv(1 << 16):
            target.sendall(chunk)


def test_a_program_in_between_cannot_pass_the_proofs_on(port):
    """It answers where a party dials, and hands every byte on to the party that was meant."""
    with socket.create_server(("127.0.0.1", 0)) as trap, socket.create_server(("127.0.0.1", 0)) as true:
        owner, client = Greeter(0, ROLES, "", SECRET), Greeter(1, ROLES, "", SECRET)
        dialled = socket.create_connection(trap.getsockname())
        left, right = trap.accept()[0], socket.create_connection(true.getsockname())
        answering = true.accept()[0]
        for pair in ((left, right), (right, left)):
            threading.Thread(target=relay, args=pair, daemon=True).start()
        with left, right, ThreadPoolExecutor(1) as pool:
            answered = pool.submit(owner.answer, answering, {1}, Wait(2))
            with pytest.raises(Stranger, match="it does not know this run's secret"):
                client.dial(dialled, 0, Wait(2))
            with pytest.raises(OSError):
                answered.result()


def test_a_proof_is_no_proof_of_the_other_side(port):
    """Whoever sends a party's own greeting back to it has not proven anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dialled = socket.create_connection(listener.getsockname())
        mirror = listener.accept()[0]
        threading.Thread(target=relay, args=(mirror, mirror), daemon=True).start()
        with mirror, pytest.raises((UsageError, Stranger)):
            Greeter(1, ROLES, "", SECRET).dial(dialled, 0, Wait(0.5))


# Who holds nobody up.


def test_silent_connections_hold_nobody_up(port, crowded):
    """Many more than are greeted at once, before any party comes and while they do."""
    with ThreadPoolExecutor(1) as pool:
        owner = pool.submit(meet, port, ranks=(0,), timeout=20)
        crowded(2 * meeting.GREETINGS)
        began = time.monotonic()
        parties = [*meet(port, ranks=(1, 2), timeout=20), *owner.result()]
        assert time.monotonic() - began < meeting.GREETING_SECONDS / 2
        assert_connected(parties)


def test_a_dripping_greeting_ends_in_time(port, crowded, monkeypatch):
    """A byte now and then moves no deadline; the party whose place it wants comes meanwhile, or after it."""
    monkeypatch.setattr(meeting, "GREETING_SECONDS", 0.4)
    with ThreadPoolExecutor(1) as pool:
        owner = pool.submit(meet, port, ranks=(0,), timeout=20)
        (sock,) = crowded(1)
        began = time.monotonic()
        with pytest.raises(OSError):
            for byte in Greeter(1, ROLES, "", SECRET)._hello():
                sock.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - began < 2
        assert_connected([*meet(port, ranks=(1, 2), timeout=20), *owner.result()])


# Who could listen.


def listening(pids) -> set[str]:
    """Addresses on which these processes accept TCP connections, as the system has them: hexadecimal, with port."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            with suppress(OSError):
                inodes.add(os.readlink(entry))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1])
    return found


@pytest.mark.parametrize("engine", ["wire", "crypten"])
def test_a_local_run_listens_on_loopback_alone(engine):
    """From its start to its end, the listeners of all its processes."""
    seen = set()
    sizes = {"hidden": 32, "heads": 2, "kv-heads": 2, "ffn": 32, "kv-len": 4, "steps": 1}
    asked = [text for name, size in sizes.items() for text in (f"--{name}", size)]
    with Program("-m", "crypten_llm", "bench", "--engine", engine, "--threads", "1", *asked) as program:
        while program.process.poll() is None:
            with suppress(OSError):
                seen |= listening(program.left())
            time.sleep(0.03)
        program.process.communicate()
    assert seen and {address.partition(":")[0] for address in seen} == {"0100007F"}


def test_the_secret_of_a_local_run_comes_over_a_pipe_alone(monkeypatch):
    """Not in arguments or the environment, which others of the machine may read."""
    told = []

    def start(arguments, environment):
        told.append(" ".join([*arguments, *environment, *environment.values()]))
        return subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    monkeypatch.setattr(launch, "start_party", start)
    parties = launch.LocalParties(ProtocolConfig(), LaunchConfig())
    try:
        assert len(told) == 2 and not any(parties.secret in text for text in told)
        for process in parties.processes.values():
            process.stdin.close()
            assert process.stdout.read().decode() == f"{parties.secret}\n"
            process.stdout.close()
            process.stdin = open(os.devnull)
    finally:
        parties.stop()
    other = launch.LocalParties(ProtocolConfig(), LaunchConfig())
    other.stop()
    for process in other.processes.values():
        process.stdout.close()
    assert other.secret != parties.secret and len(bytes.fromhex(other.secret)) == 32


# Links between hosts.


FAR = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.5", "MASTER_PORT": "29500"}


def secret(host="10.0.0.5", env=None, tls="", address="", is_insecure=False):
    return keyring.find([host, address or host], tls, is_insecure, env or {})


def test_links_between_hosts_need_tls_or_a_word():
    refused = r"links by way of {} would be plain TCP, .* give --tls DIR .* or --insecure-links"
    with pytest.raises(UsageError, match=refused.format("10.0.0.5")):
        secret()
    with pytest.raises(UsageError, match=refused.format("10.0.0.7")):
        secret(host="127.0.0.1", address="10.0.0.7")
    assert secret(tls="keys") == secret(is_insecure=True) == b""
    told = {keyring.VARIABLE: SECRET.decode()}
    assert secret(tls="keys", env=told) == secret(is_insecure=True, env=told) == SECRET
    with pytest.raises(UsageError, match="links by way of 10.0.0.5"):  # it proves who is there, and hides nothing
        secret(env=told)


def test_a_program_between_hosts_without_tls_ends_at_once():
    with Program("-m", "crypten_llm", "party", "--timeout", "20", **FAR) as program:
        code, _, err = program.finish(30)
    assert code == 2 and "--insecure-links" in error_line(err)


def test_loopback_by_name_and_number():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST."]))
    assert not any(map(is_loopback, ["10.0.0.5", "0.0.0.0", "::", "fe80::1%eth0", "localhost.example", ""]))


# The secret on one host.


def test_one_user_has_one_secret(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: keyring.of_this_user(env), range(8)))
    assert len(found) == 1 and len(found.pop()) == 64
    path = tmp_path / "crypten_llm" / "link.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(path.parent.iterdir()) == [path]
    assert secret("127.0.0.1", env) == path.read_bytes()
    assert secret("127.0.0.1", env | {keyring.VARIABLE: SECRET.decode()}) == SECRET


@pytest.mark.parametrize("spoil", ["readable", "link", "pipe", "short", "folder"])
def test_a_secret_that_others_could_know_is_refused(tmp_path, spoil):
    env = {"XDG_CACHE_HOME": str(tmp_path)}
    keyring.of_this_user(env)
    path = tmp_path / "crypten_llm" / "link.secret"
    if spoil == "readable":
        path.chmod(0o644)
    elif spoil == "short":
        path.write_text("short")
    else:
        content = path.read_bytes()
        path.unlink()
        if spoil == "link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
        elif spoil == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    with pytest.raises(UsageError, match="link.secret"):
        keyring.of_this_user(env)


def test_a_secret_that_can_be_guessed_is_refused():
    with pytest.raises(UsageError, match="CRYPTEN_LLM_LINK_SECRET has 6 characters and could be guessed"):
        keyring.given({keyring.VARIABLE: "secret"})
    assert keyring.given({}) == b""
