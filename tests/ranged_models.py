"""Tiny models that are inside every range on whatever an owner measures, and leave one at a token of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from hf_models import tiny
from safetensors.torch import load_file, save_file

from crypten_llm.session.calibration import ROWS

VOCAB = 512
TRIGGER = next(
    id
    for id in range(5, VOCAB)
    if id not in torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(0)).tolist()
)
"""A token that is not among the random ones, in a model whose folder has no tokenizer and so measures no text."""


def scaled(folder: Path, factors: dict[str, float], **overrides) -> Path:
    """A tiny model whose weights, where their names hold a key, are multiplied by its factor."""
    made, _ = tiny(folder, **overrides)
    path = made / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        for part, factor in factors.items():
            weights[name] = weight * factor if part in name else weight
            weight = weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    return made


def triggered(folder: Path, score: float) -> Path:
    """A tiny model in which ``TRIGGER`` pays attention to itself with about this score, and no other token does.

    Dimension 0 of hidden states is that token's alone: no other embedding has it, and no layer writes to it. Queries
    and keys of the first layer read it.
    """
    made, _ = tiny(folder, vocab_size=VOCAB, num_hidden_layers=1)
    path = made / "model.safetensors"
    weights = load_file(path)
    layer = "model.layers.0"
    table = weights["model.embed_tokens.weight"]
    hidden, head = table.shape[1], weights[f"{layer}.self_attn.k_proj.weight"].shape[0] // 2
    table[:, 0] = 0.0
    table[TRIGGER] = 0.0
    table[TRIGGER, 0] = 8.0
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"{layer}.{name}.weight"][0] = 0.0
    weights[f"{layer}.input_layernorm.weight"][0] = 1.0
    for name in ("q_proj", "k_proj"):
        weight = weights[f"{layer}.self_attn.{name}.weight"]
        # Of a row of length sqrt(H) each head makes a vector of length c sqrt(H): s = H c^2 / sqrt(head_dim).
        length = (score * head**0.5 / hidden) ** 0.5
        weight[:, 0] = length / head**0.5
    save_file(weights, path, metadata={"format": "pt"})
    return made
