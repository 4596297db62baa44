"""Text in and out of ``PrivateLlama``: chat templates, tokenizers, ids as they are, answers streamed by character."""

import json
import shutil

import pytest
from hf_models import with_tokenizer
from transformers import AutoTokenizer

from crypten_llm import PrivateLlama
from crypten_llm.commands.cli import main
from crypten_llm.errors import UsageError
from crypten_llm.models import checkpoint
from crypten_llm.session.api import Request
from crypten_llm.session.text import Detokenizer

PROMPT = "The passkey is 4711."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return with_tokenizer(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plain(model):
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        yield llama


@pytest.fixture
def chatty(model, tmp_path):
    """The tiny model with a tokenizer that has a chat template."""
    folder = shutil.copytree(model, tmp_path / "chatty")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}[answer]{% endif %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return folder


def test_chat(chatty, plain):
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    with PrivateLlama.from_pretrained(str(chatty), engine="plain") as llama:
        reference = AutoTokenizer.from_pretrained(chatty)
        for arguments, messages in (({"prompt": PROMPT, "chat": True}, said[1:]), ({"messages": said}, said)):
            expected = reference.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
            assert Request(**arguments).ids(lambda: llama.tokenizer) == expected
            answer = llama.generate(**arguments, max_new_tokens=2)
            assert answer.token_ids == plain.generate(input_ids=expected, max_new_tokens=2).token_ids
        assert llama.encode(PROMPT) == plain.encode(PROMPT), "a prompt is asked as it is"
    for arguments in ({"prompt": PROMPT, "chat": True}, {"messages": said}):
        with pytest.raises(UsageError, match="the tokenizer has no chat template; ask without --chat"):
            plain.generate(**arguments)


def test_a_template_that_refuses_a_conversation(chatty):
    config = json.loads((chatty / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ raise_exception('roles must alternate') }}"
    (chatty / "tokenizer_config.json").write_text(json.dumps(config))
    with PrivateLlama.from_pretrained(str(chatty), engine="plain") as llama:
        with pytest.raises(UsageError, match="template cannot be used .roles must alternate"):
            llama.generate("a", chat=True)


def test_a_chat_template_that_is_not_applied_is_said(chatty, model, capsys):
    told = "the tokenizer has a chat template, which is not applied to the prompt; --chat applies it"
    for folder, options, said in ((chatty, [], True), (chatty, ["--chat"], False), (model, [], False)):
        command = ["generate", "--engine", "plain", "--model", str(folder), "--prompt", "a", "--max-new-tokens", "1"]
        assert main([*command, *options]) == 0
        assert (told in capsys.readouterr().err.splitlines()) == said


@pytest.fixture
def foreign(model, tmp_path):
    """A tokenizer in which two ids have changed their meaning."""
    folder = shutil.copytree(model, tmp_path / "foreign")
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_a_tokenizer_of_another_model_is_refused(model, foreign, tmp_path):
    with PrivateLlama.from_pretrained(str(model), tokenizer=str(foreign), engine="plain") as llama:
        for ask in ({"prompt": "a"}, {"input_ids": [5]}):
            with pytest.raises(UsageError, match="the same ids stand for other tokens; .* with --tokenizer"):
                llama.generate(**ask, max_new_tokens=1)
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with PrivateLlama.from_pretrained(str(bare), tokenizer=str(foreign), engine="plain") as llama:
        assert llama.generate("a", max_new_tokens=1).text, "an owner without one announces none"


def test_a_missing_tokenizer_is_looked_for_once(model, monkeypatch):
    asked = []

    def missing(*arguments):
        asked.append(arguments)
        raise UsageError("no tokenizer")

    monkeypatch.setattr(checkpoint, "load_tokenizer", missing)
    with PrivateLlama.from_pretrained(str(model), engine="plain") as llama:
        for _ in range(2):
            assert llama.generate(input_ids=[5, 6], max_new_tokens=2).text == ""
        assert not llama.has_tokenizer and len(asked) == 1
        with pytest.raises(UsageError, match="no tokenizer"):
            llama.generate(PROMPT)


def test_ids_as_transformers_gives_them(plain):
    expected = plain.generate(PROMPT, max_new_tokens=2).token_ids
    ids = AutoTokenizer.from_pretrained(checkpoint.SHIPPED)(PROMPT, return_tensors="pt").input_ids
    assert plain.generate(input_ids=ids, max_new_tokens=2).token_ids == expected
    assert plain.generate(input_ids=ids[0].tolist(), max_new_tokens=2).token_ids == expected


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🙂 emoji 👩‍👩‍👧 family", "plain"])
def test_text_is_streamed_in_whole_characters(plain, text):
    ids = plain.tokenizer(text, add_special_tokens=False)["input_ids"]
    shown, detokenizer = [], Detokenizer(plain.tokenizer)
    for i, token in enumerate(ids):
        shown.append(detokenizer.push(token, i == len(ids) - 1))
        assert "\ufffd" not in shown[-1]
    assert "".join(shown) == detokenizer.text == plain.tokenizer.decode(ids)


def test_an_answer_cut_inside_a_character_says_so(plain):
    ids = plain.tokenizer("🙂", add_special_tokens=False)["input_ids"][:-1]
    detokenizer = Detokenizer(plain.tokenizer)
    shown = [detokenizer.push(token, i == len(ids) - 1) for i, token in enumerate(ids)]
    assert "".join(shown) == plain.tokenizer.decode(ids)
