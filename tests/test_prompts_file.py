"""Files of prompts and answers: JSON lines in and out, taken up again where a run was ended."""

import json

import pytest
from hf_models import with_template

from crypten_llm import PrivateLlama
from crypten_llm.commands import prompts as prompts_file
from crypten_llm.commands.cli import main
from crypten_llm.errors import UsageError
from crypten_llm.session.launch import LocalParties


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_template(tmp_path_factory.mktemp("prompts"))


LINES = [
    {"prompt": "The passkey is 4711."},
    {"id": "second", "prompt": "Two.", "max_new_tokens": 2},
    {"id": 9, "messages": [{"role": "user", "content": "Hi\u2028there"}]},
    {"prompt": "Four."},
]


@pytest.fixture
def files(tmp_path):
    """Where prompts and answers are; the prompts are written."""
    written = "\n".join(json.dumps(line, ensure_ascii=False) for line in LINES[:2])
    written += "\n\n" + "\n".join(json.dumps(line, ensure_ascii=False) for line in LINES[2:]) + "\n"
    (tmp_path / "prompts.jsonl").write_text(written, "utf-8")
    return tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"


def ask(model, files, *options, engine="plain"):
    command = [
        "generate",
        "--engine",
        engine,
        "--model",
        str(model),
        "--prompts",
        str(files[0]),
        "--out",
        str(files[1]),
    ]
    return main([*command, "--max-new-tokens", "4", "--batch-size", "3", "--threads", "1", *options])


def answers(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


@pytest.mark.parametrize("engine", ["plain", "wire"])
def test_each_prompt_is_answered(model, files, engine, capsys):
    assert ask(model, files, "--chat", "--logprobs", "1", engine=engine) == 0
    captured, found = capsys.readouterr(), answers(files[1])
    assert captured.out == ""
    assert [answer["id"] for answer in found] == [1, "second", 9, 5], "a line has its number for a name"
    assert [len(answer["logprobs"]) for answer in found] == [len(answer["token_ids"]) for answer in found]
    if engine == "plain":
        with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
            for line, answer in zip(LINES, found, strict=True):
                new = line.get("max_new_tokens", 4)
                asked = {key: value for key, value in line.items() if key in ("prompt", "messages")}
                expected = llama.generate(**asked, chat="prompt" in line, max_new_tokens=new)
                assert answer["token_ids"] == expected.token_ids and answer["text"] == expected.text
                assert answer["finish_reason"] == expected.finish_reason
                assert answer["prompt_tokens"] == expected.prompt_tokens
    assert "4 prompts, 0 answered already" in captured.err
    tokens = sum(len(answer["token_ids"]) for answer in found)
    (summary,) = [line for line in captured.err.splitlines() if line.startswith(f"4 answers of {tokens} tokens in ")]
    assert ("rounds" in summary) == (engine == "wire")
    assert ("3 prompts at once" in captured.err) and ("logits of each generated token" in captured.err)


def test_what_is_answered_is_kept(model, files, capsys, monkeypatch):
    assert ask(model, files) == 0
    whole = files[1].read_text("utf-8")
    lines = whole.split("\n")
    for left in (lines[0] + "\n" + lines[1][:7], "\n".join(lines[:3]) + "\n", ""):
        files[1].write_text(left, "utf-8")
        assert ask(model, files) == 0
        assert files[1].read_text("utf-8") == whole
        kept = left.count("\n")
        assert f"4 prompts, {kept} answered already" in capsys.readouterr().err

    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(PrivateLlama, "from_pretrained", refuse)
    assert ask(model, files) == 0
    assert files[1].read_text("utf-8") == whole


def test_an_answer_is_written_when_its_group_has_ended(model, files, monkeypatch):
    """A run that is ended later leaves it."""
    run = PrivateLlama.stream
    groups = []

    def second_fails(self, *arguments, **options):
        groups.append(arguments)
        if len(groups) > 1:
            assert len(answers(files[1])) == 3
            raise KeyboardInterrupt
        return run(self, *arguments, **options)

    monkeypatch.setattr(PrivateLlama, "stream", second_fails)
    assert ask(model, files) == 130
    assert [answer["id"] for answer in answers(files[1])] == [1, "second", 9]


def error(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def no_parties(monkeypatch):
    def refuse(*_):
        raise AssertionError("parties were started")

    monkeypatch.setattr(LocalParties, "_start", refuse)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'holds no prompt; write lines such as {"prompt": "..."}'),
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: not of its kind: Expected `object`"),
        ('{"prompt": "a"}\n{"promt": "b"}', "line 2: unknown key 'promt'; did you mean 'prompt'?"),
        ('{"prompt": "a"}\n{"id": 1, "prompt": "b"}', "line 2: the id 1 is another line's"),
        ('{"id": 1.5, "prompt": "b"}', "line 1: the id is 1.5; it must be a text or a whole number"),
        ('{"id": true, "prompt": "b"}', "line 1: the id is True"),
        ('{"prompt": " "}', "line 1: the prompt is empty"),
        ('{"id": 1}', "line 1: give either a prompt, input_ids or messages"),
        ('{"prompt": ["a"]}', "line 1: the prompt is a list"),
        ('{"prompt": "a", "max_new_tokens": 0}', "line 1: max_new_tokens is 0"),
        ('{"messages": []}', "line 1: messages is []"),
    ],
)
def test_lines_that_are_no_prompt(model, files, capsys, no_parties, text, message):
    files[0].write_text(text, "utf-8")
    assert ask(model, files, engine="wire") == 2
    assert message in error(capsys)
    assert not files[1].exists()


def test_a_system_message_is_not_for_conversations(model, files, capsys, no_parties):
    assert ask(model, files, "--chat", "--system", "Be brief.", engine="wire") == 2
    assert "line 4: --system is for prompts; of messages, the first may be the system's" in error(capsys)


def test_answers_to_other_prompts_are_not_taken_for_these(model, files, capsys, no_parties):
    asked = {"max_new_tokens": 4, "temperature": None}
    entries = prompts_file.read_prompts(str(files[0]), asked, "m")
    assert [entry.id for entry in entries] == [1, "second", 9, 5]
    same = prompts_file.read_prompts(str(files[0]), {"max_new_tokens": 4}, "m")
    assert [entry.digest for entry in same] == [entry.digest for entry in entries]
    for other, name in (({"max_new_tokens": 4, "seed": 1}, "m"), ({"max_new_tokens": 4}, "n")):
        apart = prompts_file.read_prompts(str(files[0]), other, name)
        assert not {entry.digest for entry in apart} & {entry.digest for entry in entries}
    good = json.dumps({"id": "second", "request": entries[1].digest})
    files[1].write_text(good + "\n", "utf-8")
    assert prompts_file.read_answers(str(files[1]), entries) == {"second"}
    for line in ({"id": "second", "request": "0"}, {"id": "third", "request": entries[1].digest}, {"id": [1]}, {}):
        files[1].write_text(good + "\n" + json.dumps(line) + "\n", "utf-8")
        with pytest.raises(
            UsageError, match="line 2: an answer to another prompt than .* name another file with --out"
        ):
            prompts_file.read_answers(str(files[1]), entries)
    files[1].write_text("{]\n", "utf-8")
    assert ask(model, files, engine="wire") == 2
    assert "line 1: not valid JSON" in error(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "P"], "--prompts needs --out F.jsonl"),
        (["--prompts", "P", "--out", "A", "--prompt", "a"], "leave --prompt, --prompt-file and --prompt-ids out"),
        (["--prompts", "P", "--out", "A", "--json"], "--json is of one answer"),
        (["--prompts", "P", "--out", "A", "--batch-size", "0"], "--batch-size is 0; it must be 1 or more"),
        (["--prompts", "/nowhere.jsonl", "--out", "A"], "--prompts: cannot read /nowhere.jsonl"),
        (["--prompts", "P", "--out", "/nowhere/at/all/A"], "--out: there is no folder /nowhere/at/all"),
        (["--prompt", "a", "--out", "A"], "--out belongs to a file of prompts"),
        (["--prompt", "a", "--batch-size", "3"], "--batch-size belongs to a file of prompts"),
        (["--prompt", "a", "--system", "b"], "system is a message of a chat; say chat as well (--chat)"),
        (["--prompt", "a", "--greedy", "--top-p", "0.5"], "--greedy has no use for --top-p; leave one out"),
        (["--prompt", "a", "--stop", ""], "stop is ''; give a text that ends the answer"),
        (["--prompt", "a", "--eos-token-id", "theirs"], "--eos-token-id takes whole numbers"),
        (["--prompt", "a", "--min-p", "3"], "min_p is 3.0; it must be from 0"),
        (["--prompt", "a", "--logprobs", "-1"], "logprobs is -1; it must be a number of tokens"),
    ],
)
def test_mistakes_on_the_command_line(files, capsys, no_parties, options, message):
    named = {"P": str(files[0]), "A": str(files[1])}
    assert main(["generate", *(named.get(word, word) for word in options)]) == 2
    assert message in error(capsys)


def test_a_prompt_that_does_not_fit_is_named_before_any_is_answered(model, files, capsys):
    files[0].write_text('{"prompt": "a"}\n{"id": "long", "prompt": "' + "word " * 500 + '"}\n', "utf-8")
    assert ask(model, files) == 2
    assert "prompt 'long': the prompt has" in error(capsys)
    assert not files[1].exists()
