"""``debug-compare`` finds an operation that errs, says where, and says that it reveals everything."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hf_models import EVERY_CASE, FAMILIES, tiny
from test_random_shapes import WIDE, shape

from crypten_llm.commands import cli, debug_compare
from crypten_llm.engines.wire.domain import domains
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.handles import Normed
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.engines.wire.operations import OPERATIONS
from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.insecure.finding import Finding, outside
from crypten_llm.models import checkpoint

SHIPPED = checkpoint.SHIPPED
IDS = list(range(20, 32))
USED = {
    *("embed", "rms_norm", "linear of a norm", "rotate", "rows", "cat", "scores", "softmax", "mix", "linear"),
    *("residual", "swiglu"),
}


@pytest.fixture(scope="module")
def sound():
    """Two chunks and two tokens on the shipped model."""
    return debug_compare.compare(SHIPPED, IDS, steps=2, chunk=8)


def test_every_operation_stays_within_its_bound(sound):
    assert sound.first_beyond is None, sound.describe_first()
    assert {finding.operation for finding in sound.findings} == USED
    places = {finding.where for finding in sound.findings}
    for phase in ("prefill", "decode"):
        assert {f"{phase}: layer {i} softmax" for i in range(6)} <= places
    assert sound.equal_tokens == [True, True] and max(sound.logit_errors) < 0.02


def test_bounds_are_no_formality(sound):
    """Roundings show: were an operation not compared at all, or its bound a hundred times too large, this fails."""
    for operation in USED:
        used = max(finding.used for finding in sound.findings if finding.operation == operation)
        assert 0.1 < used <= 1, operation


def test_all_that_is_opened_is_listed(sound):
    (shown,) = sound.shown
    assert shown["to"] == "client" and "nothing is private" in shown["why"]
    assert shown["times"] > len(sound.findings)


def test_the_first_operation_that_errs_is_named(monkeypatch):
    """A slip of 2^-6 in one layer's attention output, at the owner's share alone."""
    mix = OPERATIONS["mix"]

    def slip(engine, weights, values):
        out = yield from mix.protocol(engine, weights, values)
        if engine.rank == 0 and "layer 3" in engine.meter.where:
            out.share = out.share + (1 << (out.scale - 6))
        return out

    monkeypatch.setitem(OPERATIONS, "mix", replace(mix, protocol=slip))
    comparison = debug_compare.compare(SHIPPED, IDS[:5], steps=1)
    first = comparison.first_beyond
    assert (first.operation, first.where) == ("mix", "prefill: layer 3 values")
    assert first.error == pytest.approx(2**-6, rel=0.1)
    beyond = [finding for finding in comparison.findings if not finding.holds]
    assert [finding.operation for finding in beyond] == ["mix"]  # later operations are right about wrong inputs
    assert "mix is the first operation to leave its bound, in prefill: layer 3 values" in comparison.describe_first()


def test_inputs_outside_a_domain_are_named(monkeypatch):
    """Gates of three hundred are beyond silu's range of 250."""
    linear = WireEngine.linear

    def push(engine, x, weight, bias=None):
        out = linear(engine, x, weight, bias)
        if engine.rank == 0 and engine.meter.where == "prefill: layer 2 mlp" and isinstance(x, Normed):
            value = engine.settled(out)
            value.share = value.share + (300 << value.scale)
        elif "layer 2 mlp" in engine.meter.where and isinstance(x, Normed):
            engine.settled(out)
        return out

    monkeypatch.setattr(WireEngine, "linear", push)
    comparison = debug_compare.compare(SHIPPED, IDS[:4], steps=1)
    left = [finding for finding in comparison.findings if finding.outside]
    assert [(finding.operation, finding.where) for finding in left] == [("swiglu", "prefill: layer 2 mlp")]
    assert "its domain is -250 to 250" in left[0].outside


def test_a_model_outside_the_domain_is_followed(monkeypatch):
    """``generate`` refuses it; here one sees where its scores leave the range."""
    load = checkpoint.load_weights

    def steep(*given):
        return ((name, value * (16 if "layers.1.self_attn.q" in name else 1)) for name, value in load(*given))

    monkeypatch.setattr(checkpoint, "load_weights", steep)
    first = debug_compare.compare(SHIPPED, IDS, steps=1).first_beyond
    assert (first.operation, first.where) == ("softmax", "prefill: layer 1 softmax") and "domain" in first.outside


def test_each_limit_of_a_model_is_followed(tmp_path):
    """Values that are too large, and hidden states: the first is named."""
    cases = {
        "v_proj": (64.0, "mix", "mixed values of attention from"),
        "layers.0.mlp.down_proj": (4e4, "linear", "what a layer adds to hidden states from"),
    }
    for name, (factor, operation, what) in cases.items():
        folder, model = tiny(tmp_path / name)
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if name in n):
                parameter *= factor
        model.save_pretrained(folder)
        first = debug_compare.compare(folder, IDS, steps=1).first_beyond
        assert first.operation == operation and first.outside.startswith(what), first


def test_the_sum_of_a_row_is_followed(monkeypatch):
    monkeypatch.setattr(WireConfig, "row_logarithms", (-14.0, 5.0))
    left = [f for f in debug_compare.compare(SHIPPED, IDS[:6], steps=1).findings if f.outside]
    assert left and {f.operation for f in left} == {"softmax"}
    assert all(f.outside.startswith("logarithms of a row's sum") for f in left)


def test_mistakes(capsys):
    for option, message in (("5,99999", "token id 99999 is not in the vocabulary"), ("", "no prompt")):
        given = ["--prompt-ids", option] if option else []
        assert cli.main(["debug-compare", "--model", str(SHIPPED), *given]) == UsageError.exit_code
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["mqa", "attention_bias", "mlp_bias", *FAMILIES])
def test_other_architectures(name, tmp_path):
    folder, _ = tiny(tmp_path, **EVERY_CASE[name])
    comparison = debug_compare.compare(folder, [1, 5, 9, 2, 7], steps=2, chunk=3)
    assert comparison.first_beyond is None, comparison.describe_first()


@pytest.mark.parametrize("seed", range(6))
def test_random_shapes(seed, tmp_path):
    model = shape(seed, ("", *WIDE)[seed % 4])
    folder, _ = tiny(tmp_path, seed=seed, **model)
    ids = [(7 * i + seed) % model["vocab_size"] for i in range(13)]
    comparison = debug_compare.compare(folder, ids, steps=2, chunk=8)
    assert comparison.first_beyond is None, f"{comparison.describe_first()}: {model}"


def test_domains():
    config = WireConfig()
    low, high = config.scores
    assert outside(config, "softmax", torch.tensor([low, high], dtype=torch.float64)) == ""
    assert "attention scores from 0 to" in outside(config, "softmax", torch.tensor([0.0, high + 1]))
    assert "attention scores from -87.6 to" in outside(config, "softmax", torch.tensor([low - 1, high]))
    assert outside(config, "rotate", torch.tensor([1e9])) == ""
    for operation, (what, low, high) in domains(config).items():
        assert outside(config, operation, torch.tensor([low, high], dtype=torch.float64)) == ""
        for seen in (low - 0.01 * high, 1.01 * high):
            assert outside(config, operation, torch.tensor([seen])).startswith(f"{what} from {seen:.3g} to")


def test_what_a_finding_says():
    assert Finding("here", "add", 0.5, 1.0).holds
    assert not Finding("here", "add", 2.0, 1.0).holds
    assert not Finding("here", "add", float("nan"), 1.0).holds
    assert not Finding("here", "softmax", 0.0, 1.0, outside="inputs").holds


def test_command(capsys, monkeypatch):
    arguments = ["debug-compare", "--model", str(SHIPPED), "--prompt-ids", "5,6,7", "--steps", "1", "--json"]
    arguments += ["--policy", "h2o", "--set", "heavy=0.3", "--set", "recent=0.3"]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "INSECURE" in err and "every operation stayed within its declared bound" in err
    assert found["first_beyond_bound"] is None and found["equal_tokens"] == [True]
    assert {"top", "keep"} <= {finding["operation"] for finding in found["worst"]}
    monkeypatch.setitem(OPERATIONS, "rotate", replace(OPERATIONS["rotate"], bound=lambda *_: 0.0))
    assert cli.main(arguments) == CryptenLLMError.exit_code
    out, err = capsys.readouterr()
    assert json.loads(out)["first_beyond_bound"]["operation"] == "rotate"
    assert err.splitlines()[-1].startswith("error: rotate is the first operation to leave its bound, in prefill: layer")
