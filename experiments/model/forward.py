"""The Llama forward pass as pure functions that also hand out the activations inside.

Training penalises these activations and evaluation reports their ranges; the library's own forward hides them. The
weights stay in a Hugging Face `LlamaForCausalLM`, and a test holds these functions to its logits.

Axes: B rows, T tokens, D hidden, H query heads, G key-value heads, d head dimension, F ffn width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layer(NamedTuple):
    """Weights of one decoder layer."""

    attention_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    ffn_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Activations(NamedTuple):
    """What one layer computes: norm inputs (B,T,D); q (B,H,T,d), k and v (B,G,T,d) after RoPE; gate, up (B,T,F)."""

    attention_input: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    ffn_input: Tensor
    gate: Tensor
    up: Tensor


def layers(model) -> list[Layer]:
    """Weights of every layer of a `LlamaForCausalLM`, the parameters themselves."""
    return [
        Layer(
            layer.input_layernorm.weight,
            *(getattr(layer.self_attn, f"{name}_proj").weight for name in "qkvo"),
            layer.post_attention_layernorm.weight,
            *(getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down")),
        )
        for layer in model.model.layers
    ]


def rope_tables(length: int, head_dim: int, theta: float, device) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (T, d)."""
    rates = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def block(x: Tensor, layer: Layer, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Activations]:
    """One decoder layer on x (B,T,D), causal."""
    head_dim = cos.shape[-1]

    def heads(flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    attention_input = x
    normed = rms_norm(x, layer.attention_norm, eps)
    v = heads(F.linear(normed, layer.v))
    q = _rotate(heads(F.linear(normed, layer.q)), cos, sin).to(v.dtype)
    k = _rotate(heads(F.linear(normed, layer.k)), cos, sin).to(v.dtype)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(attended.transpose(1, 2).flatten(2), layer.o)
    ffn_input = x
    normed = rms_norm(x, layer.ffn_norm, eps)
    gate, up = F.linear(normed, layer.gate), F.linear(normed, layer.up)
    x = x + F.linear(F.silu(gate) * up, layer.down)
    return x, Activations(attention_input, q, k, v, ffn_input, gate, up)


def head(x: Tensor, norm: Tensor, embedding: Tensor, eps: float) -> Tensor:
    """Logits (B,T,V), float32, of the last residual x (B,T,D)."""
    return F.linear(rms_norm(x, norm, eps), embedding).float()


def logits(model, ids: Tensor, see=None) -> Tensor:
    """Logits (B,T,V) of ids (B,T). `see(layer index, Activations)` is called per layer; the last residual is passed
    with index None."""
    config = model.config
    cos, sin = rope_tables(ids.shape[1], config.head_dim, config.rope_parameters["rope_theta"], ids.device)
    x = F.embedding(ids, model.model.embed_tokens.weight)
    for index, layer in enumerate(layers(model)):
        x, activations = block(x, layer, cos, sin, config.rms_norm_eps)
        if see:
            see(index, activations)
    if see:
        see(None, x)
    return head(x, model.model.norm.weight, model.lm_head.weight, config.rms_norm_eps)
