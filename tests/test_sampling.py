"""Draws follow transformers' distribution, repeat with their seed, and bad settings are named."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.session.sampling import Sampler, SamplingConfig

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, -3.0, 1.0, 0.9])


def reference(logits, temperature=1.0, top_k=None, top_p=1.0):
    """The distribution that transformers samples from."""
    scores = TemperatureLogitsWarper(float(temperature))(None, logits[None].double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores[0].softmax(0)


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0, "top_k": 4},
    {"top_k": 3},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_distribution_is_transformers(settings):
    """Exactly: the weights of the draw, put back in token order."""
    weights = torch.zeros(len(LOGITS), dtype=torch.float64)
    scores, tokens = LOGITS.double().sort(descending=True)
    weights[tokens] = Sampler(SamplingConfig(do_sample=True, **settings))._filtered(scores)
    torch.testing.assert_close(weights / weights.sum(), reference(LOGITS, **settings))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws_follow_the_distribution(settings):
    draws = 4000
    sampler = Sampler(SamplingConfig(do_sample=True, seed=1, **settings))
    counts = torch.bincount(torch.tensor([sampler(LOGITS) for _ in range(draws)]), minlength=len(LOGITS))
    expected = reference(LOGITS, **settings)
    assert (counts[expected == 0] == 0).all()
    deviation = (counts / draws - expected).abs()
    assert (deviation <= 4.5 * (expected * (1 - expected) / draws).sqrt() + 1e-12).all()


def test_greedy():
    assert Sampler(SamplingConfig())(LOGITS) == 1
    assert Sampler(SamplingConfig(do_sample=True, temperature=0))(LOGITS) == 1
    assert Sampler(SamplingConfig(temperature=0))(LOGITS) == 1


def test_ties_go_to_the_lower_id():
    assert Sampler(SamplingConfig())(torch.tensor([0.0, 7.0, 7.0, 7.0])) == 1
    sampler = Sampler(SamplingConfig(do_sample=True, top_p=1e-9, seed=0))
    assert {sampler(torch.zeros(50)) for _ in range(20)} == {0}


def test_top_k_keeps_tokens_equal_to_the_last():
    sampler = Sampler(SamplingConfig(do_sample=True, top_k=2, seed=0))
    assert {sampler(torch.tensor([1.0, 2.0, 1.0, 0.0])) for _ in range(100)} == {0, 1, 2}


def test_top_p_keeps_at_least_one():
    sampler = Sampler(SamplingConfig(do_sample=True, top_p=1e-12, seed=0))
    assert {sampler(LOGITS) for _ in range(20)} == {1}


def test_tiny_temperature_is_greedy():
    sampler = Sampler(SamplingConfig(do_sample=True, temperature=1e-300, seed=0))
    assert {sampler(LOGITS) for _ in range(20)} == {1}


def test_excluded_tokens_are_never_drawn():
    sampler = Sampler(SamplingConfig(do_sample=True, temperature=100.0, seed=0))
    assert {sampler(torch.tensor([0.0, float("-inf"), 0.0])) for _ in range(200)} == {0, 2}


def test_seed_repeats_and_none_does_not():
    def run(seed):
        sampler = Sampler(SamplingConfig(do_sample=True, temperature=5.0, seed=seed))
        return [sampler(LOGITS) for _ in range(60)]

    assert run(3) == run(3)
    assert run(3) != run(4)
    assert run(None) != run(None)


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Sampler(SamplingConfig(do_sample=True, seed=5))(LOGITS)
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_and_one_token():
    assert Sampler(SamplingConfig(do_sample=True, top_k=5, top_p=0.5))(torch.tensor([3.0]).bfloat16()) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_overflowed_logits(value):
    with pytest.raises(CryptenLLMError, match="the logits hold NaN or infinite values"):
        Sampler(SamplingConfig())(torch.tensor([0.0, value]))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"do_sample": 1}, "do_sample is 1; it must be true or false"),
        ({"temperature": -0.5}, r"temperature is -0.5; it must be 0 \(greedy\) or a positive number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": "1"}, "temperature is '1'"),
        ({"top_k": -1}, "top_k is -1; it must be a positive integer, or 0 to keep all tokens"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"top_p": 0}, "top_p is 0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": None}, "top_p is None"),
        ({"seed": -1}, "seed is -1; it must be an integer from 0"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"do_sample": False, "temperature": 0.7}, "temperature is 0.7 but do_sample is false; leave it out"),
        ({"do_sample": False, "top_k": 5}, "top_k is 5 but do_sample is false"),
        ({"do_sample": False, "top_p": 0.9}, "top_p is 0.9 but do_sample is false"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        SamplingConfig(**{"do_sample": True, **settings})
