"""Public models' configurations: read as transformers reads them, or refused with what to do."""

import json

import public_configs
import pytest
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig


@pytest.mark.parametrize("name", public_configs.ACCEPTED)
def test_accepted(name):
    d, facts = public_configs.ACCEPTED[name]
    config = LlamaConfig.from_dict(d)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, field) == d[field]
    assert config.num_key_value_heads == d.get("num_key_value_heads", d["num_attention_heads"])
    assert (config.context, config.head_dim) == (facts["context"], facts["head_dim"])
    assert (config.rope.type, config.rope.theta) == facts["rope"]
    assert config.tie_word_embeddings == facts["tied"]
    expected = ()
    if facts["window"]:
        length, first = facts["window"]
        expected = tuple(length if layer >= first else None for layer in range(config.num_hidden_layers))
    assert config.windows == expected
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", [name for name in public_configs.ACCEPTED if name != "LLaMA 7B"])
def test_transformers_reads_the_same(name):
    """But for the first conversions of LLaMA, whose architecture it no longer knows."""
    d, _ = public_configs.ACCEPTED[name]
    reference, config = AutoConfig.for_model(**d), LlamaConfig.from_dict(d)
    for field in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, field) == getattr(reference, field)
    assert config.head_dim == getattr(reference, "head_dim", reference.hidden_size // reference.num_attention_heads)
    assert (config.rope.type, config.rope.theta) == tuple(
        reference.rope_parameters[key] for key in ("rope_type", "rope_theta")
    )
    types = getattr(reference, "layer_types", None)
    window = getattr(reference, "sliding_window", None)
    kinds = types or ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    seen = [window if kind == "sliding_attention" else None for kind in kinds]
    assert list(config.windows or [None] * len(seen)) == seen


@pytest.mark.parametrize("name", public_configs.REFUSED)
def test_refused(name):
    d, message = public_configs.REFUSED[name]
    with pytest.raises(UsageError, match=message) as caught:
        LlamaConfig.from_dict(d)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", sorted({*vars(GenerationConfig()), *vars(PreTrainedConfig())}))
def test_what_every_model_of_transformers_may_say_is_no_obstacle(field):
    """Fields of generation, of bookkeeping and of training, whatever their value; these say what the model is."""
    read = {"architectures", "bos_token_id", "eos_token_id", "is_encoder_decoder"}
    if field not in read:
        llama = public_configs.LLAMA_2_7B
        assert LlamaConfig.from_dict(llama | {field: 7}) == LlamaConfig.from_dict(llama)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("base_model_name_or_path", "owner/base"), ("unsloth_version", "2024.9"), ("license", "mit")),
        *(
            ("tokenizer_padding_side", "left"),
            ("image_token_id", 5),
            ("kv_cache_dtype", "fp8"),
            ("use_flash_attn", True),
        ),
        *(("embd_pdrop", 0.1), ("router_aux_loss_coef", 0.001), ("pretraining_tp", 2), ("trained_on", "books")),
        *(("logit_scale", 1.0), ("embedding_multiplier", 1), ("residual_multiplier", 1.0), ("auto_map", {})),
        *(("auto_map", {"AutoTokenizer": ["t.T", None]}), ("max_seq_len", 4096), ("datasets", ["c4"])),
    ],
)
def test_what_cannot_change_the_model(field, value):
    llama = public_configs.LLAMA_2_7B
    assert LlamaConfig.from_dict(llama | {field: value}) == LlamaConfig.from_dict(llama)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("logit_scale", 0.0625), ("logit_scale", 0), ("attn_logit_softcapping", 50.0), ("clip_qkv", 8.0)),
        *(("use_qk_norm", True), ("qk_layernorm", True), ("qkv_bias", True), ("num_local_experts", 8)),
        *(("alibi", True), ("no_rope_layers", [0, 1]), ("attention_chunk_size", 8192), ("query_pre_attn_scalar", 256)),
        *(("kvSharedLayers", 4), ("moe_intermediate_size", 64), ("scale_emb", 12), ("scale_depth", 1.4)),
        *(("rope_local_base_freq", 1e4), ("parallel_attn", True), ("num_nextn_predict_layers", 1), ("mup_base", 256)),
        *(("rope_interleaved", True), ("layer_norm_eps", 1e-5), ("position_embedding_type", "alibi"), ("lora_rank", 8)),
    ],
)
def test_what_may_change_the_model(field, value):
    with pytest.raises(UsageError, match=f"^{field} is .*; this field is not supported, and by its name it may change"):
        LlamaConfig.from_dict(public_configs.LLAMA_2_7B | {field: value})
