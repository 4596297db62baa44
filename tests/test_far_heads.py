"""Ranking kv heads by how far they look: the owner's measurement and its file."""

import pytest
import torch
from eviction_runs import VOCAB, model, peaked_weights, run
from safetensors.torch import load

import eviction
from crypten_llm.commands.cli import main
from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import SHIPPED, load_tokenizer
from crypten_llm.session import far_heads
from crypten_llm.session.calibration import PROSE
from experiments.tools import real_model


@pytest.fixture(scope="module")
def encode():
    tokenizer = load_tokenizer(SHIPPED)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_needles_are_where_they_are_said_to_be(encode):
    tokenizer, places = load_tokenizer(SHIPPED), []
    for prompt in far_heads.needles(encode, PROSE.read_text("utf-8"), 400, 6, begin=[1]):
        assert len(prompt.ids) == 400 and prompt.ids[0] == 1
        fact, said = (
            tokenizer.decode(prompt.ids[part])
            for part in (slice(prompt.start, prompt.stop), slice(-prompt.asked, None))
        )
        assert fact.endswith(f"is{said}.") and tokenizer.decode(prompt.ids).count("The special number for") == 4
        places.append(prompt.start)
    assert places == sorted(places) and places[0] < 80 and places[-1] > 280, "all over the prompt"
    with pytest.raises(UsageError, match="a prompt of 70 tokens has no room for a needle"):
        far_heads.needles(encode, "Some prose. " * 9, 70)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2)])
def test_scores_are_the_attention_to_the_needle(heads, kv_heads):
    size, own, asked = 150, slice(40, 47), 5
    config = model(heads, kv_heads, 2).config
    ids = torch.randint(0, VOCAB, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    seen = run("full", size, 0, heads=heads, kv_heads=kv_heads, layers=2)
    expected = torch.stack([seen.prompt_attention(layer)[:, -asked:, own].sum(-1).mean(-1) for layer in range(2)])
    prompt = far_heads.Needle([*ids, 3], own.start, own.stop, asked)
    weights = peaked_weights(config, 1.8, heads + 10 * kv_heads + 200)
    scores = far_heads.attention_to(config, weights, [prompt, prompt])
    torch.testing.assert_close(scores, expected.reshape(2, kv_heads, -1).mean(-1), atol=1e-5, rtol=1e-4)
    assert scores.std() > 0.005
    assert far_heads.ranks(torch.tensor([[0.1, 0.4], [0.4, 0.0]])).tolist() == [[2, 0], [1, 3]]


def test_the_command_writes_what_the_policy_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(far_heads, "LONGEST", 200)
    path = tmp_path / "heads.safetensors"
    assert main(["calibrate", "--heads-out", str(path)]) == 0
    assert "the 24 kv heads by how far they look, from layer " in capsys.readouterr().err
    assert load(path.read_bytes())["ranks"].dtype == torch.int32
    name = eviction.register("heads-of-shipped", path.read_bytes())
    assert eviction.policy("head_split", weights=name, far=0.25).looks_far(6, 4).sum() == 6
    assert main(["calibrate", "--heads-out", str(tmp_path / "none" / "heads")]) == 2
    assert "make it first" in capsys.readouterr().err


def test_ranks_that_come_with_the_project():
    policy = eviction.policy("head_split", weights=real_model.NAME)
    assert policy.looks_far(30, 3).sum() == 22
    assert eviction.policy("head_split").looks_far(6, 4).sum() == 6
    with pytest.raises(eviction.PolicyError, match="weights cannot be called"):
        eviction.register(real_model.NAME, b"")
