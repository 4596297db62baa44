"""How many bytes a model, a request and a bench are sure to take at a party, from sizes alone.

Owns these predictions, which are held against this machine (``memory``) before another party's words have it make
anything. They count from below: what they refuse would have ended in swapping at best. cached: bytes of a cached
number at a party, see ``Engine.holds``; 0 where none is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crypten_llm.session.plan import parse_policy

if TYPE_CHECKING:
    from crypten_llm.engines.base import Held
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.session.bench import Shape
    from crypten_llm.session.plan import Plan


def of_token(config: LlamaConfig, cached: int) -> int:
    """What a cache has of one token, in all layers."""
    return 2 * config.num_key_value_heads * config.head_dim * cached * config.num_hidden_layers


def of_requests(config: LlamaConfig, plans: Sequence[Plan], cached: int) -> int:
    """What these prompts add to their caches, and room for the whole of padded ones; and in each prompt's largest pass
    the attention scores of one layer among the tokens of the pass.
    """
    row = 2 * config.num_key_value_heads * config.head_dim * cached
    windows = config.windows or (None,) * config.num_hidden_layers
    total = 0
    for plan in plans:
        prompt = len(plan.public_prefix) + plan.prompt_tokens
        if not parse_policy(plan.policy).cuts_prompts:
            total += sum(row * (prompt if window is None else min(prompt, window)) for window in windows)
        total += row * config.num_hidden_layers * plan.room()
        total += config.num_attention_heads * min(plan.chunk, plan.prompt_tokens) ** 2 * cached
    return total


def of_bench(shape: Shape, held: Held) -> int:
    """Weights and cache. Raises UsageError as ``Shape.config``."""
    config = shape.config()
    cached = shape.sequences * shape.kv_len * of_token(config, held.cached)
    return config.parameters * held.weight + cached
