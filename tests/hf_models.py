"""Tiny random Hugging Face models, one per option, as the reference for every engine.

Owns the tables of options (`CASES` of Llama, `FAMILIES` of others) and the reference logits. Every parameter is
random, biases and norm weights included: a bug in one that is zero or one could not be seen.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from crypten_llm.models.checkpoint import SHIPPED

BASE = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
)

# Contexts are short, so that a prompt of a few dozen tokens runs beyond them.
CASES: dict[str, dict] = {
    "gqa": {},
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1),
    "wide_heads": dict(head_dim=12),
    "narrow_heads": dict(head_dim=4),
    "tied": dict(tie_word_embeddings=True),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "eps_and_theta": dict(rms_norm_eps=1e-2, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
    "rope_linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0)),
    "rope_dynamic": dict(
        max_position_embeddings=16, rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=2.0)
    ),
    # With these, head_dim 8 has one wavelength kept, one blended and two divided.
    "rope_llama3": dict(
        max_position_embeddings=512,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=10000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "fp16": dict(dtype=torch.float16),
    "bf16": dict(dtype=torch.bfloat16),
    "sharded": dict(max_shard_size="20KB"),
}
FAMILIES: dict[str, dict] = {
    "qwen3": dict(model_type="qwen3", head_dim=12),
    "qwen3_options": dict(
        model_type="qwen3", head_dim=8, num_key_value_heads=4, attention_bias=True, tie_word_embeddings=True
    ),
    "qwen3_rope": dict(
        model_type="qwen3",
        head_dim=8,
        rms_norm_eps=1e-2,
        max_position_embeddings=16,
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e6, factor=2.0),
    ),
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=12),
    # A window as long as the context; prompts of tests fill both.
    "mistral_whole": dict(model_type="mistral", sliding_window=30, max_position_embeddings=30),
    "mistral_window": dict(model_type="mistral", sliding_window=5),
    "mistral_window_of_two": dict(model_type="mistral", sliding_window=2, num_key_value_heads=1),
    "qwen2": dict(model_type="qwen2"),
    "qwen2_options": dict(model_type="qwen2", head_dim=12, num_key_value_heads=4, tie_word_embeddings=True),
    "qwen2_rope": dict(
        model_type="qwen2", rope_parameters=dict(rope_type="linear", rope_theta=1e6, factor=2.0), rms_norm_eps=1e-2
    ),
    # The lower layer sees everything.
    "qwen2_window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3_window": dict(
        model_type="qwen3", head_dim=8, use_sliding_window=True, sliding_window=7, max_window_layers=0
    ),
    # The upper one does.
    "qwen3_window_by_type": dict(
        model_type="qwen3",
        head_dim=8,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
EVERY_CASE = CASES | FAMILIES


def options(*cases: str):
    """A test's parameter: several of ``EVERY_CASE`` in one model, for runs too dear to be made for each."""
    return pytest.param({key: value for case in cases for key, value in EVERY_CASE[case].items()}, id=" ".join(cases))


def tiny(
    folder: str | Path,
    *,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    seed: int = 0,
    **overrides,
) -> tuple[Path, PreTrainedModel]:
    """Save a seeded random model to `folder`/model and load it back; returns (that folder, the model in eval mode).

    `dtype` is that of the file; the returned model computes in float32 on the rounded weights. `overrides` are
    fields of transformers' config for `model_type`.
    """
    folder = Path(folder) / "model"
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **BASE | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                # Large enough that attention is far from uniform.
                noise *= 0.5 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5
            else:
                noise = 1 + 0.3 * noise if "norm" in name else 0.3 * noise
            parameter.copy_(noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return folder, model.eval()


def with_tokenizer(folder: Path) -> Path:
    """The folder of a tiny model with the shipped model's tokenizer."""
    folder, _ = tiny(folder, vocab_size=2048, num_hidden_layers=1, seed=3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder)
    return folder


GOES_ON = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
GOES_ON += "{% if add_generation_prompt %}[assistant]{% endif %}"
"""A chat template that writes an answer as it was given."""


def with_template(folder: Path, template: str = GOES_ON, layers: int = 1, context: int = 400) -> Path:
    """The folder of a tiny model whose tokenizer, the shipped one's, has a chat template; context: in tokens."""
    folder, _ = tiny(folder, vocab_size=2048, num_hidden_layers=layers, seed=3, max_position_embeddings=context)
    shutil.copy(SHIPPED / "tokenizer.json", folder)
    config = json.loads((SHIPPED / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


@torch.no_grad()
def reference_logits(model: PreTrainedModel, ids, prefill: int | None = None) -> torch.Tensor:
    """Logits after each token. Shapes: ids [T] (list or tensor) to [T, vocab_size], float32.

    The first `prefill` tokens (all by default) go through in one call, the rest one by one through the cache.
    """
    ids = torch.as_tensor(ids).reshape(1, -1)
    # Dynamic RoPE remembers the longest sequence it has seen; each reference starts afresh.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    prefill = ids.shape[1] if prefill is None else prefill
    output = model(ids[:, :prefill], use_cache=True)
    logits = [output.logits[0]]
    for t in range(prefill, ids.shape[1]):
        output = model(ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    return torch.cat(logits)
