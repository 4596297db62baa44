"""RoPE tables equal transformers' for every type, within and beyond the trained context."""

import pytest
import torch
from hf_models import BASE, CASES
from transformers import LlamaConfig as ReferenceConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import rotary_tables
from crypten_llm.models.rope import rope_frequencies, unchanged_up_to

ROPES = [case for case in CASES if "rope" in case or "theta" in case] + ["gqa", "wide_heads", "narrow_heads"]


def make(case):
    """Our config and a fresh Hugging Face embedding of the same case."""
    overrides = {name: value for name, value in CASES[case].items() if name not in ("dtype", "max_shard_size")}
    reference = ReferenceConfig(**BASE | overrides)
    return LlamaConfig.from_dict(reference.to_dict()), LlamaRotaryEmbedding(config=reference)


def rope_tables(config, positions, seq_len=None):
    """As the model makes them; transformers takes the length from the last position of each call."""
    length = (int(positions.max()) + 1 if len(positions) else 0) if seq_len is None else seq_len
    return rotary_tables(rope_frequencies(config, length), positions)


def expected(embedding, positions):
    cos, sin = embedding(torch.zeros(1), positions[None])
    return cos[0], sin[0]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ROPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 1500])
def test_prefill(case, length):
    config, embedding = make(case)
    positions = torch.arange(length)
    assert_same(rope_tables(config, positions), expected(embedding, positions))


@pytest.mark.parametrize("case", ROPES)
def test_prefill_then_cached_decode_across_the_context(case):
    config, embedding = make(case)
    steps = [torch.arange(14), *(torch.tensor([t]) for t in range(14, 24))]
    for positions in steps:
        assert_same(rope_tables(config, positions), expected(embedding, positions))


def test_dynamic_follows_the_sequence_length():
    config, _ = make("rope_dynamic")
    positions = torch.arange(8)
    short, long = rope_tables(config, positions), rope_tables(config, positions, seq_len=64)
    assert not torch.allclose(short[0], long[0])
    whole = rope_tables(config, torch.arange(64))
    assert_same(long, (whole[0][:8], whole[1][:8]))
    assert_same(rope_tables(config, positions, seq_len=config.max_position_embeddings), short)


@pytest.mark.parametrize("case", ROPES)
def test_frequencies_are_kept_as_long_as_they_hold(case):
    config, _ = make(case)
    kept, limit = rope_frequencies(config), unchanged_up_to(config)
    assert torch.equal(rope_frequencies(config, min(limit, 10**6)), kept)
    if limit < 10**6:
        assert not torch.equal(rope_frequencies(config, limit + 1), kept)
    assert (limit == config.max_position_embeddings) == (case == "rope_dynamic")


def test_other_types_ignore_the_sequence_length():
    config, _ = make("rope_llama3")
    positions = torch.tensor([3, 900, 7])
    assert_same(rope_tables(config, positions, seq_len=5000), rope_tables(config, positions))


def test_llama3_case_covers_every_band():
    """Otherwise the comparison above could pass with a band wrong."""
    config, embedding = make("rope_llama3")
    plain = 1.0 / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    ratio = plain / embedding.inv_freq
    assert (ratio == 1).any() and torch.isclose(ratio, torch.tensor(8.0)).any()
    assert ((ratio > 1.01) & (ratio < 7.99)).any()


def test_no_positions():
    config, _ = make("rope_dynamic")
    cos, sin = rope_tables(config, torch.arange(0))
    assert cos.shape == sin.shape == (0, config.head_dim)
