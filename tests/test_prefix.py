"""A public prefix on engine ``plain``: the logits of the same prompt, whatever the model and the policy."""

import pytest
import torch
from eviction_runs import weights
from hf_models import EVERY_CASE, tiny, with_tokenizer
from policy_table import ROWS

import eviction
from crypten_llm import PrivateLlama
from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.errors import UsageError
from crypten_llm.models.llama import Llama
from crypten_llm.session import prefix
from crypten_llm.session.generation import run
from crypten_llm.session.party import Party
from crypten_llm.session.plan import Plan
from crypten_llm.session.prompted import Answer

GENERATOR = torch.Generator().manual_seed(12)
IDS = torch.randint(3, 97, (40,), generator=GENERATOR).tolist()
NEW = torch.randint(3, 97, (6,), generator=GENERATOR).tolist()  # what the model is told that it has drawn


def loaded(folder) -> Party:
    party = Party(PlainEngine())
    party.load(folder)
    return party


def logits(party, public, length=40, steps=4, **options):
    """[steps, V] for the first ``length`` of ``IDS``, of which the first ``public`` are a public prefix."""
    seen, drawn = [], iter(NEW)
    answer = Answer(IDS[public:length], lambda row: seen.append(row) or next(drawn))
    plan = Plan(length - public, steps, public_prefix=IDS[:public], **options).check(party.model.config)
    party.start_request()
    for _ in run(party, plan, answer):
        pass
    return torch.stack(seen)


CASES = [name for name in EVERY_CASE if name != "sharded"]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_same_prompt(tmp_path, case):
    """Of every option and family: windows that the prefix fills and does not, RoPE that knows the prompt's length."""
    folder, _ = tiny(tmp_path, **EVERY_CASE[case])
    party = loaded(folder)
    cut = torch.Generator().manual_seed(CASES.index(case))
    for length in (9, 26):
        expected = logits(party, 0, length)
        for public in (1, length - 1, int(torch.randint(2, length - 1, (), generator=cut))):
            chunk = int(torch.randint(1, 12, (), generator=cut))
            torch.testing.assert_close(logits(party, public, length, chunk=chunk), expected, atol=1e-4, rtol=0)


def test_a_prefix_of_several_passes(tmp_path, monkeypatch):
    folder, _ = tiny(tmp_path, **EVERY_CASE["qwen3_window_by_type"])
    party = loaded(folder)
    whole = party.prefixes.rows(IDS, 41)
    monkeypatch.setattr(prefix, "CHUNK", 7)
    for one, other in zip(whole, loaded(folder).prefixes.rows(IDS, 41), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert [keys.shape[1] for keys, _ in whole] == [3, 40]  # the lower layer looks back four tokens


def test_the_cache_goes_on_after_the_prefix(tmp_path):
    """Positions, counts and what is left of the prefix by a window, layer by layer."""
    folder, _ = tiny(tmp_path, **EVERY_CASE["qwen2_window"])
    party = loaded(folder)
    for public, kept in ((3, [0, 1, 2]), (5, [0, 1, 2, 3, 4]), (20, [15, 16, 17, 18, 19])):
        cache = party.model.new_cache()
        cache.begin_with(party.prefixes.rows(IDS[:public], 30), public)
        assert cache.length == public and cache.extend(2).tolist() == [public, public + 1]
        assert cache.layers[0].layer.positions.tolist() == list(range(public))
        assert cache.layers[1].layer.positions.tolist() == kept


def test_the_owner_computes_a_prefix_once(tmp_path, monkeypatch):
    """As long as it is among the last few, and where RoPE depends on the prompt's length once for each of these."""
    folder, _ = tiny(tmp_path)
    party, computed, extend = loaded(folder), [], Llama.extend
    monkeypatch.setattr(
        Llama, "extend", lambda self, rows, *more: computed.append(len(rows)) or extend(self, rows, *more)
    )

    def asked(count, length=60):
        computed.clear()
        party.prefixes.rows(IDS[:count], length)
        return computed

    assert asked(5) == [5] and asked(5) == [] and asked(5, 50) == []
    others = [6, 7, 8, 9]
    assert [asked(count) == [count] for count in others] == [True] * prefix.KEPT
    assert asked(9) == [] and asked(5) == [5] and asked(7) == []
    folder, _ = tiny(tmp_path / "dynamic", **EVERY_CASE["rope_dynamic"])
    party = loaded(folder)
    assert asked(5, 16) == [5] and asked(5, 9) == [] and asked(5, 20) == [5] and asked(5, 21) == [5]


# Policies.


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    return loaded(tiny(tmp_path_factory.mktemp("gqa"), num_hidden_layers=4)[0])


def policy(name: str, settings: str) -> str:
    return f"{name}({settings.replace('WEIGHTS', weights(name, 4, 2, 4) if 'WEIGHTS' in settings else '')})"


NONE = ("streaming_llm", "random", "quest", "mpcache_spread", "qfilters", "triattention")  # of the prompt's attention
LAST = ("tova", "lazyeviction", "snapkv", "pyramidkv", "mpcache")
ALL = (
    *("h2o", "infllm", "longcache", "mikv", "locret", "attention_gate", "head_split", "far_blocks"),
    *("expected_attention", "kvzap_linear"),
)


def test_every_policy_says_what_it_watches():
    assert {*NONE, *LAST, *ALL} == {name for name in eviction.POLICIES if eviction.POLICIES[name].acts}
    for names, count in ((NONE, 0), (("full",), 0), (("tova", "lazyeviction"), 1), (ALL, 40)):
        assert {eviction.policy(name).watches(40) for name in names} == {count}
    assert eviction.policy("snapkv", window=4).watches(40) == 4 and eviction.policy("snapkv").watches(9) == 9
    mpcache = eviction.policy("mpcache")
    assert (mpcache.watches(40), mpcache.watches(4), mpcache.watches(30_000)) == (8, 1, 3_000)


@pytest.mark.parametrize("name", [*NONE, *LAST])
@pytest.mark.parametrize("settings", ["small", "least"])
def test_a_policy_chooses_as_without_a_prefix(gqa, name, settings):
    text = policy(name, getattr(ROWS[name], settings))
    expected = logits(gqa, 0, steps=6, policy=text, chunk=11)
    watched = eviction.parse(text).watches(len(IDS))
    most = len(IDS) - max(1, watched)
    for public in (3, most // 2, most):
        found = logits(gqa, public, steps=6, policy=text, chunk=11)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*LAST, *ALL])
def test_a_policy_that_must_be_shown_more_says_so(gqa, name):
    text = policy(name, ROWS[name].small)
    watched = eviction.parse(text).watches(len(IDS))
    if watched == 1:  # the prompt's last token, which is never public
        assert logits(gqa, len(IDS) - 1, policy=text).isfinite().all()
        return
    which = "all of a prompt" if name in ALL else f"a prompt's last {watched} tokens"
    for public in {len(IDS) - watched + 1, len(IDS) - 1}:
        message = f"must see the attention of {which}, but {len(IDS) - public} tokens follow the public prefix; leave"
        with pytest.raises(UsageError, match=message):
            logits(gqa, public, policy=text)


# What is refused, and what is told.


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    with PrivateLlama.from_pretrained(str(with_tokenizer(tmp_path_factory.mktemp("text"))), engine="plain") as llama:
        yield llama


def test_the_result_tells_what_was_public(llama):
    alone = llama.generate(input_ids=IDS, max_new_tokens=3)
    result = llama.generate(input_ids=IDS[30:], public_prefix=IDS[:30], max_new_tokens=3)
    assert result.token_ids == alone.token_ids
    assert (result.prompt_tokens, result.public_tokens, alone.public_tokens) == (10, 30, 0)
    assert result.to_dict()["public_tokens"] == 30
    told = {entry["what"]: entry["to"] for entry in result.revealed}
    assert told["public prefix: 30 tokens, known to all"] == told["prompt length: 10 tokens"] == "all"
    assert not any("public prefix" in entry["what"] for entry in alone.revealed)


def test_a_penalty_counts_the_prefix_too(llama):
    asked = {"max_new_tokens": 8, "repetition_penalty": 3.0}
    whole = llama.generate(input_ids=IDS, **asked).token_ids
    assert llama.generate(input_ids=IDS[30:], public_prefix=IDS[:30], **asked).token_ids == whole
    assert llama.generate(input_ids=IDS, **asked | {"repetition_penalty": 1.0}).token_ids != whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"input_ids": [5], "public_prefix": [5, 2048]},
            "token id 2048 is not in the vocabulary; ids go from 0 to 2047",
        ),
        ({"input_ids": [5], "public_prefix": [-1]}, "token id -1 is not in the vocabulary"),
        ({"input_ids": [5], "public_prefix": [True]}, "token id True is not in the vocabulary"),
        ({"input_ids": [5], "public_prefix": [[5], [6]]}, "public_prefix holds 2 prompts"),
        ({"input_ids": [5], "public_prefix": []}, "the public prefix is empty"),
        ({"prompt": "a", "public_prefix": ""}, "the public prefix is empty"),
        ({"prompt": "a", "chat": True, "public_prefix": "b"}, "made public with public_system"),
        ({"prompt": "a", "public_system": True}, "public_system is of a chat"),
        ({"input_ids": IDS, "public_prefix": IDS}, "the prompt has 80 tokens and 32 more .* context is 64"),
        ({"input_ids": [5], "public_prefix": IDS[:9], "policy": "h2o"}, "policy h2o must see the attention of all"),
    ],
)
def test_refused_before_anything_is_announced(llama, arguments, message):
    before = llama.party.requests
    with pytest.raises(UsageError, match=message):
        llama.generate(**arguments)
    assert llama.party.requests == before
