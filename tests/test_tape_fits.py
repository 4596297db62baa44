"""What a tape is for: two parties' tapes of one deal, and the runs that fit one."""

import pytest
from tapes import CONFIG, ENGINE, PLAN, compared, open_tape, record

from crypten_llm.errors import UsageError
from crypten_llm.roles import CLIENT, OWNER


@pytest.fixture
def folder(tmp_path):
    record(tmp_path / "tape")
    return tmp_path / "tape"


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
    errors = compared(folder, tmp_path / "other", engine)
    assert len(errors) == 2
    for error in errors:
        with pytest.raises(UsageError, match=message.replace("rank ., ", "rank . .*, ")):
            raise error
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
