"""A GGUF file's tokenizer gives the ids of the tokenizer that it was made from, or an error."""

import json
import shutil

import gguf_files
import pytest
import sentencepieces
from hf_models import tiny
from test_tokenizer import TEXTS, same

from crypten_llm.errors import UsageError
from crypten_llm.models import gguf_tokenizer, tokenizer
from crypten_llm.models.checkpoint import SHIPPED, load_tokenizer
from crypten_llm.models.tokenizer import Tokenizer, encode_prompt, encode_rendered, has_chat_template, render_chat

TEMPLATE = "{% for m in messages %}{{ bos_token }}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def made(tmp_path):
    """Of metadata, the path of a file with it and a tiny model."""
    folder, _ = tiny(tmp_path, vocab_size=2048, num_hidden_layers=1)
    return lambda add: gguf_files.write(folder, add=add)


def shipped(pre="smollm", **more):
    return gguf_files.tokens(SHIPPED, pre, **more)


def test_byte_level(made):
    path = made(shipped())
    found = load_tokenizer(path)
    assert isinstance(found, Tokenizer)
    same(found, found.full)
    reference = load_tokenizer("shipped")
    for text in TEXTS:
        for special in (True, False):
            ids = reference(text, add_special_tokens=special)["input_ids"]
            assert found(text, add_special_tokens=special)["input_ids"] == ids
            assert found.decode(ids) == reference.decode(ids)
            assert found.decode(ids, skip_special_tokens=True) == reference.decode(ids, skip_special_tokens=True)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(found, name) == getattr(reference, name)
    assert tokenizer.digest(path) == tokenizer.digest_of(found) == tokenizer.digest(SHIPPED)


def test_the_first_token(made):
    """As the file says it, and if it does not, as the rule for splitting text has it."""
    flags = {None: None, True: True, False: False}
    for pre, by_default in (("smollm", False), ("llama-bpe", True), ("qwen2", False), ("tekken", True)):
        for flag in flags:
            ids = load_tokenizer(made(shipped(pre, add_bos_token=flag)))("a")["input_ids"]
            assert (ids[0] == 0) == (by_default if flag is None else flag)
    ids = load_tokenizer(made(shipped(add_eos_token=True)))("a")["input_ids"]
    assert ids[0] == 0 and ids[-1] == 1
    assert encode_prompt(load_tokenizer(made(shipped())), "<s>a") == ids[:-1]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", " things", "...", "\n\n ", " x"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " things", "...", "\n\n ", " x"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " things", "...\n\n", " ", " x"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " things", "...\n\n", " ", " x"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "5", " things", "...\n\n", " ", " x"]),
    ],
)
def test_text_is_split_by_the_rule_that_the_file_names(made, pre, pieces):
    found = load_tokenizer(made(shipped(pre)))
    split = found._backend.pre_tokenizer.pre_tokenize_str("It's 12345 things...\n\n  x")
    assert ["It's 12345 things...\n\n  x"[first:last] for _, (first, last) in split] == pieces


def test_a_word_that_is_a_token_is_taken_whole(made):
    """Of Llama 3's files: here one that no merges lead to."""
    add = shipped("llama-bpe")
    texts, rare = add["tokenizer.ggml.tokens"], "Ġzqxj"
    texts[-1] = rare
    merges = [merge for merge in add["tokenizer.ggml.merges"] if merge.replace(" ", "") in texts]
    path = made(add | {"tokenizer.ggml.merges": merges})
    assert load_tokenizer(path)(" zqxj")["input_ids"] == [0, len(texts) - 1]
    path = made(add | {"tokenizer.ggml.merges": merges, "tokenizer.ggml.pre": "qwen2"})
    assert len(load_tokenizer(path)(" zqxj")["input_ids"]) > 2


def test_added_tokens_and_those_that_fill_up(made):
    add = shipped()
    texts, kinds = add["tokenizer.ggml.tokens"], add["tokenizer.ggml.token_type"]
    path = made(
        add
        | {
            "tokenizer.ggml.tokens": [*texts, "<think>", "<|tool|>", "[PAD2050]"],
            "tokenizer.ggml.token_type": [*kinds, 4, 3, 5],
        }
    )
    found = load_tokenizer(path)
    assert isinstance(found, Tokenizer) and len(found) == len(texts) + 2
    assert found("<think>a<|tool|>")["input_ids"][1::2] == [2048, 2049]
    assert found.decode([2048, 2049], skip_special_tokens=True) == "<think>"
    assert tokenizer.digest(path) == tokenizer.digest_of(found) != tokenizer.digest(SHIPPED)


def test_sentencepiece(made, tmp_path):
    reference = sentencepieces.train(tmp_path)
    path = made(sentencepieces.metadata(reference))
    found = load_tokenizer(path)
    assert isinstance(found, Tokenizer)
    for text in sentencepieces.TEXTS:
        ids = found(text)["input_ids"]
        assert ids == [1, *reference.encode(text)]
        assert found.decode(ids, skip_special_tokens=True) == reference.decode(ids[1:])
    assert found("a</s>")["input_ids"][-1] == 2
    assert (found.bos_token, found.unk_token_id) == ("<s>", 0)
    assert tokenizer.digest(path) == tokenizer.digest_of(found)
    bare = load_tokenizer(made(sentencepieces.metadata(reference, add_space_prefix=False, add_bos_token=False)))
    assert bare(" the")["input_ids"] == found("the")["input_ids"][1:] != bare("the")["input_ids"]


def test_a_chat_template(made):
    assert not has_chat_template(load_tokenizer(made(shipped())))
    found = load_tokenizer(made(shipped() | {"tokenizer.chat_template": TEMPLATE}))
    assert has_chat_template(found)
    assert encode_rendered(found, render_chat(found, [{"role": "user", "content": "hi"}])) == found("[hi]")["input_ids"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pre": "default"}, "tokenizer.ggml.pre is 'default', a way to split text that is not known here"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; only 'gpt2' and 'llama'"),
        ({"model": "llama"}, "it holds no tokenizer.ggml.scores"),
        ({"tokens": None}, "it holds no tokenizer"),
    ],
)
def test_what_cannot_be_read(made, changed, message):
    add = {key: value for key, value in shipped(**{"pre": "smollm", **changed}).items() if value is not None}
    path = made(add)
    with pytest.raises(UsageError, match=f"F32.gguf: {message}.*; give the tokenizer of the .*--tokenizer FOLDER"):
        load_tokenizer(path)
    assert (tokenizer.digest(path) is None) == ("tokens" in changed)


def test_merges_of_tokens_that_are_not_there(made):
    add = shipped()
    path = made(add | {"tokenizer.ggml.merges": [*add["tokenizer.ggml.merges"], "zq xqz"]})
    with pytest.raises(UsageError, match="F32.gguf: the tokenizer cannot be used .*--prompt-ids"):
        load_tokenizer(path)


def test_the_folder_goes_with_the_process(made, monkeypatch):
    kept = []
    monkeypatch.setattr(gguf_tokenizer.atexit, "register", lambda *call, **options: kept.append((call, options)))
    path = made(shipped())
    folder = load_tokenizer(path).folder
    assert load_tokenizer(path).folder == folder, "made once"
    ((remove, where), options) = kept[0]
    assert len(kept) == 1 and where == folder and json.loads((folder / "config.json").read_text())
    remove(where, **options)
    assert not folder.exists() and remove is shutil.rmtree
