"""Real configurations load, unsupported ones are refused with the field, its value and what is supported."""

import json

import pytest
from hf_models import EVERY_CASE, tiny

from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig, RopeConfig
from crypten_llm.models.family import FAMILIES

LLAMA_2_7B = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_2_1B = LLAMA_2_7B | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_scaling": LLAMA3_ROPE,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
SMOLLM2 = LLAMA_2_7B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "vocab_size": 49152,
}
# The first conversions, with fields of that time and no position count.
LLAMA_1 = {
    "architectures": ["LLaMAForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "initializer_range": 0.02,
    "max_sequence_length": 2048,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "float16",
    "transformers_version": "4.27.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
SMALL = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_llama_2():
    config = LlamaConfig.from_dict(LLAMA_2_7B)
    assert (config.num_key_value_heads, config.head_dim) == (32, 128)
    assert (config.rope, config.eos_token_ids) == (RopeConfig(), (2,))


def test_llama_3_2():
    config = LlamaConfig.from_dict(LLAMA_3_2_1B)
    assert (config.head_dim, config.tie_word_embeddings) == (64, True)
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.rope == RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)


def test_smollm():
    config = LlamaConfig.from_dict(SMOLLM2)
    assert (config.head_dim, config.num_key_value_heads, config.rope.theta) == (64, 3, 100000)


def test_llama_1():
    config = LlamaConfig.from_dict(LLAMA_1)
    assert (config.max_position_embeddings, config.num_key_value_heads) == (2048, 32)
    assert (config.bos_token_id, config.eos_token_ids) == (0, (1,))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_transformers(model_type):
    from transformers import AutoConfig

    given = SMALL | {"model_type": model_type, "hidden_size": 64, "num_attention_heads": 32}
    reference = AutoConfig.for_model(**given)
    # Without a window, which by default some families have.
    config = LlamaConfig.from_dict(given | {"sliding_window": None})
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "bos_token_id"):
        assert getattr(config, name) == getattr(reference, name)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert getattr(config, name) == getattr(reference, name, False)
    assert config.eos_token_ids == (() if reference.eos_token_id is None else (reference.eos_token_id,))
    assert config.rope == RopeConfig(theta=reference.rope_parameters["rope_theta"])


@pytest.mark.parametrize("d", [LLAMA_2_7B, LLAMA_3_2_1B, SMOLLM2, LLAMA_1, SMALL])
def test_round_trip(d):
    config = LlamaConfig.from_dict(d)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("case", EVERY_CASE)
def test_what_transformers_saves(case, tmp_path):
    folder, model = tiny(tmp_path, **EVERY_CASE[case])
    config = LlamaConfig.from_folder(folder)
    rope = model.config.rope_parameters
    assert (config.rope.type, config.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    assert config.rope.factor == rope.get("factor")
    for name in (
        "head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    ):
        assert getattr(config, name) == getattr(model.config, name, False)
    assert config.model_type == model.config.model_type
    assert LlamaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},
        {
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3_ROPE,
            "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0},
        },
        # The trained context beside the rope fields, or left to max_position_embeddings.
        {
            "rope_theta": 500000.0,
            "original_max_position_embeddings": 8192,
            "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": None},
        },
        {
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
            "rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": None},
        },
    ],
)
def test_llama3_rope_in_either_spelling(rope):
    assert LlamaConfig.from_dict(SMALL | rope).rope == RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_scaled_rope_of_transformers_4(key, kind):
    rope = LlamaConfig.from_dict(SMALL | {"rope_scaling": {key: kind, "factor": 4}}).rope
    assert rope == RopeConfig(type=kind, factor=4)


def test_unused_rope_values_are_dropped():
    assert (
        LlamaConfig.from_dict(SMALL | {"rope_parameters": {"rope_type": "default", "factor": 8.0}}).rope == RopeConfig()
    )


def test_eos_null_is_no_eos():
    config = LlamaConfig.from_dict(SMALL | {"eos_token_id": None, "bos_token_id": None})
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


@pytest.mark.parametrize(
    "harmless",
    [
        {"unknown_switch": False},
        {"sliding_window": None},
        {"use_sliding_window": False},
        {"layer_types": ["full_attention", "full_attention"]},
        {"partial_rotary_factor": 1.0},
        {"hidden_act": "swish"},
        {"_attn_implementation_autoset": True},
        {"unsloth_version": "2024.9"},
        {"temperature": 0.6, "do_sample": True},
        {"id2label": {"0": "LABEL_0"}, "pruned_heads": {}},
        {"unk_token_id": 0, "tensor_parallel": True, "cache_implementation": "static"},
        {"base_model_name_or_path": "owner/base", "ignore_keys_at_rope_validation": ["rope_theta"]},
        {"activation": "swiglu"},
        {"activation": "silu", "hidden_act": "silu"},
        {"quantization_config": None, "head_dim": None, "num_key_value_heads": None, "rope_theta": None},
    ],
)
def test_harmless_fields(harmless):
    assert LlamaConfig.from_dict(SMALL | harmless) == LlamaConfig.from_dict(SMALL)


@pytest.mark.parametrize(
    "rope, context",
    [
        ({}, 64),
        ({"type": "linear", "factor": 4.0}, 256),
        ({"type": "linear", "factor": 2.5}, 160),
        ({"type": "dynamic", "factor": 4.0}, 256),
        # Here max_position_embeddings says itself how far it has been stretched.
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"type": "linear", "factor": 8.0, "original_max_position_embeddings": 16}, 128),
        # transformers stretches these beyond max_position_embeddings alone.
        ({"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}, 256),
        (LLAMA3_ROPE | {"original_max_position_embeddings": 16}, 64),
    ],
)
def test_context(rope, context):
    config = LlamaConfig.from_dict(SMALL | {"max_position_embeddings": 64, "rope_scaling": rope})
    assert (config.context, config.max_position_embeddings) == (context, 64)
    assert LlamaConfig.from_dict(config.to_dict()).context == context


REFUSED = [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported are llama, mistral, qwen3"),
    ({"model_type": None}, "model_type is None; supported are llama"),
    ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported are llama"),
    ({"use_sliding_window": True}, "use_sliding_window is True; this field is not supported"),
    ({"activation": "gelu"}, "activation is 'gelu'; only 'silu' is supported"),
    ({"activation": ["silu"]}, r"activation is \['silu'\]; only 'silu' is supported"),
    ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'; only 'silu' is supported"),
    ({"architectures": ["LlamaModel"]}, r"architectures is \['LlamaModel'\]; only \['LlamaForCausalLM'\]"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
    (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config is .*'gptq'.* not supported, use the float16",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 is supported"),
    ({"layer_types": ["sliding_attention"]}, "layer_types is .*'sliding_attention'.*only 'full_attention'"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
    ({"sliding_window": 4096}, "sliding_window is 4096; this field is not supported .* remove it from config.json"),
    ({"logit_scale": 0}, "logit_scale is 0; this field is not supported"),
    ({"auto_map": {"AutoModel": "m.M"}}, "auto_map is .*'m.M'.* not supported"),
    ({"rope_interleaved": True}, "rope_interleaved is True; .*supported: absent, null or false"),
    ({"vocab_size": None, "hidden_size": None}, "vocab_size, hidden_size missing"),
    ({"vocab_size": "97"}, "vocab_size is '97'; it must be a positive integer"),
    ({"vocab_size": True}, "vocab_size is True; it must be a positive integer"),
    ({"intermediate_size": 0}, "intermediate_size is 0; it must be a positive integer"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a positive integer"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1; it must be a positive integer"),
    ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648; it must be a positive integer"),
    ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be a positive integer"),
    ({"hidden_size": 30}, "hidden_size is 30; it must be a multiple of num_attention_heads 4"),
    ({"num_key_value_heads": 3}, "num_attention_heads is 4; it must be a multiple of num_key_value_heads 3"),
    ({"head_dim": 7}, "head_dim is 7; it must be even"),
    ({"max_position_embeddings": [2048]}, r"max_position_embeddings is \[2048\]; it must be a positive integer"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a positive number"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a positive number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a positive number"),
    ({"mlp_bias": 1}, "mlp_bias is 1; it must be true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id"),
    ({"eos_token_id": [2, None]}, "eos_token_id is None; it must be a token id"),
    ({"bos_token_id": 1.5}, "bos_token_id is 1.5; it must be a token id"),
    ({"rope_theta": -1}, "rope_theta is -1; it must be a positive number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf; it must be a positive number"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be a JSON object"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        "rope type is 'yarn'; supported are default, linear, dynamic, llama3",
    ),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope type is 'longrope'; supported are default"),
    ({"rope_scaling": {"factor": 4.0}}, "rope_scaling is {'factor': 4.0}; it has a factor but no rope_type"),
    ({"rope_scaling": {"type": "linear"}}, "factor of rope type linear is None; it must be a number of at least 1"),
    ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor of rope type dynamic is 0.5; .* at least 1"),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2},
        "head_dim is 2; rope type dynamic needs at least 4",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1.0}},
        "rope_scaling.mscale is 1.0; this field is not",
    ),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters.partial_rotary_factor is 0.25; only 1"),
    ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is {}; this field is not supported"),
    (
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
        "rope_theta is 5.0 but rope_parameters.rope_theta is 6.0",
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 1e4}},
        "rope_scaling is .*'linear'.* but rope_parameters say otherwise; keep one",
    ),
    (
        {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 4096},
        "original_max_position_embeddings is 4096 but rope_scaling.original_max_position_embeddings is 8192; keep one",
    ),
    ({"rope_scaling": LLAMA3_ROPE | {"low_freq_factor": None}}, "low_freq_factor of rope type llama3 is None; it must"),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": "4"}}, "high_freq_factor of rope type llama3 is '4'; it must"),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1}}, "high_freq_factor is 1; it must be larger than .* 1.0"),
    (
        {"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": 0}},
        "original_max_position_embeddings of rope type llama3 is 0; it must be a positive integer",
    ),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=[str(change)[:60] for change, _ in REFUSED])
def test_refused(change, message):
    with pytest.raises(UsageError, match=message) as caught:
        LlamaConfig.from_dict(SMALL | change)
    assert "\n" not in str(caught.value)


def test_not_an_object():
    with pytest.raises(UsageError, match="a model config must be a JSON object, not list"):
        LlamaConfig.from_dict([])


def test_a_config_made_in_code_is_checked_too():
    with pytest.raises(UsageError, match="num_key_value_heads 3"):
        LlamaConfig(97, 32, 48, 2, 4, 3, 8)
    with pytest.raises(UsageError, match="model_type is 'gpt2'; supported are"):
        LlamaConfig(97, 32, 48, 2, 4, 2, 8, model_type="gpt2")
    with pytest.raises(UsageError, match="mlp_bias is True; models of type 'qwen3' have no such bias"):
        LlamaConfig(97, 32, 48, 2, 4, 2, 8, model_type="qwen3", mlp_bias=True)


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


def test_generation_config_decides_eos(tmp_path):
    folder = write(tmp_path, config=SMALL | {"eos_token_id": 2}, generation_config={"eos_token_id": [2, 7]})
    assert LlamaConfig.from_folder(folder).eos_token_ids == (2, 7)
    assert LlamaConfig.from_folder(write(tmp_path, generation_config={})).eos_token_ids == (2,)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no config.json; give a Hugging Face model folder"),
        ({"config": "{"}, "config.json: not valid JSON"),
        ({"config": "[]"}, "config.json: must hold a JSON object, not list"),
        ({"config": SMALL, "generation_config": "?"}, "generation_config.json: not valid JSON"),
        ({"config": SMALL | {"hidden_act": "relu"}}, "config.json: hidden_act is 'relu'"),
    ],
)
def test_bad_folders(tmp_path, files, message):
    with pytest.raises(UsageError, match=message):
        LlamaConfig.from_folder(write(tmp_path, **files))


def test_missing_folder_and_unreadable_file(tmp_path):
    with pytest.raises(UsageError, match="none: no such folder; give a model folder"):
        LlamaConfig.from_folder(tmp_path / "none")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UsageError, match="config.json: cannot be read"):
        LlamaConfig.from_folder(tmp_path)
    (tmp_path / "config.json").rmdir()
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="config.json: not valid JSON"):
        LlamaConfig.from_folder(tmp_path)
