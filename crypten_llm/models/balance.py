"""Weights whose results are all of one size: what a row of one matrix loses, the columns of the next one gain.

Owns ``balance``, which the owner does to its own weights before it shares them; nobody else learns a factor of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig

REACH = 0.75  # no value, and nothing that a gate is multiplied with, is larger than this in magnitude, for any prompt


def balance(weights: dict[str, torch.Tensor], config: LlamaConfig) -> None:
    """Replaces W_v with W_o, and W_up with W_down, of every layer, so that the model computes what it did.

    weights: float, by name, as ``llama.prepare`` makes them. Before its weight, a norm's output of H elements is no
    longer than sqrt(H): a row of W_v or W_up that is as long as l, with the norm's weight, makes numbers up to
    l sqrt(H). Each row, and its bias, is divided by that over ``REACH``. Values are mixed, and up is multiplied by
    silu(gate), channel by channel, so W_o and W_down are multiplied by the same, column by column. Rows of zeros stay.

    Error: float32 rounding. Source: scales moved from activations to weights as in SmoothQuant (arXiv 2211.10438),
    here by what is proved instead of what is measured.
    """
    group, dim = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        factors = _made_even(weights, config, f"{layer}self_attn.v_proj")
        columns = factors.view(config.num_key_value_heads, 1, dim).expand(-1, group, -1).reshape(-1)
        _multiply(weights, f"{layer}self_attn.o_proj", columns)
        _multiply(weights, f"{layer}mlp.down_proj", _made_even(weights, config, f"{layer}mlp.up_proj"))


def _made_even(weights: dict[str, torch.Tensor], config: LlamaConfig, name: str) -> torch.Tensor:
    """By what each row of this product was divided, float64 [out]."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    norm = weights[f"{config.family.norm_before(name)}.weight"]
    reach = (weight.float() * norm.float()).norm(dim=1).double() * weight.shape[1] ** 0.5
    if bias is not None:
        reach = reach + bias.abs().double()
    factors = torch.where(reach == 0, 1.0, reach / REACH)
    weights[f"{name}.weight"] = (weight.float() / factors[:, None]).float()
    if bias is not None:
        weights[f"{name}.bias"] = (bias / factors).float()
    return factors


def _multiply(weights: dict[str, torch.Tensor], name: str, columns: torch.Tensor) -> None:
    weights[f"{name}.weight"] = (weights[f"{name}.weight"].float() * columns).float()
