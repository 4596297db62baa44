"""Engine ``wire`` up to the edges of its declared domain, and the owner's refusal of a model that leaves it."""

import math
from dataclasses import replace

import pytest
import torch
from hf_models import CASES, tiny
from test_wire_engine import TWIN, close, normal, opened, softmax_mix

from crypten_llm.engines.wire import domain
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.models import checkpoint
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import prepare
from crypten_llm.protocols.norm import ROOT
from crypten_llm.session import calibration

SHIPPED = checkpoint.SHIPPED
WIRE = WireConfig()


def loaded(folder):
    config = LlamaConfig.from_folder(folder)
    weights = {name: prepare(name, value, config).float() for name, value in checkpoint.load_weights(folder, config)}
    return config, weights


def refusal(config, weights):
    """Nothing where the model is accepted."""
    return domain.calibrate(WIRE, calibration.measure(config, weights)).refusal()


def times(weights, factors):
    """Those whose names hold a key multiplied by its factor."""
    changed = dict(weights)
    for part, factor in factors.items():
        changed |= {name: value * factor for name, value in weights.items() if part in name}
    return changed


# The owner's check.


@pytest.mark.parametrize("case", CASES)
def test_models_inside_the_domain_are_accepted(case, tmp_path):
    assert refusal(*loaded(tiny(tmp_path, **CASES[case])[0])) == ""


def test_the_shipped_model_is_accepted():
    config, weights = loaded(SHIPPED)
    assert refusal(config, weights) == ""
    assert calibration.measure(config, weights).limited["softmax row"][1] == pytest.approx(16.4, abs=0.05)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"v_proj": 64}, "mixed values of attention leave the range -256 to 256"),
        ({"q_proj": 8}, "attention scores leave the range -86.6 to 55.4"),
        ({"gate_proj": 64}, "gates may leave the range -250 to 250"),
        ({"up_proj": 300}, "what gates are multiplied with may leave the range -1.02e+03 to 1.02e+03"),
        ({"down_proj": 1e5}, "sums of squares of hidden states leave the range 0 to 8.46e+09"),
        ({"embed_tokens": 10}, "entries of the embedding may leave the range -16 to 16"),
    ],
    ids=str,
)
def test_models_outside_the_domain_are_refused(factors, message, tmp_path):
    config, weights = loaded(tiny(tmp_path)[0])
    found = refusal(config, times(weights, factors))
    assert message in found and "\n" not in found


def test_values_are_accepted_if_they_are_divided_and_what_takes_them_is_multiplied(tmp_path):
    config, weights = loaded(tiny(tmp_path)[0])
    assert refusal(config, times(weights, {"v_proj": 64, "o_proj": 1 / 64})) != ""
    assert refusal(config, times(weights, {"v_proj": 1 / 64, "o_proj": 64})) == ""


def test_long_rows_are_refused_where_a_shorter_context_is_not(tmp_path):
    config, weights = loaded(tiny(tmp_path)[0])
    weights = times(weights, {"q_proj": 4})
    found = refusal(replace(config, max_position_embeddings=2**27), weights)
    assert "logarithms of a row's sum of exp(score) leave the range -40.2 to 55.4" in found
    assert refusal(replace(config, max_position_embeddings=2**10), weights) == ""


def test_rows_are_continued_to_the_whole_context():
    """Equal scores add up; a score that towers over the others counts once; what is now there counts as it is."""
    recorder = calibration._Recorder(growth=10.0)
    recorder.softmax(torch.full((1, 1, 128), 49.0))
    assert recorder.limited["softmax row"][1] == pytest.approx(torch.full((1271,), 49.0).logsumexp(0).item())
    assert recorder.limited["softmax row"][1] > WIRE.row_logarithms[1]

    recorder = calibration._Recorder(growth=1000.0)
    recorder.softmax(torch.tensor([[[19.0, -10.0, -10.0]]]))
    assert recorder.limited["softmax row"][1] == pytest.approx(19.0, abs=1e-4)

    recorder = calibration._Recorder(growth=1000.0)
    recorder.softmax(torch.tensor([[[-16.0, 30.0], [-17.0, -17.0]]]), torch.ones(2, 2, dtype=torch.bool).tril())
    low, high = recorder.limited["softmax row"]
    assert low == pytest.approx(torch.full((2,), -17.0).logsumexp(0).item())
    assert high == pytest.approx(torch.full((1001,), -17.0).logsumexp(0).item())


# The engine at the edges.


@pytest.mark.parametrize(("keys", "score"), [(54, 74.2), (1000, 69.98), (1, 79.9), (1, -57.9), (16, -61.9)])
def test_rows_at_the_edges_of_their_sums(keys, score):
    scores, values = torch.full((1, 4, keys), score), normal(1, keys, 8)
    (low, high), total = WIRE.exponents.sums, math.log2(keys) + score
    assert low <= total <= high and min(total - low, high - total) < 0.2
    close(opened(softmax_mix, scores, values), TWIN.mix(TWIN.softmax(scores), values), 1e-3)


@pytest.mark.parametrize("keys", [1, 3, 5, 16, 64])
@pytest.mark.parametrize("score", [0.0, 0.7, 1.1])
@pytest.mark.parametrize("sign", [1, -1])
def test_mixed_values_at_their_edge(keys, score, sign):
    """Whatever a row's sum is, between 1/4 and 1."""
    scores, values = torch.full((1, 2, keys), score), torch.full((1, keys, 8), sign * (2.0**WIRE.mixed_bits - 0.01))
    close(opened(softmax_mix, scores, values), TWIN.mix(TWIN.softmax(scores), values), 2.0**WIRE.mixed_bits * 2e-4)


def test_norms_at_both_edges():
    """Rows from nothing at all to the largest sum of squares: of one size, and with one number that is all of it."""
    hidden, eps, high = 64, 1e-6, WIRE.square_sums
    sizes = torch.tensor([0.0, 2.0**-16, 2.0**-9, 1.0, (high / 4 / hidden) ** 0.5, (0.999 * high / hidden) ** 0.5])
    even = sizes[:, None] * torch.ones(hidden)
    spikes = torch.tensor([2.0**-16, 1.0, 2.0**10, 2.0**16, (0.999 * high) ** 0.5])[:, None] * torch.eye(5, hidden)
    x = torch.cat([even, spikes, -spikes + 0.25 * normal(5, hidden)]).double().mul(2**16).round() / 2**16

    def job(engine, secret):
        gamma, weight = torch.ones(hidden), torch.eye(hidden)
        normed = engine.rms_norm(secret(x), engine.parameter(gamma, gamma.shape), eps, 1.0)
        return engine.linear(normed, engine.parameter(weight, weight.shape))

    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    declared = hidden**0.5 * 2.0**-WIRE.row * (1.1 + 2.0 ** (WIRE.row - ROOT - WIRE.hidden_bits) * x.abs())
    assert ((opened(job).double() - expected).abs() <= declared + 2.0**-16).all()  # as it is shown
