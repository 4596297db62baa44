"""The config.json of public models, with the fields that they were published with, and what is made of each.

Owns the tables ``ACCEPTED`` (a config, and the facts that must come out of it) and ``REFUSED`` (a config, and the words
of the error). Fields without a say in the matter, such as ``initializer_range``, are in ``_COMMON``.
"""

_COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
}


def config(
    model_type: str, architecture: str, vocab: int, hidden: int, ffn: int, layers: int, heads: int, kv: int, **rest
) -> dict:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    grouped = {"num_attention_heads": heads, "num_key_value_heads": kv}
    return {"model_type": model_type, "architectures": [architecture], **_COMMON, **sizes, **grouped, **rest}


def llama(*sizes: int, **rest) -> dict:
    return config("llama", "LlamaForCausalLM", *sizes, **{"bos_token_id": 1, "eos_token_id": 2, **rest})


def mistral(*sizes: int, **rest) -> dict:
    return config("mistral", "MistralForCausalLM", *sizes, **{"bos_token_id": 1, "eos_token_id": 2, **rest})


def qwen2(*sizes: int, **rest) -> dict:
    rest = {"bos_token_id": 151643, "eos_token_id": 151645, "use_sliding_window": False, **rest}
    return config("qwen2", "Qwen2ForCausalLM", *sizes, **{"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, **rest})


def qwen3(*sizes: int, **rest) -> dict:
    rest = {"bos_token_id": 151643, "eos_token_id": 151645, "sliding_window": None, "use_sliding_window": False, **rest}
    rest = {"attention_bias": False, "rope_scaling": None, "rope_theta": 1000000, **rest}
    return config("qwen3", "Qwen3ForCausalLM", *sizes, **{"head_dim": 128, "rms_norm_eps": 1e-6, **rest})


def llama3_rope(factor: float) -> dict:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


LLAMA_2_7B = llama(
    *(32000, 4096, 11008, 32, 32, 32),
    _name_or_path="meta-llama/Llama-2-7b-hf",
    max_position_embeddings=4096,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    tie_word_embeddings=False,
)
LLAMA_3_8B = llama(
    *(128256, 4096, 14336, 32, 32, 8),
    attention_bias=False,
    bos_token_id=128000,
    eos_token_id=128001,
    max_position_embeddings=8192,
    pretraining_tp=1,
    rms_norm_eps=1e-05,
    rope_scaling=None,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)
LLAMA_3_1_8B = LLAMA_3_8B | {
    "eos_token_id": [128001, 128008, 128009],
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": llama3_rope(8.0),
}
FALCON3_7B = llama(
    *(131072, 3072, 23040, 28, 12, 4),
    activation="swiglu",
    attention_bias=False,
    bos_token_id=None,
    eos_token_id=11,
    head_dim=256,
    max_position_embeddings=32768,
    mlp_bias=False,
    pretraining_tp=1,
    rms_norm_eps=1e-06,
    rope_scaling=None,
    rope_theta=1000042,
    tie_word_embeddings=False,
)
MISTRAL_7B_V03 = mistral(
    *(32768, 4096, 14336, 32, 32, 8),
    max_position_embeddings=32768,
    rms_norm_eps=1e-05,
    rope_theta=1000000.0,
    sliding_window=None,
    tie_word_embeddings=False,
)
QWEN_3_0_6B = qwen3(
    *(151936, 1024, 3072, 28, 16, 8), max_position_embeddings=40960, max_window_layers=28, tie_word_embeddings=True
)


def facts(context: int, head_dim: int, rope: tuple[str, float], tied: bool = False, window: tuple = ()) -> dict:
    """window: (length, first layer that has it)."""
    return {"context": context, "head_dim": head_dim, "rope": rope, "tied": tied, "window": window}


ACCEPTED: dict[str, tuple[dict, dict]] = {
    "LLaMA 7B": (
        {
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
        },
        facts(2048, 128, ("default", 1e4)),
    ),
    "Llama 2 7B": (LLAMA_2_7B, facts(4096, 128, ("default", 1e4))),
    "Llama 2 70B": (
        llama(*(32000, 8192, 28672, 80, 64, 8), max_position_embeddings=4096, rms_norm_eps=1e-05),
        facts(4096, 128, ("default", 1e4)),
    ),
    "Llama 3 8B": (LLAMA_3_8B, facts(8192, 128, ("default", 5e5))),
    "Llama 3.1 8B": (LLAMA_3_1_8B, facts(131072, 128, ("llama3", 5e5))),
    "Llama 3.2 1B": (
        LLAMA_3_1_8B
        | llama(*(128256, 2048, 8192, 16, 32, 8), bos_token_id=128000, eos_token_id=128001)
        | {"head_dim": 64, "rope_scaling": llama3_rope(32.0), "tie_word_embeddings": True},
        facts(131072, 64, ("llama3", 5e5), tied=True),
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        LLAMA_3_1_8B | {"bos_token_id": 128000, "eos_token_id": 128001},
        facts(131072, 128, ("llama3", 5e5)),
    ),
    "TinyLlama 1.1B Chat": (
        llama(
            *(32000, 2048, 5632, 22, 32, 4),
            attention_bias=False,
            max_position_embeddings=2048,
            pretraining_tp=1,
            rms_norm_eps=1e-05,
            rope_scaling=None,
            rope_theta=10000.0,
        ),
        facts(2048, 64, ("default", 1e4)),
    ),
    "Vicuna 7B v1.5": (
        LLAMA_2_7B | {"_name_or_path": "vicuna-7b-v1.5", "pad_token_id": 0},
        facts(4096, 128, ("default", 1e4)),
    ),
    "Vicuna 7B v1.5 16k": (
        LLAMA_2_7B
        | {"max_sequence_length": 16384, "pad_token_id": 0, "rope_scaling": {"factor": 4.0, "type": "linear"}},
        facts(16384, 128, ("linear", 1e4)),
    ),
    "LongChat 7B v1.5 32k": (
        LLAMA_2_7B | {"max_sequence_length": 32768, "rope_scaling": {"factor": 8.0, "type": "linear"}},
        facts(32768, 128, ("linear", 1e4)),
    ),
    "CodeLlama 7B": (
        llama(*(32016, 4096, 11008, 32, 32, 32), max_position_embeddings=16384, rms_norm_eps=1e-05, rope_theta=1000000),
        facts(16384, 128, ("default", 1e6)),
    ),
    "Yi 6B": (
        llama(*(64000, 4096, 11008, 32, 32, 4), max_position_embeddings=4096, rms_norm_eps=1e-05, rope_theta=5000000.0),
        facts(4096, 128, ("default", 5e6)),
    ),
    "SmolLM2 135M": (
        llama(
            *(49152, 576, 1536, 30, 9, 3),
            eos_token_id=2,
            is_llama_config=True,
            max_position_embeddings=8192,
            mlp_bias=False,
            pad_token_id=2,
            rms_norm_eps=1e-05,
            rope_interleaved=False,
            rope_theta=100000,
            tie_word_embeddings=True,
            **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
        ),
        facts(8192, 64, ("default", 1e5), tied=True),
    ),
    "SmolLM2 1.7B": (
        llama(
            *(49152, 2048, 8192, 24, 32, 32),
            max_position_embeddings=8192,
            rms_norm_eps=1e-05,
            rope_theta=130000,
            tie_word_embeddings=True,
            unk_token_id=0,
        ),
        facts(8192, 64, ("default", 1.3e5), tied=True),
    ),
    "Falcon3 7B": (FALCON3_7B, facts(32768, 256, ("default", 1000042))),
    "DeepSeek Coder 6.7B": (
        llama(
            *(32256, 4096, 11008, 32, 32, 32),
            bos_token_id=32013,
            eos_token_id=32014,
            max_position_embeddings=16384,
            rms_norm_eps=1e-06,
            rope_scaling={"factor": 4.0, "type": "linear"},
            rope_theta=100000,
        ),
        facts(65536, 128, ("linear", 1e5)),
    ),
    "OpenLLaMA 3B": (
        llama(*(32000, 3200, 8640, 26, 32, 32), max_position_embeddings=2048, rms_norm_eps=1e-06, tensor_parallel=True),
        facts(2048, 100, ("default", 1e4)),
    ),
    "Mistral 7B v0.1": (
        mistral(
            *(32000, 4096, 14336, 32, 32, 8),
            max_position_embeddings=32768,
            rms_norm_eps=1e-05,
            rope_theta=10000.0,
            sliding_window=4096,
        ),
        facts(32768, 128, ("default", 1e4), window=(4096, 0)),
    ),
    "Mistral 7B v0.3": (MISTRAL_7B_V03, facts(32768, 128, ("default", 1e6))),
    "Mistral Nemo 12B": (
        mistral(
            *(131072, 5120, 14336, 40, 32, 8),
            head_dim=128,
            max_position_embeddings=131072,
            rms_norm_eps=1e-05,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
        facts(131072, 128, ("default", 1e6)),
    ),
    "Qwen2 0.5B": (
        qwen2(
            *(151936, 896, 4864, 24, 14, 2),
            max_position_embeddings=131072,
            max_window_layers=24,
            sliding_window=131072,
            tie_word_embeddings=True,
        ),
        facts(131072, 64, ("default", 1e6), tied=True),
    ),
    "Qwen2.5 7B Instruct": (
        qwen2(
            *(152064, 3584, 18944, 28, 28, 4),
            max_position_embeddings=32768,
            max_window_layers=28,
            sliding_window=131072,
            tie_word_embeddings=False,
            use_mrope=False,
        ),
        facts(32768, 128, ("default", 1e6)),
    ),
    # Its first 70 layers see everything. As published it does not use the window.
    "Qwen1.5 72B, window on": (
        config(
            *("qwen2", "Qwen2ForCausalLM", 152064, 8192, 24576, 80, 64, 64),
            max_position_embeddings=32768,
            max_window_layers=70,
            rms_norm_eps=1e-06,
            rope_theta=1000000.0,
            sliding_window=16384,
            use_sliding_window=True,
        ),
        facts(32768, 128, ("default", 1e6), window=(16384, 70)),
    ),
    "Qwen3 0.6B": (QWEN_3_0_6B, facts(40960, 128, ("default", 1e6), tied=True)),
    "Qwen3 8B": (
        qwen3(*(151936, 4096, 12288, 36, 32, 8), max_position_embeddings=40960, max_window_layers=36),
        facts(40960, 128, ("default", 1e6)),
    ),
}

REFUSED: dict[str, tuple[dict, str]] = {
    "Granite 3.1 2B": (
        config(
            *("granite", "GraniteForCausalLM", 49152, 2048, 8192, 40, 32, 8),
            attention_multiplier=0.015625,
            embedding_multiplier=12.0,
            logits_scaling=8.0,
            max_position_embeddings=131072,
            residual_multiplier=0.22,
            rope_theta=5000000.0,
        ),
        "model_type is 'granite'; supported are llama, mistral, qwen2, qwen3",
    ),
    "Granite 3.1 2B under the name of Llama": (
        llama(*(49152, 2048, 8192, 40, 32, 8), embedding_multiplier=12.0),
        "embedding_multiplier is 12.0; this field is not supported, and by its name it may change what",
    ),
    "Mixtral 8x7B": (
        config(
            *("mixtral", "MixtralForCausalLM", 32000, 4096, 14336, 32, 32, 8),
            num_experts_per_tok=2,
            num_local_experts=8,
        ),
        "model_type is 'mixtral'",
    ),
    "Gemma 2B": (config(*("gemma", "GemmaForCausalLM", 256000, 2048, 16384, 18, 8, 1)), "model_type is 'gemma'"),
    "Phi-3 mini": (config(*("phi3", "Phi3ForCausalLM", 32064, 3072, 8192, 32, 32, 32)), "model_type is 'phi3'"),
    "SmolLM3 3B": (config(*("smollm3", "SmolLM3ForCausalLM", 128256, 2048, 11008, 36, 16, 4)), "is 'smollm3'"),
    "Qwen3 30B A3B": (config(*("qwen3_moe", "Qwen3MoeForCausalLM", 151936, 2048, 6144, 48, 32, 4)), "is 'qwen3_moe'"),
    "Llama 2 7B GPTQ": (
        LLAMA_2_7B | {"quantization_config": {"bits": 4, "group_size": 128, "desc_act": False, "quant_method": "gptq"}},
        "quantization_config is 'gptq'; quantised weights are read from GGUF files alone: use the float16, bfloat16 or "
        r"float32 weights that this checkpoint was made from, or a GGUF file of the model \(--model FILE.gguf\)",
    ),
    "Llama 3.1 8B AWQ": (
        LLAMA_3_1_8B | {"quantization_config": {"bits": 4, "quant_method": "awq", "version": "gemm"}},
        "quantization_config is 'awq'; .*GGUF",
    ),
    "Llama 3.1 8B, bitsandbytes": (
        LLAMA_3_1_8B | {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
        "quantization_config is 'bitsandbytes'; .*GGUF",
    ),
    "Llama 3.1 8B FP8": (
        LLAMA_3_1_8B | {"quantization_config": {"activation_scheme": "static", "quant_method": "fp8"}},
        "quantization_config is 'fp8'; .*GGUF",
    ),
    "Llama 3.1 8B, compressed tensors": (
        LLAMA_3_1_8B | {"quantization_config": {"format": "pack-quantized", "quant_method": "compressed-tensors"}},
        "quantization_config is 'compressed-tensors'; .*GGUF",
    ),
    "Llama 3.1 8B, an older spelling of it": (
        LLAMA_3_1_8B | {"compression_config": {"format": "float-quantized"}},
        "compression_config is .*'float-quantized'.*; .*GGUF",
    ),
    "Llama 2 7B 64k by YaRN": (
        LLAMA_2_7B | {"rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn"}},
        "rope type is 'yarn'; supported are default, linear, dynamic, llama3",
    ),
    "Qwen2.5 7B 1M": (
        qwen2(
            *(152064, 3584, 18944, 28, 28, 4),
            dual_chunk_attention_config={"chunk_size": 262144, "local_size": 8192},
        ),
        "dual_chunk_attention_config is .*262144.*; this field is not supported",
    ),
    "InternLM 7B": (
        llama(
            *(103168, 4096, 11008, 32, 32, 32),
            auto_map={"AutoConfig": "configuration_internlm.InternLMConfig"},
            bias=True,
        ),
        "auto_map is .*InternLM.*; this checkpoint brings its own model code, which is not run",
    ),
}
