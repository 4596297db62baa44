"""Models whose numbers are as large as engine ``wire`` allows, where it is right, and larger, where it says so."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from eviction_runs import peaked_weights
from wire_parties import CLIENT, OWNER, run

from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.engines.wire.numbers import WireConfig
from crypten_llm.errors import LeftRange
from crypten_llm.models.checkpoint import expected_shapes
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama
from crypten_llm.protocols.activation import SILU
from crypten_llm.session.calibration import _Recorder, proofs

VOCAB = 40
WIRE = WireConfig()


def config_of(layers: int, heads: int = 2) -> LlamaConfig:
    return LlamaConfig.from_sizes(hidden=16, heads=heads, kv_heads=1, ffn=24, layers=layers, vocab=VOCAB, context=64)


def scaled(weights, factors):
    """Those whose names hold a key multiplied by its factor; a factor may be of rows [out, 1]."""
    changed = dict(weights)
    for part, factor in factors.items():
        changed |= {name: value * factor for name, value in changed.items() if part in name}
    return changed


def logits(engine, config, weights, *pieces):
    """Logits [T, V] at the client of token ids in one piece, or in several."""
    shapes, rows = expected_shapes(config), []
    held = {name: engine.parameter(v if engine.rank == OWNER else None, shapes[name]) for name, v in weights.items()}
    model = Llama(engine, config, held)
    cache, told = model.new_cache(), engine.rank == CLIENT or not engine.is_private
    for ids in pieces:
        one_hot = engine.tokens(ids if told else None, len(ids), VOCAB)
        rows.append(engine.open_to(model(one_hot, cache, last_only=False), CLIENT))
    return torch.cat(rows) if rows[0] is not None else None


@torch.inference_mode()
def reached(config, weights, ids):
    """(logits, ranges) in the clear."""
    recorder = _Recorder()
    return logits(recorder, config, weights, ids), recorder.limited


def prompt(seed: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


# Large, and right.


def until(name: str, size: float, config, weights, ids, factors: dict[str, float]) -> dict:
    """The weights, each of ``factors`` times the power of the one factor, by which the largest ``name`` is that big."""
    factor, made = 1.0, weights
    for _ in range(30):
        made = scaled(weights, {part: factor**power for part, power in factors.items()})
        most = max(map(abs, reached(config, made, ids)[1][name]))
        if abs(most / size - 1) < 0.01:
            return made
        factor *= size / most
    raise AssertionError(f"{name} is {most}, and no factor makes it {size}")


LARGE = {  # by what becomes large: how large, the weights that do it with their powers, and by how much logits may err
    "scores": ("softmax", 50.0, {"layers.0.self_attn.q_proj": 1}, 0.02),
    "values": ("mix", 200.0, {"layers.0.self_attn.v_proj": 1, "layers.0.self_attn.o_proj": -1}, 0.2),
    "hidden states": ("residual", 2.0**14, {"layers.0.mlp.down_proj": 1}, 0.02),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", LARGE)
def test_large_numbers_are_right(case, seed):
    name, size, factors, tolerance = LARGE[case]
    config, ids = config_of(layers=2), prompt(seed, 12)
    weights = until(name, size, config, peaked_weights(config, 1.0, seed), ids, factors)
    close_to_plain(config, weights, ids, tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("part", "limit"), [("gate_proj", SILU.bound(WIRE.gates)), ("up_proj", 2.0**WIRE.up_bits)])
def test_gates_and_what_they_are_multiplied_with_up_to_what_is_proved(part, limit, seed):
    config, ids = config_of(layers=2), prompt(seed, 12)
    weights = peaked_weights(config, 1.0, seed)
    factor = 0.99 * limit / max(value for name, value in proofs(config, weights) if name == part)
    weights = scaled(weights, {part: factor, "down_proj": 1 / factor})
    close_to_plain(config, weights, ids, 0.15)


@pytest.mark.parametrize("seed", range(3))
def test_outliers_in_hidden_states(seed):
    """One coordinate is 2^16 and more for some tokens."""
    config, ids = config_of(layers=2), prompt(seed, 12)
    weights, rows = peaked_weights(config, 1.0, seed), torch.ones(16, 1)
    rows[5] = 2.0**16 / max(map(abs, reached(config, weights, ids)[1]["residual"]))
    weights = scaled(weights, {"layers.0.mlp.down_proj": rows})
    assert 2**14 < max(map(abs, reached(config, weights, ids)[1]["residual"])) < 2**17
    close_to_plain(config, weights, ids, 0.005)


def close_to_plain(config, weights, ids, tolerance: float) -> None:
    """A prompt, and a token that is decoded."""
    expected, _ = reached(config, weights, ids)
    found = run(logits, config, weights, ids[:-1], ids[-1:], engine=True).results[CLIENT]
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < tolerance


# Beyond, and said.


def beyond_in_scores(draw: Random):
    """The sum of a row is too large, or too small, as that of a prompt of one token may be."""
    while True:
        config, ids = config_of(draw.choice([1, 2])), prompt(draw.randrange(1000), draw.choice([1, 1, 3, 7]))
        weights = peaked_weights(config, 1.0, draw.randrange(1000))
        factor = draw.choice([-1, 1]) * 2.0 ** draw.uniform(3, 7)
        made = scaled(weights, {f"layers.{draw.randrange(config.num_hidden_layers)}.self_attn.q_proj": factor})
        ranges = reached(config, made, ids)[1]
        (least, most), (lowest, highest) = (
            [end / math.log(2) for end in ranges[n]] for n in ("softmax", "softmax row")
        )
        if -116 < least and most < 116 and (lowest < -60 or highest > 82):
            return config, made, ids


def beyond_in_hidden_states(draw: Random):
    """A hidden state from three quarters of the limit, where its square alone is beyond, to almost three times that."""
    config, ids = config_of(draw.choice([1, 2])), prompt(draw.randrange(1000), draw.choice([1, 3, 7]))
    layer = f"layers.{draw.randrange(config.num_hidden_layers)}."
    parts = draw.choice([("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")])
    weights = scaled(peaked_weights(config, 1.0, draw.randrange(1000)), {layer + parts[0]: 30.0})
    size = 2.0**17 * draw.uniform(0.75, 2.9)
    return config, until("residual", size, config, weights, ids, {layer + parts[1]: 1}), ids


def ends(engine, cases):
    """Of each case, the words in which a party was told."""
    told = []
    for number, case in enumerate(cases):
        fresh = WireEngine(engine.transport, runtime=engine.runtime)
        with engine.meter.operation(f"case {number}"):
            try:
                logits(fresh, *case)
                told.append("")
            except LeftRange as error:
                told.append(str(error))
    return told


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 40))])
@pytest.mark.parametrize("kind", [beyond_in_scores, beyond_in_hidden_states])
def test_numbers_beyond_the_range_end_in_the_error_of_both_parties(kind, seed):
    """A thousand models in all, two hundred of them in each run; of gates the owner proves it before (``proofs``)."""
    draw = Random(seed)
    cases = [kind(draw) for _ in range(13)]
    outcome = run(ends, cases, engine=True)
    for party in (OWNER, CLIENT):
        assert all("left the range" in words for words in outcome.results[party]), outcome.results[party]
