"""Tapes: what two parties read is what a dealer dealt; used once, whatever happens; every mistake is named."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import threading
from contextlib import ExitStack
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from hf_models import tiny
from programs import GENERATE, by_hand, error_line, free_port

from crypten_llm.commands.cli import main
from crypten_llm.commands.deal import deal
from crypten_llm.errors import UsageError
from crypten_llm.links.meter import Meter
from crypten_llm.links.transport import Transport
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols.dealer import roles, tape
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.roles import ROLES, Dealer, Owner
from crypten_llm.protocols.dealer.tape import Recording, Sizes, Tape
from crypten_llm.roles import CLIENT, DEALER, OWNER
from crypten_llm.session.api import PrivateLlama, Request
from crypten_llm.session.bench import Shape
from crypten_llm.session.generation import Plan

ENGINE = {"activation": 14}
CONFIG = {"hidden_size": 8}
PLAN = {"prompt_tokens": 5, "max_new_tokens": 4, "chunk": 128, "policy": "full"}
VALUE = torch.arange(12).view(3, 4)
KEYS = [((3, 5), torch.uint8), ((2,), torch.int64)]
SECTIONS = ("one", "two", "three")


def program(runtime, sections=SECTIONS):
    """What is dealt in each section: a masked value, keys of an odd size, and a value of 13 bits."""
    dealt = {}
    for label in sections:
        runtime.begin(label)
        mask = runtime.mask((3,))
        first = runtime.deal(VALUE.shape, lambda: VALUE)
        keys = runtime.deal_common(KEYS, lambda: [torch.full(shape, 7, dtype=dtype) for shape, dtype in KEYS])
        dealt[label] = (mask.held, first.held, keys, runtime.deal((1,), lambda: torch.tensor([-5]), 13).held)
        runtime.end()
    return dealt


def record(out, plan=PLAN, requests=2, progress=lambda count: None):
    """A tape of ``program``; returns what the dealer knows."""
    sizes = Sizes()
    links = SimpleNamespace(rank=DEALER, meter=Meter())
    program(Counting(links, sizes))
    manifest = tape.make_manifest(ENGINE, CONFIG, "generate", plan, requests)
    with Recording(out, manifest, sizes, progress) as recording:
        return program(Dealer(links, recording.keys, recording))


def links_of(rank):
    return SimpleNamespace(rank=rank, meter=Meter(), name=lambda peer: f"rank {peer} ({tape.NAMES[peer]})")


def open_tape(path, party):
    return Tape(path, party, links_of(party))


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
    with pytest.raises(AssertionError, match="less than this section"):
        mine.end()
    mine.read(13 * 8 + 31)
    with pytest.raises(AssertionError, match="more than this section"):
        mine.read(64)
    with pytest.raises(AssertionError, match="was used before"):
        mine.begin("one")


def test_burned_on_disk_before_the_first_mask(folder, monkeypatch):
    events, fsync, replace, derive = [], os.fsync, os.replace, roles.derive_key
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}"), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    monkeypatch.setattr(roles, "derive_key", lambda *key: (events.append("stream"), derive(*key))[1])
    mine = open_tape(folder, OWNER)
    runtime = Owner(mine._transport, mine.keys, mine)
    assert events == []
    runtime.begin("one")
    assert events == [f"fsync {folder}/owner.burning", "replace", f"fsync {folder}", "stream"]
    mine.read(31)
    runtime.begin("two")
    assert events[4:] == ["stream"]


def test_a_used_tape_is_refused_and_empty(folder):
    before = (folder / "client.tape").read_bytes()
    mine = open_tape(folder, CLIENT)
    mine.begin("one")
    after = (folder / "client.tape").read_bytes()
    assert len(after) < 500 and mine.keys[0] in before and mine.keys[0] not in after
    assert mine.read(13 * 8 + 31).numel() == 135, "the material is there for this process alone"
    mine.close()
    with pytest.raises(UsageError, match=r"used on 20..-.*masks hide one run only; deal another: .*--prompt-tokens 5"):
        open_tape(folder, CLIENT)
    assert open_tape(folder, OWNER), "the other party's file is its own"


def test_a_tape_behind_a_link_is_burned_itself(folder, tmp_path):
    link = tmp_path / "here.tape"
    link.symlink_to(folder / "owner.tape")
    open_tape(link, OWNER).begin("one")
    assert link.is_symlink() and (folder / "owner.tape").stat().st_size < 500
    for path in (link, folder):
        with pytest.raises(UsageError, match="was used on"):
            open_tape(path, OWNER)


def test_a_tape_of_two_names_is_refused(folder, tmp_path):
    (tmp_path / "again.tape").hardlink_to(folder / "owner.tape")
    with pytest.raises(UsageError, match=r"has 2 names \(hard links\).*remove all but one"):
        open_tape(folder, OWNER)
    (tmp_path / "again.tape").unlink()
    assert open_tape(folder, OWNER)


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
    monkeypatch.setattr(fcntl, "flock", lambda *a: (monkeypatch.undo(), open_tape(folder, OWNER)._burn(), flock(*a)))
    with pytest.raises(UsageError, match="was used on"):
        open_tape(folder, OWNER)


def test_a_folder_where_nothing_can_be_burned(folder, monkeypatch):
    mine = open_tape(folder, OWNER)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match="cannot burn the tape .*Permission denied; its folder must be writable"):
        mine.begin("one")


@pytest.mark.parametrize("where", [10, 30, -1])
def test_damage_is_found_before_use(folder, where):
    """In the header's length, in the header, in the material; and a file that was cut."""
    path = folder / "client.tape"
    whole = path.read_bytes()
    where = where % len(whole) if where < 0 else where + len(tape.MAGIC) - 8
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
        open_tape(folder / "owner.tape", CLIENT)
    with pytest.raises(UsageError, match="manifest.json is not a tape"):
        open_tape(folder / "manifest.json", OWNER)
    with pytest.raises(UsageError, match="no tape at .*/nowhere: No such file"):
        open_tape(tmp_path / "nowhere", OWNER)
    for name, changed in (("__version__", "9.9"), ("protocols.dealer.tape.program", lambda: "changed")):
        with monkeypatch.context() as patched:
            patched.setattr(f"crypten_llm.{name}", changed)
            message = r"was dealt by version .*, this is .*(9\.9|changed).*; deal another with this version: "
            with pytest.raises(UsageError, match=message):
                open_tape(folder, OWNER)
    assert open_tape(folder, OWNER)


@pytest.mark.parametrize(
    ("other", "engine", "message"),
    [
        (
            {},
            {"activation": 15},
            "the tape's engine is {'activation': 14} at rank . .*, {'activation': 15} at this pro",
        ),
        ({}, ENGINE, "the tape's id is '[0-9a-f]{16}' at rank ., .*; give both parties the files of one tape: python"),
        ({"requests": 3}, ENGINE, "the tape's requests is . at rank"),
        ({"plan": {**PLAN, "chunk": 64}}, ENGINE, "the tape's plan is .*'chunk': .* at rank"),
    ],
)
def test_tapes_of_two_deals(folder, tmp_path, other, engine, message):
    record(tmp_path / "other", **other)
    ours, theirs = socket.socketpair()
    links = [
        Transport(0, ("owner", "client"), {1: ours}, timeout=5),
        Transport(1, ("owner", "client"), {0: theirs}, timeout=5),
    ]
    errors = []

    def compare(party, where):
        try:
            Tape(where, party, links[party]).compare(engine)
        except UsageError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=compare, args=pair) for pair in ((0, folder), (1, tmp_path / "other"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for link in links:
        link.close()
    assert len(errors) == 2
    for error in errors:
        with pytest.raises(UsageError, match=message.replace("rank ., ", "rank . .*, ")):
            raise UsageError(error)
    assert open_tape(folder, OWNER), "nothing was used"


@pytest.mark.parametrize(
    ("verb", "facts", "request_number", "message"),
    [
        ("model", {"hidden_size": 9}, 0, "the tape's config is .*, the model's .*another architecture"),
        (
            "bench",
            {"steps": 5},
            1,
            "the tape is for 'generate', not for 'bench'; deal another: .* deal --bench --steps 5",
        ),
        ("generate", {**PLAN, "prompt_tokens": 6}, 1, "prompt_tokens is 6, but the tape is for prompt_tokens 5, .* 6"),
        (
            "generate",
            {**PLAN, "max_new_tokens": 5},
            1,
            "max_new_tokens is 5, .*deal --model MODEL --prompt-tokens 5 --max",
        ),
        ("generate", {**PLAN, "chunk": 64}, 1, "chunk is 64"),
        ("generate", {**PLAN, "policy": "h2o"}, 1, "policy is 'h2o'"),
        ("generate", PLAN, 3, "the tape is for 2 requests, and this is number 3; deal a longer one: .* --requests 3"),
    ],
)
def test_runs_that_do_not_fit(folder, verb, facts, request_number, message):
    mine = open_tape(folder, CLIENT)
    with pytest.raises(UsageError, match=message):
        mine.expect(verb, facts, request_number)
    mine.close()
    assert open_tape(folder, CLIENT), "nothing was used"


def test_runs_that_fit(folder):
    mine = open_tape(folder, CLIENT)
    mine.expect("model", CONFIG, 0)
    mine.expect("generate", {**PLAN, "max_new_tokens": 2, "hide_length": True}, 2)


# Writing.


def test_who_may_read_the_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["client.tape", "manifest.json", "owner.tape"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all((folder / f"{name}.tape").stat().st_mode & 0o777 == 0o600 for name in tape.NAMES)
    manifest = (folder / "manifest.json").read_text()
    for party in (OWNER, CLIENT):
        assert open_tape(folder, party).keys[0].hex() not in manifest


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
    before = (folder / "owner.tape").read_bytes()
    with pytest.raises(UsageError, match="is there already; a tape is never overwritten"):
        record(folder)
    assert (folder / "owner.tape").read_bytes() == before


# Whole runs.

IDS = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tape"), num_hidden_layers=1)[0]


@pytest.fixture(scope="module")
def expected(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        return llama.generate(input_ids=IDS, max_new_tokens=3).token_ids


def quiet(line):
    pass


def test_a_session_of_two_requests(model, expected, tmp_path):
    deal(Plan(len(IDS), 3, chunk=2), tmp_path / "tape", LlamaConfig.from_folder(model), requests=2, say=quiet)
    settings = {"engine": "wire", "tape": str(tmp_path / "tape"), "timeout": 60, "threads": 1}
    request = {"input_ids": IDS, "prefill_chunk": 2}
    with pytest.raises(UsageError, match="chunk is 128, but the tape is for prompt_tokens 5"):
        PrivateLlama.from_pretrained(str(model), first=Request(input_ids=IDS, max_new_tokens=3), **settings)
    with PrivateLlama.from_pretrained(str(model), **settings) as llama:
        with pytest.raises(UsageError, match="prompt_tokens is 2, but the tape is for prompt_tokens 5"):
            llama.generate(input_ids=[5, 6], max_new_tokens=3, prefill_chunk=2)
        short = llama.generate(**request, max_new_tokens=1)  # the rest of the first request's tape is not used
        assert short.token_ids == expected[:1]
        full = llama.generate(**request, max_new_tokens=3)
        assert full.token_ids == expected
        assert full.cost.dealer_rounds() == 0 and full.cost.dealer_bytes() > short.cost.dealer_bytes() > 0
        assert len(full.cost.ranks) == 2
        with pytest.raises(UsageError, match="the tape is for 2 requests, and this is number 3"):
            llama.generate(**request, max_new_tokens=1)


def test_commands(model, expected, tmp_path, capsys):
    """Dealt, used by two processes that have a file each, and refused when both are given again."""
    folder = tmp_path / "tape"
    sizes = ["--prompt-tokens", "5", "--max-new-tokens", "3", "--out", str(folder), "--offline"]
    assert main(["deal", "--model", str(model), *sizes]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "tape for 1 x generate: " in err and "/s)" in err
    for party in tape.NAMES:
        (tmp_path / party).mkdir()
        shutil.move(folder / f"{party}.tape", tmp_path / party)
    command = [*GENERATE, "--engine", "wire", "--model", model, "--prompt-ids", "5,6,7,8,9", "--json", "--timeout", 60]
    port = free_port()
    with ExitStack() as running:
        for rank, party in enumerate(tape.NAMES):
            own = [*command, "--max-new-tokens", 3, "--tape", tmp_path / party / f"{party}.tape"]
            (program,) = by_hand(2, *own, port=port, ranks=[rank])
            running.enter_context(program)
        assert program.result()["token_ids"] == expected
    shutil.move(tmp_path / "owner" / "owner.tape", tmp_path / "client")
    for where, message in ((folder, "no tape at"), (tmp_path / "client", "was used on")):
        assert main([*map(str, command[2:]), "--tape", str(where)]) == 2
        assert message in error_line(capsys.readouterr().err)


def test_config_json_alone_deals_for_the_whole_folder(model, tmp_path):
    """As from a hub, where ``deal`` downloads nothing else; generation_config.json has more ends of a sequence."""
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    shutil.copytree(model, whole)
    (whole / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2, 3]}))
    alone.mkdir()
    shutil.copy(model / "config.json", alone)
    configs = [LlamaConfig.from_folder(folder) for folder in (whole, alone)]
    assert configs[0].eos_token_ids == (1, 2, 3) != configs[1].eos_token_ids
    deal(Plan(len(IDS), 3), tmp_path / "tape", configs[1], say=quiet)
    mine = open_tape(tmp_path / "tape", OWNER)
    mine.expect("model", configs[0].to_dict(), 0)
    for name, value in (("hidden_size", 128), ("num_hidden_layers", 2), ("rms_norm_eps", 1e-3)):
        with pytest.raises(UsageError, match="dealt for another architecture"):
            mine.expect("model", {**configs[0].to_dict(), name: value}, 0)


def test_a_bench_is_dealt_too(tmp_path):
    shape = Shape(hidden=16, heads=2, kv_heads=2, ffn=16, kv_len=8, steps=2)
    manifest = deal(shape, tmp_path / "tape", say=quiet)
    assert manifest["plan"] == asdict(shape)
    mine = open_tape(tmp_path / "tape", OWNER)
    mine.expect("bench", {**asdict(shape), "steps": 1}, 1)
    with pytest.raises(UsageError, match="kv_len is 9, .* deal --bench --hidden 16 --heads 2 .* --kv-len 9"):
        mine.expect("bench", {**asdict(shape), "kv_len": 9}, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"for how long a prompt\? give --prompt-tokens N"),
        (["--prompt-tokens", "5", "--requests", "0"], "requests is 0; it must be 1 or more"),
        (["--prompt-tokens", "5", "--chunk", "0"], "chunk is 0; it must be 1 or more"),
        (["--prompt-tokens", "5", "--max-new-tokens", "0"], "max_new_tokens is 0; it must be 1 or more"),
        (["--prompt-tokens", "5000"], "the model's context is .*; shorten the prompt"),
        (["--prompt-tokens", "5", "--policy", "none"], "none"),
    ],
)
def test_what_cannot_be_dealt(model, tmp_path, capsys, options, message):
    assert main(["deal", "--model", str(model), "--out", str(tmp_path / "tape"), *options]) == 2
    assert re.search(message, error_line(capsys.readouterr().err))
    assert list(tmp_path.iterdir()) == []
