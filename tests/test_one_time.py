"""What may be used once is used once: after a fork, without assertions (``python -O``), and by the text of the program.

And what parties agree on before anything is used, and tell each other afterwards.
"""

import ast
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stocks import put
from tapes import open_tape, record

import crypten_llm
from crypten_llm import program
from crypten_llm.errors import OneTimeError, PartyError, UsageError
from crypten_llm.links.meter import CLOCKS, Meter
from crypten_llm.links.transport import Transport
from crypten_llm.protocols.dealer.randomness import Stream, fresh_key
from crypten_llm.protocols.dealer.roles import Owner
from crypten_llm.protocols.dealer.stock import Stock
from crypten_llm.roles import CLIENT, OWNER
from crypten_llm.session import agreeing, counting, launch
from crypten_llm.session.party import Party
from crypten_llm.session.settings import ProtocolConfig

ROOT = Path(crypten_llm.__file__).parent


# After a fork.


def in_a_child(job):
    """What ``job`` raises in a forked child, as text; nothing where it goes well."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            job()
            said = ""
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read().decode()
    os.waitpid(child, 0)
    return said


@contextmanager
def linked():
    ours, theirs = socket.socketpair()
    links = [Transport(rank, ("owner", "client"), {1 - rank: s}, timeout=2) for rank, s in ((0, ours), (1, theirs))]
    yield links
    for link in links:
        link.close()


REFUSED = "OneTimeError: {} belongs to the process that was forked, which would use the same once more; start a"


@pytest.mark.parametrize("drawn", [0, 3, 5000])
def test_a_stream_draws_nothing_in_a_child(drawn):
    """Neither from its key stream nor from what it has kept of it."""
    stream = Stream(fresh_key())
    stream.words(drawn)
    for count in (1, 4, 5000):
        assert in_a_child(lambda count=count: stream.words(count)).startswith(REFUSED.format("a stream of masks"))
    assert in_a_child(lambda: stream.ring((2, 2), 13)).startswith("OneTimeError")
    assert stream.words(4).numel() == 4, "the parent goes on"
    assert in_a_child(lambda: Stream(fresh_key()).words(4)) == "", "and a child has streams of its own"


def test_nothing_of_a_partys_goes_on_in_a_child(tmp_path):
    record(tmp_path / "tape")
    tape = open_tape(tmp_path / "tape", OWNER)
    runtime = Owner(tape._transport, tape.keys, tape)
    assert in_a_child(lambda: runtime.begin("one")).startswith(REFUSED.format("the parties' randomness"))
    assert in_a_child(lambda: tape.begin("one")).startswith(REFUSED.format("a tape"))
    runtime.begin("one")
    tape.read(8)  # what is left of the section has been read ahead
    assert in_a_child(lambda: tape.read(8)).startswith(REFUSED.format("a tape"))
    assert runtime.mask((3,)).held.numel() == 3 and tape.read(8).numel() == 8


def test_links_stay_with_the_process_that_made_them():
    """Under TLS two processes would use a nonce twice; a child's goodbye would end its parent's run."""
    with linked() as (a, b):
        a.send_json(1, "first")
        refused = REFUSED.format("the link to rank 1 (client)")
        assert in_a_child(lambda: a.send_json(1, "a child's")).startswith(refused)
        assert in_a_child(lambda: a.recv_json(1)).startswith(refused)
        assert in_a_child(lambda: a.abort("a child ends")) == ""
        a.send_json(1, "second")
        b.send_json(0, "an answer")
        assert [b.recv_json(0), b.recv_json(0), a.recv_json(1)] == ["first", "second", "an answer"]


def test_a_childs_child_is_no_parent():
    stream = Stream(fresh_key())
    assert (
        in_a_child(lambda: print(end="", file=sys.stderr) or raise_if_empty(in_a_child(lambda: stream.words(1)))) == ""
    )


def raise_if_empty(text):
    if not text.startswith("OneTimeError"):
        raise AssertionError("a grandchild drew")


# Without assertions.

MISUSES = """
    import torch
    from types import SimpleNamespace
    from crypten_llm.errors import CryptenLLMError
    from crypten_llm.links.meter import Meter
    from crypten_llm.protocols.dealer.recording import Sizes
    from crypten_llm.protocols.dealer.roles import Owner, Dealer
    from crypten_llm.protocols.dealer.runtime import Piece
    from crypten_llm.protocols.dealer.stock import Stock
    from crypten_llm.protocols.dealer.tape import Tape

    try:
        assert False
    except AssertionError:
        raise SystemExit("assertions are on")

    class Free:
        begin = write = read = end = flush = lambda *_: None

    def links(rank):
        return SimpleNamespace(rank=rank, meter=Meter(), name=str)

    def refused(job, *arguments):
        try:
            job(*arguments)
        except CryptenLLMError as error:
            print(type(error).__name__, error)
        else:
            raise SystemExit(f"{job} {arguments} went on")

    runtime = Owner(links(0), [bytes(32)], Free())
    runtime.begin("twice")
    refused(runtime.begin, "twice")
    refused(runtime.exchange, [Piece((1,), 64, ("", ""), torch.zeros(1).long(), None)])
    sizes = Sizes()
    sizes.begin("one")
    refused(sizes.begin, "one")
    dealer = Dealer(links(2), [bytes(32), bytes(32)], Free())
    dealer.begin("one")
    refused(dealer.deal, (3,), lambda: torch.zeros(2).long())
    refused(dealer.deal_common, [((3,), torch.int64)], lambda: [torch.zeros(2).long()])
    tape = Tape(FOLDER, 1, links(1), is_local=True)
    refused(tape.begin, "nowhere")
    tape.begin("one")
    refused(tape.end)
    refused(tape.read, 1 << 20)
    refused(tape.begin, "one")
    stock = Stock(STOCK, 1, is_local=True)
    (half,) = stock.halves()
    whole = (stock.folder / f"{half.id}.block").read_bytes()
    stock.take(half, links(1), tape.manifest.engine)
    (stock.folder / f"{half.id}.block").write_bytes(whole)
    refused(Stock(STOCK, 1, is_local=True).take, half, links(1), tape.manifest.engine)
    refused(stock.arriving, half.id)
"""


def test_without_assertions_all_is_refused_that_is_with_them(tmp_path):
    record(tmp_path / "tape")
    put([Stock(tmp_path / "stock", CLIENT)], tmp_path / "block")
    code = f"FOLDER, STOCK = {str(tmp_path / 'tape')!r}, {str(tmp_path / 'stock')!r}\n" + textwrap.dedent(MISUSES)
    command = [sys.executable, "-O", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent, timeout=60)
    lines = found.stdout.splitlines()
    assert found.returncode == 0 and len(lines) == 11, found.stderr[-2000:]
    assert all(line.startswith("OneTimeError ") for line in lines[:9])
    assert all(line.startswith("UsageError ") for line in lines[9:])


# Assertions that are no hint for a reader or a type checker, in the rooms where masks, files and peers are met.
CHECKED = sorted([*(ROOT / "protocols" / "dealer").glob("*.py"), *(ROOT / "links").glob("*.py")])
OF_THE_PROGRAM = {
    ("shapes.py", "math.prod(wanted) == self.numel()"): "counts, where nothing is secret",
    ("shapes.py", "function is torch.cat"): "counts, where nothing is secret",
    ("meter.py", "left is self"): "scopes of the program's own text",
    ("meter.py", "key[2] in CHANNELS"): "a name in the program's own text",
    ("transport.py", "set(sockets) == set(range(len(roles))) - {rank}"): "what the rendezvous has connected",
    ("rendezvous.py", "len(roles) == world"): "the caller's own settings",
}


def hints(test):
    """Whether an assertion says only that something is not ``None``."""
    parts = test.values if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And) else [test]
    return all(isinstance(p, ast.Compare) and ast.unparse(p).endswith(" is not None") for p in parts)


def test_assertions_guard_nothing_there():
    """``python -O`` leaves them out."""
    found = {
        (path.name, ast.unparse(node.test))
        for path in CHECKED
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Assert) and not hints(node.test)
    }
    assert len(CHECKED) > 15 and found <= set(OF_THE_PROGRAM)


def test_an_assertion_that_guards_would_be_found():
    for text, is_hint in (("x is not None", True), ("x is not None and y is not None", True), ("x not in used", False)):
        assert hints(ast.parse(f"assert {text}").body[0].test) == is_hint
    assert not hints(ast.parse("assert x is not None or y is not None").body[0].test)


# What parties agree on.


@pytest.mark.parametrize(
    ("name", "theirs"), [("program", "0" * 16), ("torch", "1.0"), ("version", "9.9"), ("engine", "crypten")]
)
def test_a_party_with_another_program_is_named(name, theirs):
    mine = ProtocolConfig().agreement()
    with linked() as (owner, client):
        owner.send_json(CLIENT, {**vars(mine), name: theirs})
        with pytest.raises(
            UsageError, match=rf"the parties disagree on {name}: .* at rank 1 \(client\), '{theirs}' at"
        ):
            agreeing.compare(client, mine)


def test_parties_of_one_program_agree():
    mine = ProtocolConfig().agreement()
    assert (mine.program, mine.torch) == (program.digest()[:16], torch.__version__.partition("+")[0])
    with linked() as (owner, client):
        other = threading.Thread(target=agreeing.compare, args=(owner, replace(mine)))
        other.start()
        agreeing.compare(client, mine)
        other.join()


def test_the_digest_is_of_the_code_and_quick(tmp_path, monkeypatch):
    times = []
    for _ in range(3):
        program.digest.cache_clear()
        started = time.perf_counter()
        before = program.digest()
        times.append(time.perf_counter() - started)
    assert min(times) < 0.05, "at every start"
    for name in ("crypten_llm", "eviction"):
        (tmp_path / name / "weights").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("x = 1\n")
    spec = lambda name: SimpleNamespace(origin=str(tmp_path / name / "__init__.py"))  # noqa: E731
    monkeypatch.setattr(program, "find_spec", spec)
    seen = {before}
    for file, text in (
        ("crypten_llm/a.py", "a = 1"),
        ("crypten_llm/a.py", "a = 2"),
        ("crypten_llm/b.py", "a = 2"),
        ("eviction/weights/w.safetensors", "w"),
    ):
        (tmp_path / file).write_text(text)
        program.digest.cache_clear()
        seen.add(program.digest())
    program.digest.cache_clear()
    monkeypatch.undo()
    assert len(seen) == 5 and program.digest() == before


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}, True),
        ({"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1"}, False),
        ({"RANK": "0", "WORLD_SIZE": "3"}, False),
    ],
)
def test_a_run_is_local_where_all_parties_are(env, expected):
    assert launch.is_local(env) == expected


# What they tell each other.


def test_others_are_told_counts_and_no_clocks():
    meter = Meter()
    with meter.phase("prefill"), meter.operation("a", "attention"):
        meter.count("online", 1, 1, 2, 3, 4.0)
    told = Counter(name for row in meter.counts() for name in row)
    assert told["rounds"] == told["bytes_sent"] == len(meter.table()) and not set(told) & set(CLOCKS)
    assert all(set(CLOCKS) <= set(row) for row in meter.table())


def test_what_a_party_tells_of_itself_is_in_the_list():
    cpu = torch.device("cpu")
    engine = SimpleNamespace(meter=Meter(), dealer=None, dealer_follows=True, device=cpu)
    for rank in (OWNER, CLIENT):
        party = Party(engine, SimpleNamespace(rank=rank), 2)
        sent = counting.statistics(party)
        assert set(sent) == {"rank", "table", "peak_bytes"}
        assert any("seconds" in row for row in sent["table"]) == (rank == CLIENT)
        listed = [(entry["what"], entry["to"]) for entry in party.reveals.as_list()]
        assert listed == [("peak memory of each party", "client")]


def test_another_section_of_a_stream_is_the_peers_fault():
    with linked() as (a, b):
        a.send_stream(1, torch.zeros(4, dtype=torch.uint8))
        reader = b.stream_from(0, 4)
        reader.read(1)
        with pytest.raises(PartyError, match="sent more than this section needs"):
            reader.end()


def test_the_error_is_for_people():
    error = OneTimeError("section 'one' is begun twice: it would use its masks twice")
    assert (error.exit_code, error.heard) == (1, True)
