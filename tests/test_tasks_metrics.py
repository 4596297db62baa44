"""Metrics against the field's own: figures of the benchmarks' scripts, kept in a file, and the packages they use.

`metric_pairs.jsonl` holds pairs with the figures of LongBench's `metrics.py` (commit 2e00731) and of RULER's
`scripts/eval/synthetic/constants.py` (commit c3f5e3b), run on them once; RULER rounds to hundredths of a per cent.
"""

import inspect
import json
import sys
import warnings
from pathlib import Path

import pytest
from rouge import Rouge

from experiments.tasks.metrics import METRICS

FILE = Path(__file__).parent / "data/tasks/metric_pairs.jsonl"
PAIRS = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]
# exact_match is the shipped model's own; the scripts have neither ROUGE-1 nor ROUGE-2, which are compared below.
OURS = {"exact_match", "rouge_1", "rouge_2"}
TEXTS = [pair for pair in PAIRS if pair["metric"] == "rouge_l"]


@pytest.mark.parametrize("name", sorted(METRICS.keys() - OURS))
def test_equals_the_benchmarks_script(name):
    rows = [row for row in PAIRS if row["metric"] == name]
    assert len(rows) >= 4 and {0.0} < {row["score"] for row in rows}
    for row in rows:
        found = METRICS[name](row["prediction"], row["answers"], row.get("classes", ()))
        assert found == pytest.approx(row["score"], abs=5e-5 if name.startswith("string") else 1e-12), row
        assert 0 <= found <= 1


@pytest.mark.parametrize(("name", "kind"), [("rouge_1", "rouge-1"), ("rouge_2", "rouge-2"), ("rouge_l", "rouge-l")])
def test_rouge_is_the_package_but_for_empty_texts(name, kind):
    refused = 0
    for row in TEXTS:
        found = METRICS[name](row["prediction"], row["answers"], ())
        try:
            (package,) = Rouge().get_scores([row["prediction"]], row["answers"])
        except ValueError:
            refused += 1
            assert found == 0
        else:
            assert found == package[kind]["f"]
    assert refused >= 2, "an empty prediction and one of full stops alone"


@pytest.fixture
def shallow():
    """Leaves a test 100 calls, so that a long text need not be long."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    yield
    sys.setrecursionlimit(limit)


def test_rouge_of_texts_deeper_than_the_interpreter_allows(shallow):
    words = " ".join(str(number) for number in range(150))
    assert METRICS["rouge_l"](words, (words,), ()) == pytest.approx(1)
    with pytest.raises(RecursionError):
        Rouge().get_scores(words, words)


def test_code_similarity_is_fuzzywuzzy_without_levenshtein():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it recommends Levenshtein, which changes its figures
        from fuzzywuzzy import fuzz
    assert fuzz.SequenceMatcher.__module__ == "difflib", (
        "uninstall Levenshtein: figures would be others than LongBench's"
    )
    lines = ["return x", "    return product", "", "print(twice(4))", "bcabcabca", "for i in range(10):", "x" * 300]
    for line in lines:
        for answer in lines:
            assert METRICS["code_sim"](line, (answer,), ()) == fuzz.ratio(line, answer) / 100


def test_the_best_answer_counts():
    assert METRICS["qa_f1"]("Ida Holm", ("nobody", "Holm", "Ida Holm"), ()) == 1
    assert METRICS["exact_match"](" Brask ", ("Brask",), ()) == 1 > METRICS["exact_match"]("Brask.", ("Brask",), ())


def test_answer_of_another_task():
    with pytest.raises(ValueError, match="the answer 'Brask' names no Paragraph: is this the file of another task"):
        METRICS["retrieval"]("3", ("Brask",), ())
