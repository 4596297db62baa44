"""A small random Llama on engine ``plain`` under a policy, recorded: what tests of policies are made of.

Owns the runs. A test's reference gets the queries and keys that the model made, and computes with them in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from policy_table import RANKED
from safetensors.torch import save

import eviction
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.insecure.recorder import LayerRecord, Recorder
from crypten_llm.models.checkpoint import expected_shapes
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama

VOCAB = 64
HEADS = [(4, 2), (4, 1), (2, 2)]  # GQA, MQA, MHA
STEPS = 6
DIRECTIONS = {"qfilters": "filters", "triattention": "centers"}  # by policy, what its file has for each kv head


@dataclass
class Run:
    """layers: by layer, what was recorded. logits: [V] after the prompt and after each step."""

    prompt: int
    heads: int
    kv_heads: int
    layers: list[LayerRecord]
    logits: list[torch.Tensor]

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def queries(self, layer: int, before: bool = False) -> torch.Tensor:
        """[heads, P, D] by position."""
        name = "query_before" if before else "query"
        return torch.cat(
            [getattr(seen, name).reshape(self.heads, len(seen.positions), -1) for seen in self.layers[layer].seen], 1
        )

    def keys(self, layer: int, before: bool = False) -> torch.Tensor:
        """[heads, P, D] by position, repeated for the query heads that share them."""
        seen = self.layers[layer].seen
        keys = torch.cat([part.key_before if before else part.key for part in seen], 1)
        return keys.repeat_interleave(self.group, 0)

    def prompt_attention(self, layer: int) -> torch.Tensor:
        """[heads, T, T], rows the queries."""
        size = self.prompt
        scores = self.queries(layer)[:, :size] @ self.keys(layer)[:, :size].mT
        return scores.masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf).softmax(-1)

    def step_attention(self, layer: int, position: int, rows: list[int], head: int) -> torch.Tensor:
        """Weights [N] of one query head over the rows at these positions."""
        return (self.keys(layer)[head, rows] @ self.queries(layer)[head, position]).softmax(0)


@cache
def model(heads: int, kv_heads: int, layers: int) -> Llama:
    """Attention is far from uniform."""
    sizes = {"hidden": 32, "heads": heads, "kv_heads": kv_heads, "ffn": 48, "layers": layers}
    config = LlamaConfig.from_sizes(**sizes, vocab=VOCAB, context=256, tied=True)
    return Llama(PlainEngine(), config, peaked_weights(config, 1.8, heads + 10 * kv_heads + 100 * layers))


def peaked_weights(config: LlamaConfig, gain: float, seed: int) -> dict[str, torch.Tensor]:
    """Random weights by name. gain: of the queries; the larger it is, the less uniform is attention."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, shape in expected_shapes(config).items():
        value = torch.randn(tuple(shape), generator=generator)
        size = gain if "q_proj" in name else 1.0
        found[name] = 1 + 0.1 * value if value.dim() == 1 else size * value / shape[1] ** 0.5
    return found


@cache
def weights(policy: str, heads: int, kv_heads: int, layers: int) -> str:
    """The name of random weights of a trained policy for this model, made known to this process."""
    return eviction.register(f"{policy}-{heads}-{kv_heads}-{layers}", trained_data(policy, heads, kv_heads, layers))


def trained_data(policy: str, heads: int, kv_heads: int, layers: int) -> bytes:
    """A file of such weights."""
    features, generator = (heads + 2 * kv_heads) * (32 // heads), torch.Generator().manual_seed(heads)
    shapes = {"w1": (features, 5), "w2": (5, kv_heads)}
    if policy == "attention_gate":
        shapes = {**dict.fromkeys(("query", "key", "value"), (features, 3)), "gate": (3, kv_heads)}
    if policy == "kvzap_linear":
        shapes = {"scores": (features, kv_heads)}
    if policy in RANKED:
        ranks = torch.randperm(layers * kv_heads, generator=generator).reshape(layers, kv_heads)
        return save({"ranks": ranks})
    if policy in DIRECTIONS:
        return save({DIRECTIONS[policy]: torch.randn(layers, kv_heads, 32 // heads, generator=generator)})
    made = {
        f"layers.{layer}.{name}": torch.randn(shape, generator=generator) / shape[0] ** 0.5
        for layer in range(layers)
        for name, shape in shapes.items()
    }
    return save(made)


@cache
def run(
    policy: str, prompt: int, steps: int = 6, heads: int = 4, kv_heads: int = 2, layers: int = 4, chunk: int = 17
) -> Run:
    """``prompt`` tokens in pieces of ``chunk``, then ``steps`` more, all drawn from a seed.

    WEIGHTS in the policy's text stands for random weights.
    """
    if "WEIGHTS" in policy:
        policy = policy.replace("WEIGHTS", weights(policy.partition("(")[0], heads, kv_heads, layers))
    llama, logits = model(heads, kv_heads, layers), []
    ids = torch.randint(0, VOCAB, (prompt + steps,), generator=torch.Generator().manual_seed(prompt))
    recorder = Recorder(eviction.parse(policy), lambda handle: handle, keep_seen=True)
    with torch.inference_mode():
        cache = llama.new_cache()
        cache.follow(recorder, prompt)
        for start in range(0, prompt, chunk):
            part = ids[start : min(start + chunk, prompt)]
            out = llama(llama.engine.tokens(part, len(part), VOCAB), cache, seq_len=prompt)
        cache.end_prompt()
        logits.append(out[0])
        for token in ids[prompt:]:
            logits.append(llama(llama.engine.tokens(token[None], 1, VOCAB), cache)[0])
    return Run(prompt, heads, kv_heads, recorder.in_order, logits)


@torch.inference_mode()
def recomputed(llama: Llama, ids: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
    """Logits [T, V] of one pass over all tokens that keeps every row and hides, in each layer, from each kv head's
    queries what ``seen`` [kv_heads, T, T] does not allow."""
    engine, size = llama.engine, len(ids)
    heads, kv_heads = llama.config.num_attention_heads, llama.config.num_key_value_heads
    x = engine.embed(engine.tokens(ids, size, VOCAB), llama.embed_tokens)
    rotary = llama.rotary(torch.arange(size), size)
    for block, allowed in zip(llama.blocks, seen, strict=True):
        attention, normed = block.self_attn, block.input_layernorm(x)
        query = attention._split(attention.q_proj(normed), heads)
        key, value = (attention._split(p(normed), kv_heads) for p in (attention.k_proj, attention.v_proj))
        query, key = engine.rotate(query, *rotary.query), engine.rotate(key, *rotary.key)
        key, value, allowed = (part.repeat_interleave(heads // kv_heads, 0) for part in (key, value, allowed))
        mixed = (query @ key.mT).masked_fill(~allowed, -torch.inf).softmax(-1) @ value
        x = x + attention.o_proj(mixed.permute(1, 0, 2).reshape(size, -1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return llama.logits(x)


def near_and_far(size: int, start: int, recent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [size, size]: what heads see that do not look far, and those that do."""
    row, column = torch.arange(size)[:, None], torch.arange(size)
    causal = column <= row
    return causal & ((column < start) | (column > row - recent)), causal


def near_over_turns(turns, policy) -> torch.Tensor:
    """Bool [size, size]: what heads see that do not look far, when the policy splits heads. turns: how many tokens of
    a prompt, and of its answer."""
    size, place, dropped = sum(map(sum, turns)), 0, policy.start
    near = near_and_far(size, policy.start, max(policy.recent, policy.reading))[0]
    for prompt, answer in turns:
        near[place:, policy.start : dropped] = False
        for token in range(place + prompt, place + prompt + answer):
            near[token, policy.start : max(policy.start, token - policy.recent + 1)] = False
        place += prompt + answer
        dropped = max(policy.start, place - policy.recent + 1)
    return near


def best(scores: dict, count: int) -> list:
    """The keys of the largest values, ties to the lower key, in order."""
    return sorted(sorted(scores, key=lambda place: (-scores[place], place))[:count])


def kept(found, layer: int) -> list:
    """By time (after the prompt, after each step) and kv head, the positions kept."""
    return [rows.tolist() for rows in found.layers[layer].kept]


def attended(found, layer: int) -> list:
    return [rows.tolist() for rows in found.layers[layer].attended]


def heads_of(found, kv_head: int) -> range:
    return range(kv_head * found.group, (kv_head + 1) * found.group)
