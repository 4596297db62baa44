"""Families other than Llama: their real configurations load, and a field that would change the function is refused."""

import json

import pytest
from test_config import LLAMA_2_7B, SMALL

from crypten_llm.errors import UsageError
from crypten_llm.models.config import LlamaConfig

QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B_V03 = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}
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


@pytest.mark.parametrize("d", [QWEN_3_0_6B, MISTRAL_7B_V03])
def test_round_trip(d):
    config = LlamaConfig.from_dict(d)
    assert LlamaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "window",
    [
        {"sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": None},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},  # of 2 layers
        {"use_sliding_window": True, "sliding_window": 32768, "max_window_layers": 0},  # the whole context
    ],
)
def test_windows_of_qwen3_that_hide_nothing(window):
    given = SMALL | QWEN3
    config = LlamaConfig.from_dict(given | window)
    assert config == LlamaConfig.from_dict(given)
    assert LlamaConfig.from_dict(config.to_dict()) == config


def test_windows_of_mistral_that_hide_nothing():
    given = SMALL | MISTRAL | {"max_position_embeddings": 4096}
    config = LlamaConfig.from_dict(given)
    assert config == LlamaConfig.from_dict(given | {"sliding_window": None})
    assert LlamaConfig.from_dict(config.to_dict()) == config


REFUSED = [
    (QWEN3 | {"architectures": ["LlamaForCausalLM"]}, r"architectures is .*Llama.*; only \['Qwen3ForCausalLM'\] is"),
    (
        QWEN3 | {"use_sliding_window": True, "num_hidden_layers": 29},
        "sliding_window is 4096 in layer 28, for a context",
    ),
    (
        QWEN3 | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "sliding_window is 16 in layer 1, for a context of 32768; attention over a window is not supported.*its size",
    ),
    (QWEN3 | {"use_sliding_window": True, "max_window_layers": "1"}, "max_window_layers is '1'; it must be an integer"),
    (
        QWEN3 | {"use_sliding_window": True, "sliding_window": "16", "max_window_layers": 0},
        "sliding_window is '16'; it must be a positive integer",
    ),
    (QWEN3 | {"layer_types": ["sliding_attention"]}, "layer_types is .*'sliding_attention'.*only 'full_attention'"),
    (QWEN3 | {"mlp_bias": True}, "mlp_bias is True; this field is not supported"),
    (QWEN3 | {"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
    (MISTRAL | {"sliding_window": 16}, "sliding_window is 16 in layer 0, for a context of 64; attention over a window"),
    (MISTRAL | {"max_position_embeddings": None}, "sliding_window is 4096 in layer 0, for a context of 131072"),
    (MISTRAL | {"attention_bias": True}, "attention_bias is True; this field is not supported"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=[str(change)[:90] for change, _ in REFUSED])
def test_refused(change, message):
    with pytest.raises(UsageError, match=message) as caught:
        LlamaConfig.from_dict(SMALL | change)
    assert "\n" not in str(caught.value)
