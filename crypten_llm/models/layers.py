"""The parts of a Llama decoder, as ``crypten.nn`` modules over an engine's operations.

Owns the mathematics of one layer and nothing about where numbers live. Parameter names are Hugging Face's.
"""

import math

from crypten_llm.compat import import_crypten

Module = import_crypten().nn.Module


class Parameters:
    """Hands each layer its weights by Hugging Face name: ``parameters.within("mlp").get("up_proj.weight")``."""

    def __init__(self, handles: dict, prefix: str = ""):
        self.handles = handles
        self.prefix = prefix

    def within(self, name: str) -> "Parameters":
        return Parameters(self.handles, f"{self.prefix}{name}.")

    def get(self, name: str):
        return self.handles[self.prefix + name]

    def find(self, name: str):
        return self.handles.get(self.prefix + name)


class EngineModule(Module):
    """A ``crypten.nn`` module that computes through ``engine``; masks and rotary tables stay public."""

    SUPPORTS_PLAINTEXT_INPUTS = True

    def __init__(self, engine):
        super().__init__()
        self.engine = engine
        self.encrypted = engine.is_private  # CrypTen refuses secrets in a module that does not say so

    def adopt(self, name: str, handle):
        """Registers a weight, so that CrypTen's own module tools (named_parameters, state_dict) see it."""
        if handle is None:
            setattr(self, name, None)
        else:
            self.register_parameter(name, handle, requires_grad=False)


class Linear(EngineModule):
    """``norm``: weight of the norm whose output this layer takes, if one does."""

    def __init__(self, engine, parameters: Parameters, norm=None):
        super().__init__(engine)
        self.adopt("weight", parameters.get("weight"))
        self.adopt("bias", parameters.find("bias"))
        engine.prepare(parameters.get("weight"), norm)

    def forward(self, x):
        return self.engine.linear(x, self.weight, self.bias)


class RMSNorm(EngineModule):
    def __init__(self, engine, parameters: Parameters, eps: float, scale: float):
        super().__init__(engine)
        self.adopt("weight", parameters.get("weight"))
        self.eps = eps
        self.scale = scale

    def forward(self, x):
        return self.engine.rms_norm(x, self.weight, self.eps, self.scale)


class Attention(EngineModule):
    """Grouped-query attention. Query heads of one kv head share a matrix product: [kv_heads, group * T, head_dim]."""

    def __init__(self, engine, config, parameters: Parameters, label: str, norm):
        super().__init__(engine)
        self.label = label
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        for name in ("q_proj", "k_proj", "v_proj"):
            self.register_module(name, Linear(engine, parameters.within(name), norm))
        self.register_module("o_proj", Linear(engine, parameters.within("o_proj")))

    def forward(self, x, rotary, cache, mask):
        engine, rows, policy, group = self.engine, x.shape[0], cache.policy, self.heads // self.kv_heads
        with engine.operation(f"{self.label} query, key, value", "qkv"):
            query = self._split(self.q_proj(x), self.heads)
            key = self._split(self.k_proj(x), self.kv_heads)
            value = self._split(self.v_proj(x), self.kv_heads)
            query_before, key_before = query, key
            query, key = engine.rotate(query, *rotary), engine.rotate(key, *rotary)
            query, key, value = policy.enter(engine, cache.layer, query, key, value)
            cache.append(engine.rows(key), engine.rows(value, values=True))
            query = query.reshape(self.kv_heads, group * rows, self.head_dim)
        choice = cache.choose(query, query_before)
        with engine.operation(f"{self.label} scores", "scores"):
            scores = engine.scores(query, cache.keys)
            gathered = scores if choice is None else engine.gather_scores(choice, scores)
        with engine.operation(f"{self.label} softmax", "softmax"):
            weights = engine.softmax(gathered, None if mask is None else mask.repeat(group, 1))
        with engine.operation(f"{self.label} values", "values"):
            if choice is not None:
                weights = engine.scatter_weights(choice, weights, len(cache))
            mixed = engine.mix(weights, cache.values)
            mixed = policy.leave(engine, cache.layer, mixed)
            mixed = mixed.reshape(self.heads, rows, self.head_dim).permute(1, 0, 2)
            out = self.o_proj(mixed.reshape(rows, self.heads * self.head_dim))
        rotated = {"query": query, "key": key, "value": value, "scores": scores, "weights": weights}
        cache.show(rows, **rotated, query_before=query_before, key_before=key_before)
        return out

    def _split(self, x, heads):
        return x.reshape(x.shape[0], heads, self.head_dim).permute(1, 0, 2)


class MLP(EngineModule):
    def __init__(self, engine, parameters: Parameters, norm):
        super().__init__(engine)
        for name in ("gate_proj", "up_proj"):
            self.register_module(name, Linear(engine, parameters.within(name), norm))
        self.register_module("down_proj", Linear(engine, parameters.within("down_proj")))

    def forward(self, x):
        return self.down_proj(self.engine.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(EngineModule):
    def __init__(self, engine, config, parameters: Parameters, index: int, norm_scales: dict):
        super().__init__(engine)
        self.label = f"layer {index}"
        norms = [parameters.within(name) for name in ("input_layernorm", "post_attention_layernorm")]
        for name, norm in zip(("input_layernorm", "post_attention_layernorm"), norms, strict=True):
            scale = norm_scales.get(norm.prefix + "weight", 1.0)
            self.register_module(name, RMSNorm(engine, norm, config.rms_norm_eps, scale))
        before, after = (norm.get("weight") for norm in norms)
        self.register_module("self_attn", Attention(engine, config, parameters.within("self_attn"), self.label, before))
        self.register_module("mlp", MLP(engine, parameters.within("mlp"), after))

    def forward(self, x, rotary, cache, mask):
        with self.engine.operation(f"{self.label} input norm", "norm"):
            normed = self.input_layernorm(x)
        x = self.engine.residual(x, self.self_attn(normed, rotary, cache, mask))
        with self.engine.operation(f"{self.label} post-attention norm", "norm"):
            normed = self.post_attention_layernorm(x)
        with self.engine.operation(f"{self.label} mlp", "mlp"):
            return self.engine.residual(x, self.mlp(normed))


def query_scale(head_dim: int) -> float:
    """1 / sqrt(head_dim), folded into the query projection when weights are loaded, so that scores cost no more."""
    return 1 / math.sqrt(head_dim)
