"""Tapes on a disk, before and after their run: what whoever takes them can read, and whole runs that leave them so."""

import json
import os
from dataclasses import replace

import pytest
import torch
from tapes import KEYS, links_of, open_tape, record

from crypten_llm.commands.deal import deal
from crypten_llm.errors import UsageError
from crypten_llm.links.tls import make_key
from crypten_llm.protocols.dealer.layout import BEGIN, Header, read_begin
from crypten_llm.protocols.dealer.manifest import NAMES, Manifest
from crypten_llm.protocols.dealer.roles import ROLES
from crypten_llm.records import convert, decode
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import launch
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.bench import Shape
from crypten_llm.session.settings import LaunchConfig, ProtocolConfig, split


@pytest.fixture
def folder(tmp_path):
    record(tmp_path / "tape")
    return tmp_path / "tape"


def test_what_lies_on_the_disk_is_encrypted_and_then_zero(folder):
    """No dealt byte can be read without the key, which is overwritten before the first is used; and what was used is
    overwritten too.
    """
    for party, name in enumerate(NAMES):
        path = folder / name / f"{name}.tape"
        before = path.read_bytes()
        mine = open_tape(folder, party)
        start, stop = mine._sections["one"]
        first, second = KEYS
        known = bytes([7]) * 15  # what was dealt to both
        assert known not in before
        runtime = ROLES[party](mine._transport, mine.keys, mine)
        runtime.begin("one")
        key = bytes(mine.keys[0])
        burned = path.read_bytes()
        assert key not in burned and burned[BEGIN.size : start] == before[BEGIN.size : start]
        if party == CLIENT:
            runtime.mask((3,))
            runtime.deal((3, 4), lambda: None)
        keys = runtime.deal_common(KEYS, lambda: [])
        assert keys[0].shape == first[0] and keys[1].shape == second[0] and (keys[0] == 7).all()
        mine.close()
        after = path.read_bytes()
        assert not any(after[start:stop]) and any(before[start:stop])
        assert after[stop:] == before[stop:], "what was not used is encrypted still, under a key that is gone"


def test_a_section_that_has_ended_is_zeros(folder):
    """What overwrites it works beside the reader, and has done so when the section ends."""
    mine = open_tape(folder, CLIENT)
    start, stop = mine._sections["one"]
    mine.begin("one")
    mine.read(stop - start)
    mine.end()
    assert not any(mine.path.read_bytes()[start:stop])


def test_a_disk_that_cannot_be_overwritten_ends_the_run(folder, monkeypatch):
    mine = open_tape(folder, CLIENT)
    mine.begin("one")

    def full(fd, data, place):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    mine.read(8)
    with pytest.raises(UsageError, match="cannot overwrite what was read .* No space left"):
        mine.end()


def test_pieces_that_cross_what_is_read_ahead_are_decrypted_in_order(tmp_path):
    """Many sizes, none a multiple of another's; the file holds none of them."""
    sizes = [1, 8, 300_001, 17, 262_144, 5]
    written = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]

    def program(runtime):
        runtime.begin("one")
        for piece in written:
            runtime.deal_common([((len(piece),), torch.uint8)], lambda piece=piece: [piece])
        runtime.end()

    record(tmp_path / "tape", program=program)
    data = (tmp_path / "tape" / "owner" / "owner.tape").read_bytes()
    assert bytes(written[2][:64].tolist()) not in data
    mine = open_tape(tmp_path / "tape", OWNER)
    mine.begin("one")
    assert all(torch.equal(mine.read(size), piece) for size, piece in zip(sizes, written, strict=True))
    mine.end()


def test_a_manifest_reads_what_it_wrote(folder):
    mine = open_tape(folder, OWNER)
    text = (folder / "owner" / "manifest.json").read_text()
    public = json.loads(text)
    assert public.pop("bytes") > 0 and convert(public, Manifest) == mine.manifest
    assert (folder / "client" / "manifest.json").read_text() != text and links_of(0).rank == 0


# In a run.


def test_a_run_opens_what_it_may(folder, tmp_path, monkeypatch):
    """All parties on one machine may find both files there; under certificates the dealer's key must have signed."""
    links, protocol = links_of(OWNER), ProtocolConfig(tape=str(folder))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(UsageError, match="must not be on the owner's host"):
        launch._tape(protocol, LaunchConfig(), links)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launch._tape(protocol, LaunchConfig(), links).close()
    with pytest.raises(UsageError, match=r"cannot read .*dealer.crt"):
        launch._tape(protocol, LaunchConfig(tls=str(tmp_path)), links)
    make_key(tmp_path, "dealer")
    with pytest.raises(UsageError, match="is not signed by the dealer's key"):
        launch._tape(protocol, LaunchConfig(tls=str(tmp_path)), links)


def test_a_bench_with_a_signed_tape_leaves_no_key_and_no_material(tmp_path):
    """A whole run under TLS; the tape was dealt for more steps than it takes."""
    for role in ("owner", "client", "dealer"):
        make_key(tmp_path / "keys", role)
    shape = Shape(hidden=16, heads=2, kv_heads=2, ffn=16, kv_len=4, steps=2)
    deal(shape, tmp_path / "tape", say=lambda line: None, tls=str(tmp_path / "keys"))
    files = [tmp_path / "tape" / name / f"{name}.tape" for name in NAMES]
    begun = []
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        begun.append(read_begin(fd))
        os.close(fd)
    settings = {"tape": str(tmp_path / "tape"), "tls": str(tmp_path / "keys"), "timeout": 60, "threads": 1}
    with PrivateLlama(*split(settings)) as llama:
        assert llama.bench(replace(shape, steps=1))[0]["max_abs_err"] < 0.1
    for path, before in zip(files, begun, strict=True):
        data = path.read_bytes()
        header = decode(before.header, Header)
        assert before.key not in data and data[16:18] == b"20"
        start, zero = before.start, []
        for size, _ in header.sections.values():
            if size:
                zero.append(not any(data[start : start + size]))
            start += size
        assert zero == [True] * (len(zero) - 1) + [False], "the last step's is encrypted, under a key that is gone"
