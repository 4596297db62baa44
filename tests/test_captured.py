"""Steps that are captured once and run again, on graphs that record what a GPU's capture (``recorded_graphs``)."""

import pytest
import torch
from recorded_graphs import RecordedGraphs, RecordedKernels, is_captured
from stocks import put_all
from wire_parties import CLIENT, OWNER

from crypten_llm.commands.cost import predict
from crypten_llm.commands.deal import deal
from crypten_llm.commands.doctor import write_tiny
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.captured import Repeated
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import OneTimeError, PartyError
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.kernels import graphs, ring
from crypten_llm.links import stream
from crypten_llm.links.staging import Staging
from crypten_llm.links.stream import StreamReader
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols.dealer import captured as dealer_captured
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.randomness import Stream, derive_key
from crypten_llm.protocols.dealer.stock import Stock
from crypten_llm.protocols.dealer.tape import Tape
from crypten_llm.roles import DEALER
from crypten_llm.session import series
from crypten_llm.session.bench import Shape
from crypten_llm.session.bench import run as bench
from crypten_llm.session.delivery import Level
from crypten_llm.session.notary import Notary
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan, Turn
from crypten_llm.session.producing import Producer
from crypten_llm.session.prompted import Answer
from crypten_llm.session.request import Taken
from crypten_llm.session.settings import ProtocolConfig
from crypten_llm.session.stocked import Stocked
from crypten_llm.session.stocked import run as run_stocked

AS_IT_IS = WireEngine.repeated  # on a processor
IDS = list(range(3, 17))
SHAPE = Shape(hidden=16, heads=2, kv_heads=1, ffn=16, layers=1, kv_len=5, steps=3, vocab=70)


def captured(engine, program):
    """As on a GPU; who counts has none."""
    return program if isinstance(engine.runtime, Counting) else Repeated(engine, program)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(ring, "on", lambda device: RecordedKernels())
    monkeypatch.setattr(graphs, "Graphs", RecordedGraphs)
    monkeypatch.setattr(WireEngine, "repeated", captured)
    monkeypatch.setattr(RecordedGraphs, "launches", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("model"))


def counted(table):
    """Of a meter's, what was exchanged by kind of operation, and all that came of the dealer."""
    names = "rounds", "bytes_sent", "bytes_received"
    online = {row["kind"]: [row[name] for name in names] for row in table if row["phase"] == "decode" and row["rounds"]}
    return online, [sum(row[f"dealer_{name}"] for row in table if row["phase"] == "decode") for name in names]


@pytest.mark.parametrize(("precision", "most"), [("default", 0.02), ("quantised", 0.15)])
def test_a_bench(recorded, precision, most):
    """Right at every step (``bench`` compares each with ``plain``), and counted as where nothing is captured."""

    def job(transport):
        engine = WireEngine(transport, WireConfig.of(precision))
        figures = bench(Party(engine, transport, compute_parties=2), SHAPE)
        return figures, counted(transport.meter.table())

    found = run_roles(job, timeout=60.0)
    assert RecordedGraphs.launches > 3 * 2 * 22, "each step has some twenty messages a layer at each of two parties"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(WireEngine, "repeated", AS_IT_IS)
        plain = run_roles(job, timeout=60.0)
    assert 0 < found[CLIENT][0]["max_abs_err"] < most
    assert [counts for _, counts in found] == [counts for _, counts in plain]


def shown(party, plan, ids=IDS, turns=()):
    """The logits of each step, in which 3 is always chosen."""
    logits = []
    answer = Answer(ids[: plan.prompt_tokens], lambda x: logits.append(x) or 3)
    for _ in party.request_together([plan], [answer], turns):
        pass
    return torch.stack(logits)


def answers(folder, plans, turns=((),) * 9, ids=(IDS,) * 9):
    """At the client: the logits of each step of each request of one session."""

    def job(transport):
        party = Party(WireEngine(transport), transport, compute_parties=2)
        if not party.is_client:
            party.serve(folder)
            return None
        party.request_load()
        found = [shown(party, *each) for each in zip(plans, ids, turns, strict=False)]
        party.close()
        return found

    return run_roles(job, timeout=60.0)[CLIENT]


def expected(folder, plan, ids=IDS):
    party = Party(PlainEngine())
    party.load(folder)
    return shown(party, plan, ids)


PLANS = [Plan(5, 4, padded=8), Plan(4, 3, padded=8), Plan(8, 1, padded=8), Plan(9, 2, padded=5)]


def test_material_in_many_windows(recorded, monkeypatch):
    """In memory that is none of the captured kernels', which they would write on before it is read."""
    monkeypatch.setattr(StreamReader, "window", 500)
    made = []

    def room(*given, **named):
        assert not is_captured(), "room for material is made while kernels are captured"
        made.append(dealer_room(*given, **named))
        return made[-1]

    dealer_room = dealer_captured._Room
    monkeypatch.setattr(dealer_captured, "_Room", room)

    def job(transport):
        return bench(Party(WireEngine(transport), transport, compute_parties=2), SHAPE)

    assert run_roles(job, timeout=60.0)[CLIENT]["max_abs_err"] < 0.02
    assert len(made) == 3 * 3, "at each role one of what it reads, and one for each party"


def test_answers_in_room_that_serves_one_after_another(recorded, folder):
    """The first fills its room to the last place; the second begins with what was captured; and another size."""
    found = answers(folder, PLANS)
    assert RecordedGraphs.launches
    for plan, logits in zip(PLANS, found, strict=True):
        assert (logits - expected(folder, plan)).abs().max() < 0.02, plan


@pytest.mark.parametrize("dealt", ["captured", "as it is"])
def test_a_tape(recorded, folder, monkeypatch, tmp_path, dealt):
    """Its pieces take whole words, wherever it was dealt and is read; what is counted is what is in them."""
    plan = Plan(5, 4, padded=8)
    if dealt != "captured":
        monkeypatch.setattr(WireEngine, "repeated", AS_IT_IS)
    deal(plan, tmp_path / "tape", LlamaConfig.from_folder(folder), say=lambda line: None)
    launches = RecordedGraphs.launches
    assert bool(launches) == (dealt == "captured")
    at_the_client = {CLIENT: captured, OWNER: AS_IT_IS}
    monkeypatch.setattr(WireEngine, "repeated", lambda self, program: at_the_client[self.rank](self, program))

    def job(transport):
        if transport.rank == DEALER:
            return None
        tape = Tape(tmp_path / "tape", transport.rank, transport, is_local=True)
        party = Party(WireEngine(transport, material=tape), transport, compute_parties=2)
        if not party.is_client:
            party.serve(folder)
            return transport.meter.table()
        party.request_load()
        logits, table = shown(party, plan), transport.meter.table()
        party.close()
        return logits, table

    _, (logits, table), _ = run_roles(job, timeout=60.0)
    assert RecordedGraphs.launches > launches
    assert (logits - expected(folder, plan)).abs().max() < 0.02
    monkeypatch.setattr(WireEngine, "repeated", AS_IT_IS)
    priced = predict(LlamaConfig.from_folder(folder), plan).cost.ranks[CLIENT]["table"]
    assert counted(table)[0] == counted(priced)[0]


def test_blocks_of_a_stock_between_requests_of_a_dealer(recorded, folder, tmp_path):
    """Captured apart from them, by parties and producer: each block with its own keys, in the units of its file."""
    asked, level = Plan(5, 4, padded=8), Level(7, 5, 1)

    def job(transport):
        stock = Stock(tmp_path, transport.rank, is_local=True) if transport.rank != DEALER else None
        notary = Notary.of(transport, ProtocolConfig(), "")
        engine = WireEngine(transport)
        party = Party(engine, transport, compute_parties=2, notary=notary, stocked=Stocked(stock))
        if not party.is_client:
            party.serve(folder)
            return None
        party.request_load()
        producer, found = Producer(series.read(tmp_path / "owner")), []
        for blocks in (0, 1, 0, 1):
            for _ in range(blocks):
                put_all(producer, tmp_path, level.plan(), tmp_path / "out")
                (tmp_path / "out").rename(tmp_path / f"out{len(list(tmp_path.iterdir()))}")
            logits, taken = [], Taken()
            answer = Answer(IDS[:5], lambda x, logits=logits: logits.append(x) or 3)
            for _ in run_stocked(party, [asked], [answer], taken, ()):
                pass
            found.append((bool(taken.block), torch.stack(logits)))
        party.close()
        return found

    found = run_roles(job, timeout=60.0)[CLIENT]
    assert RecordedGraphs.launches and [stocked for stocked, _ in found] == [False, True, False, True]
    for _, logits in found:
        assert (logits - expected(folder, Plan(5, 4))).abs().max() < 0.02


def test_one_party_captures_and_the_other_does_not(recorded, folder, monkeypatch):
    """They draw the same, each in its way, also behind what was captured."""
    alike = {OWNER: AS_IT_IS, CLIENT: Repeated, DEALER: Repeated}
    monkeypatch.setattr(WireEngine, "repeated", lambda self, program: alike[self.rank](self, program))
    plans = [Plan(5, 4, padded=8)]
    for plan, logits in zip(plans, answers(folder, plans), strict=True):
        assert (logits - expected(folder, plan)).abs().max() < 0.02


def test_a_conversation_goes_on_with_what_its_room_gave_back(recorded, folder):
    """Of the first turn's answer the last token was never seen: the second begins with it."""
    plans, more = [Plan(5, 4, padded=8), Plan(3, 3, padded=8)], [3, 9, 11]
    found = answers(folder, plans, turns=[[Turn(1)], [Turn(1, 8)]], ids=[IDS, more])
    whole = expected(folder, Plan(11, 3), [*IDS[:5], 3, 3, 3, *more])
    assert (found[0] - expected(folder, plans[0])).abs().max() < 0.02
    assert (found[1] - whole).abs().max() < 0.02


def test_what_is_received_ahead_is_read_in_its_order():
    """Sections end where a message does, however many there are already; and no more is held than has room."""
    pieces = [memoryview(bytes([k] * 5)) for k in range(4)]
    reader = StreamReader(lambda: pieces.pop(0), lambda: bool(pieces), "the dealer", Staging())
    assert reader.receive_ahead() and reader.receive_ahead()
    assert reader.read(7).tolist() == [0] * 5 + [1] * 2
    assert reader.receive_ahead() and reader.read(3).tolist() == [1] * 3
    reader.end()
    assert reader.read(10).tolist() == [2] * 5 + [3] * 5
    reader.end()
    assert not reader.receive_ahead()
    pieces += [memoryview(bytes(5))] * 2
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stream, "AHEAD", 5)
        assert [reader.receive_ahead() for _ in range(2)] == [True, False]
    reader.read(4)
    with pytest.raises(PartyError, match="sent more than this section needs"):
        reader.end()


def test_streams_go_on_behind_what_was_captured(recorded):
    """Under the section's own key, at the place where one is that has drawn it all by itself."""
    keys = [derive_key(bytes(32), label) for label in "abc"]
    first, own, alike = (Stream(key) for key in (*keys[:2], keys[1]))
    graph = RecordedGraphs(None)
    graph.begin()
    drawn = first.words(5), first.words(1000)
    launch, mark = graph.end(), first.mark()
    own.lend_key(mark)
    launch()
    own.go_on(mark)
    for given in drawn:
        assert torch.equal(given, alike.words(len(given)))
    assert own.position == alike.position
    for count in (3, 700, 2):
        assert torch.equal(own.words(count), alike.words(count))
    used = Stream(keys[2])
    used.words(1)
    with pytest.raises(OneTimeError, match="of which some is drawn already"):
        used.lend_key(mark)


@pytest.mark.parametrize("plan", [Plan(5, 4, padded=8), Plan(6, 5, padded=300), Plan(6, 3)], ids=str)
def test_the_price_of_padded_steps(folder, plan):
    """Every counter of the owner's, as a run has it: what a step costs follows from its room."""

    def job(transport):
        party = Party(WireEngine(transport), transport, compute_parties=2)
        if not party.is_client:
            party.serve(folder)
            return None
        party.request_load()
        shown(party, plan)
        table = transport.meter.table()
        party.close()
        return counted(table)

    ran = run_roles(job, timeout=60.0)[CLIENT]
    priced = predict(LlamaConfig.from_folder(folder), plan).cost.ranks[CLIENT]["table"]
    assert counted(priced) == ran
