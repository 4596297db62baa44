"""The shipped model's tasks: names, lengths, and what counts as a right answer."""

import pytest

from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import SHIPPED, load_tokenizer
from experiments.model import drafts
from experiments.model.evaluate import is_match
from experiments.tasks import TASKS, find, score


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED)


SHIPPED_TASKS = {name: task for name, task in TASKS.items() if task.source == "shipped"}


def test_shipped_tasks_are_those_of_the_corpus():
    assert list(SHIPPED_TASKS) == list(drafts.TASKS)


@pytest.mark.parametrize("name", [name for name in SHIPPED_TASKS if name != "stories"])
def test_shipped_examples(name, tokenizer):
    task = find(name)
    examples = task.examples(tokenizer, 256, 3, seed=4)
    assert examples == task.examples(tokenizer, 256, 3, seed=4) != task.examples(tokenizer, 256, 3, seed=5)
    assert [example.index for example in examples] == [0, 1, 2]
    for example in examples:
        ids, answer = tokenizer(example.prompt)["input_ids"], example.answers[0]
        assert 200 < len(ids) <= 256
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert len(answer_ids) < example.max_new_tokens
        for prediction in (answer, answer + "x", answer[:-1], "", f"{answer}\n"):
            generated = tokenizer(prediction, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id, 7]
            assert score(task, example, prediction) == is_match(generated, answer, tokenizer)


def test_stories_are_text(tokenizer):
    stories = find("stories")
    assert stories.metric == "perplexity" and not hasattr(stories, "examples")
    (first, second) = stories.texts(tokenizer, 128, 2)
    assert first.text != second.text and second.index == 1
    assert 100 < len(tokenizer(first.text)["input_ids"]) <= 128


def test_unknown_task():
    with pytest.raises(UsageError, match="unknown task 'passkeys'; the nearest: passkey; .* shows all 49"):
        find("passkeys")
