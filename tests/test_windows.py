"""A window of attention: what a token sees, what a cache keeps, what it costs; logits are held in test_engines."""

import json
from dataclasses import replace

import party_jobs
import pytest
import torch
from hf_models import FAMILIES, reference_logits, tiny
from parties import run
from test_cost import by_kind, dealer_by_phase, generate
from test_engines import load_plain
from test_generation import GREEDY, IDS, MARGIN, Plain, plan

from crypten_llm.commands import cost
from crypten_llm.errors import UsageError
from crypten_llm.insecure.one_process import run_roles
from crypten_llm.models.cache import causal_mask
from crypten_llm.models.checkpoint import expected_shapes
from crypten_llm.models.config import LlamaConfig
from crypten_llm.roles import CLIENT
from crypten_llm.session import calibration
from crypten_llm.session.plan import Plan


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (4, 4), (5, 12), (12, 12), (1, 9)])
@pytest.mark.parametrize("window", [None, 2, 3, 7, 12, 50])
def test_masks(rows, length, window):
    mask = causal_mask(rows, length, window)
    for row in range(rows):
        at = length - rows + row
        assert mask[row].tolist() == [at - (window or length) < key <= at for key in range(length)]


def test_each_layer_keeps_what_a_later_token_sees(tmp_path):
    """The lower layer keeps all, the upper one five rows before the next."""
    folder, _ = tiny(tmp_path, **FAMILIES["qwen2_window"])
    model = load_plain(folder)
    cache = model.new_cache()
    for start, stop in ((0, 4), (4, 5), (5, 14), (14, 15), (15, 16)):
        model(model.engine.tokens(torch.tensor(IDS[start:stop]), stop - start, 97), cache)
        assert [len(layer) for layer in cache.layers] == [stop, min(start, 5) + stop - start]
        kept = cache.layers[1].layer.positions.tolist()
        assert kept == list(range(stop - len(kept), stop))
    assert cache.layers[1].copy().window == 6


def test_the_window_is_felt(tmp_path):
    """Logits of the same weights without it agree up to where it begins to hide something, and not beyond."""
    folder, reference = tiny(tmp_path, **FAMILIES["mistral_window"])
    d = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(d | {"sliding_window": None}))
    whole = load_plain(folder)
    ids = torch.tensor(IDS[:20])
    found = whole(whole.engine.tokens(ids, 20, 97), whole.new_cache(), last_only=False)
    differ = (found - reference_logits(reference, ids)).abs().amax(-1)
    assert differ[:5].max() < 1e-4 and differ[5:].min() > 1e-2


@pytest.mark.parametrize("case", ["mistral_window", "qwen3_window_by_type"])
def test_private_tokens_equal_plain(tmp_path, case):
    folder, _ = tiny(tmp_path, **FAMILIES[case])
    plain, shape = Plain(folder), plan(12, 3, chunk=5)
    for start in range(20):
        ids = IDS[start : start + 12]
        expected = plain.tokens(shape, ids)
        if min(plain.margins) > MARGIN:
            break
    outcome = run(party_jobs.generate, 2, str(folder), [(shape, ids, GREEDY, ())], wire=True)
    assert outcome[CLIENT][0]["tokens"] == expected


@pytest.mark.parametrize("case", ["mistral_window", "qwen2_window"])
def test_counted_costs_are_those_of_a_run(tmp_path, case):
    """Also where layers differ, and with chunks longer and shorter than the window."""
    folder, _ = tiny(tmp_path, **FAMILIES[case] | {"num_hidden_layers": 3})
    for shape in (Plan(15, max_new_tokens=3, chunk=4), Plan(9, max_new_tokens=2)):
        _, (_, measured, _), _ = run_roles(lambda links, shape=shape: generate(links, folder, shape))
        counted = cost.predict(LlamaConfig.from_folder(folder), shape).cost.ranks
        for rank, table in enumerate(measured):
            assert by_kind(counted[rank]["table"]) == by_kind(table)
            assert dealer_by_phase(counted[rank]["table"]) == dealer_by_phase(table)


def test_a_step_costs_no_more_once_the_window_is_full():
    config = LlamaConfig.from_sizes(hidden=32, heads=2, kv_heads=2, ffn=48, layers=2, vocab=97, context=64)
    windowed = replace(config, model_type="mistral", windows=(8, 8))
    sent = [cost.predict(windowed, Plan(length, 2)).phase("decode")["bytes_sent"] for length in (7, 20, 40)]
    assert sent[0] == sent[1] == sent[2]
    assert cost.predict(config, Plan(40, 2)).phase("decode")["bytes_sent"] > sent[0]


def test_a_policy_and_a_window_that_hides_something():
    config = LlamaConfig(97, 32, 48, 2, 4, 2, 8, max_position_embeddings=64, model_type="qwen2", windows=(None, 16))
    assert Plan(12, 4, policy="h2o").check(config) and Plan(30, 4).check(config)
    with pytest.raises(UsageError, match=r"policy h2o chooses among all rows, but .* looks back 16 tokens.* by 1$"):
        Plan(13, 4, policy="h2o").check(config)


def test_rows_of_the_owner_s_check_are_as_long_as_the_window(monkeypatch):
    """A row of scores grows up to the window, so a model is not refused for the length of its context."""
    config = LlamaConfig(97, 32, 48, 1, 4, 2, 8, max_position_embeddings=4096, model_type="mistral", windows=(256,))
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in expected_shapes(config).items()}
    seen = []

    class Recorder(calibration._Recorder):
        def softmax(self, scores, mask=None):
            seen.append(self.growth)
            return super().softmax(scores, mask)

    monkeypatch.setattr(calibration, "_Recorder", Recorder)
    calibration.measure(config, weights)
    calibration.measure(replace(config, windows=()), weights)
    assert seen == [2.0, 32.0]
