"""RULER's tasks as they are written here: full to the length, answerable, and the same for the same seed."""

import json
import re
import shutil
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import SHIPPED, load_tokenizer
from experiments.tasks import TASKS, find, natural, score
from experiments.tasks.__main__ import main
from experiments.tasks.chat import Frame
from experiments.tasks.synthetic import MAKERS, needles, questions, words
from experiments.tasks.synthetic.drafts import longest, woven

RULER = [name for name, task in TASKS.items() if task.source == "ruler"]
LENGTH = 1400  # tokens; the worked example of cwe takes most of them
NEEDLE = re.compile(r"One of the secret (number|uuid)s for (\S+) is: (\S+)\.")
# Keys and values that are hidden; those asked for; tokens by which a prompt may be too short: a unit of its filling.
NIAH = {
    "niah_single_1": (1, 1, 1, 16),
    "niah_single_2": (1, 1, 1, 16),
    "niah_single_3": (1, 1, 1, 16),
    "niah_multikey_1": (4, 1, 1, 16),
    "niah_multikey_2": (None, 1, 1, 40),
    "niah_multikey_3": (None, 1, 1, 150),
    "niah_multivalue": (1, 4, 1, 16),
    "niah_multiquery": (4, 1, 4, 16),
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED)


def test_each_task_of_ruler_is_written_here():
    assert [f"ruler/{key}" for key in MAKERS] == RULER and len(RULER) == 13


@pytest.mark.parametrize("name", RULER)
def test_prompts_are_full_and_can_be_answered(name, tokenizer):
    task = find(name)
    examples = task.examples(tokenizer, LENGTH, 3, seed=2)
    assert examples == task.examples(tokenizer, LENGTH, 3, seed=2) and examples[:2] == task.examples(
        tokenizer, LENGTH, 2, seed=2
    )
    others = task.examples(tokenizer, LENGTH, 3, seed=3)
    assert len({example.prompt for example in (*examples, *others)}) == 6
    for index, example in enumerate(examples):
        assert example.index == index and not example.rendered and example.max_new_tokens == task.max_new_tokens
        slack = NIAH.get(task.key, (0, 0, 0, 16))[3]
        assert LENGTH - slack <= len(example.ids(tokenizer)) <= LENGTH
        assert example.ids(tokenizer) == tokenizer(example.prompt)["input_ids"]
        assert all(answer in example.prompt for answer in example.answers)
        assert score(task, example, f" {', '.join(example.answers)}.") == 1 and score(task, example, "none") == 0


@pytest.mark.parametrize("key", NIAH)
def test_needles(key, tokenizer):
    keys, values, asked, _ = NIAH[key]
    places = []
    for example in find(f"ruler/{key}").examples(tokenizer, 700, 9):
        body, _, question = example.prompt.rpartition("\nWhat ")
        found = {}
        for _, name, value in NEEDLE.findall(body):
            found.setdefault(name, []).append(value)
        wanted = [name for name in found if name in question]
        assert len(found) == keys if keys else len(found) > 3
        assert {len(each) for each in found.values()} == {values} and len(wanted) == asked
        assert sorted(example.answers) == sorted(value for name in wanted for value in found[name])
        assert not any(answer in question for answer in example.answers)
        assert question.endswith(" are" if len(example.answers) > 1 else " is")
        places += [body.index(answer) / len(body) for answer in example.answers]
    assert max(places) - min(places) > 0.3, "they stand at any depth"


def test_kinds_of_haystack(tokenizer):
    noise, prose, lines = (
        find(f"ruler/niah_{kind}").examples(tokenizer, 600, 1)[0].prompt
        for kind in ("single_1", "single_2", "multikey_2")
    )
    assert noise.count(needles.NOISE[0]) > 10 and needles.NOISE[0] not in prose
    known = set(" ".join(natural.books()[0]).split())
    inside = NEEDLE.sub("", prose.partition("\n")[2].rpartition("\n")[0]).split()
    assert len(inside) > 200 and set(inside[:-1]) <= known
    assert all(NEEDLE.fullmatch(line) for line in lines.split("\n")[1:-1])


def test_a_chain_of_variables(tokenizer):
    example = find("ruler/vt").examples(tokenizer, 700, 1)[0]
    question = example.prompt.rpartition("\nQuestion: ")[2]
    value = re.search(r"assigned the value (\d+)", question)[1]
    text = example.prompt.rpartition("\n\nRemember the chain")[2].partition("\nQuestion")[0]
    assigned = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", text)
    assert assigned == list(zip(example.answers, (value, *example.answers), strict=False))
    assert len(assigned) == 5 and value not in example.prompt.partition("\n\nRemember the chain")[0].rpartition("=")[2]


def test_common_words_come_more_often(tokenizer):
    for length in (LENGTH, 4096):
        example = find("ruler/cwe").examples(tokenizer, length, 1)[0]
        text = example.prompt.rpartition(words.ASKS)[2].partition("\nQuestion")[0]
        found = Counter(re.findall(r"\d+\. (\w+)", text)).most_common()
        often, seldom = words.OFTEN[length >= words.LONG]
        assert {word for word, _ in found[:10]} == set(example.answers)
        assert {count for _, count in found[:10]} == {often} and {count for _, count in found[10:]} == {seldom}
        assert len(found) > 25


def test_coded_words_by_how_often_they_come(tokenizer):
    example = find("ruler/fwe").examples(tokenizer, 700, 1)[0]
    text = example.prompt.partition("most often. ")[2].partition("\nQuestion")[0]
    found = [word for word, _ in Counter(text.split()).most_common(4)]
    assert found[0] == words.NOISE and tuple(found[1:]) == example.answers
    for count in range(words.LEAST, 3000, 7):
        ranks = words.counts(count)
        assert ranks[0] > ranks[1] > ranks[2] > ranks[3] > ranks[4] and sum(ranks) <= count


def test_passages_hold_their_answers():
    documents = {entry["title"]: entry["text"] for entry in questions.passages()["document"]}
    assert len(documents) == len(questions.passages()["document"]) > 25
    for entry in questions.passages()["document"]:
        assert any(answer.lower() in entry["text"].lower() for answer in entry["answers"]), entry["title"]
    for entry in questions.passages()["two"]:
        first, second = (documents[title] for title in entry["titles"])
        assert any(answer.lower() in (first + second).lower() for answer in entry["answers"]), entry["question"]


@pytest.mark.parametrize("name", ["ruler/qa_1", "ruler/qa_2"])
def test_documents(name, tokenizer):
    known = {entry["text"] for entry in questions.passages()["document"]}
    for example in find(name).examples(tokenizer, LENGTH, 3):
        texts = re.findall(r"Document \d+:\n(.*)\n", example.prompt)
        assert len(texts) == len(set(texts)) and len(known & set(texts)) >= len(texts) - 1, "one of them is cut"
        assert sum(any(answer in text for answer in example.answers) for text in known & set(texts)) >= 1
    longer = find(name).examples(tokenizer, 7000, 1)[0].prompt
    assert known <= set(re.findall(r"Document \d+:\n(.*)\n", longer)), "natural text comes when these are all in"


def test_a_length_that_holds_nothing(tokenizer):
    with pytest.raises(UsageError, match=r"a prompt of ruler/cwe has 1,\d+ tokens or more, not 512; give a larger"):
        find("ruler/cwe").examples(tokenizer, 512, 1)
    with pytest.raises(UsageError, match="there are no 100 different keys"):
        needles.distinct(lambda random: random.choice("ab"), Random(0), 100)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(-1, 60))
def test_the_longest_that_fits(least, more, edge):
    most = least + more
    found = longest(lambda units: units <= edge, least, most)
    assert found == (min(edge, most) if edge >= least else None)


def test_needles_stand_between_whole_sentences():
    sentences = ["A b c.", "D e f.", "G h i."]
    assert woven(sentences, 9, ["X.", "Y."], [0, 1]) == "X. A b c. D e f. G h i. Y."
    assert woven(sentences, 7, ["X.", "Y."], [0.4, 0.4]) == "A b c. X. Y. D e f. G"
    assert woven(sentences, 0, ["X."], [0.7]) == "X."


def test_the_chat_template_goes_around(tokenizer, tmp_path):
    for file in SHIPPED.glob("*.json"):
        shutil.copy(file, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    chatting = load_tokenizer(tmp_path)
    for name in ("ruler/niah_single_2", "continuation/summary"):
        example = find(name).examples(chatting, 300, 1)[0]
        assert example.rendered and example.prompt.startswith("<|user|>")
        assert re.search(r"\n<\|assistant\|>(The secret number|Summary:)", example.prompt)
        ids = chatting(example.prompt, add_special_tokens=False)["input_ids"]
        assert example.ids(chatting) == ids and 290 <= len(ids) <= 300
        plain = find(name).examples(tokenizer, 300, 1)[0]
        assert not plain.rendered and "<|" not in plain.prompt
    assert not find("continuation/exact").examples(chatting, 64, 1)[0].rendered, "a text goes on, nobody is asked"
    assert Frame(tokenizer).around("a", "b:") == "a b:" and Frame(tokenizer).around("a") == "a"


def test_a_text_of_ones_own(tokenizer, tmp_path, capsys):
    file = tmp_path / "mine.txt"
    file.write_text("\n\n".join(f"Quokka {i} met quokka {i + 1} at noon. They spoke of leaves." for i in range(60)))
    example = find("ruler/niah_single_2", str(file)).examples(tokenizer, 400, 1)[0]
    body = NEEDLE.sub("", example.prompt.partition("\n")[2].rpartition("\n")[0])
    assert set(re.findall(r"[A-Za-z]+", body)) <= set("Quokka met quokka at noon They spoke of leaves".split())
    texts = find("prose", str(file)).texts(tokenizer, 200, 100)
    assert 1 < len(texts) < 100 and "okka 0 met quokka 1 at noon" in texts[0].text
    assert main(["show", "ruler/qa_1", "--length", "900", "--data", str(file)]) == 0
    assert "answers: '" in capsys.readouterr().out
    assert main(["show", "continuation/exact", "--length", "90", "--data", str(file)]) == 0
    assert "answers: what the full cache gives; up to 32 new" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot read the text .*none.txt: No such file"),
        ("short.txt", b"a few words", "short.txt has 3 words, too few to hide anything in"),
        ("odd.txt", b"\xff" * 900, "cannot read the text .*odd.txt: it is not UTF-8"),
        ("odd.pdf", b"%PDF", "odd.pdf' is no file of plain text; give one that ends in .txt or .md"),
    ],
)
def test_texts_that_do_not_serve(name, content, message, tokenizer, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        find("prose", str(path)).texts(tokenizer, 200, 1)
