"""The fast path of the tokenizer gives what transformers gives, and is left where it could not."""

import json
import shutil
import subprocess
import sys

import pytest
import sentencepieces
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from crypten_llm.errors import UsageError
from crypten_llm.models import tokenizer
from crypten_llm.models.checkpoint import SHIPPED, load_tokenizer
from crypten_llm.models.tokenizer import Tokenizer, encode_prompt

TEXTS = (
    *("", " ", "  two leading spaces", "trailing ", "\n\n\ttabs\nand lines\r\n", "The passkey is 4711.", "x" * 500),
    *(
        "naïve café",
        "日本語のテキスト",
        "🙂 emoji 👩‍👩‍👧 family",
        "e\u0301 decomposed",
        "\u0000\ufeff\u200b",
        "عربى",
        "﷽",
    ),
    *("<s>", "</s>", "<pad>", "a<s>b</s> c <pad>", "<s> a", " <s>a", "<s><s>a", "< s >", "<S>", "s>", "<unk>", "▁a ▁"),
    *("spaces before . and , do n't stay ?", "it 's he 'll", "12345 67.8", "http://a.b/c?d=e&f", "CamelCaseWord"),
)


@pytest.fixture
def folder(tmp_path):
    """The shipped tokenizer, to be changed."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, tmp_path)
    return tmp_path


def change(path, **values):
    """Sets keys of a JSON file; None removes one."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def same(fast, reference, texts=TEXTS):
    for text in texts:
        for special in (True, False):
            ids = reference(text, add_special_tokens=special)["input_ids"]
            assert fast(text, add_special_tokens=special)["input_ids"] == ids, text
            assert fast.encode(text, add_special_tokens=special) == ids
            for skip in (True, False):
                assert fast.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)
        expected = reference(text, return_offsets_mapping=True)["offset_mapping"]
        assert fast(text, return_offsets_mapping=True)["offset_mapping"] == expected
        assert fast.tokenize(text) == reference.tokenize(text)
    assert len(fast) == len(reference)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(fast, name) == getattr(reference, name)


def test_the_shipped_tokenizer():
    fast, reference = load_tokenizer("shipped"), AutoTokenizer.from_pretrained(SHIPPED)
    assert isinstance(fast, Tokenizer)
    same(fast, reference)
    for token in range(len(fast)):
        assert fast.decode([token]) == reference.decode([token]) == fast.decode(token)


@given(
    st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("<s>/pad. '\n0123456789")), max_size=60)
)
def test_any_text(text):
    same(*_both(), [text])


def _both(made=[]):  # noqa: B006  one pair for all examples
    if not made:
        made += load_tokenizer("shipped"), AutoTokenizer.from_pretrained(SHIPPED)
    return made


SPECIAL = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
DECODER = {str(i): {"content": text, **SPECIAL} for i, text in enumerate(("<s>", "</s>", "<pad>"))}


def backend(folder, **parts):
    """Other parts of the shipped ``tokenizer.json``."""
    change(folder / "tokenizer.json", **parts)


def no_post_processor(folder):
    made = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(made | {"post_processor": None}))


def truncated_and_padded(folder):
    made = Backend.from_file(str(folder / "tokenizer.json"))
    made.enable_truncation(4)
    made.enable_padding(length=9, pad_id=2, pad_token="<pad>")
    made.save(str(folder / "tokenizer.json"))


def set_config(**values):
    return lambda folder: change(folder / "tokenizer_config.json", **values)


def stripping_flags(folder):
    made = json.loads((folder / "tokenizer.json").read_text())
    for token in made["added_tokens"]:
        token |= {"lstrip": True, "rstrip": True}
    (folder / "tokenizer.json").write_text(json.dumps(made))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(lambda _: None, id="nothing"),
        pytest.param(set_config(tokenizer_class="TokenizersBackend", backend="tokenizers"), id="class"),
        pytest.param(set_config(add_bos_token=False), id="no bos"),
        pytest.param(set_config(add_bos_token=True, add_eos_token=True), id="bos and eos"),
        pytest.param(set_config(clean_up_tokenization_spaces=True), id="spaces of BPE"),
        pytest.param(set_config(added_tokens_decoder=DECODER), id="added tokens"),
        pytest.param(set_config(bos_token={"content": "<s>", **SPECIAL, "__type": "AddedToken"}), id="flags"),
        pytest.param(set_config(additional_special_tokens=["<pad>"]), id="additional"),
        pytest.param(set_config(pad_token=None), id="no pad"),
        pytest.param(set_config(eos_token=None, add_prefix_space=True, legacy=True), id="prefix space"),
        pytest.param(no_post_processor, id="no post processor"),
        pytest.param(truncated_and_padded, id="truncated and padded"),
        pytest.param(stripping_flags, id="stripping"),
    ],
)
def test_what_the_fast_path_honours(folder, changed):
    changed(folder)
    fast = load_tokenizer(folder)
    assert isinstance(fast, Tokenizer)
    same(fast, AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(set_config(tokenizer_class="LlamaTokenizer"), id="Llama"),
        pytest.param(set_config(tokenizer_class="GPT2Tokenizer"), id="GPT2"),
        pytest.param(set_config(tokenizer_class=None), id="no class"),
        pytest.param(set_config(split_special_tokens=True), id="split"),
        pytest.param(set_config(unk_token="<new>"), id="a new token"),
        pytest.param(set_config(mask_token="the"), id="an ordinary token made special"),
        pytest.param(set_config(image_token="<image>"), id="a token of the model's own"),
        pytest.param(set_config(extra_special_tokens={"tool_token": "<tool>"}), id="named extras"),
        pytest.param(
            set_config(added_tokens_decoder=DECODER | {"2": DECODER["2"] | {"lstrip": True}}), id="other flags"
        ),
        pytest.param(set_config(added_tokens_decoder=DECODER | {"2048": {"content": "<n>", **SPECIAL}}), id="more"),
        pytest.param(lambda folder: change(folder / "special_tokens_map.json", unk_token="<new>"), id="map"),
        pytest.param(lambda folder: change(folder / "added_tokens.json", **{"<new>": 2048}), id="added_tokens.json"),
        pytest.param(lambda folder: change(folder / "config.json", model_type="mistral"), id="another family"),
        pytest.param(lambda folder: (folder / "tokenizer_config.json").unlink(), id="no tokenizer_config.json"),
    ],
)
def test_what_is_left_to_transformers(folder, changed):
    changed(folder)
    found = load_tokenizer(folder)
    assert not isinstance(found, Tokenizer)
    for text in TEXTS:
        assert found(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_everything_else_is_transformers_own(folder):
    change(folder / "tokenizer_config.json", chat_template="{% for m in messages %}[{{ m.content }}]{% endfor %}")
    fast = load_tokenizer(folder)
    assert fast.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
    assert fast("a b", return_tensors="pt").input_ids.tolist() == [fast("a b")["input_ids"]]
    assert fast(["a", "b"])["input_ids"] == [fast("a")["input_ids"], fast("b")["input_ids"]]
    with pytest.raises(AttributeError):
        fast.nothing_of_that_name  # noqa: B018


def test_text_that_begins_with_the_first_token_gets_it_once(folder):
    fast = load_tokenizer(folder)
    plain = fast("The key")["input_ids"]
    assert encode_prompt(fast, "The key") == encode_prompt(fast, "<s>The key") == plain
    assert encode_prompt(fast, "<s><s>The key") == [0, *plain]
    assert encode_prompt(fast.full, "<s>The key") == plain
    no_post_processor(folder)
    adds_none = load_tokenizer(folder)
    assert encode_prompt(adds_none, "<s>The key") == plain and encode_prompt(adds_none, "The key") == plain[1:]
    assert encode_prompt(adds_none, "<s><s>The key") == [0, *plain], "written twice, meant twice"


@pytest.mark.parametrize(
    ("content", "package"),
    [(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")],
)
def test_a_model_file_without_its_package_names_it(tmp_path, monkeypatch, content, package):
    monkeypatch.setattr(tokenizer.importlib.util, "find_spec", lambda _: None)
    shutil.copy(SHIPPED / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UsageError, match=f"needs the package '{package}', .* pip install {package}'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"legacy": True}])
def test_a_folder_with_tokenizer_model_alone(tmp_path, settings):
    """The library's own ids; text with several spaces, which transformers joins for some models, is its affair."""
    reference = sentencepieces.train(tmp_path)
    shutil.copy(SHIPPED / "config.json", tmp_path)
    change(tmp_path / "tokenizer_config.json", **settings)
    found = load_tokenizer(tmp_path)
    for text in ("The capital of France", "12 naïve 日本 🙂", "the rounds of a layer."):
        ids = found(text)["input_ids"]
        assert ids == [1, *reference.encode(text)]
        assert found.decode(ids, skip_special_tokens=True) == text
    assert encode_prompt(found, "<s>The capital").count(1) == 1
    known = tokenizer.digest(tmp_path)
    assert known == tokenizer.digest_of(found) and len(known) == 64
    found.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").exists() and tokenizer.digest(tmp_path / "saved") == known


def test_a_digest_is_of_what_ids_stand_for(folder):
    shipped = tokenizer.digest(SHIPPED)
    assert len(shipped) == 64 and tokenizer.digest_of(load_tokenizer("shipped")) == shipped
    AutoTokenizer.from_pretrained(SHIPPED).save_pretrained(folder)
    no_post_processor(folder)
    assert tokenizer.digest(folder) == tokenizer.digest_of(AutoTokenizer.from_pretrained(folder)) == shipped
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"added_tokens": [{"id": 9, "content": "<new>"}]}))
    assert tokenizer.digest(folder) != shipped
    path.write_text("{")
    with pytest.raises(UsageError, match="tokenizer.json: not valid JSON"):
        tokenizer.digest(folder)
    path.unlink()
    assert tokenizer.digest(folder) is None


def test_a_chat_template_is_seen(folder):
    def seen():
        fast = load_tokenizer(folder)
        assert tokenizer.has_chat_template(fast) == tokenizer.has_chat_template(fast.full)
        return tokenizer.has_chat_template(fast)

    assert not seen()
    change(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    assert seen()
    change(folder / "tokenizer_config.json", chat_template=None)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert seen()


def test_transformers_is_not_imported():
    code = "import sys; from crypten_llm.models.checkpoint import load_tokenizer as load; "
    code += "t = load('shipped'); t.decode(t('a')['input_ids']); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
