"""Policy ``far_blocks``: which blocks it chooses, that an answer is masked attention over all rows, and its cost."""

import pytest
import torch
from eviction_runs import STEPS, VOCAB, model, near_and_far, near_over_turns, recomputed, run, weights
from safetensors.torch import save
from split_runs import ranked_model, side_by_side_and_alone

import eviction
from crypten_llm import PrivateLlama
from crypten_llm.commands import cost
from crypten_llm.insecure.recorder import Recorder
from crypten_llm.models.config import LlamaConfig
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import go_on
from eviction import trained

SETTINGS = "far=0.5,start=2,recent=5,reading=9,budget=0.5,block=3,window=4,last=5"


def text(heads: int, kv_heads: int, settings: str = SETTINGS) -> str:
    return f"far_blocks({settings},weights={weights('far_blocks', heads, kv_heads, 4)})"


def drawn(record, prompt: int, policy, group: int) -> torch.Tensor:
    """By position, the attention of the prompt's last tokens in all heads of a group, number by number."""
    queries = torch.cat(
        [seen.query.reshape(len(record.keys), group, -1, record.keys.shape[-1]) for seen in record.seen], 2
    )
    found = torch.zeros(prompt)
    for head, keys in enumerate(record.keys):
        for place in range(max(0, prompt - policy.window), prompt):
            for query in queries[head, :, place]:
                found[: place + 1] += (keys[: place + 1] @ query).softmax(0) / group
    return found


def chosen(attention: torch.Tensor, prompt: int, policy) -> list[int]:
    """The positions that are read after a prompt."""
    blocks = (prompt - policy.start - policy.last) // policy.block
    stop = policy.start + blocks * policy.block
    count = max(1, (round(policy.budget * prompt) - policy.start - (prompt - stop)) // policy.block)
    score = [attention[policy.start + b * policy.block :][: policy.block].sum().item() for b in range(blocks)]
    reach = policy.reach
    likeness = [sum(score[max(0, b - reach) : b + reach + 1]) for b in range(blocks)]
    kept = sorted(sorted(range(blocks), key=lambda b: (-likeness[b], b))[:count])
    middle = [policy.start + b * policy.block + i for b in kept for i in range(policy.block)]
    return [*range(policy.start), *middle, *range(stop, prompt)]


@pytest.mark.parametrize("prompt", [24, 41, 60])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1), (2, 2)])
def test_what_is_read_drew_most_attention_of_the_prompts_end(heads, kv_heads, prompt):
    """In all heads that look far and all layers together, and they all read the same."""
    policy, far, attention = eviction.parse(text(heads, kv_heads)), [], torch.zeros(prompt)
    for record in run(text(heads, kv_heads), prompt, STEPS, heads=heads, kv_heads=kv_heads).layers:
        if policy.looks_far(4, kv_heads)[record.index, record.which[0]]:
            far.append(record)
            attention += drawn(record, prompt, policy, heads // kv_heads)
    expected, new = chosen(attention, prompt, policy), list(range(prompt, prompt + STEPS))
    assert len(expected) < prompt and sum(len(record.which) for record in far) == 2 * kv_heads
    for record in far:
        assert record.kept[0].tolist() == [expected] * len(record.which)
        assert record.kept[-1].tolist() == [expected + new] * len(record.which)


def turns_of(policy, turns, chunk: int, heads: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a conversation, each token's [V], as the cache gives them and by ``recomputed``; turns: tokens of a
    prompt, and of its answer."""
    llama, size = model(heads, kv_heads, 4), sum(map(sum, turns))
    ids = torch.randint(0, VOCAB, (size,), generator=torch.Generator().manual_seed(size))
    near, causal = near_over_turns(turns, policy), near_and_far(size, 0, 1)[1]
    seen = [torch.stack([causal if far else near for far in layer]).clone() for layer in policy.looks_far(4, kv_heads)]
    recorder, cache, found = Recorder(policy, lambda handle: handle), llama.new_cache(), []

    def feed(count: int) -> None:
        part = ids[cache.length : cache.length + count]
        found.extend(llama(llama.engine.tokens(part, count, VOCAB), cache, last_only=False))

    with torch.inference_mode():
        for prompt, answer in turns:
            go_on(cache, prompt) if cache.length else cache.follow(recorder, prompt)
            stop = cache.length + prompt
            while cache.length < stop:
                feed(min(chunk, stop - cache.length))
            cache.end_prompt()
            for _ in range(answer):
                place = cache.length
                feed(1)
                for record in recorder.layers.values():
                    for head, rows in zip(record.which, record.attended[-1], strict=True):
                        seen[record.index][head, place] = False
                        seen[record.index][head, place, rows] = True
    assert not torch.equal(torch.stack(seen), torch.stack(seen) | causal), "something is left out"
    return torch.stack(found), recomputed(llama, ids, seen)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (2, 2)])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("turns", [[(41, 9)], [(30, 3), (4, 1), (17, 5), (1, 6)], [(8, 2), (40, 4)]])
def test_an_answer_is_masked_attention_over_all_rows(heads, kv_heads, chunk, turns):
    """No drift, and a further turn's prompt sees what the answer before it did not read."""
    found, expected = turns_of(eviction.parse(text(heads, kv_heads)), turns, chunk, heads, kv_heads)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_further_turn_is_read_with_all_rows():
    policy, llama = eviction.parse(text(4, 2)), model(4, 2, 4)
    cache, ids = llama.new_cache(), torch.arange(60) % VOCAB
    with torch.inference_mode():
        cache.follow(policy, 40)
        llama(llama.engine.tokens(ids[:40], 40, VOCAB), cache)
        far = next(part for layer in cache.layers for part in layer.parts if part.window is None)
        everything = far.keys
        cache.end_prompt()
        read = len(far)
        for token in ids[40:43]:
            llama(llama.engine.tokens(token[None], 1, VOCAB), cache)
        assert read < 40 and len(far) == read + 3
        answer = far.keys[:, read:]
        go_on(cache, 9)
        assert torch.equal(far.keys, torch.cat([everything, answer], 1)) and far.layer.positions.tolist() == [
            *range(43)
        ]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return ranked_model(tmp_path_factory.mktemp("blocks"))


def test_private_tokens_equal_plain(given):
    """Prompts on both sides of the budget, alone and side by side."""
    policy = f"far_blocks({SETTINGS},weights=heads-mine)"
    found = {}
    for engine in ("plain", "wire"):
        together, _ = side_by_side_and_alone(given, engine, (6, 37, 25), max_new_tokens=5, policy=policy)
        found[engine] = [one.token_ids for one in together]
    assert found["plain"] == found["wire"]


@pytest.mark.slow
def test_engine_crypten_gives_the_tokens_of_plain(given):
    folder, path = given
    asked = {"input_ids": list(range(3, 40)), "max_new_tokens": 3, "prefill_chunk": 16}
    found = []
    for engine in ("plain", "crypten"):
        settings = {"engine": engine, "policy_weights": str(path), "timeout": 120, "threads": 1}
        with PrivateLlama.from_pretrained(str(folder), **settings) as llama:
            found.append(llama.generate(**asked, policy=f"far_blocks({SETTINGS},weights=heads-mine)").token_ids)
    assert found[0] == found[1]


def counted(policy: str, **plan) -> cost.Prediction:
    config = LlamaConfig.from_sizes(hidden=64, heads=4, kv_heads=2, ffn=96, layers=4, vocab=64, context=400, tied=True)
    return cost.predict(config, Plan(policy=policy, max_new_tokens=3, **plan))


def test_a_token_has_the_rounds_of_the_full_cache_and_fewer_bytes():
    plan = {"prompt_tokens": 256, "chunk": 64}
    split = f"far=0.5,start=2,recent=16,reading=32,weights={weights('far_blocks', 4, 2, 4)}"
    found = {
        name: counted(policy, **plan).phase("decode")
        for name, policy in {
            "full": "full",
            "split": f"head_split({split})",
            "blocks": f"far_blocks({split},budget=0.3)",
        }.items()
    }
    assert found["blocks"]["rounds"] == found["split"]["rounds"] == found["full"]["rounds"]
    for less, more in (("blocks", "split"), ("split", "full")):
        assert sum(found[less]["bytes_sent"]) < sum(found[more]["bytes_sent"])
        assert found[less]["dealer_bytes"] < found[more]["dealer_bytes"]


def test_recommended_is_this_policy_with_the_ranks_that_are_there(given, monkeypatch):
    monkeypatch.setattr(trained, "_digests", {})
    assert str(eviction.parse("recommended")) == "far_blocks"
    assert eviction.policy("recommended", far=0.5) == eviction.policy("far_blocks", far=0.5)
    assert eviction.parse("recommended").looks_far(30, 3).sum() == 22, "of the model that these sizes are of"
    own = eviction.register("mine", given[1].read_bytes())
    assert eviction.parse("recommended(budget=0.2)") == eviction.parse(f"far_blocks(budget=0.2,weights={own})")
    assert eviction.parse("recommended(weights=shipped)") == eviction.parse("far_blocks(weights=shipped)")
    eviction.register("other", save({"ranks": torch.arange(4).reshape(2, 2)}))
    with pytest.raises(eviction.PolicyError, match="known from mine#.*, other#.*; name one"):
        eviction.parse("recommended")


def test_a_model_without_ranks_is_told_how_to_get_them():
    with pytest.raises(eviction.PolicyError, match=r"not each of 0 to 7 once in \(4, 2\); write them for this model"):
        eviction.policy("far_blocks").looks_far(4, 2)
