"""Draws follow transformers' distribution, repeat with their seed, and bad settings are named."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.session.sampling import Logprobs, Sampler, SamplingConfig

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.5, 0.0, -3.0, 1.0, 0.9])


def reference(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, repetition_penalty=1.0, ids=()):
    """The distribution that transformers samples from."""
    scores = logits[None].double()
    if repetition_penalty != 1 and ids:
        scores = RepetitionPenaltyLogitsProcessor(repetition_penalty)(torch.tensor([list(ids)]), scores)
    scores = TemperatureLogitsWarper(float(temperature))(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
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
    {"min_p": 0.2},
    {"temperature": 1.5, "min_p": 0.3},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.9, "min_p": 0.35},
    {"min_p": 1.0},
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


@pytest.mark.parametrize("seed", range(40))
def test_any_settings_give_transformers_distribution(seed):
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    size = int(number(2, 60))
    logits = torch.randn(size, generator=generator) * 3
    ids = torch.randint(size, (int(number(1, 9)),), generator=generator).tolist()
    settings = {
        "temperature": number(0.3, 2),
        "top_k": int(number(0, size + 3)),
        "top_p": number(0.3, 1),
        "min_p": number(0, 0.5),
        "repetition_penalty": number(0.5, 2),
    }
    sampler = Sampler(SamplingConfig(do_sample=True, **settings), ids)
    scores, tokens = sampler._penalized(logits.double()).sort(descending=True)
    weights = torch.zeros(size, dtype=torch.float64)
    weights[tokens] = sampler._filtered(scores)
    torch.testing.assert_close(weights / weights.sum(), reference(logits, ids=ids, **settings))


def test_the_penalty_is_on_what_prompt_and_answer_hold_once_each():
    """Greedy: each token is the best that is not penalised below another; transformers' processor says which."""
    logits = torch.tensor([3.0, 2.9, 2.8, -0.1, 1.0])
    sampler, ids = Sampler(SamplingConfig(repetition_penalty=1.5), [4, 4]), [4, 4]
    for _ in range(6):
        scores = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([ids]), logits[None].double())
        ids.append(sampler(logits))
        assert ids[-1] == int(scores.argmax())
    assert ids[2:5] == [0, 1, 2]
    alone = Sampler(SamplingConfig(), [4])
    assert [alone(logits) for _ in range(3)] == [0, 0, 0]


def test_logprobs_are_the_models_own():
    expected = LOGITS.double().log_softmax(0)
    found = Logprobs.of(LOGITS, 4, 3)
    assert found.token_id == 4 and found.logprob == pytest.approx(expected[4].item())
    assert [token for token, _ in found.top] == [1, 3, 6]
    assert [value for _, value in found.top] == pytest.approx(expected[[1, 3, 6]].tolist())
    assert Logprobs.of(LOGITS, 4, 0).top == ()
    assert len(Logprobs.of(LOGITS, 4, 99).top) == len(LOGITS)
    assert [token for token, _ in Logprobs.of(torch.zeros(4), 0, 2).top] == [0, 1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "greedy"),
        ({"do_sample": True}, "temperature 1"),
        ({"do_sample": True, "temperature": 0}, "greedy"),
        ({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "seed": 3}, None),
        ({"repetition_penalty": 1.1}, "greedy, repetition_penalty 1.1"),
    ],
)
def test_settings_in_words(settings, words):
    assert str(SamplingConfig(**settings)) == (words or "temperature 0.7, top_k 5, top_p 0.9, min_p 0.1")


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
        ({"min_p": -0.1}, "min_p is -0.1; it must be from 0"),
        ({"min_p": 2}, "min_p is 2; it must be from 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a positive number, 1 for none"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"do_sample": False, "min_p": 0.1}, "min_p is 0.1 but do_sample is false"),
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
