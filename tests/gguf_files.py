"""GGUF files of tiny models, written as llama.cpp's converter writes them: other names, rows of queries in pairs.

Owns that conversion, apart from the reader's. ``write`` takes a folder that ``hf_models.tiny`` made, ``tokens`` gives
the metadata of a byte-level tokenizer.json.
"""

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_of(name: str) -> str:
    stem, end = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{end}"
    return f"{NAMES[stem]}.{end}"


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """As convert_hf_to_gguf.py permutes the rows of q_proj and k_proj for architecture llama."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(folder: Path, kind: str = "F32", leave_out=(), add=None, tensors=None) -> Path:
    """The folder's model as a GGUF file beside it; matrices are of this type where their rows fit its blocks.

    leave_out: keys of the metadata, after the architecture. add: more metadata, by whole key. tensors: more tensors.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = "llama" if config["model_type"] == "mistral" else config["model_type"]  # llama.cpp has one for both
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    path = folder.parent / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "block_count": config["num_hidden_layers"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
    }
    rope = config["rope_parameters"]
    floats = {"attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": rope["rope_theta"]}
    if rope["rope_type"] == "linear":
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
        floats["rope.scaling.factor"] = rope["factor"]
    for key, size in sizes.items():
        if key not in leave_out:
            writer.add_uint32(f"{architecture}.{key}", size)
    for key, number in floats.items():
        writer.add_float32(f"{architecture}.{key}", number)
    for key, given in ({"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2} | (add or {})).items():
        _add(writer, key, given)
    found = load_file(folder / "model.safetensors")
    for name, value in found.items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            value = in_pairs(value, heads if ".q_proj." in name else kv_heads)
        _add_tensor(writer, name_of(name), value.astype(np.float32), kind)
    for name, value in (tensors or {}).items():
        _add_tensor(writer, name, value, "F32")
    if rope["rope_type"] == "llama3":
        _add_tensor(writer, "rope_freqs.weight", _divisors(rope, head_dim), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, given) -> None:
    if isinstance(given, list):
        writer.add_array(key, given)
    else:
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(given)](key, given)


def _add_tensor(writer: gguf.GGUFWriter, name: str, value: np.ndarray, kind: str) -> None:
    quantised = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[quantised]
    if kind == "F32" or value.ndim < 2 or value.shape[-1] % block:
        writer.add_tensor(name, value)
    elif kind == "F16":
        writer.add_tensor(name, value.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(value, quantised), raw_dtype=quantised)


def _divisors(rope: dict, head_dim: int) -> np.ndarray:
    """As convert_hf_to_gguf.py writes Llama 3's stretch."""
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    made = []
    for wavelength in 2 * np.pi / frequencies:
        context = rope["original_max_position_embeddings"]
        if wavelength < context / high:
            made.append(1.0)
        elif wavelength > context / low:
            made.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            made.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(made, dtype=np.float32)


def tokens(folder: Path, pre: str, **more) -> dict:
    """Metadata of the byte-level tokenizer.json in a folder."""
    content = json.loads((folder / "tokenizer.json").read_text())
    texts = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    special = {token["content"] for token in content["added_tokens"]}
    made = {
        "model": "gpt2",
        "pre": pre,
        "tokens": texts,
        "token_type": [3 if text in special else 1 for text in texts],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "padding_token_id": 2,
        "add_bos_token": True,
    }
    return {f"tokenizer.ggml.{key}": given for key, given in (made | more).items() if given is not None}
