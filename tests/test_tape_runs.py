"""Whole runs with tapes: sessions, commands, a bench, and what cannot be dealt."""

import json
import re
import shutil
from contextlib import ExitStack
from dataclasses import asdict

import pytest
from hf_models import tiny
from programs import GENERATE, by_hand, error_line, free_port
from tapes import open_tape

from crypten_llm.commands.cli import main
from crypten_llm.commands.deal import deal
from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig
from crypten_llm.protocols.dealer.manifest import NAMES
from crypten_llm.roles import OWNER
from crypten_llm.session.api import PrivateLlama, Request
from crypten_llm.session.bench import Shape
from crypten_llm.session.plan import Plan

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
    for party in NAMES:
        shutil.move(folder / party, tmp_path / "hosts" / party / "tape")
    command = [*GENERATE, "--engine", "wire", "--model", model, "--prompt-ids", "5,6,7,8,9", "--json", "--timeout", 60]
    port = free_port()
    with ExitStack() as running:
        for rank, party in enumerate(NAMES):
            own = [*command, "--max-new-tokens", 3, "--tape", tmp_path / "hosts" / party / "tape"]
            (program,) = by_hand(2, *own, port=port, ranks=[rank])
            running.enter_context(program)
        assert program.result()["token_ids"] == expected
    shutil.move(tmp_path / "hosts" / "owner" / "tape" / "owner.tape", tmp_path / "hosts" / "client" / "tape")
    for where, message in ((folder, "no tape at"), (tmp_path / "hosts" / "client" / "tape", "was used on")):
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
    assert manifest.plan == asdict(shape)
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
