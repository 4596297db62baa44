"""Policies at one budget: what they read, their settings, and the variants that are compared beside them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypten_llm.errors import UsageError
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.plan import parse_policy
from eviction import POLICIES
from experiments.baselines.plots import STYLES
from experiments.baselines.policies import PARTS, VARIANTS, at_budget, has_budget, names, style
from experiments.baselines.variants import ABLATION
from experiments.measure.quality import Scorer, draw

BUDGETS = (0.05, 0.2)
BUDGETED = [name for name in [*names(), *ABLATION] if has_budget(name)]
OTHER = {name for name in BUDGETED if name in POLICIES and POLICIES[name].budget_means}  # all else reads its budget's


@pytest.fixture(scope="module")
def llama():
    with PrivateLlama.from_pretrained("shipped", engine="plain", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def read_rows(llama):
    """Rows that a step reads beside the prompt's length, by policy and budget, measured on a prompt."""
    example = draw("key_value", llama.tokenizer, 256, 1)[0]
    wanted = {(name, budget): at_budget(name, budget, 256, 8) for budget in BUDGETS for name in BUDGETED}
    rows = {row["policy"]: row for row in Scorer(llama).rows(example, list(dict.fromkeys(wanted.values())))}
    for text in [text for text, row in rows.items() if row["attended"] is None]:  # its first token was wrong
        (rows[text],) = Scorer(llama, to_the_end=True).rows(example, [text])
    return {key: rows[text] for key, text in wanted.items()}


@pytest.mark.parametrize("name", sorted(set(BUDGETED) - OTHER))
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_is_the_share_of_rows_that_a_step_reads(read_rows, name, budget):
    row = read_rows[name, budget]
    assert row["attended"] == pytest.approx(budget, rel=0.2, abs=0.02)
    assert row["kept"] >= row["attended"] - 1e-9


def test_policies_without_an_exact_budget_say_what_they_read(read_rows):
    assert OTHER == {"quest", "mikv"}
    for budget in BUDGETS:
        assert read_rows["mikv", budget]["attended"] == 1.0
        whole = (2 + 4 * read_rows["quest_every_layer", budget]["attended"]) / 6  # two of the model's layers are dense
        assert read_rows["quest", budget]["attended"] == pytest.approx(whole, abs=0.01)


def test_policies_that_drop_rows_keep_what_they_read_and_others_keep_all(read_rows):
    for name in (
        "streaming_llm",
        "head_split",
        "far_blocks",
        "h2o",
        "tova",
        "snapkv",
        "pyramidkv",
        "expected_attention",
        "qfilters",
        "triattention",
        "kvzap_linear",
        "locret",
        "attention_gate",
        "random",
    ):
        assert read_rows[name, 0.2]["kept"] == read_rows[name, 0.2]["attended"]
    for name in ("quest", "infllm", "longcache", "mikv", "dynamic only"):
        assert read_rows[name, 0.2]["kept"] == 1.0
    assert read_rows["mpcache", 0.2]["kept"] == pytest.approx(0.5, abs=0.02)


@given(
    st.sampled_from(BUDGETED),
    st.floats(0.02, 0.98),
    st.integers(64, 40_000),
    st.sampled_from([1, 8, 32, 64]),
)
def test_every_budget_gives_settings_that_there_are(name, budget, prompt, heads):
    if round(budget * prompt) < 8:
        with pytest.raises(UsageError, match="rows; give one of at least 8 rows"):
            at_budget(name, budget, prompt, heads)
    else:
        text = at_budget(name, budget, prompt, heads)
        assert str(parse_policy(text)) == text


def test_what_has_no_budget_is_taken_as_it_is():
    assert at_budget("full", None, 512, 8) == "full"
    assert at_budget("snapkv(budget=64,window=32)", None, 512, 8) == "snapkv(budget=64)"


def test_every_policy_of_the_project_is_compared_and_no_two_look_alike():
    assert set(BUDGETED) == {*POLICIES, *VARIANTS} - {"full"} and set(names()) == {*POLICIES, "quest_every_layer"}
    assert {at_budget(name, 0.5, 512, 8).partition("(")[0] for name in BUDGETED} == set(POLICIES) - {"full"}
    assert set(STYLES) <= set(names()) and len(set(STYLES.values())) == len(STYLES)
    assert style("quest_every_layer")[:2] == style("quest")[:2]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("budget, prompt", [(0.05, 256), (0.2, 1024)])
def test_a_variant_differs_from_its_policy_in_what_it_says(name, budget, prompt):
    """And in the settings that follow from that, so that it reads as much."""
    follow = {"one level": {"second"}, "half clusters": {"second"}, "dynamic only": {"second"}}
    follow["static only"] = {"static", "coarse", "fine", "least"}
    variant = VARIANTS[name]
    mine, own = (vars(parse_policy(at_budget(one, budget, prompt, 8))) for one in (name, variant.policy))
    said = {**variant.changed, **{setting: max(2, times * own[setting]) for setting, times in variant.scaled.items()}}
    expected = {**own, **said}
    assert mine != own and {setting for setting in own if mine[setting] != expected[setting]} <= follow.get(name, set())


def test_parts_are_the_rows_of_the_ablation():
    assert PARTS.keys() == {"mpcache", "mpcache_spread"} and sum(PARTS.values(), []) == list(ABLATION)
