"""What the wire engine sends looks like noise whatever it hides, depends on no secret, and is never used twice."""

import ast
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_models import tiny
from wire_parties import CLIENT, DEALER, OWNER, key, run, share

from crypten_llm.insecure.audit import MaskReused
from crypten_llm.protocols import fourier, products
from crypten_llm.protocols.dealer.randomness import Stream
from crypten_llm.protocols.normalize import normalize
from crypten_llm.protocols.opening import Opening, Secret, open_wires
from crypten_llm.session.generation import Answer, Plan, Step
from crypten_llm.session.party import Party

ROOT = Path(__file__).parents[1]
ROOMS = [ROOT / "crypten_llm" / room for room in ("kernels", "protocols", "engines/wire")]
ENGINE = [path for room in ROOMS for path in room.rglob("*.py")]
COUNT = 4096
EXTREMES = {
    "zeros": torch.zeros(COUNT, dtype=torch.int64),
    "largest": torch.full((COUNT,), 2**20 - 1),
    "smallest": torch.full((COUNT,), 1 - 2**20),
    "ramp": torch.arange(COUNT),
}

# Protocols: what each does with the same integers, and how many bits of each word on the wire are free.


def ordinary(size, bits=20, **options):
    def job(runtime, integers):
        open_wires(runtime, [Opening(share(runtime, integers, width=size, bits=bits), **options)])

    return job


def function(size):
    def job(runtime, integers):
        secret = share(runtime, integers, scale=size - 5, width=64)
        (wire,) = open_wires(runtime, [Opening(secret, ring=size, function=True)])
        fourier.evaluate(runtime, wire, fourier.exponential(), 22, bits=1)

    return job


def reopened_product(runtime, integers):
    """A product of a wire with itself and with another, opened again: three openings that hang together."""
    first, second = (share(runtime, integers, bits=20) for _ in range(2))
    wires = open_wires(runtime, [Opening(first), Opening(second, lifted=True, ring=40)])
    open_wires(runtime, [Opening(products.multiply(runtime, *wires))])
    open_wires(runtime, [Opening(products.square(runtime, wires[0]))])


def tokens(runtime, integers):
    ids = integers.clamp(min=0) % 8
    table = torch.eye(8) * 2.0**10 if runtime.role == OWNER else None
    matrix = products.OwnedMatrix(runtime, table, (8, 8), 0)
    products.lookup(runtime, ids if runtime.role == CLIENT else None, len(ids), matrix, bits=12)


def weights(runtime, integers):
    value = integers.double().view(64, -1) if runtime.role == OWNER else None
    products.OwnedMatrix(runtime, value, (64, COUNT // 64), 0)


PROTOCOLS = {  # bits of each word
    "narrow opening": (ordinary(37, truncate=9), 37),
    "lifted opening": (ordinary(48, truncate=16, lifted=True), 48),
    "whole opening": (ordinary(64), 64),
    "tiny ring": (lambda runtime, x: ordinary(8, bits=1)(runtime, x % 2), 8),
    "function": (function(19), 19),
    "products": (reopened_product, None),
    "token lookup": (tokens, 32),
    "weights": (weights, 64),
}


def words(payload: bytes, bits: int) -> np.ndarray:
    """Packed words as [words, bytes]."""
    return np.frombuffer(payload, np.uint8).reshape(-1, -(-bits // 8))


def surprise(counts: np.ndarray) -> float:
    """How many standard deviations a chi-square of equal cells is above its mean (5 is one in millions)."""
    expected = counts.sum() / len(counts)
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    return ((chi / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5  # Wilson-Hilferty


def kolmogorov(sample: np.ndarray) -> float:
    """sqrt(n) times the largest distance of a sample in [0, 1) from the uniform distribution (2.5: one in 10^5)."""
    ordered = np.sort(sample)
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    return max((ranks[1:] - ordered).max(), (ordered - ranks[:-1]).max()) * len(ordered) ** 0.5


def assert_uniform(payload: bytes, bits: int, what: str) -> None:
    rows = words(payload, bits)
    for position in range(rows.shape[1]):
        free = min(8, bits - 8 * position)
        counts = np.bincount(rows[:, position], minlength=256)
        assert counts[2**free :].sum() == 0, f"{what}: byte {position} carries more than {free} bits"
        if free > 1:
            assert surprise(counts[: 2**free]) < 5, f"{what}: byte {position} is not uniform"
    padded = np.zeros((len(rows), 8), np.uint8)
    padded[:, : rows.shape[1]] = rows
    assert kolmogorov(padded.view(np.uint64)[:, 0] / 2.0**bits) < 2.5, what


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)
def test_what_the_parties_send_each_other_is_uniform(name, integers):
    job, bits = PROTOCOLS[name]
    sent = {OWNER: b"", CLIENT: b""}
    for outcome in [run(job, integers, seed=seed) for seed in range(3)]:
        for role in sent:
            for frame in outcome.frames[role]:
                if bits is None:  # the product's frames: 64 bits and 40 bits, then whole words
                    cut = 8 * COUNT
                    assert_uniform(frame.payload[:cut], 64, f"{name} of rank {role}")
                    if frame.payload[cut:]:
                        assert_uniform(frame.payload[cut:], 40, f"{name} of rank {role}")
                sent[role] += frame.payload
    for role, payload in sent.items():
        if bits and payload and not (name == "token lookup" and role == OWNER):
            assert_uniform(payload, bits, f"{name} of rank {role}")


def received_by(party: int, job, integers, seed: int) -> bytes:
    """The corrections that the dealer sends ``party``."""
    frames = run(job, integers, seed=seed).frames[DEALER]
    return b"".join(frame.payload for frame in frames if frame.target == party)


@pytest.mark.parametrize("name", ["narrow opening", "lifted opening", "function", "products", "token lookup"])
@pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)
def test_what_the_dealer_sends_is_uniform(name, integers):
    payload = received_by(CLIENT, PROTOCOLS[name][0], integers, seed=5)
    assert_uniform(payload, 64, name)
    assert received_by(OWNER, PROTOCOLS[name][0], integers, seed=5) == b""


def comparison(runtime, integers):
    secret = share(runtime, integers.abs() + 1)
    (wire,) = open_wires(runtime, [Opening(secret, ring=31, function=True)])
    normalize(runtime, wire, 30, 8, list(range(8)))


@pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)
def test_comparison_keys_are_uniform(integers):
    """Correction words, but for the seeds' cleared bit and the flags, of which each byte holds two bits."""
    outcome = run(comparison, integers)
    assert_uniform(b"".join(frame.payload for frame in outcome.frames[OWNER]), 31, "opening")
    payload = b"".join(frame.payload for frame in outcome.frames[DEALER] if frame.target == OWNER)
    levels = 31 - (30 - 16 - 6) - 1
    seeds, values = 16 * levels * COUNT, 16 * (levels + 1) * COUNT
    assert len(payload) == seeds + values + levels * COUNT
    seed_words = np.frombuffer(payload[:seeds], np.uint64).reshape(-1, 2)
    assert not (seed_words[:, 0] & 1).any()
    assert_uniform((seed_words[:, 0] >> 1).tobytes(), 63, "seed corrections")
    assert_uniform(seed_words[:, 1].tobytes(), 64, "seed corrections")
    for level in range(levels + 1):  # each level by itself: the last one is the leaf's
        part = slice(seeds + 16 * COUNT * level, seeds + 16 * COUNT * (level + 1))
        assert_uniform(payload[part], 64, f"value corrections of level {level}")
    flags = np.frombuffer(payload[seeds + values :], np.uint8).reshape(levels, COUNT)
    for level in range(levels):
        counts = np.bincount(flags[level], minlength=4)
        assert len(counts) == 4 and surprise(counts) < 5, f"flags of level {level}"


def test_statistics_notice_what_is_not_uniform():
    """The checks above can fail: a mask one bit short, a value left bare, a biased byte."""
    generator = np.random.default_rng(0)
    short = generator.integers(0, 2**36, COUNT, dtype=np.uint64)
    rows = short.view(np.uint8).reshape(-1, 8)[:, :5].tobytes()
    with pytest.raises(AssertionError, match="byte 4 is not uniform"):
        assert_uniform(rows, 37, "short mask")
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform(EXTREMES["ramp"].numpy().tobytes(), 64, "bare")
    sums = (generator.random((COUNT, 2)).sum(1) / 2 * 2.0**53).astype(np.uint64)
    with pytest.raises(AssertionError):
        assert_uniform(sums.tobytes(), 64, "sum of two")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_two_inputs_give_transcripts_of_one_kind(name):
    """Byte by byte, the counts of two inputs differ no more than two samples of one distribution do."""
    job, _ = PROTOCOLS[name]
    first, second = (run(job, EXTREMES[kind], seed=seed) for seed, kind in enumerate(("zeros", "largest")))
    for role in range(3):
        ours, theirs = first.frames[role], second.frames[role]
        assert [(f.target, f.kind, len(f.payload)) for f in ours] == [
            (f.target, f.kind, len(f.payload)) for f in theirs
        ]
        for one, other in zip(ours, theirs, strict=True):
            counts = [np.bincount(np.frombuffer(f.payload, np.uint8), minlength=256) for f in (one, other)]
            both = sum(counts)
            used = both > 0
            chi = ((counts[0] - counts[1]) ** 2)[used] / both[used]
            freedom = used.sum() - 1
            assert chi.sum() < freedom + 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("name", [*PROTOCOLS, "comparison"])
def test_the_same_seed_hides_different_values_behind_the_same_traffic(name):
    """Rounds, messages and sizes are the same for every input; so is each of the dealer's, bit by bit.

    What the dealer sends follows from its keys alone: it has no input.
    """
    job = comparison if name == "comparison" else PROTOCOLS[name][0]
    outcomes = [run(job, integers) for integers in EXTREMES.values()]
    for outcome in outcomes[1:]:
        assert outcome.cost() == outcomes[0].cost()
        assert outcome.frames[DEALER] == outcomes[0].frames[DEALER]
        for role in (OWNER, CLIENT):
            mine, first = outcome.frames[role], outcomes[0].frames[role]
            assert [len(frame.payload) for frame in mine] == [len(frame.payload) for frame in first]


@pytest.mark.parametrize("name", [*PROTOCOLS, "comparison"])
def test_nothing_is_sent_to_the_dealer(name):
    outcome = run(comparison if name == "comparison" else PROTOCOLS[name][0], EXTREMES["ramp"])
    assert not [frame for role in (OWNER, CLIENT) for frame in outcome.frames[role] if frame.target == DEALER]
    assert all(frame.kind == "stream" for frame in outcome.frames[DEALER])


# Masks are used once.


def twice(runtime, forget: bool):
    for value in (1, 2):
        if forget:
            runtime._begun.clear()
        runtime.begin("twice")
        open_wires(runtime, [Opening(share(runtime, torch.tensor([value])))])


def test_a_section_is_begun_once():
    with pytest.raises(AssertionError, match="section 'twice' is begun twice: it would use its masks twice"):
        run(twice, False)


def test_the_audit_detects_a_section_that_was_begun_before():
    with pytest.raises(MaskReused, match="bytes 0 to 8 of the stream of section 'twice' were used before"):
        run(twice, True)


def test_a_stream_that_starts_over_is_detected():
    def job(runtime):
        open_wires(runtime, [Opening(share(runtime, torch.tensor([1])))])
        for stream in runtime._streams:
            stream.position = 0
        open_wires(runtime, [Opening(share(runtime, torch.tensor([2])))])

    with pytest.raises(MaskReused):
        run(job)


def test_sections_that_follow_each_other_share_no_mask():
    def job(runtime):
        for label in ("request 1 token 0", "request 1 token 1", "request 2 token 0"):
            runtime.begin(label)
            open_wires(
                runtime, [Opening(share(runtime, EXTREMES["zeros"])), Opening(share(runtime, EXTREMES["zeros"]))]
            )

    outcome = run(job)
    for role in (OWNER, CLIENT):
        words = np.frombuffer(b"".join(frame.payload for frame in outcome.frames[role]), np.uint64)
        assert len(words) == 6 * COUNT == len(np.unique(words))


def test_streams_of_sections_and_of_parties_are_disjoint():
    """4 kilobytes of each of 40 streams hold no 8 bytes twice."""

    def job(runtime):
        mine = []
        for section in range(10):
            runtime.begin(f"section {section}")
            mine += [stream.draw(4096).view(np.uint64) for stream in runtime._streams]
        return mine

    drawn = [words for seed in (0, 1) for words in run(job, seed=seed).results[DEALER]]
    assert len(drawn) == 40
    assert len(np.unique(np.concatenate(drawn))) == 40 * 512


def test_no_word_is_sent_twice_when_everything_is_zero():
    """Secret and shares are zero, so each message is its mask: one used for two openings would be sent twice."""

    def job(runtime):
        zero = torch.zeros(COUNT, dtype=torch.int64, device="meta" if runtime.is_dealer else "cpu")
        for _ in range(3):
            openings = [Opening(Secret(zero, 0, 64, 1)), Opening(Secret(zero, 0, 64, 1), truncate=8, lifted=True)]
            open_wires(runtime, [*openings, Opening(Secret(zero, 0, 64, 1), function=True)])

    outcome = run(job)
    words = np.frombuffer(b"".join(f.payload for role in (0, 1) for f in outcome.frames[role]), np.uint64)
    assert len(words) == 2 * 9 * COUNT == len(np.unique(words))


def test_parties_draw_what_the_dealer_expects():
    """The dealer's whole mask is the sum of the parties' parts, modulo the ring it is opened in."""

    def job(runtime):
        return [runtime.mask((50,), bits) for bits in (8, 37, 64)], runtime.mask_of(0, (3,)), runtime.mask_of(1, (3,))

    (first, own0, hidden1), (second, hidden0, own1), (whole, known0, known1) = run(job).results
    for mine, theirs, both, bits in zip(first, second, whole, (8, 37, 64), strict=True):
        total = mine + theirs
        assert torch.equal(total if bits == 64 else total & (2**bits - 1), both)
    assert hidden0 is None and hidden1 is None
    assert torch.equal(own0, known0) and torch.equal(own1, known1)


def test_keys_of_the_parties_are_their_own():
    """Party 1 cannot compute party 0's masks: their streams come from keys that the dealer draws apart."""
    streams = [Stream(key(0, party)).draw(64).tobytes() for party in (0, 1)]
    assert streams[0] != streams[1]
    masks = run(lambda runtime: runtime.mask((4,))).results
    assert not torch.equal(masks[0], masks[1])


# What the code may not do.


def calls(path: Path) -> Counter:
    """(enclosing class or function, method called) for every call of an attribute."""
    found = Counter()

    def visit(node, where):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = [*where, node.name]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            found[".".join(where), node.func.attr] += 1
        for child in ast.iter_child_nodes(node):
            visit(child, where)

    visit(ast.parse(path.read_text("utf-8")), [])
    return found


SENDING = {"send", "send_json", "send_stream", "exchange", "all_exchange", "all_exchange_many"}


def test_only_these_places_send_anything():
    """Every message of the engine, and why it may be sent; a new one has to be judged and listed here."""
    allowed = {
        ("opening.py", "_exchange"): "x + r for a fresh mask r",
        ("products.py", "OwnedMatrix.__init__"): "W - R for a fresh mask R",
        ("products.py", "lookup"): "one-hot rows + r for a fresh mask r",
        ("dealing.py", "Runtime.exchange"): "what the three above hand it",
        ("audit.py", "audited.Audited.exchange"): "the same, once it has been checked",
        ("tape.py", "Tape.compare"): "which tape this is, before anything is masked",
        ("wire_engine.py", "WireEngine.open_to"): "a result, by order of the reveal module",
    }
    dealer = {"_Courier._send", "agree_on_keys"}  # material and keys, from the dealer to one party
    found = set()
    for path in ENGINE:
        for where, method in calls(path):
            if method in SENDING and not (path.name == "dealing.py" and where in dealer):
                found.add((path.name, where))
    assert found == set(allowed)


def test_no_torch_or_numpy_generator_draws_in_the_engine():
    forbidden = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "Generator", "manual_seed", "random"}
    forbidden |= {f"{name}_" for name in forbidden} | {"rand_like", "randn_like", "randint_like", "default_rng"}
    assert len(ENGINE) > 16
    for path in ENGINE:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            assert name not in forbidden, f"{path.name} line {node.lineno} uses {name}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None)]
                assert not {"random", "secrets"} & set(modules), f"{path.name} imports {modules}"


# A whole session.


def session(engine, folders, prompt):
    """Load, one request of two tokens, statistics, close: what ``PrivateLlama`` has each role do."""
    party = Party(engine, engine.transport, 2)
    if engine.rank != CLIENT:
        party.serve(folders[engine.rank])
        return None
    party.request_load()
    answer = Answer(prompt, lambda logits: int(logits.argmax()))
    steps = [
        step.token_id
        for step in party.request_generate(Plan(len(prompt), 2, chunk=3), answer)
        if isinstance(step, Step)
    ]
    party.collect_statistics()
    party.close()
    return steps, party.reveals.as_list()


def played(tmp_path, seed, prompt):
    folder, _ = tiny(tmp_path / str(seed), num_hidden_layers=1, seed=seed)
    return run(session, [str(folder), None, None], prompt, engine=True)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Two sessions of one shape; model and prompt differ."""
    tmp_path = tmp_path_factory.mktemp("session")
    return [played(tmp_path, seed, prompt) for seed, prompt in ((0, [5, 6, 7, 8]), (1, [90, 80, 70, 60]))]


PUBLIC = {  # keys of the JSON that the dealer may see, by sender
    OWNER: {"config", "norm_scales", "loaded", "total"},
    CLIENT: {"verb", "plan", "stop"},
}


def test_the_dealer_is_told_the_plan_and_when_to_stop(sessions):
    plans = []
    for outcome in sessions:
        told = {role: [f for f in outcome.frames[role] if f.target == DEALER] for role in (OWNER, CLIENT)}
        for role, frames in told.items():
            assert frames and all(frame.kind == "JSON" for frame in frames)
            for frame in frames:
                assert set(json.loads(frame.payload)) <= PUBLIC[role], frame.payload
        messages = [json.loads(frame.payload) for frame in told[CLIENT]]
        assert [m.get("verb", "stop") for m in messages] == ["load", "generate", "stop", "statistics", "close"]
        plans.append([json.loads(frame.payload) for frame in told[OWNER] if b"loaded" not in frame.payload] + messages)
    assert plans[0] == plans[1]  # the models differ, their configurations do not


def test_two_sessions_differ_in_no_size_and_no_order(sessions):
    """Other weights, another prompt: the same messages of the same sizes, but for the text of public JSON."""
    shapes = []
    for outcome in sessions:
        online = [(f.source, f.target, f.kind, len(f.payload)) for f in outcome.frames[OWNER] + outcome.frames[CLIENT]]
        shapes.append([shape if shape[2] == "tensor" else shape[:3] for shape in online])
        shapes[-1] += [(f.target, len(f.payload)) for f in outcome.frames[DEALER] if f.kind == "stream"]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 60
    assert sessions[0].results[CLIENT][0] != sessions[1].results[CLIENT][0]


def test_a_session_reveals_logits_and_public_facts_alone(sessions):
    for outcome in sessions:
        revealed = outcome.results[CLIENT][1]
        assert [entry["what"] for entry in revealed if entry["to"] != "all"] == ["logits of each generated token"]
