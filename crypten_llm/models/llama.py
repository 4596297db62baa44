"""The Llama definition: one for every engine and family. It reads like the architecture and knows no protocol.

Owns the mathematics, from one layer's parts to the whole model, as ``crypten.nn`` modules over an engine's operations,
and nothing about where numbers live. Parameter names are Hugging Face's; which of them there are, and which norm's
output a product takes, the family says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from crypten_llm.compat import import_crypten
from crypten_llm.models.cache import KVCache, Stretch
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.family import Family
from crypten_llm.models.rope import rope_frequencies, unchanged_up_to

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine
    from crypten_llm.models.cache import LayerCache
    from eviction.operations import Handle


Tables = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, see ``rotary_tables``


class Rotary(NamedTuple):
    """The tables of queries and of keys: alike but for two factors.

    An engine may want scores to another base than e; and the weights of queries have taken in all of the attention's
    scale, 1/sqrt(head_dim). The factors give the scores the one, and queries and keys an equal part of the other, so
    that as many fractional bits serve both.
    """

    query: Tables
    key: Tables


if TYPE_CHECKING:
    Module = Any  # CrypTen has no types
else:
    Module = import_crypten().nn.Module


class Parameters:
    """Hands each layer its weights by Hugging Face name: ``parameters.within("mlp").get("up_proj.weight")``."""

    def __init__(self, handles: dict, family: Family, prefix: str = "") -> None:
        self.handles = handles
        self.family = family
        self.prefix = prefix

    def within(self, name: str) -> Parameters:
        return Parameters(self.handles, self.family, f"{self.prefix}{name}.")

    def get(self, name: str) -> Handle:
        return self.handles[self.prefix + name]

    def find(self, name: str) -> Handle:
        return self.handles.get(self.prefix + name)

    def norm_before(self) -> Handle:
        """The weight of the norm whose output this product takes, ``None`` for other inputs."""
        norm = self.family.norm_before(self.prefix.removesuffix("."))
        return None if norm is None else self.handles[f"{norm}.weight"]


class EngineModule(Module):
    """A ``crypten.nn`` module that computes through ``engine``; masks and rotary tables stay public."""

    SUPPORTS_PLAINTEXT_INPUTS = True
    __getattribute__ = object.__getattribute__  # CrypTen's looks for secrets among what a module of no secrets is given

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine
        self.encrypted = engine.is_private  # CrypTen refuses secrets in a module that does not say so

    def adopt(self, name: str, handle: Handle) -> None:
        """Registers a weight, so that CrypTen's own module tools (named_parameters, state_dict) see it."""
        if handle is None:
            setattr(self, name, None)
        else:
            self.register_parameter(name, handle, requires_grad=False)


class Linear(EngineModule):
    def __init__(self, engine: Engine, parameters: Parameters) -> None:
        super().__init__(engine)
        self.adopt("weight", parameters.get("weight"))
        self.adopt("bias", parameters.find("bias"))
        name = parameters.prefix.removesuffix(".").rpartition(".")[2]
        engine.prepare(parameters.get("weight"), parameters.norm_before(), name, parameters.find("bias"))

    def forward(self, x: Handle) -> Handle:
        return self.engine.linear(x, self.weight, self.bias)


class RMSNorm(EngineModule):
    """Over the last dimension: of hidden states [T, H], or of heads [heads, T, head_dim].

    ``scales``: a public power of four by the name of a norm's weight, 1 where there is none.
    """

    def __init__(self, engine: Engine, parameters: Parameters, eps: float, scales: dict) -> None:
        super().__init__(engine)
        self.adopt("weight", parameters.get("weight"))
        self.eps = eps
        self.scale = scales.get(f"{parameters.prefix}weight", 1.0)

    def forward(self, x: Handle) -> Handle:
        return self.engine.rms_norm(x, self.weight, self.eps, self.scale)


class Made(NamedTuple):
    """What a pass makes of its rows, [heads or kv_heads, T, head_dim], and before the rotary embedding."""

    query: Handle
    key: Handle
    value: Handle
    query_before: Handle
    key_before: Handle

    def rows(self, start: int, stop: int) -> Made:
        """Of one sequence's rows."""
        return self if (start, stop) == (0, self.query.shape[1]) else Made(*(x[:, start:stop] for x in self))

    def of(self, part: LayerCache) -> Made:
        """Of the heads whose rows ``part`` keeps."""
        if not part.layer.which:
            return self
        own, group = torch.tensor(part.layer.which), part.layer.group
        queries = (own[:, None] * group + torch.arange(group)).flatten()
        return Made(*(x[queries if name.startswith("query") else own] for name, x in self._asdict().items()))


class Attention(EngineModule):
    """Grouped-query attention. Query heads of one kv head share a matrix product: [kv_heads, group * T, head_dim]."""

    def __init__(
        self, engine: Engine, config: LlamaConfig, parameters: Parameters, label: str, norm_scales: dict
    ) -> None:
        super().__init__(engine)
        self.label = label
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.register_module(name, Linear(engine, parameters.within(name)))
        self.has_head_norms = parameters.find("q_norm.weight") is not None
        if self.has_head_norms:
            for name in ("q_norm", "k_norm"):
                norm = RMSNorm(engine, parameters.within(name), config.rms_norm_eps, norm_scales)
                self.register_module(name, norm)

    def forward(self, x: Handle, rotary: Rotary, stretches: Sequence[Stretch]) -> Handle:
        engine, rows = self.engine, x.shape[0]
        with engine.meter.operation(f"{self.label} query, key, value", "qkv"):
            query = self._split(self.q_proj(x), self.heads)
            key = self._split(self.k_proj(x), self.kv_heads)
            value = self._split(self.v_proj(x), self.kv_heads)
            if self.has_head_norms:
                with engine.meter.operation("head norms", "norm"):
                    query, key = self.q_norm(query), self.k_norm(key)
            query_before, key_before = query, key
            query, key = engine.rotate(query, *rotary.query), engine.rotate(key, *rotary.key)
        made = Made(query, key, value, query_before, key_before)
        programs: list[Callable[[], Handle]] = []
        start = 0
        for cache, length in stretches:
            own = made.rows(start, start + length)
            programs += [partial(self._attend, own.of(part), part) for part in cache.parts]
            start += length
        with self._shared(stretches):
            mixed = engine.side_by_side(programs) if len(programs) > 1 else [programs[0]()]
        with engine.meter.operation(f"{self.label} values", "values"):
            taken = iter(mixed)
            found = [cache.in_order([next(taken) for _ in cache.parts]) for cache, _ in stretches]
            attended = (found[0] if len(found) == 1 else engine.cat(found, 1)).permute(1, 0, 2)
            return self.o_proj(attended.reshape(rows, self.heads * self.head_dim))

    def _shared(self, stretches: Sequence[Stretch]) -> AbstractContextManager[object]:
        """The step that rounds belong to which several programs share."""
        if len(stretches) > 1:
            return self.engine.meter.operation(f"{self.label} sequences side by side", "shared")
        if stretches[0].cache.is_split:
            return self.engine.meter.operation(f"{self.label} groups of heads", "groups")
        return nullcontext()

    def _attend(self, made: Made, cache: LayerCache) -> Handle:
        """The values [heads, T, head_dim] that the heads of this cache mix; their new rows join it."""
        engine, (query, key, value, query_before, key_before) = self.engine, made
        rows, group, kv_heads = query.shape[1], self.heads // self.kv_heads, key.shape[0]
        with engine.meter.operation(f"{self.label} query, key, value", "qkv"):
            query, key, value = cache.enter(query, key, value)
            cache.append(engine.rows(key), engine.rows(value, values=True))
            query = query.reshape(kv_heads, group * rows, self.head_dim)
        choice, mask = cache.choose(query, query_before), cache.mask(rows)
        with engine.meter.operation(f"{self.label} scores", "scores"):
            hidden = None if mask is None or cache.policy.reads_scores else mask.repeat(group, 1)
            scores = engine.scores(query, cache.keys, hidden)
            gathered = scores if choice is None else cache.engine.gather_scores(choice, scores)
        with engine.meter.operation(f"{self.label} softmax", "softmax"):
            weights = engine.softmax(gathered, None if mask is None else mask.repeat(group, 1))
        with engine.meter.operation(f"{self.label} values", "values"):
            if choice is not None:
                weights = cache.engine.scatter_weights(choice, weights, len(cache))
            mixed = cache.leave(engine.mix(weights, cache.values))
        rotated = {"query": query, "key": key, "value": value, "scores": scores, "weights": weights}
        cache.show(rows, **rotated, query_before=query_before, key_before=key_before)
        return mixed.reshape(kv_heads * group, rows, self.head_dim)

    def _split(self, x: Handle, heads: int) -> Handle:
        return x.reshape(x.shape[0], heads, self.head_dim).permute(1, 0, 2)


class MLP(EngineModule):
    def __init__(self, engine: Engine, parameters: Parameters) -> None:
        super().__init__(engine)
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.register_module(name, Linear(engine, parameters.within(name)))

    def forward(self, x: Handle) -> Handle:
        return self.down_proj(self.engine.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(EngineModule):
    def __init__(
        self, engine: Engine, config: LlamaConfig, parameters: Parameters, index: int, norm_scales: dict
    ) -> None:
        super().__init__(engine)
        self.label = f"layer {index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = RMSNorm(engine, parameters.within(name), config.rms_norm_eps, norm_scales)
            self.register_module(name, norm)
        attention = Attention(engine, config, parameters.within("self_attn"), self.label, norm_scales)
        self.register_module("self_attn", attention)
        self.register_module("mlp", MLP(engine, parameters.within("mlp")))

    def forward(self, x: Handle, rotary: Rotary, stretches: Sequence[Stretch]) -> Handle:
        with self.engine.meter.operation(f"{self.label} input norm", "norm"):
            normed = self.input_layernorm(x)
        x = self.engine.residual(x, self.self_attn(normed, rotary, stretches))
        with self.engine.meter.operation(f"{self.label} post-attention norm", "norm"):
            normed = self.post_attention_layernorm(x)
        with self.engine.meter.operation(f"{self.label} mlp", "mlp"):
            return self.engine.residual(x, self.mlp(normed))


def rotary_tables(frequencies: torch.Tensor, positions: torch.Tensor) -> Tables:
    """Cosines and sines for ``engine.rotate``; both are public.

    Shapes: frequencies [head_dim / 2] in radians per position (see ``rope``), positions [T], integers from 0; returns
    (cos, sin), each [T, head_dim], float32. The right half of each row repeats the left.
    """
    angles = positions[:, None].to(torch.float32) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotary_for(engine: Engine, tables: Tables) -> Rotary:
    """The tables of queries and keys for an engine."""
    cos, sin = tables
    query, key = score_factors(engine, cos.shape[-1])
    return Rotary((cos * query, sin * query), (cos * key, sin * key))


def score_factors(engine: Engine, head_dim: int) -> tuple[float, float]:
    """What an engine's rotated queries and keys are multiplied by."""
    if engine.softmax_base == math.e:
        return 1.0, 1.0
    unit, balance = math.log(engine.softmax_base) ** -0.5, head_dim**0.25
    return unit * balance, unit / balance


class Pass(NamedTuple):
    """One sequence's rows in a pass, which join its cache. seq_len: as of ``Llama.forward``."""

    cache: KVCache
    rows: int
    seq_len: int = 0


class Llama(EngineModule):
    """A decoder-only Llama. ``norm_scales`` gives RMSNorms, by weight name, a power of four (see ``calibration``)."""

    def __init__(self, engine: Engine, config: LlamaConfig, handles: dict, norm_scales: dict | None = None) -> None:
        super().__init__(engine)
        scales = norm_scales or {}
        parameters = Parameters(handles, config.family)
        body, head = parameters.within("model"), parameters.within("lm_head")
        table = body.get("embed_tokens.weight")
        self.config = config
        self.frequencies, self.frequencies_hold = rope_frequencies(config), unchanged_up_to(config)
        self.adopt("embed_tokens", table)
        engine.prepare(table, name="embed_tokens")
        self.blocks: list[DecoderLayer] = []
        for i in range(config.num_hidden_layers):
            layer = DecoderLayer(engine, config, body.within(f"layers.{i}"), i, scales)
            self.register_module(f"layers.{i}", layer)
            self.blocks.append(layer)
        self.register_module("norm", RMSNorm(engine, body.within("norm"), config.rms_norm_eps, scales))
        if config.tie_word_embeddings:
            engine.prepare(table, head.norm_before(), "lm_head")
        else:
            self.register_module("lm_head", Linear(engine, head))

    def new_cache(self) -> KVCache:
        config = self.config
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        layers, turn = config.num_hidden_layers, self._query_tables
        return KVCache.empty(self.engine, layers, *sizes, windows=config.windows, rotary=turn)

    def forward(self, one_hot: Handle, cache: KVCache, last_only: bool = True, seq_len: int = 0) -> Handle:
        """Logits [T, V], or [1, V] of the last row, for one-hot rows [T, V]; their keys and values join the cache.

        ``seq_len`` is the length of the whole prompt when these rows are a chunk of it (dynamic RoPE depends on it).
        """
        x = self.extend(one_hot, cache, seq_len)
        return self.logits(x[-1:] if last_only else x)

    def extend(self, one_hot: Handle, cache: KVCache, seq_len: int = 0) -> Handle:
        """Hidden states [T, H] for one-hot rows [T, V]; their keys and values join the cache."""
        return self.extend_together(one_hot, [Pass(cache, one_hot.shape[0], seq_len)])

    def extend_together(self, one_hot: Handle, passes: Sequence[Pass]) -> Handle:
        """The same for rows of several sequences, one behind the other; each row sees those of its own sequence.

        All that a layer does apart from attention it does to all rows at once; attention shares its rounds.
        """
        return self._extend(one_hot, rotary_for(self.engine, self._next_tables(passes)), passes)

    def _extend(self, one_hot: Handle, rotary: Rotary, passes: Sequence[Pass]) -> Handle:
        with self.engine.meter.operation("embedding", "embedding"):
            x = self.engine.embed(one_hot, self.embed_tokens)
        for index in range(len(self.blocks)):
            stretches = [Stretch(each.cache.layers[index], each.rows) for each in passes]
            for cache, _ in stretches:
                cache.slide()
            x = self.through(index, x, rotary, stretches)
        return x

    def step(self, cache: KVCache, one_hot: Handle, *tables: torch.Tensor) -> Handle:
        """Logits [1, V] of one token behind a padded cache; tables: of its position, as ``turning`` gives them."""
        cos, sin, *of_keys = tables
        return self.logits(self._extend(one_hot, Rotary((cos, sin), (of_keys[0], of_keys[1])), [Pass(cache, 1)]))

    def turning(self, cache: KVCache) -> list[torch.Tensor]:
        """The rotary tables of the next token behind ``cache``, which now counts as seen, for ``step``."""
        rotary = rotary_for(self.engine, self._next_tables([Pass(cache, 1)]))
        return [self.engine.turning(table) for table in (*rotary.query, *rotary.key)]

    def through(self, index: int, x: Handle, rotary: Rotary, stretches: Sequence[Stretch]) -> Handle:
        """Hidden states [T, H] through the layer of that index."""
        return self.blocks[index](x, rotary, stretches)

    def rotary(self, positions: torch.Tensor, length: int) -> Rotary:
        """Public cosines and sines, each [T, head_dim], of ``positions`` [T] in a sequence of ``length`` tokens."""
        return rotary_for(self.engine, self._tables(positions, length))

    def _tables(self, positions: torch.Tensor, length: int) -> Tables:
        frequencies = self.frequencies
        if length > self.frequencies_hold:
            frequencies = rope_frequencies(self.config, length)
        return rotary_tables(frequencies, positions)

    def _next_tables(self, passes: Sequence[Pass]) -> Tables:
        """Of the positions that come next in each sequence, which are now taken."""
        made = []
        for cache, rows, seq_len in passes:
            positions = cache.extend(rows)
            made.append(self._tables(positions, max(seq_len, cache.length)))
        if len(made) == 1:
            return made[0]
        cos, sin = (torch.cat(tables) for tables in zip(*made, strict=True))
        return cos, sin

    def _query_tables(self, positions: torch.Tensor) -> Tables:
        """How queries are turned at ``positions`` [T] behind a sequence that ends before the first of them."""
        return self.rotary(positions, int(positions[0])).query

    def logits(self, x: Handle) -> Handle:
        with self.engine.meter.operation("final norm", "norm"):
            x = self.norm(x)
        with self.engine.meter.operation("logits", "logits"):
            if self.config.tie_word_embeddings:
                return self.engine.linear(x, self.embed_tokens)
            return self.lm_head(x)


def prepare(name: str, value: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """A weight as the layers expect it: one of them takes the attention's scale in (``Family.factor``)."""
    factor = config.family.factor(name, config)
    return value if factor == 1 else value * factor
