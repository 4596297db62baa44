"""Trained weights of a policy that each party was given: from the command line to a private answer."""

import json

import pytest
from eviction_runs import trained_data
from hf_models import tiny

from crypten_llm import PrivateLlama
from crypten_llm.commands.cli import main
from crypten_llm.errors import UsageError


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model, and weights for it."""
    folder, _ = tiny(tmp_path_factory.mktemp("trained"), num_hidden_layers=2, max_position_embeddings=64)
    path = folder.parent / "locret-mine.safetensors"
    path.write_bytes(trained_data("locret", 4, 2, 2))
    return folder, path


def test_a_private_answer_with_weights_that_every_party_was_given(given):
    folder, path = given
    asked = {"input_ids": list(range(3, 23)), "max_new_tokens": 3, "prefill_chunk": 16}
    found = []
    for engine in ("plain", "wire"):
        settings = {"engine": engine, "policy_weights": str(path), "timeout": 60, "threads": 1}
        with PrivateLlama.from_pretrained(str(folder), **settings) as llama:
            found.append(llama.generate(**asked, policy="locret(budget=12,recent=2,weights=locret-mine)"))
    assert found[0].token_ids == found[1].token_ids and found[0].policy == found[1].policy
    assert "weights=locret-mine#" in found[0].policy and str(path) not in found[0].policy


def test_the_command_line_takes_them_by_the_files_name(given, capsys):
    folder, path = given
    command = ["cost", "--model", str(folder), "--prompt-tokens", "20", "--json", "--policy", "locret"]
    assert main([*command, "--set", "weights=locret-mine", "--set", "budget=12", "--policy-weights", str(path)]) == 0
    assert "weights=locret-mine#" in json.loads(capsys.readouterr().out)["plan"]["policy"]
    assert main([*command, "--set", f"weights={path}"]) == 2
    assert "it must be shipped, or the name of weights that every party was started" in capsys.readouterr().err


def test_a_party_that_was_not_given_them_says_so(given):
    folder, _ = given
    with PrivateLlama.from_pretrained(str(folder), engine="plain") as llama:
        with pytest.raises(UsageError, match="no weights x#0123456789abcdef are known here; start every party with"):
            llama.generate(input_ids=[5, 6], max_new_tokens=1, policy="locret(weights=x#0123456789abcdef)")
