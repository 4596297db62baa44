"""GGUF, llama.cpp's one-file checkpoints: the configuration and the weights in one, quantised or not.

Owns what its metadata and tensor names mean in Hugging Face's terms. The package ``gguf`` parses the file and turns
quantised blocks into floats, exactly as they stand for them; nothing in such a file is run. Its tokenizer is in
``gguf_tokenizer``.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crypten_llm import limits, records
from crypten_llm.errors import UsageError, first_line
from crypten_llm.files import check_regular
from crypten_llm.models.fields import integer, short
from crypten_llm.models.stored import Stored

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

    from crypten_llm.models.config import LlamaConfig

SUFFIX = ".gguf"
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_ROPE_DIVISORS = "rope_freqs.weight"
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Of the metadata under the architecture's name, all of which describes the computation.
_SIZES = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_HEAD_DIM = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_READ = {
    *(*_SIZES, *_HEAD_DIM, "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "tensor_data_layout"),
}
_CHANGES_NOTHING = {"attention.causal": True, "rope.scaling.attn_factor": 1.0, "rope.scaling.type": "none"}


def is_gguf(path: str | Path) -> bool:
    return str(path).lower().endswith(SUFFIX)


def opened(path: str | Path) -> GGUFReader:
    """The parsed file; its tensors are mapped, not read. Raises UsageError for one that cannot be used."""
    path = Path(path)
    try:
        check_regular(path)
        state = path.stat()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give a GGUF file or a model folder") from None
    return _opened(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4)  # parsing a vocabulary takes seconds
def _opened(path: Path, size: int, changed: int) -> GGUFReader:
    from gguf import GGUFReader

    class Reader(GGUFReader):
        """Cuts the file into plain arrays: a vocabulary has 10^6 pieces, which take three times as long as maps."""

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            # The package's own reads nothing behind the end, as often as a length in the file asks for.
            if int(offset) + int(count) * np.dtype(dtype).itemsize > len(self._whole):
                raise ValueError("it ends early")
            return super()._get(offset, dtype, count, override_order)

        @property
        def data(self) -> Any:
            return self._whole

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._whole = mapped.view(np.ndarray)

    try:
        reader = Reader(path)
    except Exception as error:  # the package raises anything here for a file that is cut off or no GGUF at all
        raise UsageError(f"{path} cannot be read as GGUF ({first_line(error)}); download it again") from error
    if (parts := value(reader, "split.count", int) or 1) > 1:
        raise UsageError(
            f"{path} is one of {parts} parts of a model; join them with "
            "'llama-gguf-split --merge' and give the joined file"
        )
    return reader


def value(reader: GGUFReader, name: str, kind: Any = Any) -> Any:
    """One entry of the metadata: a number, a text, or a list; None where there is none.

    Raises UsageError where it is not of this ``kind``.
    """
    field = reader.fields.get(name)
    if field is None:
        return None
    try:
        return records.convert(field.contents(), kind)
    except (records.Malformed, UnicodeError) as error:
        raise UsageError(f"{name} is not as it should be ({error}); get the file again") from None


def read_config(path: str | Path) -> dict[str, Any]:
    """What ``LlamaConfig.from_dict`` takes. Raises UsageError for a model that would be another one if read so."""
    reader = opened(path)
    try:
        architecture = value(reader, "general.architecture", str)
        if architecture not in _ARCHITECTURES:
            raise UsageError(
                f"general.architecture is {short(architecture)}; supported are {', '.join(_ARCHITECTURES)}"
            )
        prefix = f"{architecture}."
        given = {key.removeprefix(prefix): value(reader, key) for key in reader.fields if key.startswith(prefix)}
        _refuse_unread(given, prefix)
        return {
            "model_type": architecture,
            "architectures": [_ARCHITECTURES[architecture]],
            **{name: given[key] for key, name in _SIZES.items() if key in given},
            **_head_dim(given, prefix),
            **_from_tensors(reader),
            **_rope(given, reader),
            **_tokens(reader),
        }
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def stored(path: str | Path, config: LlamaConfig) -> dict[str, Stored]:
    """The file's tensors by Hugging Face's names; one that has none there is under its own."""
    reader = opened(path)
    named = {_hugging_face_name(tensor.name): tensor for tensor in reader.tensors if tensor.name != _ROPE_DIVISORS}
    return {name: _stored(tensor, _as_hugging_face(name, config)) for name, tensor in named.items()}


def _stored(tensor: ReaderTensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Stored:
    from gguf import quants

    def read() -> torch.Tensor:
        import torch

        return change(torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy()))

    kind = tensor.tensor_type.name
    known = kind in ("F32", "F16") or hasattr(quants, kind)  # it has a class for each type of block that it can read
    return Stored(tuple(tensor.shape.tolist()[::-1]), kind, known, read)


def _hugging_face_name(name: str) -> str:
    stem, _, end = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{end}"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found is None or found[2] not in _OF_A_LAYER:
        return name
    return f"model.layers.{found[1]}.{_OF_A_LAYER[found[2]]}.{end}"


def _as_hugging_face(name: str, config: LlamaConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of a head's queries and keys are in pairs in files of architecture llama, in halves in Hugging Face's."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = name.rpartition(".")[0].rpartition(".")[2]
    if config.model_type != "llama" or projection not in heads:
        return lambda tensor: tensor

    def halves(tensor: torch.Tensor) -> torch.Tensor:
        pairs = tensor.reshape(heads[projection], tensor.shape[0] // heads[projection] // 2, 2, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)

    return halves


def _refuse_unread(given: Mapping[str, Any], prefix: str) -> None:
    for key, found in given.items():
        if key not in _READ and found not in (0, False, "", _CHANGES_NOTHING.get(key)):
            raise UsageError(
                f"{prefix}{key} is {short(found)}; this is not supported and may change the model's results"
            )


def _head_dim(given: Mapping[str, Any], prefix: str) -> dict[str, int]:
    sizes = {key: integer(f"{prefix}{key}", given[key], limits.HEAD_DIM) for key in _HEAD_DIM if key in given}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{prefix}{key} {size}" for key, size in sizes.items())
        raise UsageError(f"{listed}: these must be equal (keys as wide as values, RoPE on the whole head)")
    if sizes:
        return {"head_dim": next(iter(sizes.values()))}
    # Not left to the family: its default may be another one than the file's.
    hidden, heads = (
        integer(f"{prefix}{key}", given.get(key), most)
        for key, most in (("embedding_length", limits.HIDDEN), ("attention.head_count", limits.HEADS))
    )
    return {"head_dim": hidden // heads}


def _from_tensors(reader: GGUFReader) -> dict[str, Any]:
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    if not shapes.get("token_embd.weight"):
        raise UsageError("token_embd.weight is missing; this is no language model, or a part of one")
    biases = {"attention_bias": "attn_output", "mlp_bias": "ffn_gate"}
    return {
        "vocab_size": shapes["token_embd.weight"][-1],
        "tie_word_embeddings": "output.weight" not in shapes,
        **{field: True for field, name in biases.items() if f"blk.0.{name}.bias" in shapes},
    }


def _rope(given: Mapping[str, Any], reader: GGUFReader) -> dict[str, Any]:
    """RoPE's stretch. Llama 3's is a tensor of divisors, one for each frequency."""
    kind = given.get("rope.scaling.type", "none")
    factor = given.get("rope.scaling.factor", given.get("rope.scale_linear"))
    divisors = [tensor.data.tolist() for tensor in reader.tensors if tensor.name == _ROPE_DIVISORS]
    if divisors and kind != "none":
        raise UsageError(f"rope.scaling.type is {short(kind)} beside {_ROPE_DIVISORS}; only one stretch is supported")
    if divisors:
        return {"rope_scaling": {"rope_type": "divided", "divisors": divisors[0]}}
    if kind == "none" and given.get("rope.scale_linear", 1) != 1:
        kind = "linear"
    return {} if kind == "none" else {"rope_scaling": {"rope_type": kind, "factor": factor}}


def _tokens(reader: GGUFReader) -> dict[str, Any]:
    """Ids of the first token and of all that end an answer: of a text, a turn or a message."""
    ends = [value(reader, f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    return {
        "bos_token_id": value(reader, "tokenizer.ggml.bos_token_id", int),
        "eos_token_id": [*dict.fromkeys(token for token in ends if token is not None)],
    }
