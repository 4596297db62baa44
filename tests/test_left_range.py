"""Models and prompts outside an engine's ranges, in whole sessions: nothing wrong is given without a word."""

import json
from contextlib import ExitStack

import pytest
from hf_models import tiny
from programs import GENERATE, Program, by_hand, error_line, free_port
from ranged_models import TRIGGER, scaled, triggered

from crypten_llm import PrivateLlama
from crypten_llm.commands import prompts as prompts_file
from crypten_llm.commands.cli import main
from crypten_llm.engines.wire.engine import LEFT_DOMAIN
from crypten_llm.errors import CryptenLLMError, LeftRange, PartyError, UsageError
from crypten_llm.session.prompted import Step
from crypten_llm.session.report import revealed_table

HARMLESS, HARMFUL = [11, 12, 13, 14], [11, 12, TRIGGER, 14]
TOLD = ("parties", "whether any number left the engine's range")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Accepted, and right but for prompts that hold ``TRIGGER``: attention scores of 72, which is 104 bits."""
    return triggered(tmp_path_factory.mktemp("triggered"), 72.0)


@pytest.fixture(scope="module")
def expected(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        return llama.generate(input_ids=HARMLESS, max_new_tokens=3).token_ids


def ids(tokens):
    return ",".join(map(str, tokens))


def generate(model, *options, tokens=HARMLESS, new=3):
    return [*GENERATE, "--model", model, "--prompt-ids", ids(tokens), "--max-new-tokens", new, *options]


# A prompt that leaves the range: engine wire sees it in the step.


def test_a_run_ends_in_one_line(model, expected):
    with Program(*generate(model, "--json")) as program:
        result = program.result(120)
    assert result["token_ids"] == expected and result["outside"] == ""
    entry = next(entry for entry in result["revealed"] if (entry["to"], entry["what"]) == TOLD)
    assert entry["times"] == 3 and TOLD[1] in revealed_table(result["revealed"])
    with Program(*generate(model, "--json", tokens=HARMFUL)) as program:
        code, out, err = program.finish(120)
    assert (code, out, error_line(err)) == (UsageError.exit_code, "", LEFT_DOMAIN)


def test_by_hand_each_party_ends_by_itself_and_says_why(model):
    port = free_port()
    with ExitStack() as running:
        told = []
        for rank in range(3):
            words = generate(model, "--timeout", 60, tokens=HARMFUL)
            (program,) = by_hand(3, *words, port=port, ranks=[rank])
            told.append(running.enter_context(program))
        ends = [program.finish(120) for program in told]
    owner, client, dealer = (error_line(err) for _, _, err in ends)
    assert owner == client == LEFT_DOMAIN
    assert dealer.endswith(f"stopped: {LEFT_DOMAIN}")
    assert all(code != 0 for code, _, _ in ends) and all(out.strip() == "" for _, out, _ in ends)


def test_a_session_of_many_prompts_keeps_what_was_answered(model, expected):
    """And has ended: the parties have stopped in the middle of a step."""
    with PrivateLlama.from_pretrained(str(model), threads=1) as llama:
        steps = []
        prompts = [HARMLESS, HARMLESS, HARMFUL, HARMLESS]
        with pytest.raises(LeftRange) as left:
            for event in llama.stream(input_ids=prompts, max_new_tokens=3, batch_size=2):
                if isinstance(event, Step):
                    steps.append((event.prompt, event.token_id))
        assert str(left.value) == LEFT_DOMAIN
        assert [result.token_ids for result in llama.result] == [expected, expected]
        assert sorted(steps) == sorted((prompt, token) for prompt in (0, 1) for token in expected)
        assert not llama.is_open
        with pytest.raises(UsageError, match="this session has ended"):
            llama.generate(input_ids=HARMLESS)


@pytest.mark.parametrize("place", [0, 5, 19])
def test_wherever_in_a_prompt_it_is(model, place):
    """Chunks of the prompt before the last are told with the first token."""
    prompt = [20 + i for i in range(20)]
    prompt[place] = TRIGGER
    with (
        pytest.raises(LeftRange),
        PrivateLlama.from_pretrained(str(model), threads=1) as llama,
    ):
        llama.generate(input_ids=prompt, prefill_chunk=4, max_new_tokens=2)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Prompts of ids are no lines of a file: a prompt is a word here, which stands for its ids."""
    words = {"good": HARMLESS, "bad": HARMFUL}

    class Tokenizer:
        bos_token = chat_template = None

        def __call__(self, text, **_):
            return {"input_ids": words[text]}

        def decode(self, ids, **_):
            return "".join(f"<{token}>" for token in ids)

    monkeypatch.setattr(PrivateLlama, "tokenizer", Tokenizer())
    monkeypatch.setattr(PrivateLlama, "has_tokenizer", True)

    def written(*prompts):
        lines = [json.dumps({"id": f"{word} {i}", "prompt": word}) + "\n" for i, word in enumerate(prompts)]
        (tmp_path / "prompts.jsonl").write_text("".join(lines))
        return ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "answers.jsonl")]

    return written, tmp_path / "answers.jsonl"


def test_a_file_keeps_its_answers_and_is_taken_up_again(model, expected, files, capsys):
    written, answers = files
    words = ["generate", "--model", str(model), "--threads", "1", "--max-new-tokens", "3"]
    assert main([*words, *written("good", "bad", "good"), "--batch-size", "1"]) == UsageError.exit_code
    said = error_line(capsys.readouterr().err)
    assert said.startswith(f"prompt 'bad 1': {LEFT_DOMAIN}") and "take this prompt out" in said
    assert [json.loads(line)["id"] for line in answers.read_text().splitlines()] == ["good 0"]
    assert main([*words, *written("good", "bad", "good"), "--batch-size", "8"]) == UsageError.exit_code
    said = error_line(capsys.readouterr().err)
    assert said.startswith("one of the prompts 'bad 1', 'good 2'") and "--batch-size 1 finds which" in said
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(line["id"], line["token_ids"]) for line in found] == [("good 0", expected)]


def test_answers_of_a_group_that_had_ended_are_written(tmp_path):
    request = prompts_file.read_prompts(str(_lines(tmp_path)), {}, "shipped")
    steps = [[Step(0, 7, "a", 0.1, 1, 1), Step(1, 8, "b", 0.1, 1, 1, "stop")], [Step(0, 9, "c", 0.1, 1, 1)], []]
    ready = [type("Ready", (), {"ids": [1, 2]}) for _ in request]
    with open(tmp_path / "out.jsonl", "w") as file:
        left = prompts_file._write(file, request, ready, steps, "")
    assert [entry.id for entry in left] == [2, 3]
    (line,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (line["id"], line["text"], line["token_ids"], line["finish_reason"]) == (1, "ab", [7, 8], "stop")


def _lines(folder):
    path = folder / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    return path


def test_the_owner_finds_where_it_happens(model, capsys):
    """As the error advises: what is compared goes on beyond the range, and the first to leave it is named."""
    words = ["debug-compare", "--model", str(model), "--prompt-ids", ids(HARMFUL), "--steps", "1", "--json"]
    assert main(words) == CryptenLLMError.exit_code
    out, err = capsys.readouterr()
    found = json.loads(out)["first_beyond_bound"]
    assert found["operation"] == "softmax" and "attention scores from" in found["outside"]
    assert "its domain is" in err


# A model that leaves it: the owner's measurement.


@pytest.fixture(scope="module")
def steep(tmp_path_factory):
    """Scores of hundreds on any token."""
    return scaled(tmp_path_factory.mktemp("steep"), {"q_proj": 60.0})


@pytest.mark.parametrize("engine", ["wire", "crypten"])
def test_a_model_outside_is_refused(steep, engine):
    """All parties end, with the owner's words, which hold no number of the model's."""
    with Program(*generate(steep, "--engine", engine)) as program:
        code, out, err = program.finish(120)
    said = error_line(err)
    assert (code, out) == (PartyError.exit_code, "") and said.startswith("rank 0 (owner) stopped: engine")
    what = {"wire": "attention scores leave the range -86.6 to 55.4", "crypten": "attention scores less the largest"}
    assert f"engine {engine!r} would be wrong on this model: {what[engine]}" in said
    assert said.endswith("--force shares it all the same, and marks every answer as not to be trusted")
    assert "lowest" not in err, "the table is the owner's"


def test_forced_on_crypten_every_answer_is_marked(steep):
    command = generate(steep, "--engine", "crypten", "--force")
    with Program(*command, "--json") as program:
        result = program.result(120)
    assert "attention scores less the largest of their row leave the range -128 to 0" in result["outside"]
    assert {"to": "all", "what": "which ranges of the engine the model leaves"}.items() <= _entry(result).items()
    with Program(*command) as program:
        code, out, err = program.finish(120)
    assert code == 0 and out.startswith("[not to be trusted] ")
    marked = [line for line in err.splitlines() if line.startswith("warning: not to be trusted: engine 'crypten'")]
    assert len(marked) == 2, "before the answer, and after the report"


def _entry(result):
    return next(entry for entry in result["revealed"] if entry["why"].startswith("--force"))


def test_forced_on_wire_a_step_that_leaves_it_still_ends(steep):
    with Program(*generate(steep, "--force")) as program:
        code, _, err = program.finish(120)
    assert code == UsageError.exit_code and error_line(err) == LEFT_DOMAIN


def test_all_parties_have_to_force(steep):
    port = free_port()
    with ExitStack() as running:
        told = []
        for rank, extra in enumerate((["--force"], [], [])):
            (program,) = by_hand(3, *generate(steep, *extra, "--timeout", 60), port=port, ranks=[rank])
            told.append(running.enter_context(program))
        lines = [error_line(program.finish(120)[2]) for program in told]
    assert "the parties disagree on force: False at rank 1 (client), True at rank 0 (owner)" in lines[1]


def test_what_cannot_be_forced(tmp_path):
    """What the weights do not rule out: gates may be anything there, and nothing looks at them later."""
    with Program(*generate(scaled(tmp_path, {"gate_proj": 100.0}), "--force")) as program:
        code, _, err = program.finish(120)
    said = error_line(err)
    assert code == PartyError.exit_code
    assert "gates may leave the range -250 to 250" in said and "--force is for what was measured alone" in said


def test_force_is_for_engines_with_a_range(capsys):
    assert main(["generate", "--engine", "plain", "--force", "--prompt-ids", "5"]) == UsageError.exit_code
    assert "engine 'plain' has no range" in error_line(capsys.readouterr().err)


# What the owner sees.


def test_the_table_is_shown_at_the_owner_and_to_no_other(model, expected):
    port = free_port()
    with ExitStack() as running:
        told = []
        for rank in range(3):
            (program,) = by_hand(3, *generate(model, "--timeout", 60), port=port, ranks=[rank])
            told.append(running.enter_context(program))
        owner, client, dealer = (program.finish(120) for program in told)
    assert "measured on 64 random tokens" in owner[2] and "proved from the weights" in owner[2]
    assert client[1].split() == [str(token) for token in expected]
    assert all("measured" not in err and "headroom" not in err for _, _, err in (client, dealer))


def test_little_headroom_is_said_in_a_local_run(tmp_path):
    """The owner's process is a child there, whose other lines are shown with --verbose."""
    with Program(*generate(scaled(tmp_path, {"q_proj": 3.0}))) as program:
        code, _, err = program.finish(120)
    assert code == 0
    assert "warning: little headroom on engine 'wire', so a prompt may leave its range: attention scores" in err
    assert "measured on" not in err


@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_logits_are_plains_or_refused(tmp_path, factor):
    folder = scaled(tmp_path, {"lm_head": factor})
    with PrivateLlama.from_pretrained(str(folder), engine="plain") as llama:
        clear = llama.generate(input_ids=HARMLESS, max_new_tokens=2).token_ids
    with Program(*generate(folder, "--json", new=2)) as program:
        code, out, err = program.finish(120)
    if factor == 1e3:
        assert code == 0 and json.loads(out)["token_ids"] == clear
    else:
        assert code == PartyError.exit_code and "logits may leave the range -6.55e+04 to 6.55e+04" in error_line(err)


def test_a_text_of_the_owners_choice_reaches_the_owner_alone(tmp_path):
    """In a local run its path is told to that process; without a tokenizer it cannot be measured."""
    folder, _ = tiny(tmp_path)
    (tmp_path / "asked.txt").write_text("What will clients ask?")
    with Program(*generate(folder, "--calibration-text", tmp_path / "asked.txt")) as program:
        code, _, err = program.finish(120)
    assert code == UsageError.exit_code and "no tokenizer" in error_line(err)
