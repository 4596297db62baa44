"""Rotary position embedding: the public cosines and sines of each position.

Owns the frequencies of every supported rope type, equal to transformers' Llama. Positions and tables are public;
the rotation of secret queries and keys is done by the model with whichever engine runs it.
"""

from __future__ import annotations

import math

import torch

from crypten_llm.models.config import LlamaConfig


def rope_tables(
    config: LlamaConfig, positions: torch.Tensor, seq_len: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for `x * cos + rotate_half(x) * sin`, where rotate_half((a, b)) = (-b, a) on the two halves.

    Shapes: positions [T], integers from 0; returns (cos, sin), each [T, head_dim], float32, on positions' device.
    The right half of each row repeats the left.

    `seq_len` matters to rope type `dynamic` only, whose base grows with the sequence beyond
    max_position_embeddings. It defaults to max(positions) + 1, which is transformers' rule at each forward call:
    a prefill rotates all its tokens for its own length, a cached decode step rotates its one token for the length
    reached, and keys cached earlier keep the rotation they got. Decoding with a cache therefore differs a little from
    one prefill of the same tokens, in transformers and here alike.
    """
    if seq_len is None:
        seq_len = int(positions.max()) + 1 if positions.numel() else 0
    frequencies = _inverse_frequencies(config, seq_len).to(positions.device)
    angles = positions[:, None].to(torch.float32) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _inverse_frequencies(config: LlamaConfig, seq_len: int) -> torch.Tensor:
    """Radians per position, [head_dim / 2], float32 on the CPU.

    The order of the float32 operations is transformers': an error of one rounding in a frequency grows with the
    position, to 1e-3 radians at 10^4.
    """
    rope, dim = config.rope, config.head_dim
    base: float | torch.Tensor = rope.theta
    if rope.type == "dynamic" and seq_len > config.max_position_embeddings:
        length = torch.tensor(seq_len)
        stretch = (rope.factor * length / config.max_position_embeddings) - (rope.factor - 1)
        base = base * stretch ** (dim / (dim - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(config, frequencies)
    return frequencies


def _llama3(config: LlamaConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Keep the short wavelengths, divide the long ones by `factor`, blend in between. [head_dim / 2] to the same."""
    rope = config.rope
    context, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    smooth = (context / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    stretched = torch.where(wavelengths > context / low, frequencies / rope.factor, frequencies)
    between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return torch.where(between, blended, stretched)
