"""Scores from a shared prefill, against the answers of a run alone: token for token, for every policy."""

from dataclasses import replace

import pytest
import torch
from policy_table import ROWS

from crypten_llm.errors import UsageError
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.plan import Plan, parse_policy
from crypten_llm.session.prompted import Answer
from experiments.measure.quality import Evaluator, Scorer, draw, may_match, means, settled
from experiments.measure.shared_prefill import Onlookers, prefill, prefill_all
from experiments.model.evaluate import is_match
from experiments.tasks import Example, find

POLICIES = ["full", *(f"{name}({row.small.replace(',weights=WEIGHTS', '')})" for name, row in ROWS.items())]
LENGTH = 160  # two pieces of the prompt, so that a policy can evict between them


@pytest.fixture(scope="module")
def llama():
    threads = torch.get_num_threads()
    with PrivateLlama.from_pretrained("shipped", engine="plain", threads=1) as opened:
        yield opened
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def examples(llama):
    return [replace(draw(name, llama.tokenizer, LENGTH, 1)[0], max_new_tokens=6) for name in ("passkey", "span_copy")]


@pytest.fixture(scope="module")
def alone(llama, examples):
    """Answers of ``generate``, by policy and task."""
    return {
        (policy, example.task): llama.generate(example.prompt, max_new_tokens=6, policy=policy).token_ids
        for policy in POLICIES
        for example in examples
    }


@pytest.fixture(scope="module")
def shared(llama, examples):
    scorer = Scorer(llama, to_the_end=True)
    return {(row["policy"], row["task"]): row for example in examples for row in scorer.rows(example, POLICIES)}


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_a_run_alone(policy, alone, shared):
    for task in ("passkey", "span_copy"):
        assert shared[policy, task]["token_ids"] == alone[policy, task]


def test_scores_are_exact_matches(llama, examples, shared):
    for (_, task), row in shared.items():
        wanted = next(example for example in examples if example.task == task).answers[0]
        assert row["score"] == is_match(row["token_ids"], wanted, llama.tokenizer)
    assert {row["score"] for row in shared.values()} == {0.0, 1.0}


def test_an_answer_ends_where_it_cannot_match_any_more(llama, examples, shared):
    shorter = 0
    for example in examples:
        for row in Scorer(llama).rows(example, POLICIES):
            whole = shared[row["policy"], row["task"]]
            assert row["score"] == whole["score"]
            assert row["token_ids"] == whole["token_ids"][: len(row["token_ids"])]
            shorter += len(row["token_ids"]) < len(whole["token_ids"])
            if whole["score"]:
                assert row["token_ids"] == whole["token_ids"]
    assert shorter > 5


def test_only_a_policy_that_drops_rows_of_the_prompt_on_the_way_has_its_own_prefill(llama, examples):
    ids = llama.encode(examples[0].prompt)
    onlookers = Onlookers({policy: parse_policy(policy) for policy in POLICIES})
    with torch.inference_mode():
        prefill(llama.party.model, onlookers, ids, 128)
    assert [parse_policy(policy).name for policy in onlookers.apart] == ["head_split", "far_blocks", "locret"]
    assert len(onlookers.policies) == len(POLICIES) - 3


def test_going_on_with_one_cache_leaves_the_others(llama, examples):
    """A policy's tokens do not depend on which others share its prefill, or on their order."""
    scorer = Scorer(llama, to_the_end=True)
    several = ["h2o(heavy=9,recent=9)", "mpcache(coarse=8,fine=4)", "mikv(important=20)"]
    together, backwards = (scorer.rows(examples[0], order) for order in (several, several[::-1]))
    assert [row["policy"] for row in together] == several
    assert together == backwards[::-1]
    for policy, row in zip(several, together, strict=True):
        assert scorer.rows(examples[0], [policy]) == [row]


@pytest.mark.parametrize("policy", ["mpcache(coarse=8,fine=4)", "locret(budget=0.3,recent=4)"])
def test_loss_of_a_text_is_that_of_decoding_it_token_by_token(llama, policy):
    text = draw("stories", llama.tokenizer, LENGTH, 1)[0]
    row = Scorer(llama).rows(text, [policy])[0]
    ids, seen = llama.encode(text.text), []
    prompt, rest = ids[: -text.scored - 1], ids[-text.scored - 1 :]

    def choose(logits):
        seen.append(logits.clone())
        return rest[len(seen) - 1]

    plan = Plan(len(prompt), len(rest), policy=policy)
    for _ in llama.party.request_generate(plan, Answer(prompt, choose)):
        pass
    predicted = torch.stack(seen)[1:].log_softmax(-1)
    expected = -predicted[torch.arange(text.scored), torch.tensor(rest[1:])].mean().item()
    assert row["score"] == pytest.approx(expected, abs=1e-6)
    assert row["tokens"] == len(prompt)


def test_kept_and_attended_are_shares_of_the_rows_of_the_full_cache(llama, examples):
    tokens = len(llama.encode(examples[0].prompt))
    policies = ["full", "streaming_llm(start=4,recent=28)", "quest(page=8,budget=32,dense=0)"]
    full, streaming, quest = Scorer(llama, to_the_end=True).rows(examples[0], policies)
    steps = [len(row["token_ids"]) - 1 for row in (full, streaming, quest)]
    assert (full["kept"], full["attended"]) == (1.0, 1.0)
    rows = [tokens + 1 + step for step in range(steps[1])]
    assert streaming["kept"] == streaming["attended"] == pytest.approx(33 * steps[1] / sum(rows))  # 32 and the newest
    assert quest["kept"] == 1.0
    newest = [(count - 1) % 8 + 1 for count in range(tokens + 1, tokens + 1 + steps[2])]
    assert quest["attended"] == pytest.approx(sum(24 + rows for rows in newest) / sum(rows[: steps[2]]), abs=0.01)


def test_an_answer_of_one_token_has_no_shares(llama, examples):
    row = Scorer(llama).rows(replace(examples[0], max_new_tokens=1), ["h2o"])[0]
    assert row["kept"] is None and row["attended"] is None
    assert means([row]) == {"samples": 1, "score": 0.0, "kept": None, "attended": None}


def test_rows_come_in_the_order_of_examples_and_policies(examples):
    before = torch.get_num_threads()
    with Evaluator("shipped", workers=1) as evaluator:
        assert torch.get_num_threads() == 1
        rows = list(evaluator.rows(examples, ["h2o", "full"]))
    assert [(row["task"], row["policy"]) for row in rows] == [
        (example.task, policy) for example in examples for policy in ("h2o", "full")
    ]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "text, possible",
    [
        ("", True),
        (" ", True),
        (" New", True),
        ("New ", True),
        ("New York", True),
        (" New York  ", True),
        ("New\ufffd", True),
        ("Newer", False),
        ("York", False),
        ("New York City", False),
        ("Bern", True),
    ],
)
def test_what_may_still_match(text, possible):
    assert may_match(text, [" New York", "Bern "]) is possible


def test_what_rules_and_what_settles():
    """An answer ends where no match is possible any more, or where all that was asked for stands there."""
    exact, every, any_of, f1 = (find(name) for name in ("passkey", "ruler/vt", "ruler/qa_1", "longbench/hotpotqa"))
    example = Example("", "", ("ab", "cd"), 9)
    for task, unsettled, done in ((exact, ("", "a", "ab"), "b"), (every, ("", "ab", "c d"), "x CD ab")):
        assert not any(settled(task, example, text) for text in unsettled) and settled(task, example, done)
    assert settled(any_of, example, "or cd") and not settled(any_of, example, "or c")
    assert not settled(f1, example, "ab")


def test_answers_end_with_the_last_that_was_asked_for(llama):
    """Of RULER's tasks: the score is that of the whole answer."""
    example = replace(draw("few_shot", llama.tokenizer, LENGTH, 1)[0], task="ruler/qa_1", max_new_tokens=6)
    whole = Scorer(llama, to_the_end=True).rows(example, ["full"])[0]
    first = llama.tokenizer.decode(whole["token_ids"][:1]).strip()
    example = replace(example, answers=(first,))
    row, whole = (Scorer(llama, end).rows(example, ["full"])[0] for end in (False, True))
    assert row["score"] == whole["score"] == 1 and len(row["token_ids"]) == 1 < len(whole["token_ids"])


def test_a_continuation_is_compared_with_the_full_cache(llama):
    """Whether that is asked for or not; its answer is then the whole one, as it runs alone."""
    policies = ["streaming_llm(start=1,recent=5)", "quest(page=4,budget=900,dense=0)"]
    for name in ("continuation/exact", "continuation/rouge_l"):
        example = draw(name, llama.tokenizer, LENGTH, 1)[0]
        few, all_rows, full = Scorer(llama).rows(example, [*policies, "full"])
        assert Scorer(llama).rows(example, policies) == [few, all_rows]
        alone = llama.generate(example.prompt, max_new_tokens=example.max_new_tokens).token_ids
        assert full["token_ids"] == alone
        assert full["score"] == pytest.approx(1) == all_rows["score"] and few["score"] < 0.9


def test_texts_are_scored_at_stretches_that_follow_each_other(llama):
    first, second = draw("prose", llama.tokenizer, LENGTH, 2)
    assert first.scored == second.scored == 64
    end = llama.tokenizer.decode(first.ids(llama.tokenizer)[-20:])
    before = llama.tokenizer.decode(second.ids(llama.tokenizer)[: -second.scored])
    assert before.endswith(end)
    assert Scorer(llama).rows(first, ["full"])[0]["tokens"] == len(first.ids(llama.tokenizer)) - 65


def test_what_cannot_be_scored_is_refused(llama, examples):
    scorer = Scorer(llama)
    with pytest.raises(UsageError, match="unknown policy 'h20'; did you mean 'h2o'"):
        scorer.rows(examples[0], ["h20"])
    with pytest.raises(UsageError, match="the model's context is"):
        scorer.rows(replace(examples[0], max_new_tokens=100_000), ["full"])
    with pytest.raises(UsageError, match="a text of stories has 18 tokens; give a length above 25"):
        scorer.rows(draw("stories", llama.tokenizer, 20, 1)[0], ["full"])


def test_prefill_all_gives_each_policy_an_evicted_cache(llama, examples):
    ids = llama.encode(examples[0].prompt)
    with torch.inference_mode():
        policies = {policy: parse_policy(policy) for policy in POLICIES}
        found = {policy: cache for policy, cache, _ in prefill_all(llama.party.model, policies, ids, 128)}
    assert set(found) == set(POLICIES)
    assert len(found["full"].layers[0]) == len(ids)
    assert len(found["tova(size=6)"].layers[0]) == 6
