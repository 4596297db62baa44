"""What the client's own files say of answers: as transformers reads them, and nothing that another party sends."""

import json

import pytest
import torch
from hf_models import tiny, with_template
from transformers import AutoModelForCausalLM

from crypten_llm import PrivateLlama
from crypten_llm.commands.cli import main
from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session import party as parties
from crypten_llm.session.defaults import Defaults
from crypten_llm.session.request import Request

IDS = [5, 6, 7, 8]


def write(folder, generation=None, config=None):
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


class OfModel:
    eos_token_id = 1


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ids", "source"),
    [
        ({"eos_token_id": [2, 7]}, {"eos_token_id": 3}, None, (2, 7), "generation_config.json"),
        ({"eos_token_id": 2}, None, OfModel, (2, 1), "generation_config.json and the tokenizer"),
        ({"eos_token_id": [1, 2]}, None, OfModel, (1, 2), "generation_config.json"),
        ({}, {"eos_token_id": 3}, None, (3,), "config.json"),
        (None, {"eos_token_id": None}, OfModel, (1,), "the tokenizer"),
        (None, None, None, (), ""),
    ],
)
def test_what_ends_an_answer(tmp_path, generation, config, tokenizer, ids, source):
    found = Defaults.of_folder(write(tmp_path, generation, config), tokenizer)
    assert (found.stop_ids, found.stop_source) == (ids, source)


@pytest.mark.parametrize(
    ("file", "sampling"),
    [
        ({}, {}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {}),
        ({"temperature": 0.6}, {}),
        ({"do_sample": False, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {"do_sample": True, "top_k": 0, "min_p": 0.1}),
    ],
)
def test_how_tokens_are_chosen(tmp_path, file, sampling):
    assert Defaults.of_folder(write(tmp_path, file)).sampling == sampling


def test_greedy_defaults_give_what_transformers_generates(tmp_path):
    """The penalty of the model's file counts without anybody's asking, here as there."""
    folder, _ = tiny(tmp_path, num_hidden_layers=1)
    write(folder, {"eos_token_id": 2, "repetition_penalty": 1.7})
    reference = AutoModelForCausalLM.from_pretrained(folder)
    expected = reference.generate(torch.tensor([IDS]), max_new_tokens=20)[0, len(IDS) :].tolist()
    with PrivateLlama.from_pretrained(str(folder), engine="plain") as llama:
        found = llama.generate(input_ids=IDS, max_new_tokens=20)
        assert found.token_ids == expected
        assert found.decoding == "greedy, repetition_penalty 1.7"
        without = llama.generate(input_ids=IDS, max_new_tokens=20, repetition_penalty=1.0)
        assert without.token_ids != expected and without.decoding == "greedy"


def test_a_request_comes_before_the_models_defaults():
    defaults = Defaults(sampling={"do_sample": True, "temperature": 0.6, "top_k": 50, "repetition_penalty": 1.2})
    assert str(Request("a").sampling(defaults)) == "temperature 0.6, top_k 50, repetition_penalty 1.2"
    assert str(Request("a", do_sample=False).sampling(defaults)) == "greedy, repetition_penalty 1.2"
    assert str(Request("a", top_k=0, temperature=1.5).sampling(defaults)) == "temperature 1.5, repetition_penalty 1.2"
    assert str(Request("a", repetition_penalty=1).sampling(defaults)) == "temperature 0.6, top_k 50"
    with pytest.raises(UsageError, match="temperature is 0.7 but do_sample is false"):
        Request("a", temperature=0.7).sampling()


def test_how_many_tokens():
    chat = Request("a", chat=True)
    assert (Request("a").plan(3).max_new_tokens, chat.plan(3).max_new_tokens) == (32, 256)
    assert chat.plan(3, Defaults(max_new_tokens=90)).max_new_tokens == 90
    assert Request("a", max_new_tokens=5).plan(3, Defaults(max_new_tokens=90)).max_new_tokens == 5


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"eos_token_id": "x"}, "eos_token_id is 'x'; it must be a token id"),
        ({"do_sample": True, "temperature": -1}, "generation_config.json: temperature is -1"),
        ({"repetition_penalty": 0}, "generation_config.json: repetition_penalty is 0"),
        ({"max_new_tokens": 0}, "generation_config.json: max_new_tokens is 0; it must be 1 or more"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, file, message):
    with pytest.raises(UsageError, match=message):
        Defaults.of_folder(write(tmp_path, file))


def test_what_is_not_followed_is_told(tmp_path):
    asked = {"num_beams": 4, "no_repeat_ngram_size": 0, "typical_p": 0.9, "suppress_tokens": [], "use_cache": True}
    assert Defaults.of_folder(write(tmp_path, asked)).not_followed == ("num_beams", "typical_p")


@pytest.fixture
def model(tmp_path):
    return with_template(tmp_path)


def announces(monkeypatch, ids):
    """The owner says that these end an answer."""
    told = LlamaConfig.to_dict
    monkeypatch.setattr(LlamaConfig, "to_dict", lambda self: {**told(self), "eos_token_id": ids})
    assert parties.LlamaConfig is LlamaConfig


def test_what_the_owner_announces_ends_no_answer(model, monkeypatch):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        expected = llama.generate(input_ids=IDS, max_new_tokens=6).token_ids
    announces(monkeypatch, [expected[2]])
    assert expected[2] not in expected[:2]
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        assert llama.config.eos_token_ids == (expected[2],)
        usual = llama.generate(input_ids=IDS, max_new_tokens=6)
        assert usual.token_ids == expected and expected[2] not in usual.stop_ids
        own = llama.generate(input_ids=IDS, max_new_tokens=6, eos_token_id=expected[1])
        assert (own.token_ids, own.stop_ids) == (expected[:2], (expected[1],))


@pytest.mark.parametrize("wrong", ["owner", [True], [-1], ["a"], ["owner"]])
def test_what_is_no_token_id(wrong):
    with pytest.raises(UsageError, match="eos_token_id is .*; give a token id, or several"):
        Request("a", eos_token_id=wrong)


def decoding(capsys, model, *options):
    command = ["generate", "--engine", "plain", "--model", str(model), "--prompt-ids", "5,6", "--max-new-tokens", "1"]
    assert main([*command, *options]) == 0
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(("decoding", "generation_config"))]


def test_the_command_says_what_decides(model, capsys):
    write(model, {"eos_token_id": [2], "do_sample": True, "temperature": 0.5, "num_beams": 2})
    both = "generation_config.json and the tokenizer"
    assert decoding(capsys, model) == [
        f"decoding: temperature 0.5, top_k 50 (generation_config.json), at most 1 tokens, until token 2, 1 ({both})",
        "generation_config.json asks for num_beams, which is not followed here",
    ]
    options = ["--greedy", "--eos-token-id", "7"]
    assert decoding(capsys, model, *options)[0] == "decoding: greedy, at most 1 tokens, until token 7 (as asked for)"
    options = ["--temperature", "2", "--top-k", "0", "--eos-token-id", "7,8"]
    assert decoding(capsys, model, *options)[0] == (
        "decoding: temperature 2, at most 1 tokens, until token 7, 8 (as asked for)"
    )


def test_where_nothing_ends_an_answer_it_is_said(tmp_path, capsys):
    folder, _ = tiny(tmp_path, num_hidden_layers=1, eos_token_id=None)
    write(folder, {})
    assert decoding(capsys, folder) == [
        "decoding: greedy, at most 1 tokens, and no token ends it: --eos-token-id says which would"
    ]
