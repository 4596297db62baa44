"""Models of shapes drawn at random, on both sides of every plan that switches on a shape, held against ``plain``.

A plan for a small matrix and one for a large one are two programs, and a table of hand-picked models runs one of them.
"""

from __future__ import annotations

from random import Random

import party_jobs
import pytest
from hf_models import tiny
from parties import run as run_processes
from test_wire_engine import IDS, PLAIN, logits
from wire_parties import CLIENT, run

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.session.bench import Shape

WIDE = ("ffn", "queries", "both")  # which outputs of a layer are more than 4 hidden sizes


def shape(seed: int, wide: str = "") -> dict:
    """Fields of a LlamaConfig; ``wide`` is one of ``WIDE``, or nothing for a model whose outputs all are small."""
    draw = Random(f"{seed} {wide}")
    hidden = draw.choice([12, 24, 48])  # transformers wants a multiple of the heads
    kv_heads, group = draw.choice([1, 2, 3]), draw.choice([1, 2])
    ffn = draw.randint(4 * hidden + 1, 9 * hidden) if wide in ("ffn", "both") else draw.randint(hidden, 4 * hidden)
    heads = kv_heads * group
    least = 4 * hidden // heads // 2 + 1  # head_dim is even
    head_dim = 2 * draw.randint(least, 2 * least) if wide in ("queries", "both") else 2 * draw.randint(1, least - 1)
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "num_hidden_layers": draw.choice([1, 2]),
        "vocab_size": draw.choice([hidden, 97, 4 * hidden, 4 * hidden + 1]),
        "attention_bias": draw.random() < 0.5,
        "mlp_bias": draw.random() < 0.5,
        "tie_word_embeddings": draw.random() < 0.5,
    }


@pytest.mark.parametrize("wide", ["", *WIDE], ids=lambda wide: wide or "none")
@pytest.mark.parametrize("seed", range(3))
def test_wire_on_random_shapes(tmp_path, seed, wide):
    model = shape(seed, wide)
    folder, _ = tiny(tmp_path, **model)
    ids, pieces = IDS % model["vocab_size"], [7, 5, 1, 1]
    expected = logits(PLAIN, folder, pieces, ids)
    found = run(logits, folder, pieces, ids, engine=True).results[CLIENT]
    assert expected.abs().max() > 0.5
    assert (found - expected).abs().max() < 0.004 * expected.abs().max(), model


@pytest.mark.parametrize("wide", ["both", ""], ids=lambda wide: wide or "none")
def test_crypten_on_random_shapes(tmp_path, wide):
    model = shape(7, wide)
    folder, _ = tiny(tmp_path, **model)
    ids = IDS[:6] % model["vocab_size"]
    expected = logits(PlainEngine(), folder, [4, 2], ids)
    value = run_processes(party_jobs.logits, str(folder), ids, [4, 2])[1]
    assert (value - expected).abs().max() < 0.02 * expected.abs().max(), model


@pytest.mark.parametrize("ffn", [63, 64, 129, 512])
def test_bench_on_both_sides_of_a_wide_layer(ffn):
    """It once had an error of 3e4 on the wide ones, and ended with exit 0."""
    figures = run_processes(
        party_jobs.bench, Shape(hidden=16, heads=2, kv_heads=1, ffn=ffn, layers=2, kv_len=9, steps=1), wire=True
    )[1]["figures"]
    assert 0 < figures["max_abs_err"] < 2e-3
