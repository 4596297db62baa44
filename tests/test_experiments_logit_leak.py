"""Logits give the output matrix's column space once there are as many as it has columns; ids give nothing of it."""

import json
import sys

import pytest
import torch
from hf_models import tiny

from crypten_llm import PrivateLlama
from experiments.measure import logit_leak


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("leak"), num_hidden_layers=1)[0]


def test_the_column_space_is_found_with_the_last_of_the_vectors_it_takes(folder):
    with PrivateLlama.from_pretrained(str(folder), engine="plain") as llama:
        size = llama.config.hidden_size
        logits = logit_leak.seen(llama, size + 16)
        weight = logit_leak.output_matrix(folder, llama.config)
    rows = {row["logit vectors"]: row for row in logit_leak.table(logits, weight)}
    assert rows[size // 2]["outside"] > 0.3 and rows[size + 16]["outside"] < 1e-4
    assert rows[size + 16]["gap"] > 100, "the singular values tell how many dimensions there are"


def test_another_matrix_is_not_in_it(folder):
    with PrivateLlama.from_pretrained(str(folder), engine="plain") as llama:
        logits = logit_leak.seen(llama, llama.config.hidden_size + 8)
    other = torch.randn(logits.shape[1], llama.config.hidden_size, dtype=torch.float64)
    assert logit_leak.leak(logits, other)["outside"] > 0.3


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "leak.json"
    words = ["logit_leak", "--model", str(folder), "--engine", "plain", "--tokens", "40", "--json", str(kept)]
    monkeypatch.setattr(sys, "argv", words)
    assert logit_leak.main() == 0
    assert "logit vectors" in capsys.readouterr().out
    assert [row["logit vectors"] for row in json.loads(kept.read_text())["plain"]["rows"]][0] == 16
