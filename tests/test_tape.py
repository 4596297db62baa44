"""Tapes: two parties read what a dealer dealt, once, whatever happens; nothing is left of one that was not finished."""

import fcntl
import os
import resource
import signal

import pytest
import torch
from tapes import KEYS, SECTIONS, VALUE, open_tape, program, record

from crypten_llm.errors import OneTimeError, UsageError
from crypten_llm.protocols.dealer import runtime as shared
from crypten_llm.protocols.dealer.layout import BEGIN
from crypten_llm.protocols.dealer.manifest import NAMES
from crypten_llm.protocols.dealer.roles import ROLES, Owner
from crypten_llm.protocols.dealer.tape import AHEAD
from crypten_llm.roles import CLIENT, OWNER


@pytest.fixture
def folder(tmp_path):
    record(tmp_path / "tape")
    return tmp_path / "tape"


@pytest.mark.parametrize("sections", [SECTIONS, ("two",), ("one", "three")])
def test_the_parties_read_what_was_dealt(tmp_path, sections):
    known = record(tmp_path / "tape")
    tapes = [open_tape(tmp_path / "tape", party) for party in (OWNER, CLIENT)]
    shares = [program(ROLES[mine._transport.rank](mine._transport, mine.keys, mine), sections) for mine in tapes]
    for label in sections:
        (mask0, first0, keys0, last0), (mask1, first1, keys1, last1) = (dealt[label] for dealt in shares)
        assert torch.equal(mask0 + mask1, known[label][0])
        assert torch.equal(first0 + first1, VALUE) and (last0 + last1).item() % 2**13 == 2**13 - 5
        for ours, theirs, (shape, dtype) in zip(keys0, keys1, KEYS, strict=True):
            assert ours.dtype == theirs.dtype == dtype and (ours == 7).all() and (theirs == 7).all()
            assert ours.shape == theirs.shape == shape
    keys = 3 * 5 + 2 * 8
    for mine, expected in zip(tapes, (keys, keys + 12 * 8 + 2), strict=True):
        seen = mine._transport.meter.snapshot().dealer
        assert (seen.bytes_received, seen.rounds) == (len(sections) * expected, 0), "the report's offline bytes"


def test_a_section_is_read_once_and_whole(folder):
    mine = open_tape(folder, CLIENT)
    mine.begin("one")
    with pytest.raises(OneTimeError, match="less than this section"):
        mine.end()
    mine.read(13 * 8 + 31)
    with pytest.raises(OneTimeError, match="more than this section"):
        mine.read(64)
    with pytest.raises(OneTimeError, match="was used before"):
        mine.begin("one")


@pytest.mark.parametrize("counts", [[1] * 900, [AHEAD - 64, 64, 1], [AHEAD + 1, 3], [5, 2 * AHEAD, 7], [0, 64, 0]])
def test_pieces_are_what_was_written(tmp_path, counts):
    """Small ones share what is read ahead, large ones take memory of their own, and none changes under its reader."""
    written = [torch.randint(256, (count,), dtype=torch.uint8) for count in counts]

    def program(runtime):
        runtime.begin("one")
        dealt = [runtime.deal_common([((len(piece),), torch.uint8)], lambda piece=piece: [piece]) for piece in written]
        runtime.end()
        return [piece for pieces in dealt for piece in pieces]  # none where they are only counted

    record(tmp_path / "tape", program=program)
    mine = open_tape(tmp_path / "tape", CLIENT)
    read = program(ROLES[CLIENT](mine._transport, mine.keys, mine))
    assert all(torch.equal(ours, piece) for ours, piece in zip(read, written, strict=True))


def test_burned_on_disk_before_the_first_mask(folder, monkeypatch):
    events, fsync, pwrite, derive = [], os.fsync, os.pwrite, shared.derive_key
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}"), fsync(fd))
    )
    monkeypatch.setattr(os, "pwrite", lambda *a: (events.append(f"write at {a[2]}"), pwrite(*a))[1])
    monkeypatch.setattr(shared, "derive_key", lambda *key: (events.append("stream"), derive(*key))[1])
    mine = open_tape(folder, OWNER)
    runtime = Owner(mine._transport, mine.keys, mine)
    assert events == []
    runtime.begin("one")
    assert events == ["write at 0", f"fsync {folder}/owner/owner.tape", "stream"]
    mine.read(31)
    runtime.begin("two")
    assert len(events) == 5 and events[4:] == ["stream"]


def test_a_used_tape_is_refused_and_empty(folder):
    before = (folder / "client" / "client.tape").read_bytes()
    mine = open_tape(folder, CLIENT)
    mine.begin("one")
    after = (folder / "client" / "client.tape").read_bytes()
    assert mine.keys[0] in before and mine.keys[0] not in after and len(after) == len(before)
    assert mine.read(13 * 8 + 31).numel() == 135, "the material is there for this process alone"
    mine.close()
    with pytest.raises(UsageError, match=r"used on 20..-.*masks hide one run only; deal another: .*--prompt-tokens 5"):
        open_tape(folder, CLIENT)
    assert open_tape(folder, OWNER), "the other party's file is its own"


def test_a_tape_behind_a_link_is_burned_itself(folder, tmp_path):
    link = tmp_path / "here.tape"
    link.symlink_to(folder / "owner" / "owner.tape")
    open_tape(link, OWNER).begin("one")
    assert link.is_symlink()
    for path in (link, folder):
        with pytest.raises(UsageError, match="was used on"):
            open_tape(path, OWNER)


def test_a_tape_of_two_names_is_burned_under_both(folder, tmp_path):
    (tmp_path / "again.tape").hardlink_to(folder / "owner" / "owner.tape")
    open_tape(folder, OWNER).begin("one")
    with pytest.raises(UsageError, match="was used on"):
        open_tape(tmp_path / "again.tape", OWNER)


def test_a_crashed_run_has_used_its_tape(folder):
    child = os.fork()
    if child == 0:
        open_tape(folder, OWNER).begin("one")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with pytest.raises(UsageError, match="was used on"):
        open_tape(folder, OWNER)


def test_a_run_that_ends_before_its_first_mask_has_not(folder):
    open_tape(folder, OWNER).close()
    assert open_tape(folder, OWNER)


def test_two_processes_at_once(folder, monkeypatch):
    mine = open_tape(folder, OWNER)
    with pytest.raises(UsageError, match="owner.tape is in use by another process"):
        open_tape(folder, OWNER)
    mine.close()
    flock = fcntl.flock  # another process uses the tape up between our opening and our lock
    monkeypatch.setattr(fcntl, "flock", lambda *a: (monkeypatch.undo(), open_tape(folder, OWNER).burn(), flock(*a)))
    with pytest.raises(UsageError, match="was used on"):
        open_tape(folder, OWNER)


def test_a_file_that_cannot_be_burned(folder, monkeypatch):
    mine = open_tape(folder, OWNER)
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(UsageError, match="cannot burn the tape .*Input/output error; nothing was used"):
        mine.begin("one")
    mine.close()
    opened = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: opened("/dev/full/x" if flags & os.O_RDWR else path, flags))
    with pytest.raises(UsageError, match="cannot burn the tape .*it must be writable, as it is used once"):
        open_tape(folder, CLIENT)


@pytest.mark.parametrize("where", [46, BEGIN.size + 20, -1])
def test_damage_is_found_before_use(folder, where):
    """In the header's length, in the header, in the material; and a file that was cut."""
    path = folder / "client" / "client.tape"
    whole = path.read_bytes()
    where = where % len(whole)
    path.write_bytes(whole[:where] + bytes([whole[where] ^ 0x80]) + whole[where + 1 :])
    with pytest.raises(UsageError, match="is damaged; nothing was used: copy it from the dealer again"):
        open_tape(folder, CLIENT)
    path.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match="is damaged"):
        open_tape(folder, CLIENT)
    path.write_bytes(whole)
    mine = open_tape(folder, CLIENT)
    key = whole.index(mine.keys[0])
    mine.close()
    path.write_bytes(whole[:key] + bytes([whole[key] ^ 1]) + whole[key + 1 :])
    with pytest.raises(UsageError, match="is damaged"):
        open_tape(folder, CLIENT)
    path.write_bytes(whole)
    assert open_tape(folder, CLIENT)


def test_files_that_are_not_this_partys_tape(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is the owner's; give the client client.tape alone"):
        open_tape(folder / "owner" / "owner.tape", CLIENT)
    with pytest.raises(UsageError, match="manifest.json is not a tape"):
        open_tape(folder / "owner" / "manifest.json", OWNER)
    with pytest.raises(UsageError, match="no tape at .*/nowhere: No such file"):
        open_tape(tmp_path / "nowhere", OWNER)
    for name, changed in (("__version__", "9.9"), ("program.digest", lambda: "changed")):
        with monkeypatch.context() as patched:
            patched.setattr(f"crypten_llm.{name}", changed)
            message = r"was dealt by version .*, this is .*(9\.9|changed).*; deal another with this version: "
            with pytest.raises(UsageError, match=message):
                open_tape(folder, OWNER)
    assert open_tape(folder, OWNER)


# Writing.


def test_who_may_read_the_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["client", "owner"]
    assert folder.stat().st_mode & 0o777 == 0o700
    for party, name in enumerate(NAMES):
        own = folder / name
        assert {path.name for path in own.iterdir()} == {"manifest.json", f"{name}.tape"}
        assert own.stat().st_mode & 0o777 == 0o700 and (own / f"{name}.tape").stat().st_mode & 0o777 == 0o600
        assert open_tape(folder, party).keys[0].hex() not in (own / "manifest.json").read_text()


def test_a_full_disk_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        with pytest.raises(UsageError, match="cannot write a tape of .* to .*: File too large; make room .*--out"):
            record(tmp_path / "tape")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stops_half_way_leaves_nothing(tmp_path, error):
    seen = []

    def stop(count):
        seen.append([path.name for path in tmp_path.iterdir()])
        raise error

    with pytest.raises((KeyboardInterrupt, UsageError)):
        record(tmp_path / "tape", progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert len(seen) == 1 and seen[0][0].startswith(".tape."), "under way it had another name"


def test_a_tape_is_never_overwritten(folder):
    before = (folder / "owner" / "owner.tape").read_bytes()
    with pytest.raises(UsageError, match="is there already; a tape is never overwritten"):
        record(folder)
    assert (folder / "owner" / "owner.tape").read_bytes() == before
