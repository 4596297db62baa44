"""Policy ``head_split``: what each head sees, on shares and in the clear, and that it costs no round."""

import gc
import itertools
import weakref

import pytest
import torch
from eviction_runs import STEPS, VOCAB, model, near_and_far, near_over_turns, recomputed, run, weights
from safetensors.torch import save
from split_runs import ranked_model, side_by_side_and_alone

import eviction
from crypten_llm.commands import cost
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import UsageError
from crypten_llm.models.cache import LayerCache
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import go_on
from eviction.policy import HeadGroup

LENGTHS = [1, 6, 7, 8, 9, 24, 41]  # on both sides of what start + recent hold


def ranked(ranks) -> str:
    """The name of registered weights with these ranks."""
    rows = torch.tensor(ranks)
    return eviction.register(f"ranks-{'-'.join(map(str, rows.flatten().tolist()))}", save({"ranks": rows}))


def masked(prompt: int, steps: int, far, start: int, recent: int, heads: int, kv_heads: int) -> list[torch.Tensor]:
    """Logits after the prompt and after each step, of one pass that hides what the policy says is not seen."""
    ids = torch.randint(0, VOCAB, (prompt + steps,), generator=torch.Generator().manual_seed(prompt))
    seen = near_and_far(len(ids), start, recent)
    by_layer = [torch.stack([seen[is_far] for is_far in layer]) for layer in far]
    return list(recomputed(model(heads, kv_heads, len(far)), ids, by_layer)[prompt - 1 :])


def check(text: str, far, prompt: int, start: int, recent: int, **sizes) -> None:
    expected = masked(prompt, STEPS, far, start, recent, sizes["heads"], sizes["kv_heads"])
    for chunk in (1, 5, 17, 64):
        for one, other in zip(run(text, prompt, STEPS, chunk=chunk, **sizes).logits, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompt", LENGTHS)
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1), (2, 2)])
def test_it_is_masked_attention_over_all_rows(heads, kv_heads, prompt):
    name = weights("head_split", heads, kv_heads, 4)
    for far, start, recent in [(0.5, 2, 5), (0.25, 0, 1), (0.75, 3, 4), (1.0, 1, 2)]:
        text = f"head_split(far={far},start={start},recent={recent},weights={name})"
        is_far = eviction.parse(text).looks_far(4, kv_heads)
        assert is_far.sum() == 4 * kv_heads * far
        check(text, is_far.tolist(), prompt, start, recent, heads=heads, kv_heads=kv_heads, layers=4)


def test_groups_of_every_kind_of_layer():
    """All far, none far, and both kinds, in either order."""
    name = ranked([[0, 1], [6, 7], [5, 2], [3, 4]])
    policy = eviction.policy("head_split", far=0.5, weights=name)
    assert policy.looks_far(4, 2).tolist() == [[True, True], [False, False], [False, True], [True, False]]
    text = f"head_split(far=0.5,start=2,recent=5,weights={name})"
    check(text, policy.looks_far(4, 2).tolist(), 30, 2, 5, heads=4, kv_heads=2, layers=4)
    kept = {(record.index, record.which): [rows[0].tolist() for rows in record.kept] for record in run(text, 30).layers}
    assert list(kept) == [(0, (0, 1)), (1, (0, 1)), (2, (0,)), (2, (1,)), (3, (0,)), (3, (1,))]
    for (index, which), rows in kept.items():
        is_far = index == 0 or (index, which) in [(2, (1,)), (3, (0,))]
        last = list(range(30 + STEPS)) if is_far else [0, 1, *range(30 + STEPS - 5, 30 + STEPS)]
        assert rows[-1] == last, (index, which)


@pytest.mark.parametrize(
    "ranks, words",
    [
        ([[0, 1], [2, 2]], r"of shape \(2, 2\), not each of 0 to 3 once in \(2, 2\)"),
        ([[0, 1, 2, 3]], r"of shape \(1, 4\)"),
        ([[0.5, 1.0], [2.0, 3.0]], "write them for this model"),
    ],
)
def test_ranks_must_fit(ranks, words):
    with pytest.raises(UsageError, match=words):
        model(4, 2, 2).new_cache().follow(eviction.policy("head_split", weights=ranked(ranks)), 8)


def test_a_split_cache_begins_empty():
    cache = model(4, 2, 2).new_cache()
    cache.layers[0].append(torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
    with pytest.raises(UsageError, match="head_split begins with an empty cache, but this one has 3 rows"):
        cache.follow(eviction.policy("head_split", weights=weights("head_split", 4, 2, 2)), 8)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return ranked_model(tmp_path_factory.mktemp("split"))


POLICY = "head_split(far=0.34,start=2,recent=6,reading=11,weights=heads-mine)"


def test_private_tokens_equal_plain(given):
    """Prompts of both sides of the window, alone and side by side."""
    found = {}
    for engine in ("plain", "wire"):
        together, alone = side_by_side_and_alone(given, engine, (5, 31, 18), max_new_tokens=4, policy=POLICY)
        found[engine] = [one.token_ids for one in together]
        if engine == "wire":
            longest = max(one.cost.rounds() for one in alone)
            assert together[0].cost.rounds() == longest, "groups of heads within prompts side by side share all rounds"
    assert found["plain"] == found["wire"]


def test_further_turns_are_masked_attention_too():
    """No drift: after turns and answers of any length, with rows that have left the window long ago."""
    name = weights("head_split", 4, 2, 4)
    policy = eviction.policy("head_split", far=0.5, start=2, recent=5, weights=name)
    check_turns(policy, [(12, 3), (4, 1), (17, 2), (1, 6)])


@pytest.mark.parametrize("recent, reading", [(5, 9), (1, 4), (3, 50)])
@pytest.mark.parametrize("turns", [[(30, 7)], [(12, 3), (4, 1), (17, 12), (1, 6)], [(3, 9), (20, 0), (5, 4)]])
def test_a_prompt_may_see_more_than_its_answer(turns, recent, reading):
    """What an answer dropped the next turn does not see either."""
    policy = eviction.policy(
        "head_split", far=0.5, start=2, recent=recent, reading=reading, weights=weights("head_split", 4, 2, 4)
    )
    check_turns(policy, turns)


def check_turns(policy, turns) -> None:
    """turns: tokens of a prompt, and those that follow one by one."""
    llama, size = model(4, 2, 4), sum(map(sum, turns))
    ids = torch.randint(0, VOCAB, (size,), generator=torch.Generator().manual_seed(size))
    near, seen = near_over_turns(turns, policy), near_and_far(size, 0, 1)[1]
    by_layer = [torch.stack([seen if far else near for far in layer]) for layer in policy.looks_far(4, 2)]
    expected, found, cache = recomputed(llama, ids, by_layer), [], llama.new_cache()
    cache.follow(policy, turns[0][0])

    def feed(count: int) -> list[torch.Tensor]:
        part = ids[cache.length : cache.length + count]
        return list(llama(llama.engine.tokens(part, count, VOCAB), cache, last_only=False)) if count else []

    with torch.inference_mode():
        for tokens, steps in turns:
            if cache.length:
                go_on(cache, tokens)
            found += feed(tokens // 2) + feed(tokens - tokens // 2)
            cache.end_prompt()
            found += [row for _ in range(steps) for row in feed(1)]
    torch.testing.assert_close(torch.stack(found), expected, atol=1e-4, rtol=1e-4)


def counted(policy: str, config: LlamaConfig, **plan) -> cost.Prediction:
    return cost.predict(config, Plan(policy=policy, max_new_tokens=2, **plan))


def test_no_round_is_added_and_bytes_fall():
    config = LlamaConfig.from_sizes(hidden=64, heads=4, kv_heads=2, ffn=96, layers=4, vocab=64, context=400, tied=True)
    text = f"head_split(far=0.25,start=2,recent=16,weights={weights('head_split', 4, 2, 4)})"
    split, full = (counted(policy, config, prompt_tokens=256, chunk=32) for policy in (text, "full"))
    for phase in ("prefill", "decode"):
        mine, all_rows = split.phase(phase), full.phase(phase)
        assert mine["rounds"] == all_rows["rounds"]
        assert sum(mine["bytes_sent"]) < sum(all_rows["bytes_sent"])
        assert mine["dealer_bytes"] < all_rows["dealer_bytes"]
    assert all(split.memory[role]["cache"] < 0.5 * full.memory[role]["cache"] for role in split.memory)


def test_a_group_may_have_a_policy_of_its_own():
    """As a policy that also chooses rows in the heads that look far would have."""

    class Both(eviction.POLICIES["head_split"]):
        name = "both"

        def split(self, layer):
            inner = eviction.policy("snapkv", budget=10, window=4)
            return tuple(
                HeadGroup(group.heads, inner if group.window is None else group.policy, group.window, group.sinks)
                for group in super().split(layer)
            )

    llama, ids = model(4, 2, 4), torch.arange(30)
    split = Both(far=0.5, start=2, recent=5, weights=ranked([[0, 1], [6, 7], [5, 2], [3, 4]]))
    cache = llama.new_cache()
    with torch.inference_mode():
        cache.follow(split, 30)
        llama(llama.engine.tokens(ids, 30, VOCAB), cache)
        cache.end_prompt()
        llama(llama.engine.tokens(ids[:1], 1, VOCAB), cache)
    counts = [[len(part) for part in layer.parts] for layer in cache.layers]
    assert counts == [[11], [7], [11, 7], [11, 7]] and list(itertools.chain(*counts))


def test_a_cache_that_is_done_with_gives_its_rows_back_at_once():
    """No cycle keeps them until the collector comes by, which a long answer's steps would wait for."""
    gc.disable()
    try:
        cache = LayerCache(PlainEngine())
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()
