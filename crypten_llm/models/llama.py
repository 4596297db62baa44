"""The Llama definition: one for every engine and family. It reads like the architecture and knows no protocol."""

import torch

from crypten_llm.models.cache import KVCache
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.layers import DecoderLayer, EngineModule, Linear, Parameters, RMSNorm, rotary_tables
from crypten_llm.models.rope import rope_frequencies, unchanged_up_to


class Llama(EngineModule):
    """A decoder-only Llama. ``norm_scales`` gives RMSNorms, by weight name, a power of four (see ``calibration``)."""

    def __init__(self, engine, config: LlamaConfig, handles: dict, norm_scales: dict | None = None):
        super().__init__(engine)
        scales = norm_scales or {}
        parameters = Parameters(handles, config.family)
        body, head = parameters.within("model"), parameters.within("lm_head")
        table = body.get("embed_tokens.weight")
        self.config = config
        self.frequencies, self.frequencies_hold = rope_frequencies(config), unchanged_up_to(config)
        self.adopt("embed_tokens", table)
        engine.prepare(table)
        self.blocks = []
        for i in range(config.num_hidden_layers):
            layer = DecoderLayer(engine, config, body.within(f"layers.{i}"), i, scales)
            self.register_module(f"layers.{i}", layer)
            self.blocks.append(layer)
        self.register_module("norm", RMSNorm(engine, body.within("norm"), config.rms_norm_eps, scales))
        if config.tie_word_embeddings:
            engine.prepare(table, head.norm_before())
        else:
            self.register_module("lm_head", Linear(engine, head))

    def new_cache(self) -> KVCache:
        config = self.config
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        return KVCache.empty(self.engine, config.num_hidden_layers, *sizes)

    def forward(self, one_hot, cache: KVCache, last_only: bool = True, seq_len: int = 0):
        """Logits [T, V], or [1, V] of the last row, for one-hot rows [T, V]; their keys and values join the cache.

        ``seq_len`` is the length of the whole prompt when these rows are a chunk of it (dynamic RoPE depends on it).
        """
        x = self.extend(one_hot, cache, seq_len)
        return self.logits(x[-1:] if last_only else x)

    def extend(self, one_hot, cache: KVCache, seq_len: int = 0):
        """Hidden states [T, H] for one-hot rows [T, V]; their keys and values join the cache."""
        with self.engine.operation("embedding", "embedding"):
            x = self.engine.embed(one_hot, self.embed_tokens)
        return self.decode_rows(x, cache, seq_len)

    def decode_rows(self, x, cache: KVCache, seq_len: int = 0):
        """Hidden states [T, H] through every layer; their keys and values join the cache."""
        rows = x.shape[0]
        positions = cache.extend(rows)
        rotary = self.rotary(positions, max(seq_len, cache.length))
        mask = None
        for layer, layer_cache in zip(self.blocks, cache.layers, strict=True):
            length = len(layer_cache) + rows  # layers may keep different counts of rows
            if rows > 1 and (mask is None or mask.shape[1] != length):
                mask = causal_mask(rows, length)
            x = layer(x, rotary, layer_cache, mask)
        return x

    def rotary(self, positions, length: int):
        """Public cosines and sines [T, head_dim] of ``positions`` [T] in a sequence of ``length`` tokens."""
        frequencies = self.frequencies
        if length > self.frequencies_hold:
            frequencies = rope_frequencies(self.config, length)
        return rotary_tables(frequencies, positions)

    def logits(self, x):
        with self.engine.operation("final norm", "norm"):
            x = self.norm(x)
        with self.engine.operation("logits", "logits"):
            if self.config.tie_word_embeddings:
                return self.engine.linear(x, self.embed_tokens)
            return self.lm_head(x)


def causal_mask(rows: int, length: int) -> torch.Tensor:
    """Public bool [rows, length]: the last ``rows`` of ``length`` cached rows, each seeing itself and those before."""
    return torch.ones(rows, length, dtype=torch.bool).tril(length - rows)


def prepare(name: str, value: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """A weight as the layers expect it: one of them takes the attention's scale in (``Family.factor``)."""
    factor = config.family.factor(name, config)
    return value if factor == 1 else value * factor
