"""Decode steps on random weights over a secret cache of a given length: what one token costs, without a model.

Owns the measurement that engines are compared by: of decoder layers, or of a whole token from its id to its logits.
Weights, cache and inputs are random and public (drawn from a seed), so that the result can be held against ``plain``;
they are shared and computed on as secrets all the same. An eviction policy finds the cache as after a prompt of that
length of which it has seen the last query alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import torch
from msgspec import Meta

from crypten_llm import limits
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.models.balance import REACH, balance
from crypten_llm.models.cache import KVCache, Stretch
from crypten_llm.models.checkpoint import expected_shapes
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.family import EMBEDDING
from crypten_llm.models.llama import (
    DecoderLayer,
    Llama,
    Parameters,
    Rotary,
    prepare,
    rotary_for,
    rotary_tables,
    score_factors,
)
from crypten_llm.models.rope import rope_frequencies
from crypten_llm.protocols.dealer.randomness import KEY_BYTES, Stream, derive_key
from crypten_llm.records import Count, Tokens
from crypten_llm.roles import CLIENT, DEALER, OWNER
from crypten_llm.session.plan import parse_policy

if TYPE_CHECKING:
    from crypten_llm.engines.base import Engine
    from crypten_llm.session.party import Party
    from eviction.operations import Handle, Layer


WARM_UP = 1
LARGEST = 64.0  # of the random numbers that stand for queries, keys and values
BYTES = 8  # of a word
FIRST_QUERY = 2_000_000
FIRST_INPUT = 1_000_000  # seeds of inputs, apart from those of weights: a row of W times itself is no typical gate


@dataclass(frozen=True)
class Shape:
    """What to measure: sizes as in config.json, ``kv_len`` cached tokens, ``steps`` counted steps.

    vocab: with it a step is a whole token, from its id to its logits; without, the decoder layers alone. sequences: so
    many take each step together, a token and a cache each.
    """

    hidden: Count
    heads: Count
    kv_heads: Count
    ffn: Count
    layers: Count = 1
    kv_len: Tokens = 1024
    steps: Tokens = 5
    policy: Annotated[str, Meta(max_length=1000)] = "full"
    vocab: Count = 0
    sequences: Annotated[int, Meta(ge=1, le=limits.PROMPTS)] = 1

    def facts(self) -> dict:
        """What decides how all messages look."""
        return asdict(self)

    def config(self) -> LlamaConfig:
        """Raises UsageError for sizes that no Llama has."""
        for name, low in (("kv_len", 1), ("steps", 1), ("heads", 1), ("vocab", 0), ("sequences", 1)):
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        sizes = {"hidden": self.hidden, "heads": self.heads, "kv_heads": self.kv_heads, "ffn": self.ffn}
        vocab, is_alone = self.vocab or 1, not self.vocab  # layers alone come with a table that nobody uses
        return LlamaConfig.from_sizes(**sizes, layers=self.layers, vocab=vocab, context=self.kv_len + 1, tied=is_alone)


@torch.inference_mode()
def run(party: Party, shape: Shape, grows: bool = False) -> dict | None:
    """Times ``shape`` on this party's engine; at the client returns what the command prints.

    grows: whether rows stay in the cache; else every step finds it as the first one did.

    Reveals: the output of each step, hidden states or logits, to the client (they come from public random numbers).
    Raises: CryptenLLMError at the client, where the error is beyond what the engine declares (``layer_error``); of a
    policy that acts, where it is no number.
    """
    config = shape.config()
    engine = party.engine
    party.start_request()
    name = f"bench {party.requests}"
    with engine.meter.phase("load"), engine.section(f"{name} weights"):
        built = _build(engine, config, shape, engine.balances)
    plain = PlainEngine(getattr(engine, "device", "cpu"), softmax_base=engine.softmax_base)
    reference = _build(plain, config, shape, engine.balances) if party.is_client else None
    seconds, errors = [], []
    for step in range(WARM_UP + shape.steps):
        given = _given(shape, FIRST_INPUT + step)
        if step == WARM_UP:
            party.fresh_meter()
        with engine.meter.phase("decode"), engine.section(f"{name} step {step}"):
            started = perf_counter()
            out = built.decode(given if party.rank == built.source(party.owner, party.client) else None, grows)
            seconds.append(perf_counter() - started)
        with engine.meter.phase("check"):
            value = party.reveals.open_to_client(
                engine, out, party.client, "output of random weights", "to measure the error"
            )
        if reference is not None:
            assert value is not None, "the client sees the output"
            expected = reference.decode(given, grows).cpu()
            errors.append((value - expected).abs().max().item())
    if not party.is_client:
        return None
    error, bound = torch.tensor(errors, dtype=torch.float64).max().item(), engine.layer_error * shape.layers  # or NaN
    # A policy may choose other rows than ``plain`` where values tie, and both are right.
    if not (math.isfinite(error) if parse_policy(shape.policy).acts else error <= bound):
        raise CryptenLLMError(
            f"engine {engine.name!r} is off by {error:.2g} on {shape.layers} random layers of these sizes, and "
            f"declares {bound:.2g}: its results cannot be used here; please report the command"
        )
    return {"seconds_per_step": median(seconds[WARM_UP:]), "max_abs_err": error, "steps": shape.steps}


def _wait_for_the_client(party: Party) -> None:
    """At the dealer, which has nothing to load: it would be ahead of the client for longer than a step may take."""
    transport = party.transport
    if transport is not None and transport.world > DEALER:
        if transport.rank == CLIENT:
            transport.send_json(DEALER, True)
        elif transport.rank == DEALER:
            transport.recv_json(CLIENT, bool, timeout=math.inf)


@dataclass
class _Built:
    """Decoder layers, and of each sequence a cache; model: what they are of, where a whole token is measured."""

    engine: Engine
    config: LlamaConfig
    layers: Sequence[DecoderLayer]
    caches: list[KVCache]
    model: Llama | None

    def __post_init__(self) -> None:
        newest = torch.full((len(self.caches),), self.config.max_position_embeddings - 1)
        self._rotary = _rotary(self.engine, self.config, newest)
        self._alike = self.engine.repeated(partial(self._through, grows=False))
        self._acts = any(part.policy.acts for cache in self.caches for layer in cache.layers for part in layer.parts)

    def source(self, owner: int, client: int) -> int:
        """Who gives what a step begins with."""
        return owner if self.model is None else client

    def decode(self, given: torch.Tensor | None, grows: bool) -> Handle:
        """One token of each sequence through all; unless the caches grow, they are left as they were. given:
        ``_given``'s, at its source.
        """
        sequences = len(self.caches)
        if self.model is None:
            x = self.engine.secret(given, (sequences, self.config.hidden_size), OWNER)
        else:
            x = self.engine.tokens(given, sequences, self.config.vocab_size)
        # A policy that acts looks at public places, which come from the processor each time.
        return self._through(x, grows) if grows or self._acts else self._alike(x)

    def _through(self, x: Handle, grows: bool) -> Handle:
        sequences = len(self.caches)
        if self.model is not None:
            with self.engine.meter.operation("embedding", "embedding"):
                x = self.engine.embed(x, self.model.embed_tokens)
        before: list[Layer | None] = [None] * sequences
        for layer, *caches in zip(self.layers, *(cache.layers for cache in self.caches), strict=True):
            used = caches if grows else [cache.copy(layer) for cache, layer in zip(caches, before, strict=True)]
            for cache in used:
                cache.slide()
            x, before = layer(x, self._rotary, [Stretch(cache, 1) for cache in used]), [cache.layer for cache in used]
        return x if self.model is None else self.model.logits(x)


def _given(shape: Shape, seed: int) -> torch.Tensor:
    """What a step begins with: token ids [sequences], or hidden states [sequences, H]."""
    if shape.vocab:
        return torch.randint(shape.vocab, (shape.sequences,), generator=torch.Generator().manual_seed(seed))
    return _random(seed, (shape.sequences, shape.hidden))


def _build(engine: Engine, config: LlamaConfig, shape: Shape, balanced: bool = False) -> _Built:
    """Weights and cached keys and values, all held by the owner; all sequences have the same. balanced: whether as
    ``balance`` leaves weights, and values as small as these make them.
    """
    is_owner, device = engine.rank == OWNER, getattr(engine, "device", "cpu")
    value_factor = REACH / math.sqrt(config.hidden_size) if balanced else 1.0
    query_factor, key_factor = score_factors(engine, config.head_dim)

    def rows(seed: int, size: tuple[int, ...], values: bool = False) -> Handle:
        return engine.rows(attended(seed, size, value_factor if values else key_factor), values)

    def attended(seed: int, size: tuple[int, ...], factor: float) -> Handle:
        """Numbers as attention meets them, which policies know to be small."""
        secret = engine.secret(_random(seed, size, device) * factor if is_owner else None, size, OWNER)
        able: Any = engine
        return able.within(secret, LARGEST)

    handles, sizes = {}, expected_shapes(config)

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        for seed, (name, size) in enumerate(sizes.items()):
            yield name, prepare(name, _as_weight(name, _random(seed, size, device)), config)

    weights = dict(made()) if balanced and is_owner else {}
    if weights:
        balance(weights, config)
    given = iter(weights.items()) if weights else made()
    for name, size in sizes.items():
        handles[name] = engine.parameter(next(given)[1] if is_owner else None, size)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    model = Llama(engine, config, handles) if shape.vocab else None
    layers = model.blocks if model is not None else _layers(engine, config, handles)
    tables = partial(_rotary, engine, config)
    caches = []
    for _ in range(shape.sequences):
        cache = KVCache.empty(engine, len(layers), heads, kv_heads, dim, rotary=lambda places: tables(places).query)
        cache.follow(parse_policy(shape.policy), shape.kv_len)
        for i, layer in enumerate(cache.layers):
            for part in layer.parts:
                cached = (part.layer.kv_heads, shape.kv_len, config.head_dim)
                part.layer.keys, part.layer.values = rows(-1 - 2 * i, cached), rows(-2 - 2 * i, cached, values=True)
        for i, layer in enumerate(cache.layers):
            for part in layer.parts:
                if part.policy.acts:
                    query = (part.layer.kv_heads, heads // kv_heads, dim)
                    part.show_last(attended(FIRST_QUERY + i, query, query_factor))
        cache.end_prompt()
        caches.append(cache)
    return _Built(engine, config, layers, caches, model)


def _rotary(engine: Engine, config: LlamaConfig, places: torch.Tensor) -> Rotary:
    return rotary_for(engine, rotary_tables(rope_frequencies(config), places))


def _layers(engine: Engine, config: LlamaConfig, handles: dict[str, Handle]) -> list[DecoderLayer]:
    body = Parameters(handles, config.family).within("model")
    return [DecoderLayer(engine, config, body.within(f"layers.{i}"), i, {}) for i in range(config.num_hidden_layers)]


def _random(seed: int, size: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Public numbers, float32, about normal, the same wherever they are made: sums of a word's eight bytes."""
    words = Stream(derive_key(bytes(KEY_BYTES), f"bench {seed}"), device).words(math.prod(size))
    sums = words.view(torch.int8).view(*size, BYTES).sum(-1, dtype=torch.int32)
    return (sums + BYTES / 2) * (12 / BYTES / (2**16 - 1)) ** 0.5


def _as_weight(name: str, value: torch.Tensor) -> torch.Tensor:
    """Norm weights near one, matrices such that products keep their size, and an embedding's entries as they are."""
    if value.dim() == 1:
        return 1 + 0.1 * value
    return value if name == f"{EMBEDDING}.weight" else value / math.sqrt(value.shape[1])
