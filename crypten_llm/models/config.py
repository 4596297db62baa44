"""The public facts of a Llama model: its architecture, read from a Hugging Face config.json.

Owns which configurations are supported and every check on them. A field that would make the model compute
something else is refused by name: silently wrong logits are worse than an error. Everything here is known to all
parties; weights and token ids have no place in this file, and it imports no tensor library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crypten_llm.errors import UsageError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")

# Fields of real config.json files that do not change the logits. Dropout is off at inference; pretraining_tp only
# splits a product into slices; the third group steers generate(), which is not used here.
_HARMLESS = frozenset(
    """
    architectures attention_dropout attn_implementation attn_pdrop embd_pdrop hidden_dropout resid_pdrop dtype
    torch_dtype transformers_version transformers.js_config name_or_path use_cache initializer_range pretraining_tp
    pad_token_id gradient_checkpointing neftune_noise_alpha is_llama_config unsloth_fixed unsloth_version
    original_max_position_embeddings max_sequence_length model_max_length tokenizer_model_max_length
    tokenizer_padding_side tokenizer_class padding_side

    chunk_size_feed_forward finetuning_task id2label label2id num_labels problem_type is_decoder output_attentions
    output_hidden_states return_dict tf_legacy_loss torchscript use_bfloat16 cross_attention_hidden_size prefix
    task_specific_params sep_token_id decoder_start_token_id

    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_READ = frozenset(_REQUIRED) | {
    *("model_type", "hidden_act", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "layer_types"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "quantization_config"),
}
_ROPE_READ = {
    *("type", "rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    *("original_max_position_embeddings", "partial_rotary_factor"),
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(name: str, value: Any) -> int:
    # The upper bound keeps a nonsense size from reaching an allocation.
    if not _is_integer(value) or not 0 < value < 2**31:
        raise UsageError(f"{name} is {value!r}; it must be a positive integer")
    return value


def _number(name: str, value: Any, least: float = 0) -> float:
    # Strictly positive and within float32, which also refuses NaN and infinity.
    if isinstance(value, bool) or not isinstance(value, int | float) or not max(least, 1e-38) <= value <= 3e38:
        wanted = f"number of at least {least}" if least else "positive number"
        raise UsageError(f"{name} is {value!r}; it must be a {wanted}")
    return value


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base wavelength `theta` and how it is stretched beyond the trained context.

    `factor` is the stretch of linear, dynamic and llama3; the last three fields belong to llama3 alone and stay
    None otherwise. Raises UsageError on a value that is missing or out of range.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        _number("rope_theta", self.theta)
        if self.type not in ROPE_TYPES:
            raise UsageError(f"rope type is {self.type!r}; supported are {', '.join(ROPE_TYPES)}")
        if self.type != "default":
            _number(f"factor of rope type {self.type}", self.factor, least=1)
        if self.type == "llama3":
            _number("low_freq_factor of rope type llama3", self.low_freq_factor)
            _number("high_freq_factor of rope type llama3", self.high_freq_factor)
            _integer("original_max_position_embeddings of rope type llama3", self.original_max_position_embeddings)
            if self.high_freq_factor <= self.low_freq_factor:
                raise UsageError(
                    f"high_freq_factor is {self.high_freq_factor!r}; it must be larger than "
                    f"low_freq_factor {self.low_freq_factor!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """`rope_parameters` as transformers 5 writes it."""
        values = {
            "rope_theta": self.theta,
            "rope_type": self.type,
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of one Llama model; fields are named as in config.json, `eos_token_ids` is always a tuple.

    Raises UsageError, naming the field, its value and what is supported, for anything that cannot be computed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        for name in (*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"):
            _integer(name, getattr(self, name))
        _number("rms_norm_eps", self.rms_norm_eps)
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        # An id outside the vocabulary is never produced, so only the type matters.
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                if not _is_integer(token) and not (token is None and name == "bos_token_id"):
                    raise UsageError(f"{name} is {token!r}; it must be a token id (an integer)")
        if self.hidden_size % self.num_attention_heads:
            raise UsageError(
                f"hidden_size is {self.hidden_size}; it must be a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}; it must be even, since RoPE rotates pairs")
        if self.rope.type == "dynamic" and self.head_dim == 2:
            raise UsageError("head_dim is 2; rope type dynamic needs at least 4")

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> LlamaConfig:
        """Read a parsed config.json of transformers 4 or 5, or what `to_dict` gave.

        Absent fields get the defaults of transformers' Llama. Raises UsageError as the class does, and for any
        field not known to be harmless whose value is set.
        """
        if not isinstance(d, dict):
            raise UsageError(f"a model config must be a JSON object, not {type(d).__name__}")
        _refuse_other_functions(d)
        given = {name: value for name, value in d.items() if value is not None}
        if missing := [name for name in _REQUIRED if name not in given]:
            raise UsageError(f"{', '.join(missing)} missing; a Llama config must give them")
        hidden, heads = (_integer(name, given[name]) for name in ("hidden_size", "num_attention_heads"))
        positions = _integer("max_position_embeddings", given.get("max_position_embeddings", 2048))
        # null means that there is no such token, absence means transformers' default.
        eos = d.get("eos_token_id", 2)
        return cls(
            vocab_size=given["vocab_size"],
            hidden_size=hidden,
            intermediate_size=given["intermediate_size"],
            num_hidden_layers=given["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=given.get("num_key_value_heads", heads),
            head_dim=given.get("head_dim", hidden // heads),
            max_position_embeddings=positions,
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            rope=_read_rope(given, positions),
            tie_word_embeddings=given.get("tie_word_embeddings", False),
            attention_bias=given.get("attention_bias", False),
            mlp_bias=given.get("mlp_bias", False),
            bos_token_id=d.get("bos_token_id", 1),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )

    @classmethod
    def from_sizes(
        cls, hidden: int, heads: int, kv_heads: int, ffn: int, layers: int, vocab: int, context: int, tied: bool = False
    ) -> LlamaConfig:
        """A Llama of these sizes, with transformers' defaults for the rest."""
        return cls.from_dict(
            {
                "model_type": "llama",
                "vocab_size": vocab,
                "hidden_size": hidden,
                "intermediate_size": ffn,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "max_position_embeddings": context,
                "tie_word_embeddings": tied,
            }
        )

    @classmethod
    def from_file(cls, path: str | Path) -> LlamaConfig:
        """Read one config.json."""
        try:
            return cls.from_dict(_read_json(Path(path)))
        except UsageError as error:
            raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    @classmethod
    def from_folder(cls, path: str | Path) -> LlamaConfig:
        """Read `path`/config.json; as in transformers, generation_config.json decides the end-of-sequence ids."""
        path = Path(path)
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; give a model folder that holds config.json")
        if not (path / "config.json").exists():
            raise UsageError(f"{path}: no config.json; give a Hugging Face model folder")
        d = _read_json(path / "config.json")
        if (path / "generation_config.json").exists():
            generation = _read_json(path / "generation_config.json")
            if generation.get("eos_token_id") is not None:
                d = {**d, "eos_token_id": generation["eos_token_id"]}
        try:
            return cls.from_dict(d)
        except UsageError as error:
            raise UsageError(f"{path / 'config.json'}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON object that the model owner sends to the other parties; `from_dict` gives the config back."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        rope, eos = values.pop("rope"), values.pop("eos_token_ids")
        return {"model_type": "llama", **values, "rope_parameters": rope.to_dict(), "eos_token_id": list(eos)}


def _refuse_other_functions(d: dict[str, Any]) -> None:
    """Raise UsageError for the first field that makes the model something else than a plain Llama."""
    if d.get("model_type") != "llama":
        raise UsageError(f"model_type is {d.get('model_type')!r}; only 'llama' is supported")
    architectures = d.get("architectures")
    # The second spelling is that of the first conversions of LLaMA.
    if architectures is not None and architectures not in (["LlamaForCausalLM"], ["LLaMAForCausalLM"]):
        raise UsageError(f"architectures is {architectures!r}; only ['LlamaForCausalLM'] is supported")
    if d.get("hidden_act") not in (None, "silu", "swish"):
        raise UsageError(f"hidden_act is {d['hidden_act']!r}; only 'silu' is supported")
    if d.get("quantization_config"):
        raise UsageError(
            f"quantization_config is {_short(d['quantization_config'])}; quantized checkpoints are not supported, "
            "use the float16, bfloat16 or float32 weights of this model"
        )
    _refuse_partial_rotation("partial_rotary_factor", d)
    layers = d.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise UsageError(f"layer_types is {_short(layers)}; only 'full_attention' in every layer is supported")
    for name, value in d.items():
        # Names with an underscore are transformers' own bookkeeping; an unset field asks for nothing, but 0 may.
        is_set = value is not False and (bool(value) or value == 0)
        if is_set and name not in _READ and name not in _HARMLESS and not name.startswith("_"):
            raise UsageError(
                f"{name} is {_short(value)}; this field is not supported and may change what the model computes "
                "(supported: absent, null or false). If it does not, remove it from config.json"
            )


def _read_rope(given: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """`rope_theta` + `rope_scaling` (transformers 4) or `rope_parameters` (5); when both are there they must agree."""
    theta = given.get("rope_theta")
    found: dict[str, RopeConfig] = {}
    for field in ("rope_scaling", "rope_parameters"):
        values = given.get(field)
        if not values:
            continue
        if not isinstance(values, dict):
            raise UsageError(f"{field} is {_short(values)}; it must be a JSON object")
        values = {name: value for name, value in values.items() if value is not None}
        for name in values.keys() - _ROPE_READ:
            raise UsageError(f"{field}.{name} is {_short(values[name])}; this field is not supported")
        _refuse_partial_rotation(f"{field}.partial_rotary_factor", values)
        kind = values.get("rope_type", values.get("type"))
        if kind is None and "factor" in values:
            raise UsageError(f"{field} is {_short(values)}; it has a factor but no rope_type ({', '.join(ROPE_TYPES)})")
        if theta is not None and values.get("rope_theta", theta) != theta:
            raise UsageError(f"rope_theta is {theta!r} but {field}.rope_theta is {values['rope_theta']!r}; keep one")
        # Values that the type does not use are dropped, as transformers does.
        used = {"factor": values.get("factor")} if kind in ("linear", "dynamic", "llama3") else {}
        if kind == "llama3":
            used |= {name: values.get(name) for name in ("low_freq_factor", "high_freq_factor")}
            used["original_max_position_embeddings"] = _original_context(field, values, given, max_position_embeddings)
        base = values.get("rope_theta", 10000.0 if theta is None else theta)
        found[field] = RopeConfig(theta=base, type="default" if kind is None else kind, **used)
    if len(set(found.values())) > 1:
        raise UsageError(f"rope_scaling is {given['rope_scaling']!r} but rope_parameters say otherwise; keep one")
    return next(iter(found.values()), RopeConfig(theta=10000.0 if theta is None else theta))


def _original_context(field: str, values: dict, given: dict, max_position_embeddings: int) -> Any:
    """The trained context of llama3; versions of transformers disagree which field wins, so both must say the same."""
    name = "original_max_position_embeddings"
    inner, outer = values.get(name), given.get(name)
    if inner is not None and outer is not None and inner != outer:
        raise UsageError(f"{name} is {outer!r} but {field}.{name} is {inner!r}; keep one")
    return next((value for value in (inner, outer) if value is not None), max_position_embeddings)


def _refuse_partial_rotation(label: str, d: dict[str, Any]) -> None:
    factor = d.get("partial_rotary_factor")
    if factor is not None and factor != 1:
        raise UsageError(f"{label} is {factor!r}; only 1 is supported (RoPE on the whole head)")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        d = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # JSON and encoding errors alike
        raise UsageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(d, dict):
        raise UsageError(f"{path}: must hold a JSON object, not {type(d).__name__}")
    return d
