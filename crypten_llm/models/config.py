"""The public facts of a model: its architecture, read from a Hugging Face config.json or a GGUF file's metadata.

Owns which configurations are supported and every check on what is read of them; where families differ, ``family`` says
so, and what becomes of fields that are not read, ``config_fields``. What would make the model compute something else is
refused by name: silently wrong logits are worse than an error.
Everything here is known to all parties; weights and token ids have no place in this file, and it imports no tensor
library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crypten_llm import limits
from crypten_llm.errors import UsageError
from crypten_llm.files import check_folder, read_json
from crypten_llm.models.config_fields import check_unread
from crypten_llm.models.family import FAMILIES, Family
from crypten_llm.models.fields import integer, is_integer, number, short
from crypten_llm.models.gguf_file import SUFFIX, is_gguf, read_config
from crypten_llm.models.rope_config import RopeConfig, read_rope, refuse_partial_rotation
from crypten_llm.models.windows import Windows, read_windows, write_windows

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_READ = frozenset(_REQUIRED) | {
    *("model_type", "hidden_act", "activation", "num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "layer_types"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "auto_map"),
}
_MOST = {
    "vocab_size": limits.VOCABULARY,
    "hidden_size": limits.HIDDEN,
    "intermediate_size": limits.FFN,
    "num_hidden_layers": limits.LAYERS,
    "num_attention_heads": limits.HEADS,
    "num_key_value_heads": limits.HEADS,
    "head_dim": limits.HEAD_DIM,
    "max_position_embeddings": limits.CONTEXT,
}
_ACTIVATIONS = {"hidden_act": ("silu", "swish"), "activation": ("silu", "swiglu")}  # spellings of the one there is
_BIASES = ("attention_bias", "mlp_bias")


@dataclass(frozen=True)
class LlamaConfig:
    """Architecture of one model; fields are named as in config.json, `eos_token_ids` is always a tuple.

    windows: by layer, how many tokens, its own among them, a token sees; None for all, `()` where every layer sees all.

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
    model_type: str = "llama"
    windows: Windows = ()

    def __post_init__(self) -> None:
        _family(self.model_type)
        for name, most in _MOST.items():
            integer(name, getattr(self, name), most)
        number("rms_norm_eps", self.rms_norm_eps)
        for name in ("tie_word_embeddings", *_BIASES):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is {short(getattr(self, name))}; it must be true or false")
        for name in _BIASES:
            if getattr(self, name) and name not in self.family.fields:
                raise UsageError(f"{name} is True; models of type {self.model_type!r} have no such bias")
        if self.windows and "sliding_window" not in self.family.fields:
            raise UsageError(f"windows are {short(self.windows)}; models of type {self.model_type!r} have none")
        if self.windows and len(self.windows) != self.num_hidden_layers:
            raise UsageError(f"windows are {short(self.windows)}; there must be one for each of the layers")
        # An id outside the vocabulary is never produced, so only the type matters.
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for token in ids:
                if not is_integer(token) and not (token is None and name == "bos_token_id"):
                    raise UsageError(f"{name} is {short(token)}; it must be a token id (an integer)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UsageError(f"head_dim is {self.head_dim}; it must be even, since RoPE rotates pairs")
        if self.rope.type == "dynamic" and self.head_dim == 2:
            raise UsageError("head_dim is 2; rope type dynamic needs at least 4")
        if self.parameters > limits.PARAMETERS:
            raise UsageError(f"these sizes make {self.parameters:.2g} parameters; {limits.PARAMETERS:.2g} at most")
        divisors = self.rope.divisors
        if divisors is not None and len(divisors) != self.head_dim // 2:
            raise UsageError(
                f"rope type divided has {len(divisors)} divisors; a head of {self.head_dim} needs half as many"
            )

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return self.family.parameters(self)

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together.

        max_position_embeddings; with RoPE of type linear or dynamic that is the length before the stretch (Vicuna-16k
        has 4,096 and a factor of 4), and this is its product with the factor. Where a linear config also gives
        original_max_position_embeddings, that is the length before, and max_position_embeddings may be the one after;
        so a config that gives the length after alone can say how far it goes.
        """
        rope, given = self.rope, self.max_position_embeddings
        if rope.type not in ("linear", "dynamic"):
            return given
        assert rope.factor is not None, "RopeConfig asks for it"
        stretched = (rope.original_max_position_embeddings or given) * rope.factor
        return max(given, int(min(stretched, limits.CONTEXT)))

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> LlamaConfig:
        """Read a parsed config.json of transformers 4 or 5, or what `to_dict` gave.

        Absent fields get transformers' defaults for the family. Raises UsageError as the class does, and for a set
        field that is not read and may change the model (see ``config_fields``).
        """
        if not isinstance(d, dict):
            raise UsageError(f"a model config must be a JSON object, not {type(d).__name__}")
        family = _family(d.get("model_type"))
        _refuse_other_functions(d, family)
        check_unread(d, _READ | family.fields)
        given = {name: value for name, value in d.items() if value is not None}
        if missing := [name for name in _REQUIRED if name not in given]:
            raise UsageError(f"{', '.join(missing)} missing; a model's config must give them")
        hidden, heads = (integer(name, given[name], _MOST[name]) for name in ("hidden_size", "num_attention_heads"))
        positions = given.get("max_position_embeddings", family.defaults["max_position_embeddings"])
        integer("max_position_embeddings", positions, limits.CONTEXT)
        # For these null is a value: there is no such token, or as many heads of keys as of queries.
        key_value_heads, bos, eos = (
            d.get(name, family.defaults[name]) for name in ("num_key_value_heads", "bos_token_id", "eos_token_id")
        )
        head_dim = given.get("head_dim", family.defaults["head_dim"])
        if head_dim is None and hidden % heads:
            raise UsageError(f"hidden_size is {hidden}; it must be a multiple of num_attention_heads {heads}")
        config = cls(
            vocab_size=given["vocab_size"],
            hidden_size=hidden,
            intermediate_size=given["intermediate_size"],
            num_hidden_layers=given["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=heads if key_value_heads is None else key_value_heads,
            head_dim=hidden // heads if head_dim is None else head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=given.get("rms_norm_eps", 1e-6),
            rope=read_rope(given, positions),
            tie_word_embeddings=given.get("tie_word_embeddings", False),
            attention_bias=given.get("attention_bias", False),
            mlp_bias=given.get("mlp_bias", False),
            bos_token_id=bos,
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            model_type=d["model_type"],
        )
        return replace(config, windows=read_windows(family.windows, d, config.num_hidden_layers, config.context))

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
            return cls.from_dict(read_json(path))
        except UsageError as error:
            raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    @classmethod
    def from_folder(cls, path: str | Path) -> LlamaConfig:
        """Read `path`/config.json; as in transformers, generation_config.json decides the end-of-sequence ids.

        A GGUF file stands for a folder, with its own metadata.
        """
        path = Path(path)
        if is_gguf(path):
            try:
                return cls.from_dict(read_config(path))
            except UsageError as error:
                raise UsageError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        if not path.is_dir():
            raise UsageError(f"{path}: no such folder; give a model folder that holds config.json")
        check_folder(path)
        if not (path / "config.json").exists():
            others = sorted(file.name for file in path.glob(f"*{SUFFIX}"))
            what = f"the GGUF file itself, {path / others[0]}" if others else "a Hugging Face model folder"
            raise UsageError(f"{path}: no config.json; give {what}")
        d = read_json(path / "config.json")
        if (path / "generation_config.json").exists():
            generation = read_json(path / "generation_config.json")
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
        seen = write_windows(values.pop("windows"), self.family.fields)
        return {**values, "rope_parameters": rope.to_dict(), "eos_token_id": list(eos), **seen}


def _family(model_type: Any) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UsageError(f"model_type is {short(model_type)}; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _refuse_other_functions(d: dict[str, Any], family: Family) -> None:
    """Raise UsageError for the first field that makes the model something else than what the family computes."""
    architectures = d.get("architectures")
    if architectures is not None and architectures not in ([name] for name in family.architectures):
        raise UsageError(f"architectures is {short(architectures)}; only {[family.architectures[0]]!r} is supported")
    for name, spellings in _ACTIVATIONS.items():
        if d.get(name) not in (None, *spellings):
            raise UsageError(f"{name} is {short(d[name])}; only 'silu' is supported")
    refuse_partial_rotation("partial_rotary_factor", d)
