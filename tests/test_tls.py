"""Links under TLS: who is let in, what travels, and what is said when a key does not fit."""

import contextlib
import gc
import hashlib
import os
import shutil
import socket
import ssl
import stat
import struct
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from programs import GENERATE, by_hand, error_line, free_port
from transports import socket_pair, together

from crypten_llm.commands.cli import main
from crypten_llm.errors import CryptenLLMError, PartyError, UsageError
from crypten_llm.links import rendezvous
from crypten_llm.links.tls import Links, make_key
from crypten_llm.links.transport import Transport

ROLES = ["owner", "client", "dealer"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A folder with the keys and certificates of all roles."""
    folder = tmp_path_factory.mktemp("keys")
    for role in ROLES:
        make_key(folder, role)
    return folder


@pytest.fixture
def secured(keys):
    """Makes two transports whose link is under TLS, from two connected sockets."""
    made = []

    def make(ours, theirs, timeout=5.0):
        ours.settimeout(5), theirs.settimeout(5)
        with ThreadPoolExecutor(2) as pool:
            answered = pool.submit(Links(keys, ROLES, 0).secure, ours)
            dialled = pool.submit(Links(keys, ROLES, 1).secure, theirs, 0)
            ends = answered.result(5), dialled.result(5)
        made.extend(Transport(rank, ROLES[:2], {1 - rank: ends[rank]}, timeout=timeout) for rank in (0, 1))
        return made[-2:]

    yield make
    for transport in made:
        transport.close()


@pytest.fixture
def relayed():
    """Makes two connected sockets between which somebody passes on what ``change`` makes of each piece."""
    ends, threads = [], []

    def relay(source, target, change):
        with contextlib.suppress(OSError):
            while chunk := source.recv(1 << 16):
                target.sendall(change(chunk))

    def make(change):
        (ours, left), (right, theirs) = socket_pair(), socket_pair()
        ends.extend((left, right))
        for pair in ((left, right), (right, left)):
            threads.append(threading.Thread(target=relay, args=(*pair, change)))
            threads[-1].start()
        return ours, theirs

    yield make
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()
    for end in ends:
        end.close()


def meet(folders, timeout=5.0):
    """Each rank connects with its folder, or plainly with ``None``; a Transport or the error for each."""
    port = free_port()

    def job(rank, folder):
        try:
            links = Links(folder, ROLES, rank) if folder else None
            return rendezvous.connect(rank, 3, ROLES, "127.0.0.1", port, timeout, links=links)
        except CryptenLLMError as error:
            assert "\n" not in str(error)
            return error

    return together(*(lambda rank=rank, folder=folder: job(rank, folder) for rank, folder in enumerate(folders)))


# What travels.


@pytest.mark.parametrize("size", [0, 1, 5, 2047, 2048, 100_000, 3_000_000])
def test_tensors_arrive_both_ways_at_once(secured, size):
    """Also more than the sockets' buffers hold, when both sides only write at first."""
    a, b = secured(*socket_pair())
    x, y = torch.arange(size), torch.arange(size) * 3
    got = together(lambda: a.exchange(1, x), lambda: b.exchange(0, y))
    assert torch.equal(got[0], y) and torch.equal(got[1], x)
    sent, received = a.meter.snapshot().online.bytes_sent, b.meter.snapshot().online.bytes_received
    assert sent == received == 24 + 8 * size  # of frames: what TLS adds is not counted


def test_many_messages_of_several_tensors(secured):
    a, b = secured(*socket_pair())

    def job(party, peer):
        for count in range(60):
            mine = [torch.full((count * 7 + k,), party.rank) for k in range(5)] + [torch.ones(3, dtype=torch.uint8)]
            for theirs in party.all_exchange_many([peer], mine)[peer][:5]:
                assert (theirs == 1 - party.rank).all()
        party.send_json(peer, {"done": party.rank})
        return party.recv_json(peer)

    assert together(lambda: job(a, 1), lambda: job(b, 0)) == [{"done": 1}, {"done": 0}]


def test_nothing_is_read_on_the_way(relayed, secured):
    """A relay between the parties sees TLS records and no byte of what they hold."""
    seen = []
    a, b = secured(*relayed(lambda chunk: seen.append(chunk) or chunk))
    secret = torch.tensor([int.from_bytes(b"thepatie", "little")] * 1000)
    together(lambda: a.send(1, secret), lambda: b.recv(0, secret.shape, secret.dtype))
    a.send_json(1, {"reason": "public words"})
    assert b.recv_json(0) == {"reason": "public words"}
    everything = b"".join(seen)
    assert len(everything) > 8000
    assert b"thepatie" in secret.numpy().tobytes()
    for words in (b"thepatie", b"public words", b"crypten_llm"):  # certificates are encrypted too
        assert words not in everything


def test_last_words_arrive(secured):
    a, b = secured(*socket_pair())
    a.abort("out of memory")
    with pytest.raises(PartyError, match=r"rank 0 \(owner\) stopped: out of memory"):
        b.recv(0, (1,), torch.int64)


def test_what_was_sent_before_the_end_arrives(secured):
    """A party that only sends, and closes at once."""
    a, b = secured(*socket_pair())
    x = torch.arange(1 << 18)
    got = together(lambda: (b.send(0, x), b.close()), lambda: a.recv(1, x.shape, x.dtype))
    assert torch.equal(got[1], x)


def test_a_silent_party_is_named(secured):
    a, _ = secured(*socket_pair(), timeout=0.3)
    with pytest.raises(PartyError, match=r"rank 1 \(client\) sent nothing for 0.3 s"):
        a.recv(1, (4,), torch.int64)


def test_a_changed_byte_ends_the_run(relayed, secured):
    """What is altered on the way is no message: the link ends."""
    spoiling = threading.Event()
    a, b = secured(*relayed(lambda chunk: chunk[:-1] + bytes([chunk[-1] ^ spoiling.is_set()])))
    spoiling.set()
    a.send(1, torch.arange(10))
    with pytest.raises(PartyError, match=r"what came from rank 0 \(owner\) during .* is not as it was sent"):
        b.recv(0, (10,), torch.int64)


# Who is let in.


def test_three_parties_meet(keys):
    parties = meet([keys] * 3)
    jobs = [lambda p=p: p.all_exchange([r for r in range(3) if r != p.rank], torch.tensor(p.rank)) for p in parties]
    for received in together(*jobs):
        assert all(rank == tensor.item() for rank, tensor in received.items())
    for party in parties:
        assert all(link.sock.version() == "TLSv1.3" for link in party._links.values())
        party.close()


def test_each_party_needs_its_own_key_alone(keys, tmp_path):
    folders = [tmp_path / role for role in ROLES]
    for role, folder in zip(ROLES, folders, strict=True):
        folder.mkdir()
        for name in [f"{role}.key", *(f"{other}.crt" for other in ROLES)]:
            shutil.copy(keys / name, folder)
    for party in meet(folders):
        party.close()


@pytest.mark.parametrize("secured", [(True, True, False), (False, True, False)])
def test_all_or_none(keys, secured):
    """Whoever finds the disagreement says it, to a host with TLS and to one without; nobody falls back to plain TCP."""
    found = meet([keys if tls else None for tls in secured], timeout=1.0)
    assert all(isinstance(error, CryptenLLMError) for error in found)
    differs = found[2 if secured[0] else 1]
    assert str(differs).startswith("the parties disagree on the links: rank ")
    assert "TLS (--tls)" in str(differs) and "plain TCP" in str(differs)
    assert "did not come within 1 s" in str(found[0]) and "links)" in str(found[0])


def test_another_key_is_turned_away(keys, tmp_path):
    """A client whose certificate the others have not been given."""
    stranger = tmp_path / "stranger"
    shutil.copytree(keys, stranger)
    (stranger / "client.key").unlink(), (stranger / "client.crt").unlink()
    make_key(stranger, "client")
    found = meet([keys, stranger, keys], timeout=2.0)
    assert all(isinstance(error, PartyError) for error in found)
    assert "did not complete the greeting" in str(found[1])


@pytest.mark.parametrize("peer", [None, 0])
def test_a_connection_that_ends_before_its_handshake_is_closed(keys, peer):
    ours, theirs = socket_pair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, as of a closed listener
    theirs.close()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(OSError):
            Links(keys, ROLES, 1).secure(ours, peer)
        gc.collect()
    assert [str(warning.message) for warning in said if warning.category is ResourceWarning] == []


def test_one_role_is_not_another(keys, tmp_path):
    """The dealer's key, known to all, does not make a client."""
    posing = tmp_path / "posing"
    shutil.copytree(keys, posing)
    for kind in ("key", "crt"):
        shutil.copy(keys / f"dealer.{kind}", posing / f"client.{kind}")
        (posing / f"dealer.{kind}").unlink()
    make_key(posing, "dealer")
    found = meet([keys, posing, keys], timeout=2.0)
    assert all(isinstance(error, PartyError) for error in found)


def test_strangers_without_a_key_hold_nobody_up(keys):
    """Plain connections to a party that answers, silent or not, are dropped, and the others still come."""
    port, strays = free_port(), []

    def job(rank):
        links = Links(keys, ROLES, rank)
        return rendezvous.connect(rank, 3, ROLES, "127.0.0.1", port, 20.0, links=links)

    def stray(said):
        while True:
            with contextlib.suppress(ConnectionRefusedError):
                strays.append(socket.create_connection(("127.0.0.1", port)))
                return strays[-1].sendall(said)

    with ThreadPoolExecutor(1) as pool:
        owner = pool.submit(job, 0)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x16\x03\x01\x02\x00\x01"):
            stray(said)
        began = time.monotonic()
        for party in (*together(*(lambda rank=rank: job(rank) for rank in (1, 2))), owner.result()):
            party.close()
    for sock in strays:
        sock.close()
    assert time.monotonic() - began < 4


# Files.


def test_a_key_is_private_and_never_overwritten(tmp_path, capsys):
    assert main(["keys", "client", "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr().out
    key, certificate = tmp_path / "new" / "client.key", tmp_path / "new" / "client.crt"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and b"PRIVATE" in key.read_bytes()
    assert b"PRIVATE" not in certificate.read_bytes()
    digits = shown.splitlines()[-1].partition(": ")[2].replace(" ", "")
    assert digits == hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.read_text())).hexdigest()
    before = key.read_bytes()
    assert main(["keys", "client", "--out", str(tmp_path / "new")]) == 2
    assert error_line(capsys.readouterr().err).startswith(f"{key} exists; give another folder (--out)")
    assert key.read_bytes() == before
    assert main(["keys", "klient", "--out", str(tmp_path)]) == 2
    assert "there is no role 'klient'" in capsys.readouterr().err


def test_another_partys_certificate_is_never_overwritten(keys, tmp_path, capsys):
    """A folder that has been sent the owner's certificate, where somebody makes an owner's key."""
    received = tmp_path / "owner.crt"
    shutil.copy(keys / "owner.crt", received)
    assert main(["keys", "owner", "--out", str(tmp_path)]) == 2
    assert error_line(capsys.readouterr().err).startswith(f"{received} exists; give another folder (--out)")
    assert received.read_bytes() == (keys / "owner.crt").read_bytes()
    assert list(tmp_path.iterdir()) == [received], "no key of another certificate is left"


def test_files_that_do_not_fit_are_named(keys, tmp_path):
    folder = tmp_path / "keys"
    with pytest.raises(UsageError, match=r"--tls: cannot read .*owner.crt \(No such file"):
        Links(folder, ROLES, 0)
    shutil.copytree(keys, folder)
    (folder / "dealer.crt").write_text("not one")
    with pytest.raises(UsageError, match=r"--tls: .*dealer.crt is no certificate; have the dealer send it again"):
        Links(folder, ROLES, 0)
    shutil.copy(keys / "dealer.crt", folder)
    shutil.copy(keys / "dealer.key", folder / "owner.key")
    with pytest.raises(UsageError, match=r"--tls: cannot use .*owner.key \(no key of owner's certificate\)"):
        Links(folder, ROLES, 0)
    (folder / "owner.key").unlink()
    with pytest.raises(UsageError, match=r"--tls: cannot use .*owner.key \(No such file"):
        Links(folder, ROLES, 0)


def test_one_key_for_two_roles_is_refused(keys, tmp_path):
    """Also under another certificate of the same key."""
    folder = tmp_path / "keys"
    shutil.copytree(keys, folder)
    shutil.copy(keys / "dealer.crt", folder / "client.crt")
    with pytest.raises(UsageError, match="the certificates of client and dealer in .* are of one key, so the client"):
        Links(folder, ROLES, 0)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_read_is_refused(keys, tmp_path, mode):
    folder = tmp_path / "keys"
    shutil.copytree(keys, folder)
    (folder / "owner.key").chmod(mode)
    with pytest.raises(UsageError, match=rf"others than you can read or change .*owner.key \(mode {mode:o}\)"):
        Links(folder, ROLES, 0)
    Links(folder, ROLES, 1)  # whose own key is closed


@pytest.mark.parametrize("name", ["owner.key", "client.crt"])
def test_a_pipe_in_the_place_of_a_file_holds_nobody_up(keys, tmp_path, name):
    folder = tmp_path / "keys"
    shutil.copytree(keys, folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UsageError, match=rf"{name} \(not a plain file\)"):
        Links(folder, ROLES, 0)


# Whole runs.


def test_an_answer_over_encrypted_links(keys):
    asked = [*GENERATE, "--prompt", "Read the documents.", "--max-new-tokens", "2", "--json", "--timeout", "60"]
    plain, secret = (by_hand(3, *asked, *more) for more in ([], ["--tls", keys]))
    answers = []
    for programs in (plain, secret):
        owner, client, dealer = programs
        with owner, client, dealer:
            answers.append(client.result())
            assert owner.finish()[0] == dealer.finish()[0] == 0
    assert answers[0]["token_ids"] == answers[1]["token_ids"]


def test_a_missing_certificate_ends_every_process(keys, tmp_path):
    shutil.copytree(keys, tmp_path / "keys")
    (tmp_path / "keys" / "dealer.crt").unlink()
    asked = [*GENERATE, "--prompt", "a", "--max-new-tokens", "1", "--timeout", "20", "--tls", tmp_path / "keys"]
    for program in by_hand(3, *asked):
        with program:
            code, _, err = program.finish()
            assert code == 2 and "dealer.crt" in error_line(err)
