"""Policies in a conversation: those that go on leave earlier turns' rows as they are, on plaintext and on shares."""

import pytest
import torch
from eviction_runs import trained_data
from hf_models import tiny
from safetensors.torch import save
from test_wire_engine import load
from wire_parties import run

import eviction
from crypten_llm import PrivateLlama
from crypten_llm.errors import UsageError
from crypten_llm.roles import CLIENT
from crypten_llm.session.prompted import go_on

ABLE = sorted(name for name, policy in eviction.POLICIES.items() if policy.goes_on)

TOKENS = torch.randint(3, 97, (60,), generator=torch.Generator().manual_seed(5)).tolist()
TURNS = (20, 3), (17, 2), (9, 4)  # tokens of a prompt, then of its answer


def conversation(model, policy, turns=TURNS):
    """At the client, the logits [V] of every step, and at all the rows of layer 0 after each turn: of its last group,
    where heads are split."""
    engine = model.engine
    cache, at, found, rows = model.new_cache(), 0, [], []

    def step(size):
        nonlocal at
        told = torch.tensor(TOKENS[at : at + size]) if engine.rank == CLIENT or not engine.is_private else None
        at += size
        return engine.open_to(model(engine.tokens(told, size, 97), cache, seq_len=at), CLIENT)

    for prompt, answer in turns:
        if cache.length:
            go_on(cache, prompt)
        else:
            cache.follow(eviction.parse(policy), prompt)
        step(prompt - prompt // 2)
        out = step(prompt // 2)
        cache.end_prompt()
        for _ in range(answer):
            found.append(out)
            out = step(1)
        rows.append(cache.layers[0].parts[-1].keys)
    return found if found[0] is None else torch.cat(found), rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("small"), max_position_embeddings=128)[0]


@pytest.fixture(scope="module")
def small(folder):
    with PrivateLlama.from_pretrained(str(folder), engine="plain") as llama:
        yield llama.party.model


FILTERS = eviction.register(
    "filters-in-turns", save({"filters": torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(1))})
)
CENTERS = eviction.register("centers-in-turns", trained_data("triattention", 4, 2, 2))
MAPS = eviction.register("maps-in-turns", trained_data("kvzap_linear", 4, 2, 2))
RANKS = eviction.register("ranks-in-turns", save({"ranks": torch.tensor([[0, 2], [3, 1]])}))
KEEPS_ALL = {
    "full": "full",
    "streaming_llm": "streaming_llm(recent=60)",
    "head_split": f"head_split(far=0.5,recent=60,weights={RANKS})",
    "far_blocks": f"far_blocks(far=0.5,recent=60,budget=60,weights={RANKS})",
    "snapkv": "snapkv(budget=60,window=4)",
    "pyramidkv": "pyramidkv(budget=60,window=4)",
    "expected_attention": "expected_attention(budget=60)",
    "qfilters": f"qfilters(budget=60,weights={FILTERS})",
    "triattention": f"triattention(budget=60,weights={CENTERS})",
    "kvzap_linear": f"kvzap_linear(budget=60,weights={MAPS})",
    "quest": "quest(page=4,budget=60,dense=0)",
    "infllm": "infllm(block=4,blocks=12,representatives=2,initial=2,local=8)",
    "longcache": "longcache(top=4,span=2,sinks=2,local=20)",
}
DROPS = {
    "streaming_llm": "streaming_llm(start=2,recent=9)",
    "head_split": f"head_split(far=0.5,start=2,recent=9,weights={RANKS})",
    "far_blocks": f"far_blocks(far=0.5,start=2,recent=9,budget=9,block=2,last=3,weights={RANKS})",
    "snapkv": "snapkv(budget=7,window=3)",
    "pyramidkv": "pyramidkv(budget=7,window=2,beta=2)",
    "expected_attention": "expected_attention(budget=7,start=1,recent=2)",
    "qfilters": f"qfilters(budget=7,start=1,recent=2,weights={FILTERS})",
    "triattention": f"triattention(budget=7,start=1,recent=2,weights={CENTERS})",
    "kvzap_linear": f"kvzap_linear(budget=7,start=1,recent=2,weights={MAPS})",
    "quest": "quest(page=4,budget=12,dense=0)",
    "infllm": "infllm(block=2,blocks=2,representatives=1,initial=2,local=4)",
    "longcache": "longcache(top=1,span=2,sinks=2,local=4)",
}


def test_every_policy_that_goes_on_is_tested():
    assert sorted(KEEPS_ALL) == ABLE and sorted([*DROPS, "full"]) == ABLE
    assert {"full", "streaming_llm", "snapkv"} <= set(ABLE)
    assert all(policy.goes_on or policy.why_not for policy in eviction.POLICIES.values())


@torch.inference_mode()
@pytest.mark.parametrize("policy", KEEPS_ALL.values())
def test_a_policy_that_leaves_nothing_out_is_the_full_cache_in_every_turn(small, policy):
    torch.testing.assert_close(conversation(small, policy)[0], conversation(small, "full")[0])


@torch.inference_mode()
@pytest.mark.parametrize("name", DROPS)
def test_rows_of_earlier_turns_stay_as_they_are(small, name):
    logits, rows = conversation(small, DROPS[name])
    assert (logits - conversation(small, "full")[0]).abs().max() > 1e-3, "it leaves something out"
    for before, after in zip(rows, rows[1:], strict=False):
        if name in ("streaming_llm", "head_split", "far_blocks"):  # whose window moves on, over rows that nobody chose
            assert torch.equal(after[:, :2], before[:, :2])
            assert after.shape[1] == 11
        else:
            assert torch.equal(after[:, : before.shape[1]], before)
            assert after.shape[1] > before.shape[1]


@torch.inference_mode()
@pytest.mark.parametrize(
    "name", ["snapkv", "pyramidkv", "expected_attention", "qfilters", "triattention", "kvzap_linear"]
)
def test_each_turn_is_compressed_to_its_budget(small, name):
    _, rows = conversation(small, DROPS[name])
    counts = [0, *(row.shape[1] for row in rows)]
    kept = [after - before - answer for (_, answer), before, after in zip(TURNS, counts, counts[1:], strict=False)]
    assert all(0 < count < prompt for count, (prompt, _) in zip(kept, TURNS, strict=True))
    assert kept == [7, 7, 7] or name == "pyramidkv"


@torch.inference_mode()
def test_go_on_refuses_a_policy_that_cannot(small):
    cache = small.new_cache()
    cache.follow(eviction.parse("tova(size=9)"), 4)
    small(small.engine.tokens(torch.tensor(TOKENS[:4]), 4, 97), cache)
    with pytest.raises(UsageError, match="policy tova cannot go on"):
        go_on(cache, 3)


@pytest.mark.parametrize("policy", ["full", *DROPS.values()])
def test_turns_on_shares_give_the_logits_of_plaintext(small, folder, policy):
    turns = TURNS[:2]

    def job(engine):
        model = load(engine, folder)
        with engine.section("turns"):
            return conversation(model, policy, turns)[0]

    with torch.inference_mode():
        expected = conversation(small, policy, turns)[0]
    error = (run(job, engine=True).results[CLIENT] - expected).abs()
    assert expected.abs().max() > 3 and error.max() < 0.02
