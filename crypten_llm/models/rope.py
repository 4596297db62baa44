"""Rotary position embedding: how fast each pair of coordinates turns.

Owns the frequencies of every supported rope type, equal to transformers'. They are public and are made when a model is
built; at a step they are made again only where the sequence's length changes them. Their cosines and sines are made in
``llama.rotary_tables``, and secret queries and keys are rotated by the engine.
"""

from __future__ import annotations

import math

import torch

from crypten_llm.models.config import LlamaConfig


def unchanged_up_to(config: LlamaConfig) -> float:
    """The longest sequence that has the frequencies of the shortest."""
    return config.max_position_embeddings if config.rope.type == "dynamic" else math.inf


def rope_frequencies(config: LlamaConfig, length: int = 0) -> torch.Tensor:
    """Radians per position in a sequence of ``length`` tokens, [head_dim / 2], float32 on the CPU.

    The length matters to rope type `dynamic` only, whose base grows with the sequence beyond max_position_embeddings.
    It is transformers' rule at each forward call: a prefill rotates all its tokens for its own length, a cached decode
    step rotates its one token for the length reached, and keys cached earlier keep the rotation they got. Decoding with
    a cache therefore differs a little from one prefill of the same tokens, in transformers and here alike.

    The order of the float32 operations is transformers': an error of one rounding in a frequency grows with the
    position, to 1e-3 radians at 10^4.
    """
    rope, dim = config.rope, config.head_dim
    base: float | torch.Tensor = rope.theta
    if length > unchanged_up_to(config):
        assert rope.factor is not None, "RopeConfig asks for it"
        stretch = (rope.factor * torch.tensor(length) / config.max_position_embeddings) - (rope.factor - 1)
        base = base * stretch ** (dim / (dim - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.type == "linear":
        assert rope.factor is not None, "RopeConfig asks for it"
        return frequencies / rope.factor
    if rope.type == "divided":
        return frequencies / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.type == "llama3":
        return _llama3(config, frequencies)
    return frequencies


def _llama3(config: LlamaConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Keep the short wavelengths, divide the long ones by `factor`, blend in between. [head_dim / 2] to the same."""
    rope = config.rope
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    assert rope.factor is not None and context is not None and low is not None and high is not None, "RopeConfig asks"
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / rope.factor, frequencies)
    between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return torch.where(between, blended, stretched)
