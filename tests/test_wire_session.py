"""What leaves a party over a whole session of engine ``wire``, and which places of its code may send at all."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
from hf_models import tiny
from wire_parties import CLIENT, DEALER, OWNER, run

from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan, Turn
from crypten_llm.session.prompted import Answer, Step

ROOT = Path(__file__).parents[1]
ROOMS = [ROOT / "crypten_llm" / room for room in ("kernels", "protocols", "engines/wire")]
BESIDE = [ROOT / "crypten_llm" / file for file in ("insecure/audit.py", "insecure/tracked.py", "insecure/opened.py")]
ENGINE = [*[path for room in ROOMS for path in room.rglob("*.py")], *BESIDE]

# What the code may not do.


def calls(path: Path) -> Counter:
    """(enclosing class or function, function or method called) for every call."""
    found = Counter()

    def visit(node, where):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = [*where, node.name]
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found[".".join(where), name] += 1
        for child in ast.iter_child_nodes(node):
            visit(child, where)

    visit(ast.parse(path.read_text("utf-8")), [])
    return found


# What makes a message, and what sends one. Openings are masked where they are made: in ``Opening.prepare`` alone.
SENDING = {"send", "send_json", "send_stream", "swap", "swap_here", "exchange", "all_exchange", "all_exchange_many"}
SENDING |= {"Message", "Piece"}


def test_only_these_places_send_anything():
    """Every message of the engine, and why it may be sent; a new one has to be judged and listed here."""
    allowed = {
        ("opening.py", "Opening.prepare"): "x + r for a fresh mask r",
        ("opening.py", "Message.prepare"): "what one of the eight below says",
        ("products.py", "own"): "W - R for a fresh mask R",
        ("known.py", "_told"): "rows + r for a fresh mask r",
        ("embedding.py", "own_table"): "a table xor a fresh mask",
        ("embedding.py", "look_up"): "one-hot bits xor a fresh mask",
        ("embedding.py", "_as_words"): "xor shares of rows xor a fresh mask",
        ("sketch.py", "Sketches._noted"): "sums of labels xor fresh masks",
        ("flags.py", "differ"): "a share that the other party has too, or else uniform: the one bit that it tells",
        ("engine.py", "WireEngine._show"): "a result, by order of the reveal module",
        ("engine.py", "WireEngine._pass_on"): "the same behind a pad of the client's, who is no party",
        ("wide.py", "WideOpening.prepare"): "x + r for a fresh mask r",
        ("wide.py", "ResidueOpening.prepare"): "x + r for a mask r that was drawn for it",
        ("rounds.py", "Rounds._round"): "what running protocols have prepared of all these",
        ("rounds.py", "Rounds._resume"): "nothing: a generator is sent its wires",
        ("roles.py", "Party.exchange"): "what a round hands it",
        ("captured.py", "Captured._swap"): "the same, while it is captured",
        ("captured.py", "Captured._travel"): "the same, each time that it is launched",
        ("captured.py", "Captured._post"): "the same, from card to card",
        ("mailbox.py", "Mailbox.swap"): "what it is handed",
        ("peer.py", "tap"): "where material from card to card is to be put",
        ("peer.py", "connect"): "where messages from card to card are to be put, and numbers that try it",
        ("peer.py", "_check_pace"): "zeros, to see how long it takes",
        ("counting.py", "Counting.exchange"): "nothing: it counts",
        ("audit.py", "audited.Audited.exchange"): "the same, once it has been checked",
        ("tape.py", "Tape.compare"): "which tape this is, before anything is masked",
    }
    dealer = {
        ("material.py", "_Courier._send"),
        ("roles.py", "agree_on_keys"),
        ("peer.py", "pour"),
    }  # from the dealer to one party
    found = {(path.name, where) for path in ENGINE for where, name in calls(path) if name in SENDING}
    assert found == set(allowed) | dealer


def test_no_torch_or_numpy_generator_draws_in_the_engine():
    forbidden = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "Generator", "manual_seed", "random"}
    forbidden |= {f"{name}_" for name in forbidden} | {"rand_like", "randn_like", "randint_like", "default_rng"}
    assert len(ENGINE) > 16
    for path in ENGINE:
        tree = ast.parse(path.read_text("utf-8"))
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        types = {alias.name for node in imports if node.module == "collections.abc" for alias in node.names}
        for node in ast.walk(tree):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            is_type = isinstance(node, ast.Name) and name in types  # the generator that a protocol is
            assert name not in forbidden or is_type, f"{path.name} line {node.lineno} uses {name}"
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


SHOWN = ["whether any number left the engine's range", "logits of each generated token"]  # to both parties; to one
COUNTED = [*SHOWN, "peak memory of each party"]  # where statistics are asked for
PUBLIC = {  # keys of the JSON that the dealer may see, by sender
    OWNER: {"verb", "config", "norm_scales", "tokens", "loaded", "total"},
    CLIENT: {"verb", "plans", "stop"},
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
        plans.append([json.loads(frame.payload) for frame in told[OWNER] if b"loading" not in frame.payload] + messages)
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
        assert [entry["what"] for entry in revealed if entry["to"] != "all"] == COUNTED


# Turns of a conversation, and prompts side by side.


def turns_and_batch(engine, folders, prompt):
    """Two turns, two prompts at once of which the second ends first, and the conversation dropped."""
    party = Party(engine, engine.transport, 2)
    if engine.rank != CLIENT:
        party.serve(folders[engine.rank])
        return party.kept
    party.request_load()

    def answered(plans, prompts, *turns):
        answers = [Answer(ids, lambda logits: int(logits.argmax())) for ids in prompts]
        for _ in party.request_together(plans, answers, turns):
            pass
        return [answer.token_ids for answer in answers]

    found = answered([Plan(4, 2, chunk=3)], [prompt], Turn(1))
    found += answered([Plan(3, 2)], [prompt[1:]], Turn(1, 5))
    revealed = party.reveals.as_list()
    found += answered([Plan(4, 3, chunk=3), Plan(2, 2, chunk=2)], [prompt, prompt[:2]])
    party.request_forget(1)
    party.close()
    return found, revealed


def test_turns_and_batches_differ_in_no_size_and_no_order_and_leave_nothing(tmp_path):
    shapes, told = [], []
    for seed, prompt in ((0, [5, 6, 7, 8]), (1, [90, 80, 70, 60])):
        folder, _ = tiny(tmp_path / str(seed), num_hidden_layers=1, seed=seed)
        outcome = run(turns_and_batch, [str(folder), None, None], prompt, engine=True)
        online = [(f.source, f.target, f.kind, len(f.payload)) for f in outcome.frames[OWNER] + outcome.frames[CLIENT]]
        shapes.append([shape if shape[2] == "tensor" else shape[:3] for shape in online])
        shapes[-1] += [(f.target, len(f.payload)) for f in outcome.frames[DEALER] if f.kind == "stream"]
        messages = [json.loads(f.payload) for f in outcome.frames[CLIENT] if f.target == DEALER]
        told.append(messages)
        (found, revealed) = outcome.results[CLIENT]
        assert [len(ids) for ids in found] == [2, 2, 3, 2]
        assert [entry["what"] for entry in revealed if entry["to"] != "all"] == SHOWN
        assert "prompt length: 3 tokens, after 5 that the cache holds" in [entry["what"] for entry in revealed]
        assert outcome.results[OWNER] == outcome.results[DEALER] == {}
    assert shapes[0] == shapes[1] and told[0] == told[1]
    assert [message["turns"] for message in told[0] if "turns" in message] == [
        [{"conversation": 1}],
        [{"conversation": 1, "cached_tokens": 5}],
    ]
    keys = {key for message in told[0] for key in message}
    assert keys == {"verb", "plans", "turns", "stop", "conversation"}
