"""LongBench, RULER and XSUM read from files in their public formats, offline; the sample rows are written for this."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import huggingface_hub
import pytest
from datasets import Dataset

from crypten_llm.errors import UsageError
from crypten_llm.models.checkpoint import SHIPPED, load_tokenizer
from experiments.tasks import TASKS, find, longbench, score
from experiments.tasks.__main__ import main

SAMPLES = Path(__file__).parent / "data/tasks"
LONGBENCH, RULER, XSUM = (str(SAMPLES / name) for name in ("longbench", "ruler", "xsum"))
NOT_PUBLISHED = "not the published prompts"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED)


@pytest.fixture
def published(monkeypatch):
    """Takes the templates of the samples for the published ones, which are not in this repository."""
    templates = json.loads((SAMPLES / "longbench/dataset2prompt.json").read_text())
    monkeypatch.setattr(longbench, "PUBLISHED", longbench._digest(templates))
    longbench._templates.cache_clear()
    yield templates
    longbench._templates.cache_clear()


def only(task, tokenizer, length=256):
    (example,) = task.examples(tokenizer, length, 1)
    return example


def names(source):
    return [name for name, task in TASKS.items() if task.source == source]


def test_all_tasks_are_there():
    assert [len(names(source)) for source in ("longbench", "ruler", "xsum")] == [21, 13, 3]


@pytest.mark.parametrize("name", names("longbench"))
def test_longbench_rows(name, tokenizer, published):
    task = find(name, LONGBENCH)
    row = json.loads((SAMPLES / f"longbench/{task.key}.jsonl").read_text())
    example = only(task, tokenizer)
    assert example.prompt == published[task.key].format(**row)
    assert example.answers == tuple(row["answers"]) and example.classes == tuple(row["all_classes"] or ())
    assert example.max_new_tokens == task.max_new_tokens
    assert score(task, example, example.answers[-1]) == pytest.approx(1, abs=1e-6)
    assert score(task, example, "") == 0


def test_few_shot_tasks_compare_the_first_line(tokenizer, published):
    for name in ("trec", "triviaqa", "samsum", "lsht"):
        task = find(f"longbench/{name}", LONGBENCH)
        example = only(task, tokenizer)
        prediction = f"\n\n{example.answers[0]}\nand more: {' '.join(example.classes)}"
        assert score(task, example, prediction) == pytest.approx(1, abs=1e-6)
    task = find("longbench/hotpotqa", LONGBENCH)
    assert score(task, only(task, tokenizer), "\nBrask\nand more") < 1


def test_other_prompts_are_said(tokenizer):
    longbench._templates.cache_clear()
    with pytest.warns(UserWarning, match=NOT_PUBLISHED):
        only(find("longbench/hotpotqa", LONGBENCH), tokenizer)


def test_longbench_from_its_archive_and_from_a_mirror(tokenizer, published, tmp_path):
    direct = only(find("longbench/hotpotqa", LONGBENCH), tokenizer)
    with ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(SAMPLES / "longbench/hotpotqa.jsonl", "data/hotpotqa.jsonl")
    shutil.copy(SAMPLES / "longbench/dataset2prompt.json", tmp_path)
    assert only(find("longbench/hotpotqa", str(tmp_path)), tokenizer) == direct
    with pytest.raises(UsageError, match=r"data.zip, data/lcc.jsonl: cannot be read as rows .*; download it again"):
        only(find("longbench/lcc", str(tmp_path)), tokenizer)

    # A mirror writes the prompt out, in three parts, as parquet files.
    context, answer_prefix = direct.prompt[: -len("Reply:")], direct.prompt[-len("Reply:") :]
    mirror = {"context": context, "question": "", "answer_prefix": answer_prefix, "answers": list(direct.answers)}
    (tmp_path / "mirror/hotpotqa").mkdir(parents=True)
    Dataset.from_list([mirror]).to_parquet(tmp_path / "mirror/hotpotqa/test-00000-of-00001.parquet")
    assert only(find("longbench/hotpotqa", str(tmp_path / "mirror")), tokenizer) == direct


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the prompt templates of LongBench are missing; put the rows and dataset2prompt.json"),
        ("no json", "dataset2prompt.json: not JSON"),
        ('{"lcc": "{context}"}', "no prompt template with {context} for narrativeqa, .*repobench-p"),
    ],
)
def test_templates_that_do_not_serve(content, message, tokenizer, tmp_path):
    shutil.copy(SAMPLES / "longbench/lcc.jsonl", tmp_path)
    if content:
        (tmp_path / "dataset2prompt.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        only(find("longbench/lcc", str(tmp_path)), tokenizer)


def test_long_prompts_keep_both_ends(tokenizer, published):
    task = find("longbench/gov_report", LONGBENCH)
    whole = only(task, tokenizer).prompt
    ids = tokenizer(whole)["input_ids"]
    assert only(task, tokenizer, len(ids)).prompt == whole
    for length in (len(ids) - 1, 24, 7):
        cut = only(task, tokenizer, length).prompt
        assert length - 4 <= len(tokenizer(cut)["input_ids"]) <= length
        half = length // 2
        assert cut.startswith(tokenizer.decode(ids[1 : half - 1])) and cut.endswith(tokenizer.decode(ids[-half + 2 :]))
    with pytest.raises(UsageError, match=r"a prompt of \d+ tokens cannot be cut to 1; give a greater length"):
        only(task, tokenizer, 1)


def test_ruler_rows(tokenizer):
    task = find("ruler/niah_multivalue", RULER)
    first, second = task.examples(tokenizer, 256, 5)
    assert first.prompt.endswith("for brook? The numbers for brook are") and second.answers == ("37", "555")
    assert score(task, first, " 902, 418.\x00") == 1 and score(task, first, "902") == 0.5
    older = find("ruler/vt", RULER)
    assert only(older, tokenizer).prompt.endswith("hold 12? Answer:"), "the answer's beginning is part of the input"
    any_of = find("ruler/qa_2", RULER)
    assert score(any_of, only(any_of, tokenizer), "It was HOLM.") == 1
    assert [TASKS[f"ruler/{name}"].max_new_tokens for name in ("niah_single_1", "vt", "cwe", "fwe", "qa_1")] == [
        *(128, 30, 120, 50, 32)
    ]


def test_ruler_from_a_mirror(tokenizer, tmp_path):
    rows = [
        {
            "context": "VAR A = 1\n",
            "question": "Which hold 1?",
            "answer_prefix": " Answer:",
            "answer": ["A"],
            "task": task,
        }
        for task in ("cwe", "vt")
    ]
    (tmp_path / "512").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "512/test-00000-of-00001.parquet")
    example = only(find("ruler/vt", str(tmp_path)), tokenizer, 512)
    assert (example.prompt, example.answers) == ("VAR A = 1\nWhich hold 1? Answer:", ("A",))
    with pytest.raises(UsageError, match="the files there hold no row of ruler/fwe"):
        only(find("ruler/fwe", str(tmp_path)), tokenizer, 512)


def test_ruler_is_never_cut(tokenizer, tmp_path):
    shutil.copytree(SAMPLES / "ruler/256/data/vt", tmp_path / "vt")
    with pytest.raises(
        UsageError, match=r"a prompt of ruler/vt has \d+ tokens, more than 20, and a cut might take its"
    ):
        only(find("ruler/vt", str(tmp_path)), tokenizer, 20)


def test_xsum_rows(tokenizer):
    task = find("xsum/0shot", XSUM)
    example = only(task, tokenizer)
    assert example.prompt.startswith("###\nArticle: Ferries") and example.max_new_tokens == 64
    summary = example.answers[0]
    assert score(task, example, f" {summary}### Article: and so on") == score(task, example, summary) > 0.99
    assert score(task, example, "###") == 0, "nothing generated: the package raises, the score is 0"
    halves = {metric: score(replace(task, metric=metric), example, summary[:30]) for metric in ("rouge_1", "rouge_2")}
    assert 0 < halves["rouge_2"] < halves["rouge_1"] < 1


def test_dates_stay_text(tokenizer, tmp_path):
    """The JSON reader of `datasets` would hand over timestamps here."""
    row = {"article": "2011-05-06", "summary_gt": "2011-05-06"}
    (tmp_path / "xsum_0shot.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row))
    first, second = find("xsum/0shot", str(tmp_path)).examples(tokenizer, 64, 9)
    assert first.prompt == "2011-05-06" and second.answers == ("2011-05-06",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]\n", "xsum_0shot.jsonl: cannot be read as rows .line 1 is no object.; download it again"),
        ('{"article": ', "xsum_0shot.jsonl: cannot be read as rows"),
        ('{"request": {}}', "row 0 of xsum/0shot has no field 'article', only request"),
        ("", "the files there hold no row of xsum/0shot"),
    ],
)
def test_rows_that_do_not_serve(content, message, tokenizer, tmp_path):
    (tmp_path / "xsum_0shot.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        only(find("xsum/0shot", str(tmp_path)), tokenizer)


def test_answers_must_be_a_list(tokenizer, tmp_path):
    (tmp_path / "vt").mkdir()
    (tmp_path / "vt/validation.jsonl").write_text('{"input": "x", "outputs": "AB"}')
    with pytest.raises(UsageError, match="the answers of row 0 of ruler/vt are 'AB', not a list"):
        only(find("ruler/vt", str(tmp_path)), tokenizer)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "xsum/0shot: no data; give --data FOLDER or a hub id; docs/evaluation_data.md"),
        ("./nowhere", "'./nowhere': no such folder, and not a hub id"),
        (RULER, "no rows of xsum/0shot there, looked for xsum_0shot.jsonl, h2o_hf/data"),
    ],
)
def test_no_data(data, message, tokenizer):
    with pytest.raises(UsageError, match=message):
        find("xsum/0shot", data).examples(tokenizer, 64, 1)


@pytest.mark.parametrize("offline", [False, True])
def test_from_the_hub(offline, tokenizer, monkeypatch):
    asked = []

    def snapshot_download(name, **settings):
        asked.append(SimpleNamespace(name=name, **settings))
        return XSUM

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert only(find("xsum/0shot", "owner/name", offline), tokenizer) == only(find("xsum/0shot", XSUM), tokenizer)
    (request,) = asked
    assert (request.name, request.repo_type, request.local_files_only) == ("owner/name", "dataset", offline)
    assert "xsum_0shot.jsonl" in request.allow_patterns and "*.py" not in request.allow_patterns


def test_a_hub_that_has_none(tokenizer, monkeypatch):
    def snapshot_download(name, **settings):
        raise huggingface_hub.errors.LocalEntryNotFoundError("-")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UsageError, match="run once without --offline to download it, or give a dataset folder"):
        only(find("xsum/0shot", "owner/name", offline=True), tokenizer)


def test_commands(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("\n") == 2 + len(TASKS) and "| `ruler/qa_1` | ruler | string_match_part | 32 |" in listed
    assert main(["show", "ruler/niah_multivalue", "--length", "256", "--index", "1", "--data", RULER]) == 0
    shown = capsys.readouterr().out
    assert "the number for heath is: 37" in shown.lower() and "answers: '37', '555'; up to 128 new tokens" in shown
    assert main(["show", "stories", "--length", "64"]) == 0
    assert "tokens, perplexity\n\nOnce there was" in capsys.readouterr().out
    for arguments, message in (
        (["show", "passkey", "--length", "0"], "error: --length is 0; it must be 1 or more"),
        (
            ["show", "ruler/vt", "--index", "3", "--length", "256", "--data", RULER],
            "has 1 examples, so none with --index 3",
        ),
        (["show", "passkey", "--data", RULER], "writes its own examples and reads no data; leave out"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
