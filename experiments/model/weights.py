"""A model before training and after it: random weights, and the folder that is shipped."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from experiments.model import forward
from experiments.model.schedule import Settings


def new_model(s: Settings, tokenizer) -> LlamaForCausalLM:
    """A model with random weights.

    The embedding is large and the last norm small, so that the residual stream starts with a mean square of
    `embedding_std`² although embedding and output share one matrix.
    """
    torch.manual_seed(s.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=s.hidden,
            num_hidden_layers=s.layers,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            head_dim=s.hidden // s.heads,
            intermediate_size=s.ffn,
            max_position_embeddings=s.positions,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": s.rope_theta},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        for layer in forward.layers(model):
            for name, weight in layer._asdict().items():
                if weight.ndim == 2:
                    out = 1 / math.sqrt(2 * s.layers) if name in ("o", "down") else 1.0
                    weight.normal_(std=out / math.sqrt(weight.shape[1]))
        model.model.embed_tokens.weight.normal_(std=s.embedding_std)
        model.model.norm.weight.fill_(1 / (s.embedding_std * math.sqrt(s.hidden)))
    return model


def save_model(model: LlamaForCausalLM, tokenizer, folder: Path) -> None:
    """Writes config, float16 weights and tokenizer, readable by any release of transformers from 4.40 on."""
    folder.mkdir(parents=True, exist_ok=True)
    # Parameters, not the state dict: the output matrix is the embedding and is stored once.
    half = {name: value.detach().half() for name, value in model.named_parameters()}
    model.save_pretrained(folder, state_dict=half)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    # Older releases read these two names, newer ones `dtype` and `rope_parameters`.
    config |= {"dtype": "float16", "torch_dtype": "float16", "rope_theta": config["rope_parameters"]["rope_theta"]}
    path.write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    # The class name that older releases know too, and nothing about where the tokenizer was loaded from.
    names = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = {name: value for name, value in names.items() if name not in ("backend", "is_local", "local_files_only")}
    path.write_text(json.dumps(names, indent=2) + "\n")
