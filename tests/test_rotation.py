"""Keys that change: certificates pinned by fingerprint, and a rotation in which no start fails."""

import itertools
import shutil

import pytest
from programs import free_port
from transports import together

from crypten_llm.commands.cli import main
from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.links import rendezvous, rotation, signatures
from crypten_llm.links.tls import Links, make_key
from crypten_llm.links.transport import Transport

ROLES = ["owner", "client", "dealer"]


@pytest.fixture
def folders(tmp_path):
    """A folder for each party: its own key, and the others' certificates, pinned."""
    made = {role: make_key(tmp_path / role, role) for role in ROLES}
    for mine, theirs in itertools.permutations(ROLES, 2):
        rotation.pin(tmp_path / mine, theirs, made[theirs].certificate, made[theirs].fingerprint)
    return {role: tmp_path / role for role in ROLES}


def meet(folders, timeout=5.0):
    port = free_port()

    def job(rank, folder):
        try:
            return rendezvous.connect(rank, 3, ROLES, "127.0.0.1", port, timeout, links=Links(folder, ROLES, rank))
        except CryptenLLMError as error:
            return error

    found = together(*(lambda rank=rank, role=role: job(rank, folders[role]) for rank, role in enumerate(ROLES)))
    for each in found:
        if isinstance(each, Transport):
            each.close()
    return [isinstance(each, Transport) for each in found]


def test_no_start_fails_while_a_key_is_rotated(folders):
    """Whichever of the others has the new certificate already, and whether or not the new key is in use."""
    others = ("owner", "dealer")
    assert meet(folders) == [True] * 3
    begun = rotation.begin(folders["client"], "client")
    assert meet(folders) == [True] * 3  # nobody has it yet
    for other in others:
        rotation.pin(folders[other], "client", begun.certificate, begun.fingerprint)
        assert meet(folders) == [True] * 3
    ended = rotation.end(folders["client"], "client")
    assert ended.fingerprint == begun.fingerprint and meet(folders) == [True] * 3
    for other in others:
        rotation.pin(folders[other], "client", ended.certificate, "")  # it is pinned: nothing needs to be compared
        assert meet(folders) == [True] * 3
    assert rotation.begin(folders["client"], "client").fingerprint != ended.fingerprint


def test_the_old_key_is_nobodys_once_it_has_been_rotated(folders, tmp_path):
    shutil.copytree(folders["client"], tmp_path / "stolen")
    begun = rotation.begin(folders["client"], "client")
    ended = rotation.end(folders["client"], "client")
    for other in ("owner", "dealer"):
        rotation.pin(folders[other], "client", begun.certificate, begun.fingerprint)
    assert ended.certificate == begun.certificate
    assert meet({**folders, "client": tmp_path / "stolen"}, timeout=2.0) == [False] * 3


def test_an_end_that_was_interrupted_goes_on(folders, monkeypatch):
    begun = rotation.begin(folders["client"], "client")

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rotation, "_write", fail)
        with pytest.raises(KeyboardInterrupt):
            rotation.end(folders["client"], "client")
    assert rotation.end(folders["client"], "client").fingerprint == begun.fingerprint


def test_a_dealer_between_two_keys_has_signed_with_either(folders):
    before = signatures.Signer.of_role(folders["dealer"], "dealer").public
    rotation.begin(folders["dealer"], "dealer")
    trusted = signatures.public_keys(folders["dealer"], "dealer")
    rotation.end(folders["dealer"], "dealer")
    after = signatures.Signer.of_role(folders["dealer"], "dealer").public
    assert trusted == [before, after] and signatures.public_keys(folders["dealer"], "dealer") == [after]


def test_what_is_not_pinned(folders, tmp_path):
    pinned = (folders["owner"] / "client.crt").read_bytes()
    other = make_key(tmp_path / "other", "client")
    for fingerprint in ("", "ab" * 32, other.fingerprint[:-1]):
        with pytest.raises(UsageError, match="has the fingerprint"):
            rotation.pin(folders["owner"], "client", other.certificate, fingerprint)
    with pytest.raises(UsageError, match="not of the dealer"):
        rotation.pin(folders["owner"], "dealer", other.certificate, other.fingerprint)
    with pytest.raises(UsageError, match="holds the key of client"):
        rotation.pin(folders["client"], "client", other.certificate, other.fingerprint)
    with pytest.raises(UsageError, match="no role 'king'"):
        rotation.pin(folders["owner"], "king", other.certificate, other.fingerprint)
    both = tmp_path / "both.crt"  # of two, one that was never pinned may not come along
    both.write_bytes(make_key(tmp_path / "third", "client").certificate.read_bytes() + other.certificate.read_bytes())
    with pytest.raises(UsageError, match="has the fingerprint"):
        rotation.pin(folders["owner"], "client", both, other.fingerprint)
    both.write_bytes(other.certificate.read_bytes() * 3)
    with pytest.raises(UsageError, match="more than 2"):
        rotation.pin(folders["owner"], "client", both, other.fingerprint)
    assert (folders["owner"] / "client.crt").read_bytes() == pinned
    rotation.pin(folders["owner"], "client", other.certificate, other.fingerprint.upper().replace(" ", ""))
    assert (folders["owner"] / "client.crt").read_bytes() == other.certificate.read_bytes()


def test_steps_out_of_order(folders, tmp_path):
    with pytest.raises(UsageError, match="no rotation of client's key has begun"):
        rotation.end(folders["client"], "client")
    rotation.begin(folders["client"], "client")
    with pytest.raises(UsageError, match="has begun"):
        rotation.begin(folders["client"], "client")
    with pytest.raises(UsageError, match="cannot be read"):
        rotation.begin(tmp_path / "nothing", "client")


def test_the_command(folders, tmp_path, capsys):
    client = ["keys", "client", "--out", str(folders["client"])]
    assert main([*client, "--rotate", "begin"]) == 0
    said = capsys.readouterr().out
    fingerprint = said.partition("compare: ")[2].strip()
    assert (folders["client"] / "client.next.key").stat().st_mode & 0o777 == 0o600
    pin = ["keys", "client", "--out", str(folders["owner"]), "--pin", str(folders["client"] / "client.crt")]
    assert main(pin) == 2 and fingerprint in capsys.readouterr().err
    assert main([*pin, "--fingerprint", fingerprint]) == 0
    assert main([*client, "--rotate", "end"]) == 0 and fingerprint in capsys.readouterr().out
    assert main([*client, "--rotate", "end"]) == 2 and main([*client, "--fingerprint", "ab"]) == 2
