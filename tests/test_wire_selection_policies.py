"""Every eviction policy on engine ``wire``: as on plaintext, and as engine ``cost`` counts it."""

import sys

import parties
import pytest
import torch
from eviction_runs import VOCAB, peaked_weights, weights
from policy_table import ROWS
from wire_parties import CLIENT, OWNER, run

import eviction
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire.counted import CostEngine, Links
from crypten_llm.models.checkpoint import expected_shapes
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.llama import Llama
from crypten_llm.session.prefix import Prefixes

CONFIG = LlamaConfig.from_sizes(hidden=32, heads=4, kv_heads=2, ffn=48, layers=3, vocab=VOCAB, context=256, tied=True)


WEIGHTS = peaked_weights(CONFIG, 0.6, seed=498)  # with which no policy has a close call to make
CLOSE = 3e-4  # of what is compared: twice what wire is off by


class Referee(PlainEngine):
    """``closest``: the smallest difference that decided a choice."""

    closest = float("inf")

    def decided(self, differences):
        self.closest = min([self.closest, *differences.flatten().tolist()])

    def top(self, x, count):
        if 0 < count < x.shape[-1]:
            self.decided(x.sort(-1, descending=True).values[..., count - 1 : count + 1].diff().abs())
        return super().top(x, count)

    def best(self, x, count):
        self.decided(x.sort(-1, descending=True).values[..., : count + 1].diff().abs())
        return super().best(x, count)

    def above(self, x, threshold):
        self.decided((x - threshold).abs())
        return super().above(x, threshold)


@torch.inference_mode()
def logits(engine, text, prompt, steps, public=0):
    """At the client, logits [1 + steps, V]: a prompt in chunks of 17, then single tokens.

    public: tokens of the prompt that all know.
    """
    shapes = expected_shapes(CONFIG)
    held = {n: engine.parameter(v if engine.rank == OWNER else None, shapes[n]) for n, v in WEIGHTS.items()}
    llama, rows = Llama(engine, CONFIG, held), []
    ids = torch.randint(0, VOCAB, (prompt + steps,), generator=torch.Generator().manual_seed(prompt))
    told = engine.rank == CLIENT or not engine.is_private

    def step(part):
        one_hot = engine.tokens(part if told else None, len(part), VOCAB)
        return llama(one_hot, kept, seq_len=prompt)

    kept = llama.new_cache()
    kept.follow(eviction.parse(text), prompt)
    with engine.section("prefill"):
        if public:
            clear = Llama(PlainEngine(softmax_base=engine.softmax_base), CONFIG, WEIGHTS)
            prefixes = Prefixes(engine, llama, (lambda: clear) if engine.rank == OWNER else None)
            kept.begin_with(prefixes.rows(ids[:public].tolist(), prompt), public)
        for start in range(public, prompt, 17):
            out = step(ids[start : min(start + 17, prompt)])
        kept.end_prompt()
        rows.append(engine.open_to(out, CLIENT))
    for i, token in enumerate(ids[prompt:]):
        with engine.section(f"step {i}"):
            rows.append(engine.open_to(step(token[None]), CLIENT))
    return rows if rows[0] is None else torch.cat(rows)


def settings(name: str, kind: str) -> str:
    text = getattr(ROWS[name], kind)
    return f"{name}({text.replace('WEIGHTS', weights(name, 4, 2, CONFIG.num_hidden_layers))})" if text else name


@pytest.mark.parametrize(
    ("kind", "prompt", "steps"),
    [
        ("small", 40, 4),
        pytest.param("everything", 3, 2, marks=pytest.mark.slow),
        pytest.param("least", 23, 2, marks=pytest.mark.slow),
    ],
    ids=["work to do", "a budget beyond the prompt", "one row, page or cluster"],
)
@pytest.mark.parametrize("name", ROWS)
def test_logits_under_a_policy_are_close_to_plain(name, kind, prompt, steps):
    text = settings(name, kind)
    referee = Referee()
    expected = logits(referee, text, prompt, steps)
    assert referee.closest > CLOSE, "a choice that may go either way: take another seed for the weights"
    outcome = run(logits, text, prompt, steps, engine=True)
    error = (outcome.results[CLIENT] - expected).abs().amax(-1)
    assert error.max() < ROWS[name].wire_tolerance, error
    links = Links()
    logits(CostEngine(links), text, prompt, steps)
    for party in (0, 1):
        mine, real = links.meters[party].snapshot(), outcome.traffic[party]
        assert (mine.online.rounds, mine.online.bytes_sent) == (real.online.rounds, real.online.bytes_sent)
        assert mine.dealer.bytes_received == real.dealer.bytes_received


@pytest.mark.parametrize("name", [name for name in ROWS if eviction.policy(name).watches(40) < 40])
def test_the_same_after_a_public_prefix(name):
    """Of rows that came in one message as of those that were opened."""
    text = settings(name, "small")
    expected, public = logits(Referee(), text, 40, 3), 40 - max(1, eviction.parse(text).watches(40))
    outcome = run(logits, text, 40, 3, public, engine=True)
    error = (outcome.results[CLIENT] - expected).abs().amax(-1)
    assert error.max() < ROWS[name].wire_tolerance, error


def loaded(engine, *arguments):
    logits(engine, *arguments)
    return {"sympy", "torch._dynamo"} & set(sys.modules)


def test_no_role_loads_torchs_compiler():
    """What takes a second and more to import, and is asked for by shapes alone (``wire.shapes``)."""
    assert parties.run(loaded, settings("mikv", "small"), 14, 1, wire=True) == [set()] * 3
