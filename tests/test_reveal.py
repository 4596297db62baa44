"""What a step reveals: all logits, the best few or an id alone, as every party's own settings say and no peer does."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack

import pytest
from hf_models import tiny, with_tokenizer
from programs import GENERATE, by_hand, error_line, free_port
from ranged_models import scaled
from wire_parties import CLIENT, DEALER, OWNER, run

from crypten_llm import PrivateLlama
from crypten_llm.commands.cli import main
from crypten_llm.commands.deal import deal
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import CryptenLLMError, LeftRange, UsageError
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols.tournament import place_bits
from crypten_llm.session import stocked
from crypten_llm.session.mode import MOST, Mode
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Answer, Step
from crypten_llm.session.request import Request, Taken
from crypten_llm.session.sampling import Sampler, SamplingConfig

IDS = [5, 6, 7, 8]
VOCABULARY = 97
RANGE = "whether any number left the engine's range"
ID = "id of each generated token"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return [str(tiny(tmp_path_factory.mktemp("m"), num_hidden_layers=1, seed=seed)[0]) for seed in (0, 1)]


@pytest.fixture(scope="module")
def clear(models):
    with PrivateLlama.from_pretrained(models[0], engine="plain") as llama:
        yield llama


# Whole sessions, every message of which is at hand and every mask of which is followed (``wire_parties``).


class Choosing(WireEngine):
    def __init__(self, transport, runtime):
        super().__init__(transport, WireConfig.choosing(), runtime=runtime)


def session(engine, folder, prompt, plans, modes):
    """Each role with a mode of its own; the client returns ids and what was revealed."""
    party = Party(engine, engine.transport, 2, mode=Mode.parse(modes[engine.rank]))
    if engine.rank != CLIENT:
        party.serve(folder if engine.rank == OWNER else None)
        return None
    party.request_load()
    choose = int if party.mode.kind == "tokens" else Sampler(SamplingConfig())
    answers = [Answer(prompt[: plan.prompt_tokens], choose) for plan in plans]
    found: list[list] = [[] for _ in plans]
    for event in party.request_together(plans, answers):
        if isinstance(event, Step):
            found[event.prompt].append(event.token_id)
    party.close()
    return found, party.reveals.as_list()


def played(folder, prompt, *plans, modes=None):
    return run(session, folder, prompt, plans, modes or [plans[0].reveal] * 3, engine=Choosing)


def plan(mode, new=2, tokens=4, **facts):
    return Plan(tokens, new, chunk=3, reveal=mode, **facts)


CHOICES = {  # what the client learns in each mode, in words
    "tokens": [(ID, 2)],
    "top-5": [("ids and logits of the 5 best tokens, each step", 2)],
    "logits": [("logits of each generated token", 2)],
}


@pytest.mark.parametrize("mode", CHOICES)
def test_tokens_are_plains_and_the_list_says_what_was_revealed(models, clear, mode):
    expected = clear.generate(input_ids=IDS, max_new_tokens=2).token_ids
    (found,), revealed = played(models[0], IDS, plan(mode)).results[CLIENT]
    assert found == expected
    secret = [(entry["to"], entry["what"], entry["times"]) for entry in revealed if entry["to"] != "all"]
    assert secret == [("parties", RANGE, 2), *[("client", *what) for what in CHOICES[mode]]]


@pytest.mark.parametrize(("mode", "facts"), [("tokens", {}), ("tokens", {"temperature": 0.7}), ("top-5", {})])
def test_two_sessions_differ_in_no_size_and_no_order(models, mode, facts):
    """Other weights, another prompt: messages of the same sizes; the client is shown an id's bits alone."""
    shapes, told = [], []
    for folder, prompt in zip(models, (IDS, [90, 80, 70, 60]), strict=True):
        outcome = played(folder, prompt, plan(mode, **facts))
        frames = outcome.frames[OWNER] + outcome.frames[CLIENT]
        shapes.append([(f.source, f.target, len(f.payload)) for f in frames if f.kind == "tensor"])
        shapes[-1] += [(f.target, len(f.payload)) for f in outcome.frames[DEALER] if f.kind == "stream"]
        told.append([f.payload for f in outcome.frames[CLIENT] if f.target == DEALER])
    assert shapes[0] == shapes[1] and told[0] == told[1] and len(shapes[0]) > 60
    last = [f for f in outcome.frames[OWNER] if f.target == CLIENT and f.kind == "tensor"][-1]
    if mode == "tokens":
        assert len(last.payload) == -(-place_bits(VOCABULARY) // 8) == 1


def test_several_prompts_at_temperatures_of_their_own(models, clear):
    plans = [plan("tokens"), plan("tokens", new=3, tokens=2, temperature=1.5), plan("tokens", new=1, temperature=0.01)]
    outcome = played(models[0], IDS, *plans)
    greedy, drawn, cold = outcome.results[CLIENT][0]
    expected = clear.generate(input_ids=IDS, max_new_tokens=2).token_ids
    assert greedy == expected and cold == expected[:1]
    assert len(drawn) == 3 and all(0 <= token < VOCABULARY for token in drawn)
    said = [entry["what"] for entry in outcome.results[CLIENT][1]]
    for how in ("greedily", "at temperature 1.5", "at temperature 0.01"):
        assert f"tokens are chosen on shares, {how}" in said


# Nothing that a peer sends changes what this side reveals.


@pytest.mark.parametrize(("asked", "own"), [("logits", "tokens"), ("logits", "top-5"), ("top-6", "top-5")])
def test_a_client_that_asks_for_more_is_refused_by_the_owner(models, asked, own):
    """It says in its plan that it would see more; the owner looks at its own setting before it runs anything."""
    with pytest.raises(UsageError, match=f"would reveal {asked}, and this party reveals {own}; start every party with"):
        played(models[0], IDS, plan(asked), modes=[own, asked, asked])


def test_all_parties_agree_on_what_is_revealed(models):
    """The owner demands a mode by being started with it."""
    port, command = free_port(), [*GENERATE, "--model", models[0], "--prompt-ids", "5,6", "--timeout", "60"]
    with ExitStack() as running:
        told = []
        for rank, extra in enumerate((["--reveal", "tokens"], [], ["--reveal", "tokens"])):
            (program,) = by_hand(3, *command, *extra, port=port, ranks=[rank])
            told.append(running.enter_context(program))
        lines = [error_line(program.finish(120)[2]) for program in told]
    assert "the parties disagree on reveal: 'logits' at rank 1 (client), 'tokens' at rank 0 (owner)" in lines[1]


def test_an_owner_whose_config_ends_answers_at_even_ids_learns_no_parity(tmp_path):
    """The attack: were stop ids the owner's, the answer's length would tell that its tokens were odd until then."""
    owners, own = (with_tokenizer(tmp_path / name) for name in ("owners", "own"))
    even = list(range(0, 1000, 2))
    for file in ("config.json", "generation_config.json"):
        path = owners / file
        told = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**told, "eos_token_id": even}))
    ended_early = []
    with PrivateLlama.from_pretrained(str(owners), tokenizer=str(own), timeout=60, threads=1) as llama:
        assert llama.config.eos_token_ids == tuple(even), "it was announced"
        for start in range(20, 26):
            steps = [e for e in llama.stream(input_ids=[start], max_new_tokens=3) if isinstance(e, Step)]
            ids, own_ids = [step.token_id for step in steps], llama.result.stop_ids
            expected = next((place for place, token in enumerate(ids, 1) if token in own_ids), 3)
            said = [entry["what"] for entry in llama.result.revealed if entry["to"] == "all"]
            assert f"number of generated tokens: {expected}" in said
            ended_early.append(any(token % 2 == 0 for token in ids[: expected - 1]))
    assert any(ended_early), "no answer had an even id before its last: the test tells nothing"


# The length of an answer.


def lengths(result):
    said = [entry["what"] for entry in result.revealed]
    return [what for what in said if what.startswith(("number of generated tokens", "upper bound of the answer's"))]


HIDDEN, SHOWN = "upper bound of the answer's length: 4", "number of generated tokens: 2"


@pytest.fixture(scope="module")
def private(models):
    with PrivateLlama.from_pretrained(models[0], timeout=60, threads=1) as llama:
        yield llama


def test_an_answer_that_nobody_streams_hides_its_length(private, clear):
    expected = clear.generate(input_ids=IDS, max_new_tokens=4).token_ids
    asked = {"input_ids": IDS, "max_new_tokens": 4, "eos_token_id": expected[1]}
    whole, shown = private.generate(**asked), private.generate(**asked, hide_length=False)
    assert whole.token_ids == shown.token_ids == expected[:2] and whole.finish_reason == "stop"
    assert (lengths(whole), lengths(shown)) == ([HIDDEN], [SHOWN])
    both = private.generate([Request(**asked), Request(**asked, hide_length=False)])
    assert sorted(lengths(both[0])) == [SHOWN, HIDDEN]
    for _ in private.stream(**asked):
        pass
    assert lengths(private.result) == [SHOWN]
    assert lengths(clear.generate(**asked)) == [SHOWN], "one process has nobody to hide it from"


def test_answers_that_had_ended_when_a_step_left_its_range_are_shown(clear, monkeypatch):
    """They were held back until the last step, which never comes."""
    step = Step(0, 7, "a", 0.1, 1, 1, "stop")

    def together(plans, answers, turn):
        yield step
        raise LeftRange("a step left it")

    monkeypatch.setattr(clear.party, "request_together", together)
    events = stocked.run(clear.party, [Plan(4, 2, hide_length=True)], [], Taken(), ())
    assert next(events) is step
    with pytest.raises(LeftRange, match="a step left it"):
        next(events)


@pytest.mark.parametrize(
    ("options", "hidden"),
    [([], False), (["--hide-length"], True), (["--json"], True), (["--json", "--show-length"], False)],
)
def test_the_command_hides_it_where_nothing_is_streamed(models, monkeypatch, options, hidden):
    asked = []
    monkeypatch.setattr("crypten_llm.commands.show.show_generation", lambda request, **_: asked.append(request))
    assert main(["generate", "--model", models[0], "--prompt-ids", "5,6", *options]) == 0
    assert [request.hide_length for request in asked] == [hidden]


@pytest.mark.parametrize(
    ("options", "hidden"), [([], True), (["--show-length"], False), (["--engine", "plain"], False)]
)
def test_a_file_of_prompts_hides_it(models, monkeypatch, options, hidden):
    asked = []
    monkeypatch.setattr(
        "crypten_llm.commands.prompts.answer_file", lambda file, out, given, *_, **__: asked.append(given)
    )
    assert main(["generate", "--model", models[0], "--prompts", "a.jsonl", "--out", "b.jsonl", *options]) == 0
    assert [given["hide_length"] for given in asked] == [hidden]


# What a client can ask for in each mode.


@pytest.mark.parametrize(
    ("mode", "asked", "message"),
    [
        ("tokens", {"logprobs": 0}, "logprobs is 0, but --reveal tokens does not show the client all logits; leave it"),
        ("tokens", {"do_sample": True, "top_p": 0.9}, "top_p is 0.9, but --reveal tokens does not show .*set it to 1"),
        ("tokens", {"do_sample": True, "top_k": 50}, "top_k is 50, but --reveal tokens .*; set it to 0 or use"),
        ("tokens", {"do_sample": True, "min_p": 0.1}, "min_p is 0.1, but --reveal tokens"),
        ("tokens", {"do_sample": True, "seed": 3}, "seed is 3, but --reveal tokens draws with the dealer's noise"),
        ("tokens", {"repetition_penalty": 1.2}, "repetition_penalty is 1.2, but --reveal tokens .*set it to 1"),
        ("tokens", {"do_sample": True, "temperature": 17}, "temperature is 17; with --reveal tokens it must be 16 at"),
        ("top-5", {"logprobs": 2}, "logprobs is 2, but --reveal top-5"),
        ("top-5", {"repetition_penalty": 0.9}, "repetition_penalty is 0.9, but --reveal top-5"),
        ("top-5", {"do_sample": True}, "top_k is None, but --reveal top-5 shows the client 5 logits; give a top_k of"),
        ("top-5", {"do_sample": True, "top_k": 6}, "top_k is 6, but --reveal top-5 shows the client 5 logits"),
    ],
)
def test_what_needs_more_of_the_logits_is_refused(models, mode, asked, message):
    with (
        PrivateLlama.from_pretrained(models[0], engine="plain", reveal=mode) as llama,
        pytest.raises(UsageError, match=message),
    ):
        llama.generate(input_ids=IDS, max_new_tokens=1, **asked)


def test_what_does_not_is_answered(models, clear):
    expected = clear.generate(input_ids=IDS, max_new_tokens=3)
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 4, "top_p": 0.9, "seed": 5}
    drawn = clear.generate(input_ids=IDS, max_new_tokens=3, **sampled)
    with PrivateLlama.from_pretrained(models[0], engine="plain", reveal="top-5") as llama:
        assert llama.generate(input_ids=IDS, max_new_tokens=3).token_ids == expected.token_ids
        assert llama.generate(input_ids=IDS, max_new_tokens=3, **sampled).token_ids == drawn.token_ids
    with PrivateLlama.from_pretrained(models[0], engine="plain", reveal="tokens") as llama:
        assert llama.generate(input_ids=IDS, max_new_tokens=3).token_ids == expected.token_ids
        found = llama.generate(input_ids=IDS, max_new_tokens=3, do_sample=True, temperature=2.0)
        assert len(found.token_ids) == 3 and found.decoding == "temperature 2"


@pytest.mark.parametrize("wrong", ["token", "top-0", f"top-{MOST + 1}", "top-k", "", "x" * 99, 3, None])
def test_a_mode_that_there_is_not(wrong):
    with pytest.raises(UsageError, match="what is revealed is .{1,60}; it must be tokens, top-K with K from 1 to 64"):
        Mode.parse(wrong)


@pytest.mark.parametrize(
    "facts",
    [
        {"reveal": "tokens", "temperature": 16.5},
        {"reveal": "tokens", "temperature": -1},
        {"reveal": "tokens", "temperature": float("nan")},
        {"reveal": "tokens", "temperature": True},
        {"reveal": "tokens", "temperature": "1"},
        {"reveal": "logits", "temperature": 0.5},
    ],
)
def test_a_plan_of_a_temperature_that_cannot_be(facts):
    with pytest.raises(UsageError, match=re.escape(f"temperature is {facts['temperature']!r} in the plan; it must be")):
        Plan(4, 2, **facts)


# Engine crypten, tapes and the command line.


@pytest.mark.parametrize("mode", ["tokens", "top-5"])
def test_crypten_chooses_by_its_own_comparisons(models, clear, mode):
    expected = clear.generate(input_ids=IDS, max_new_tokens=2).token_ids
    with PrivateLlama.from_pretrained(models[0], engine="crypten", reveal=mode, timeout=60, threads=1) as llama:
        found = llama.generate(input_ids=IDS, max_new_tokens=2)
        assert found.token_ids == expected
        assert [entry["what"] for entry in found.revealed if entry["to"] == "client"] == [
            "commitment to the weights",
            CHOICES[mode][0][0],
            "digests of each party's messages, and its clock",
            "peak memory of each party",
        ]
        if mode == "tokens":
            with pytest.raises(UsageError, match="engine 'crypten' has no noise to draw tokens on shares at temperat"):
                llama.generate(input_ids=IDS, max_new_tokens=1, do_sample=True, temperature=0.5)


def test_a_tape_is_dealt_for_a_mode_and_a_temperature(models, tmp_path):
    dealt = Plan(len(IDS), 2, reveal="tokens", temperature=0.5)
    deal(dealt, tmp_path / "tape", LlamaConfig.from_folder(models[0]), say=lambda line: None)
    settings = {"tape": str(tmp_path / "tape"), "timeout": 60, "threads": 1}
    with pytest.raises(UsageError, match="the tape's engine is"):
        PrivateLlama.from_pretrained(models[0], **settings)
    drawn = {"input_ids": IDS, "max_new_tokens": 2, "do_sample": True, "temperature": 0.5, "eos_token_id": []}
    with PrivateLlama.from_pretrained(models[0], reveal="tokens", **settings) as llama:
        with pytest.raises(UsageError, match="temperature is 0.0, but the tape is for .*--reveal tokens --out DIR"):
            llama.generate(input_ids=IDS, max_new_tokens=2)
        assert len(llama.generate(**drawn).token_ids) == 2


def test_the_command_counts_and_runs_a_mode(models, capsys):
    counted = ["cost", "--config", f"{models[0]}/config.json", "--prompt-tokens", "4", "--json"]
    rounds = {}
    for mode in ("logits", "tokens", "top-5"):
        assert main([*counted, "--reveal", mode]) == 0
        rounds[mode] = json.loads(capsys.readouterr().out)["per_token"]["rounds"]
    assert rounds["logits"] < rounds["tokens"] and rounds["logits"] < rounds["top-5"]
    assert main([*counted, "--reveal", "all"]) == UsageError.exit_code
    assert "what is revealed is 'all'" in capsys.readouterr().err
    words = ["generate", "--model", models[0], "--engine", "plain", "--prompt-ids", "5,6", "--max-new-tokens", "2"]
    assert main([*words, "--reveal", "tokens", "--temperature", "0.5"]) == 0
    assert ID in capsys.readouterr().err


def test_logits_of_other_modes_have_a_smaller_range(tmp_path):
    """What comparisons can take, which the owner proves from the weights as it does the usual range."""
    folder = str(scaled(tmp_path, {"lm_head": 1000.0}))
    with PrivateLlama.from_pretrained(folder, timeout=60, threads=1) as llama:
        assert len(llama.generate(input_ids=IDS, max_new_tokens=1).token_ids) == 1
    with pytest.raises(CryptenLLMError, match="logits may leave the range -4.1e\\+03 to 4.1e\\+03"):
        PrivateLlama.from_pretrained(folder, reveal="tokens", timeout=60, threads=1)
