"""Real configurations load, unsupported ones are refused with the field, its value and what is supported."""

import json

import pytest
from hf_models import EVERY_CASE, tiny
from public_configs import llama3_rope

from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig, RopeConfig
from crypten_llm.models.family import FAMILIES

LLAMA3_ROPE = llama3_rope(32.0)
SMALL = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_transformers(model_type):
    from transformers import AutoConfig

    given = SMALL | {"model_type": model_type, "hidden_size": 64, "num_attention_heads": 32}
    reference = AutoConfig.for_model(**given)
    # Without a window, which by default some families have.
    config = LlamaConfig.from_dict(given | {"sliding_window": None})
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id"):
        assert getattr(config, name) == getattr(reference, name)
    assert config.head_dim == getattr(reference, "head_dim", 2)
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert getattr(config, name) == getattr(reference, name, False)
    assert config.eos_token_ids == (() if reference.eos_token_id is None else (reference.eos_token_id,))
    assert config.rope == RopeConfig(theta=reference.rope_parameters["rope_theta"])


@pytest.mark.parametrize("case", EVERY_CASE)
def test_what_transformers_saves(case, tmp_path):
    folder, model = tiny(tmp_path, **EVERY_CASE[case])
    config = LlamaConfig.from_folder(folder)
    rope = model.config.rope_parameters
    assert (config.rope.type, config.rope.theta) == (rope["rope_type"], rope["rope_theta"])
    assert config.rope.factor == rope.get("factor")
    assert config.head_dim == getattr(model.config, "head_dim", 8)
    for name in (
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
        {"id2label": {"0": "LABEL_0"}, "pruned_heads": {}},
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
    ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported are llama, mistral, qwen2, qwen3"),
    ({"model_type": None}, "model_type is None; supported are llama"),
    ({"model_type": ["llama"]}, r"model_type is \['llama'\]; supported are llama"),
    ({"use_sliding_window": True}, "use_sliding_window is True; this field is not supported"),
    ({"activation": "gelu"}, "activation is 'gelu'; only 'silu' is supported"),
    ({"activation": ["silu"]}, r"activation is \['silu'\]; only 'silu' is supported"),
    ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'; only 'silu' is supported"),
    ({"architectures": ["LlamaModel"]}, r"architectures is \['LlamaModel'\]; only \['LlamaForCausalLM'\]"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' is supported"),
    ({"quantization_config": {"load_in_8bit": True}}, "quantization_config is {'load_in_8bit': True}; quantised"),
    ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; quantised weights are read from GGUF files alone"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 is supported"),
    (
        {"layer_types": ["sliding_attention"] * 2},
        "layer_types is .* it must be full_attention for each of the 2 layers",
    ),
    ({"layer_types": ["full_attention"]}, "layer_types is .*for each of the 2 layers"),
    ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
    ({"sliding_window": 4096}, "sliding_window is 4096; this field is not supported.* remove it from config.json"),
    ({"auto_map": {"AutoModel": "m.M"}}, "auto_map is .*'m.M'.* its own model code, which is not run"),
    ({"auto_map": "m.M"}, "auto_map is 'm.M'"),
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


@pytest.mark.parametrize(("model_type", "windows"), [("llama", (8, 8)), ("mistral", (8,)), ("qwen2", (8, None, 8))])
def test_windows_that_no_such_model_has(model_type, windows):
    with pytest.raises(
        UsageError, match="^windows are .*(models of type 'llama' have none|one for each of the layers)"
    ):
        LlamaConfig(97, 32, 48, 2, 4, 2, 8, model_type=model_type, windows=windows)


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
        ({"config": "[]"}, "config.json: not of its kind: Expected `object`, got `array`"),
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
