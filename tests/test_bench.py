"""Bench measures decode steps on a secret cache of fixed length, and holds the result against ``plain``."""

from dataclasses import replace

import party_jobs
import pytest
import torch
from parties import run

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import CryptenLLMError, UsageError
from crypten_llm.session import bench
from crypten_llm.session.bench import Shape
from crypten_llm.session.party import Party

SHAPE = Shape(hidden=32, heads=4, kv_heads=2, ffn=48, layers=1, kv_len=20, steps=2)


def test_bench_on_real_parties():
    owner, client = run(party_jobs.bench, SHAPE)
    assert owner["figures"] is None
    figures = client["figures"]
    assert figures["steps"] == 2 and figures["seconds_per_step"] > 0
    assert 0 < figures["max_abs_err"] < 0.05
    # Every step costs the same, on the same length, and the opening that measures the error is not part of it.
    rounds = sum(row["rounds"] for row in client["table"] if row["phase"] == "decode")
    assert rounds == 2 * client["one_step"]
    assert {row["phase"] for row in client["table"] if row["rounds"]} == {"decode", "check"}


@pytest.mark.parametrize("wire", [False, True])
def test_a_whole_token_on_real_parties(wire):
    """From its id to its logits: more rounds than the layers alone, alike in every step, and close to ``plain``."""
    shape = replace(SHAPE, vocab=50)
    client, alone = run(party_jobs.bench, shape, wire=wire)[1], run(party_jobs.bench, SHAPE, wire=wire)[1]
    assert 0 < client["figures"]["max_abs_err"] < 0.1
    rounds = {
        name: sum(row["rounds"] for row in client["table"] if row["kind"] == name) for name in ("embedding", "mlp")
    }
    assert rounds["embedding"] > 0 and rounds["mlp"] > 0
    assert client["one_step"] > alone["one_step"]
    assert sum(row["rounds"] for row in client["table"] if row["phase"] == "decode") == 2 * client["one_step"]


def test_what_a_step_gives():
    """Logits of the vocabulary; hidden states without one."""
    for vocab, width in ((50, 50), (0, SHAPE.hidden)):
        shape = replace(SHAPE, vocab=vocab)
        with torch.inference_mode():
            built = bench._build(PlainEngine(), shape.config(), shape)
            assert built.decode(bench._given(shape, 1), grows=False).shape == (1, width)


@pytest.mark.parametrize(
    "policy, near, far",
    [
        ("head_split(start=2,recent=8)", 10, 40),
        ("head_split(start=2,recent=8,reading=16)", 9, 40),
        ("far_blocks(start=2,recent=8,budget=18,block=4,last=4)", 10, 16),
    ],
)
def test_split_heads_read_no_more_in_a_bench_than_in_an_answer(policy, near, far):
    """As many rows in each step, whether the cache grows or not. Where the prompt's window is wider than the answer's a
    row is dropped behind a token, not before the next one."""
    shape = Shape(hidden=32, heads=4, kv_heads=4, ffn=32, layers=6, kv_len=40, policy=policy)
    with torch.inference_mode():
        built = bench._build(PlainEngine(), shape.config(), shape)
        for step in range(3):
            built.decode(bench._given(shape, step), grows=True)
            sizes = {len(part) for cache in built.caches for layer in cache.layers for part in layer.parts}
            assert sizes == {near, far + 1 + step}


@pytest.mark.parametrize(
    "change", [{"vocab": -1}, {"kv_len": 0}, {"steps": 0}, {"heads": 0}, {"heads": 3}, {"kv_heads": 3}]
)
def test_impossible_sizes(change):
    with pytest.raises(UsageError):
        Shape(**vars(SHAPE) | change).config()


def test_an_error_beyond_the_declared_one_ends_the_bench():
    class Broken(PlainEngine):
        def swiglu(self, gate, up):
            return super().swiglu(gate, up) + 1e-2

    with pytest.raises(CryptenLLMError, match="engine 'plain' is off by .* declares 0.0001"):
        bench.run(Party(Broken()), SHAPE)
    assert bench.run(Party(PlainEngine()), SHAPE)["max_abs_err"] < 1e-4


@pytest.mark.parametrize("policy", ["full", "snapkv(budget=0.5)"])
def test_what_is_no_number_in_any_step_ends_the_bench(policy):
    class Broken(PlainEngine):
        steps = 0

        def swiglu(self, gate, up):
            self.steps += 1
            return super().swiglu(gate, up) * (torch.nan if self.steps > 1 else 1)

    with pytest.raises(CryptenLLMError, match="is off by nan"):
        bench.run(Party(Broken()), replace(SHAPE, policy=policy))


@pytest.mark.parametrize("wire", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sequences_that_take_a_step_together_take_the_rounds_of_one(wire):
    """And their outputs are those of each alone: the first is given what one alone is given."""
    three = replace(SHAPE, vocab=50, sequences=3)
    together, alone = (run(party_jobs.bench, shape, wire=wire)[1] for shape in (three, replace(three, sequences=1)))
    assert 0 < together["figures"]["max_abs_err"] < 0.1
    if wire:
        assert together["one_step"] == alone["one_step"]
    plain = PlainEngine()
    with torch.inference_mode():
        outs = []
        for shape in (three, replace(three, sequences=1)):
            built = bench._build(plain, shape.config(), shape)
            outs.append(built.decode(torch.tensor([7, 8, 9])[: shape.sequences], grows=True))
    torch.testing.assert_close(outs[0][:1], outs[1])
