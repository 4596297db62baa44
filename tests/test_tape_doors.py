"""What an attacker does with tapes: carries both files to one party, forges or damages them."""

import json
import os
import random
import socket

import pytest
from msgspec.structs import replace
from tapes import compared, open_tape, record

from crypten_llm.commands.cli import main
from crypten_llm.errors import PartyError, UsageError
from crypten_llm.links.signatures import Signer, is_signed, public_keys
from crypten_llm.links.tls import make_key
from crypten_llm.links.transport import Transport
from crypten_llm.protocols.dealer.layout import BEGIN, MAX_HEADER, Header, begin, read_begin
from crypten_llm.protocols.dealer.tape import Tape, locate
from crypten_llm.records import decode, encode
from crypten_llm.roles import CLIENT, OWNER


@pytest.fixture
def folder(tmp_path):
    record(tmp_path / "tape")
    return tmp_path / "tape"


# Both files at one party.


def test_a_party_on_its_own_host_has_its_own_file_alone(folder, tmp_path):
    own = folder / "owner"
    for given in (folder, own, own / "owner.tape"):
        with pytest.raises(UsageError, match=r"client.tape is the client's file and must not be on the owner's host"):
            open_tape(given, OWNER, is_local=False)
    carried = tmp_path / "carried"
    (folder / "client").rename(carried)
    assert open_tape(folder, OWNER, is_local=False) and open_tape(carried, CLIENT, is_local=False)
    (carried / "owner.tape").symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match="owner.tape is the owner's file and must not be on the client's host"):
        locate(carried, CLIENT)


# Forged and damaged files.


def rewritten(path, change=lambda header: header, key=None, raw=None):
    """The file with another header, made to fit what it says of itself where it can."""
    data = path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    begun = read_begin(fd)
    os.close(fd)
    text = json.dumps(change(json.loads(begun.header))).encode() if raw is None else raw
    path.write_bytes(begin(text, key or begun.key, max(len(text), len(begun.header))) + data[begun.start :])


def resigned(path, signer, **changes):
    """A forgery that fits in itself: signed by another key."""
    data = path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    begun = read_begin(fd)
    os.close(fd)
    header = decode(begun.header, Header)
    manifest = replace(header.manifest, **changes)
    signed, signature = manifest.signed_by(signer, manifest.files)
    changed = replace(header, manifest=signed, signature=signature.hex())
    path.write_bytes(begin(encode(changed), begun.key, len(begun.header)) + data[begun.start :])


def at(path, value):
    """A change of a header: puts ``value`` at a path of names."""

    def change(header):
        place = header
        for name in path[:-1]:
            place = place[name]
        if value is ...:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return header

    return change


@pytest.mark.parametrize(
    "change",
    [
        at(("manifest", "requests"), 3),  # no longer what was signed
        at(("manifest", "plan", "chunk"), 64),
        at(("manifest", "engine"), {}),
        at(("signature",), "00" * 64),
        at(("signature",), "no hex"),
        at(("signature",), 5),
        at(("manifest", "signer"), Signer.fresh().public),
        at(("manifest", "signer"), "AAAA"),
        at(("manifest", "files", "owner"), "0" * 64),
        at(("manifest", "files", "owner"), ...),
        at(("manifest", "files"), None),
        at(("manifest", "requests"), -1),
        at(("manifest", "requests"), True),
        at(("manifest", "requests"), 1e300),
        at(("manifest", "requests"), 1 << 60),
        at(("manifest", "plan"), {str(i): 0 for i in range(100)}),
        at(("manifest", "plan", "policy"), ["full"]),
        at(("manifest", "plan", "policy"), float("nan")),
        at(("manifest", "id"), "\x1b[2J"),
        at(("manifest", "id"), "a" * 5000),
        at(("manifest", "id"), ...),
        at(("manifest", "more"), 1),
        at(("manifest",), []),
        at(("party",), "dealer"),
        at(("party",), None),
        at(("sections",), []),
        at(("sections", "one"), [8]),
        at(("sections", "one"), 8),
        at(("sections", "one"), ["8", "0" * 64]),
        at(("sections", "one"), [7, "0" * 64]),
        at(("sections", "one"), [1 << 50, "0" * 64]),
        at(("sections", "one"), [-8, "0" * 64]),
        at(("sections", "one"), [8, "z" * 64]),
        at(("sections", "one"), ...),
        lambda header: [header],
    ],
)
def test_a_header_that_is_not_what_was_signed(folder, change):
    rewritten(folder / "owner" / "owner.tape", change)
    with pytest.raises(UsageError, match="is damaged; nothing was used") as caught:
        open_tape(folder, OWNER)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"[" * 100_000, b'{"manifest": NaN}', b"\xff\xfe", b"9" * 9999, b"null"])
def test_a_header_that_is_no_record(folder, raw):
    rewritten(folder / "owner" / "owner.tape", raw=raw)
    with pytest.raises(UsageError, match="is damaged"):
        open_tape(folder, OWNER)


def test_a_header_that_would_fill_the_memory(folder):
    path = folder / "owner" / "owner.tape"
    data = bytearray(path.read_bytes())
    for length in (MAX_HEADER + 1, 2**64 - 1):
        data[40:48] = length.to_bytes(8, "little")
        path.write_bytes(data)
        with pytest.raises(UsageError, match="is damaged"):
            open_tape(folder, OWNER)


def test_another_key_for_the_same_material(folder):
    rewritten(folder / "owner" / "owner.tape", key=bytes(32))
    with pytest.raises(UsageError, match="is damaged"):
        open_tape(folder, OWNER)


def test_words_of_another_version_are_cut_and_shown_as_text(folder):
    rewritten(folder / "owner" / "owner.tape", at(("manifest", "version"), "\x1b[2J" + "9" * 5000))
    with pytest.raises(UsageError, match=r"was dealt by version \\x1b\[2J9{190,}\.\.\. \(code") as caught:
        open_tape(folder, OWNER)
    assert len(str(caught.value)) < 700


def test_files_that_would_be_waited_for(tmp_path):
    os.mkfifo(tmp_path / "owner.tape")
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(UsageError, match="is not a tape of this version"):
            open_tape(path, OWNER)


def test_mutated_files(folder):
    """A thousand of them, flipped, cut, and joined: damage is one line, and what is not found changes nothing."""
    path, draw = folder / "client" / "client.tape", random.Random(0)
    whole = path.read_bytes()
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(len(data))
            match draw.randrange(4):
                case 0:
                    data[place] ^= 1 << draw.randrange(8)
                case 1:
                    del data[place:]
                    data += b"\0"
                case 2:
                    data[place:place] = whole[draw.randrange(len(whole)) :][: draw.randrange(64)]
                case 3:
                    data[place : place + 8] = draw.choice([b"\xff" * 8, bytes(8), b'{"a":1e9', b"99999999"])
        path.write_bytes(data)
        if bytes(data) != whole:
            try:
                open_tape(folder, CLIENT).close()
            except UsageError as error:
                assert "\n" not in str(error)
            else:
                start = BEGIN.size + int.from_bytes(whole[40:48], "little")
                assert data[16:40].strip(b"\0") == b"" and data[: BEGIN.size] == whole[: BEGIN.size]
                assert json.loads(data[BEGIN.size : start]) == json.loads(whole[BEGIN.size : start])


# Signatures.


def test_a_forgery_that_fits_in_itself_is_no_dealers(folder, tmp_path):
    """Without certificates the other party finds it; with them each party does, alone."""
    make_key(tmp_path / "keys", "dealer")
    dealer = Signer.of_role(tmp_path / "keys", "dealer")
    record(tmp_path / "signed", signer=dealer)
    trusted = public_keys(tmp_path / "keys", "dealer")
    assert [dealer.public] == trusted and open_tape(tmp_path / "signed", OWNER, signers=trusted)
    with pytest.raises(UsageError, match=r"is not signed by the dealer's key, of [0-9a-f ]{39}, but by that of"):
        open_tape(folder, OWNER, signers=trusted)
    resigned(tmp_path / "signed" / "client" / "client.tape", Signer.fresh(), requests=9)
    with pytest.raises(UsageError, match="is not signed by the dealer's key"):
        open_tape(tmp_path / "signed", CLIENT, signers=trusted)
    found = compared(tmp_path / "signed", tmp_path / "signed")
    assert len(found) == 2 and all(str(error).startswith("the tape's requests is ") for error in found)


def test_files_that_were_swapped_are_found(folder, tmp_path):
    """Of one deal they are alike; with the material of another, under the same name, they are not."""
    assert compared(folder, folder) == []
    record(tmp_path / "other")
    signer = Signer.fresh()
    fd = os.open(folder / "owner" / "owner.tape", os.O_RDONLY)
    ours = decode(read_begin(fd).header, Header).manifest
    os.close(fd)
    same = {field: getattr(ours, field) for field in ("id", "config", "plan", "requests")}
    resigned(tmp_path / "other" / "client" / "client.tape", signer, **same)
    found = compared(folder, tmp_path / "other")
    assert len(found) == 2 and all("the tape's signer is" in str(error) for error in found)


@pytest.mark.parametrize("said", [[], {}, {"id": 5}, "manifest", {"version": "x" * 9999}])
def test_another_party_that_says_something_else_of_its_tape(folder, said):
    ours, theirs = socket.socketpair()
    link = Transport(0, ("owner", "client"), {1: ours}, timeout=5)
    other = Transport(1, ("owner", "client"), {0: theirs}, timeout=5)
    other.send_json(0, said)
    mine = Tape(folder, OWNER, link, is_local=True)
    with pytest.raises(
        PartyError,
        match=r"rank 1 \(client\) sent something else than what is due \(not of its kind: .{,99}different programs",
    ):
        mine.compare(mine.manifest.engine)
    for each in (link, other):
        each.close()


def test_keys_that_sign(tmp_path):
    make_key(tmp_path, "dealer")
    for signer in (Signer.fresh(), Signer.of_role(tmp_path, "dealer")):
        signature = signer.sign(b"what was dealt")
        assert is_signed(b"what was dealt", signature, signer.public)
        assert not is_signed(b"what was dealt.", signature, signer.public)
        assert not is_signed(b"what was dealt", signature[:-1] + bytes([signature[-1] ^ 1]), signer.public)
        assert not is_signed(b"what was dealt", signature, Signer.fresh().public)
        assert not is_signed(b"what was dealt", b"", "no key")
    with pytest.raises(UsageError, match=r"cannot read .*owner.key \(No such file.*the owner makes it with"):
        Signer.of_role(tmp_path, "owner")
    (tmp_path / "owner.key").write_text("nothing")
    with pytest.raises(UsageError, match="owner.key is no key of a party"):
        Signer.of_role(tmp_path, "owner")
    (tmp_path / "owner.crt").write_text("nothing")
    with pytest.raises(UsageError, match="owner.crt is no certificate; have the owner send it again"):
        public_keys(tmp_path, "owner")


def test_deal_signs_with_the_dealers_key(tmp_path, capsys):
    make_key(tmp_path / "keys", "dealer")
    sizes = "--hidden 16 --heads 2 --kv-heads 2 --ffn 16 --kv-len 4 --steps 1".split()
    out = ["--bench", *sizes, "--out", str(tmp_path / "tape"), "--tls"]
    assert main(["deal", *out, str(tmp_path)]) == 2
    assert "dealer.key (No such file" in capsys.readouterr().err and not (tmp_path / "tape").exists()
    assert main(["deal", *out, str(tmp_path / "keys")]) == 0
    said = capsys.readouterr().err
    assert "signed by the dealer's key, " in said and f"carry {tmp_path}/tape/owner to the owner alone" in said
    trusted = public_keys(tmp_path / "keys", "dealer")
    assert all(open_tape(tmp_path / "tape", party, signers=trusted) for party in (OWNER, CLIENT))
