"""Families other than Llama: their real configurations load, and a field that would change the function is refused."""

import json

import pytest
from public_configs import LLAMA_2_7B, MISTRAL_7B_V03, QWEN_3_0_6B
from test_config import SMALL

from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig

QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 2}
MISTRAL = {"model_type": "mistral", "num_key_value_heads": 2, "max_position_embeddings": 64}


def test_qwen_3():
    config = LlamaConfig.from_dict(QWEN_3_0_6B)
    assert (config.head_dim, config.num_key_value_heads, config.eos_token_ids) == (128, 8, (151645,))
    shapes = config.family.shapes(config)
    assert (
        shapes["model.layers.27.self_attn.q_norm.weight"] == shapes["model.layers.0.self_attn.k_norm.weight"] == (128,)
    )
    assert "lm_head.weight" not in shapes and not any(name.endswith("bias") for name in shapes)


def test_mistral():
    config = LlamaConfig.from_dict(MISTRAL_7B_V03)
    assert (config.head_dim, config.context) == (128, 32768)
    llama = LlamaConfig.from_dict(
        LLAMA_2_7B | {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32768}
    )
    assert config.family.shapes(config) == llama.family.shapes(llama)


def test_qwen_2():
    """Biases of queries, keys and values alone, and no field that says so."""
    config = LlamaConfig.from_dict(SMALL | QWEN2)
    biases = {name.rpartition("layers.")[2] for name in config.family.shapes(config) if name.endswith("bias")}
    assert biases == {f"{layer}.self_attn.{name}_proj.bias" for layer in (0, 1) for name in "qkv"}


@pytest.mark.parametrize(
    "window",
    [
        {"sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},  # of 2 layers
        {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 0},  # the whole context
        {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": ["full_attention"] * 2},
    ],
)
@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_windows_of_qwen_that_hide_nothing(family, window):
    given = SMALL | family
    config = LlamaConfig.from_dict(given | window)
    assert config == LlamaConfig.from_dict(given)
    assert LlamaConfig.from_dict(config.to_dict()) == config


def test_windows_of_mistral_that_hide_nothing():
    given = SMALL | MISTRAL | {"max_position_embeddings": 4096}
    config = LlamaConfig.from_dict(given)
    assert config == LlamaConfig.from_dict(given | {"sliding_window": None})
    assert LlamaConfig.from_dict(config.to_dict()) == config


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        (MISTRAL | {"sliding_window": 16}, (16, 16)),
        (MISTRAL | {"sliding_window": 16, "layer_types": [SLIDING] * 2}, (16, 16)),
        (MISTRAL | {"max_position_embeddings": None}, (4096, 4096)),  # of 131,072, transformers' defaults
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, (None, 16)),
        (QWEN3 | {"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        (QWEN3 | {"use_sliding_window": True, "sliding_window": 16, "layer_types": [SLIDING, FULL]}, (16, None)),
    ],
)
def test_windows(fields, windows):
    config = LlamaConfig.from_dict(SMALL | fields)
    assert config.windows == windows
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


REFUSED = [
    (QWEN3 | {"architectures": ["LlamaForCausalLM"]}, r"architectures is .*Llama.*; only \['Qwen3ForCausalLM'\] is"),
    (QWEN3 | {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers is '1'; it must be an integer"),
    (
        QWEN3 | {"use_sliding_window": True, "sliding_window": "16", "max_window_layers": 0},
        "sliding_window is '16'; it must be a positive integer",
    ),
    (QWEN3 | {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 0}, "it must be at least 2"),
    (QWEN3 | {"layer_types": [SLIDING, FULL]}, "layer_types is .*it must be full_attention for each of the 2 layers"),
    (
        QWEN3 | {"use_sliding_window": True, "layer_types": ["chunked_attention", FULL]},
        "layer_types is .*it must be full_attention or sliding_attention for each of the 2 layers",
    ),
    (QWEN2 | {"attention_bias": True}, "attention_bias is True; this field is not supported"),
    (QWEN3 | {"mlp_bias": True}, "mlp_bias is True; this field is not supported"),
    (QWEN3 | {"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
    (MISTRAL | {"sliding_window": 16, "layer_types": [FULL, SLIDING]}, "layer_types .*must be sliding_attention for"),
    (MISTRAL | {"sliding_window": 0}, "sliding_window is 0; it must be a positive integer"),
    (MISTRAL | {"attention_bias": True}, "attention_bias is True; this field is not supported"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=[str(change)[:90] for change, _ in REFUSED])
def test_refused(change, message):
    with pytest.raises(UsageError, match=message) as caught:
        LlamaConfig.from_dict(SMALL | change)
    assert "\n" not in str(caught.value)
