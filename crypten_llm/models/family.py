"""Model families: what each is made of, as data. Nothing else asks which model this is.

Owns, for each ``model_type`` of a config.json: which weights there are, of which shape, in order of computation; which
of them have a bias; which norms there are, and which products take their output; how a window of attention is written;
the accepted ``architectures``, the fields that the family reads beside those that all have, and their defaults; and
where the attention's scale, 1/sqrt(head_dim), is folded when weights are loaded. It imports no tensor library.

A model family, in four steps:

1. An entry of ``FAMILIES``. Its ``layer`` lists a ``Part`` for each weight below "model.layers.N.", named as in the
   checkpoint. The parts that ``llama`` knows are computed where they are listed and left out where they are not: norms
   on heads are "self_attn.q_norm" and "self_attn.k_norm", both or none. A part of another kind takes a module in
   ``llama``, which finds its weight as they do (``Parameters.find``). ``after`` names the norm before a product; an
   engine may fold that norm's weight into the product's.
2. Its ``defaults`` are transformers' for absent fields; its ``fields`` are those that change what this family computes
   and that ``config.LlamaConfig`` or ``windows`` reads. What becomes of the others is said in ``config_fields``.
3. In tests/hf_models.py an entry of ``FAMILIES`` for each of its options. Configs, weights and logits (to 1e-4, on
   engine ``plain``, every parameter random) are then held against transformers' model of that type.
4. In tests/public_configs.py its real config.json, in tests/test_family.py every field of it that would change the
   function, refused; in tests/test_engines.py and tests/test_wire_engine.py one model on engines ``crypten`` and
   ``wire``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crypten_llm.models.windows import Reading, by_layer, everywhere, nowhere

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
_QUERY, _QUERY_NORM = "self_attn.q_proj", "self_attn.q_norm"
_IN_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")


@dataclass(frozen=True)
class Part:
    """One weight of a layer: the checkpoint's name below "model.layers.N.", without ".weight".

    shape: names of its dimensions; products are x @ W.T, W [out, in]. after: the norm whose output it multiplies,
    ``None`` for other inputs. bias: whether it has one, or the config field that says so, true or false.
    """

    name: str
    shape: tuple[str, ...]
    after: str | None = None
    bias: str | bool = False

    def has_bias(self, config: LlamaConfig) -> bool:
        return getattr(config, self.bias) if isinstance(self.bias, str) else self.bias


_BEFORE_ATTENTION = Part("input_layernorm", ("hidden",))
_HEAD_NORMS = (Part(_QUERY_NORM, ("head",)), Part("self_attn.k_norm", ("head",)))
_AFTER_ATTENTION = (
    Part("post_attention_layernorm", ("hidden",)),
    Part("mlp.gate_proj", ("ffn", "hidden"), after="post_attention_layernorm", bias="mlp_bias"),
    Part("mlp.up_proj", ("ffn", "hidden"), after="post_attention_layernorm", bias="mlp_bias"),
    Part("mlp.down_proj", ("hidden", "ffn"), bias="mlp_bias"),
)


def _layer(
    *between: Part, projections_bias: str | bool = "attention_bias", output_bias: str | bool = "attention_bias"
) -> tuple[Part, ...]:
    """Of a decoder; ``between``: parts between the projections and the products of their results."""
    projections = (
        Part(f"self_attn.{name}", (out, "hidden"), after="input_layernorm", bias=projections_bias)
        for name, out in (("q_proj", "query"), ("k_proj", "key_value"), ("v_proj", "key_value"))
    )
    output = Part("self_attn.o_proj", ("hidden", "query"), bias=output_bias)
    return (_BEFORE_ATTENTION, *projections, *between, output, *_AFTER_ATTENTION)


@dataclass(frozen=True)
class Family:
    """What models of one ``model_type`` are made of; see the recipe above.

    architectures: values of that field, the usual one first. defaults: of config.json fields that are absent, where
    families differ; ``None`` follows from the sizes. fields: of config.json, read for this family and not for all.
    windows: how its config.json says how far attention looks back.
    """

    architectures: tuple[str, ...]
    layer: tuple[Part, ...]
    defaults: Mapping[str, Any]
    fields: frozenset[str] = frozenset()
    windows: Reading = nowhere

    def shapes(self, config: LlamaConfig) -> dict[str, tuple[int, ...]]:
        """Every parameter of a model with its shape, in order of computation.

        With tied embeddings there is no "lm_head.weight": "model.embed_tokens.weight" serves for both.
        """
        sizes = self._sizes(config)
        table = (config.vocab_size, config.hidden_size)
        found: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": table}
        for layer in range(config.num_hidden_layers):
            for part in self.layer:
                name, shape = f"model.layers.{layer}.{part.name}", tuple(sizes[size] for size in part.shape)
                found[f"{name}.weight"] = shape
                if part.has_bias(config):
                    found[f"{name}.bias"] = shape[:1]
        found[f"{FINAL_NORM}.weight"] = (config.hidden_size,)
        if not config.tie_word_embeddings:
            found[f"{HEAD}.weight"] = table
        return found

    def parameters(self, config: LlamaConfig) -> int:
        """How many numbers ``shapes`` has, without listing it: a config may name any count of layers."""
        sizes, table = self._sizes(config), config.vocab_size * config.hidden_size
        count = table * (1 if config.tie_word_embeddings else 2) + config.hidden_size
        for part in self.layer:
            shape = [sizes[size] for size in part.shape]
            count += config.num_hidden_layers * (math.prod(shape) + part.has_bias(config) * shape[0])
        return count

    def _sizes(self, config: LlamaConfig) -> dict[str, int]:
        """By the names that a part's dimensions have."""
        return {
            "hidden": config.hidden_size,
            "query": config.num_attention_heads * config.head_dim,
            "key_value": config.num_key_value_heads * config.head_dim,
            "head": config.head_dim,
            "ffn": config.intermediate_size,
        }

    def norm_before(self, name: str) -> str | None:
        """The norm whose output the product ``name`` takes, if one does; both without ".weight"."""
        if name == HEAD:
            return FINAL_NORM
        found = _IN_LAYER.fullmatch(name)
        assert found is not None, f"{name} is no product of a layer"
        prefix, inner = found.groups()
        (norm,) = (part.after for part in self.layer if part.name == inner)
        return None if norm is None else prefix + norm

    def factor(self, name: str, config: LlamaConfig) -> float:
        """What parameter ``name`` is multiplied by when it is loaded, so that scores cost no more.

        1/sqrt(head_dim) is the query's: of its projection, bias included, or of the norm on its heads, which would undo
        a factor before it.
        """
        found = _IN_LAYER.fullmatch(name)
        last = _QUERY_NORM if any(part.name == _QUERY_NORM for part in self.layer) else _QUERY
        folds = found is not None and found[2].rpartition(".")[0] == last
        return 1 / math.sqrt(config.head_dim) if folds else 1.0


_WINDOW_FIELDS = frozenset({"sliding_window", "use_sliding_window", "max_window_layers"})

FAMILIES = {
    "llama": Family(
        # The second spelling is that of the first conversions of LLaMA.
        architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
        layer=_layer(),
        defaults={
            "max_position_embeddings": 2048,
            "num_key_value_heads": None,
            "head_dim": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        fields=frozenset({"attention_bias", "mlp_bias"}),
    ),
    "mistral": Family(
        architectures=("MistralForCausalLM",),
        layer=_layer(),
        defaults={
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        fields=frozenset({"sliding_window"}),
        windows=everywhere,
    ),
    "qwen2": Family(
        architectures=("Qwen2ForCausalLM",),
        layer=_layer(projections_bias=True, output_bias=False),
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": None,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        fields=_WINDOW_FIELDS,
        windows=by_layer,
    ),
    "qwen3": Family(
        architectures=("Qwen3ForCausalLM",),
        layer=_layer(*_HEAD_NORMS),
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "bos_token_id": None,
            "eos_token_id": None,
        },
        fields=_WINDOW_FIELDS | {"attention_bias"},
        windows=by_layer,
    ),
}
