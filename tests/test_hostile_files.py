"""What files and names hold, against whoever reads them: one clear line, at once, and nothing that steers a terminal.

The attacks of a review, as scripts: each was a hang, a traceback, exhausted memory or an opened file before.
"""

import contextlib
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from hf_models import tiny
from hostile import LARGE, SIZES, one_line

import eviction
from crypten_llm import memory
from crypten_llm.commands.cli import main
from crypten_llm.errors import CryptenLLMError, PartyError, UsageError, last_words, public_words
from crypten_llm.models import checkpoint
from crypten_llm.models import tokenizer as tokenizers
from crypten_llm.models.config import LlamaConfig
from crypten_llm.models.gguf_file import opened
from crypten_llm.session.defaults import Defaults
from crypten_llm.session.plan import Plan
from crypten_llm.session.weights import know_weights
from eviction import trained

DEEP = b"[" * 100_000


@pytest.mark.parametrize(("changes", "words"), LARGE, ids=[next(iter(changes)) for changes, _ in LARGE])
def test_a_model_of_any_size_in_ones_own_folder(tmp_path, changes, words):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **changes}))
    with one_line(UsageError, "config.json: .*" + words):
        LlamaConfig.from_folder(tmp_path)


NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.mark.parametrize("name", [*NAMES, "model.safetensors.index.json"])
def test_a_fifo_in_a_models_folder_hangs_nobody(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    readers = (
        lambda: checkpoint.resolve_model(tmp_path),
        lambda: LlamaConfig.from_folder(tmp_path),
        lambda: checkpoint.load_weights(tmp_path, LlamaConfig.from_dict(SIZES)),
    )
    for read in readers:
        with one_line(UsageError, f"{name} is no regular file"):
            read()
    if name.startswith("token"):
        (tmp_path / ("tokenizer_config.json" if name == "tokenizer.json" else "tokenizer.json")).write_text("{}")
        with one_line(UsageError, f"{name} is no regular file"):
            tokenizers.load(tmp_path)
    if "config.json" in name and "tokenizer" not in name:
        with one_line(UsageError, f"{name} is no regular file"):
            Defaults.of_folder(tmp_path)


def test_a_fifo_as_a_gguf_file(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    with one_line(UsageError, "model.gguf is no regular file"):
        opened(tmp_path / "model.gguf")


def test_a_gguf_file_that_counts_further_than_it_goes(tmp_path):
    counts = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    array = (9).to_bytes(4, "little") + (0).to_bytes(4, "little") + (1 << 60).to_bytes(8, "little")
    text = b"GGUF" + (3).to_bytes(4, "little") + counts + (1).to_bytes(8, "little") + b"a" + array
    (tmp_path / "model.gguf").write_bytes(text)
    with one_line(UsageError, r"model.gguf cannot be read as GGUF \(it ends early\)"):
        opened(tmp_path / "model.gguf")


@pytest.mark.parametrize("text", [DEEP, b'{"a":' * 100_000, b'{"vocab_size": NaN}', b"\xff\xfe", b'{"a": 1e999}'])
def test_json_that_is_deep_or_not_a_number(tmp_path, text):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(text)
    for read in (
        lambda: LlamaConfig.from_folder(tmp_path),
        lambda: Defaults.of_folder(tmp_path),
        lambda: tokenizers.digest(tmp_path),
        lambda: checkpoint.load_weights(tmp_path, LlamaConfig.from_dict(SIZES)),
        lambda: tokenizers.load(tmp_path),
    ):
        with one_line(UsageError, "JSON|not of its kind|cannot be used"):
            read()


def test_a_file_that_never_ends(tmp_path):
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with one_line(UsageError, "config.json is no regular file"):
        LlamaConfig.from_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**11)
    with one_line(UsageError, "config.json has 100.0 GB; a file of its kind has 16.8 MB at most"):
        LlamaConfig.from_folder(tmp_path)


def test_a_regex_that_panics_in_a_tokenizer(tmp_path, capfd):
    content = json.loads((checkpoint.SHIPPED / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint.SHIPPED / name).read_bytes())
    loaded = tokenizers.load(tmp_path)
    with one_line(UsageError, r"the tokenizer on this text cannot be used \(Onig: .*\); repair it, or give token ids"):
        tokenizers.encode_prompt(loaded, "a" * 40 + "b")
    assert capfd.readouterr().err == ""


# A policy's text.


@pytest.mark.parametrize("name", ["locret", "attention_gate"])
@pytest.mark.parametrize("value", ["/etc/passwd", "/etc/passwd#0123456789abcdef", "../shipped", "~", "", ".", "a#b"])
def test_a_policys_text_opens_no_file(name, value, monkeypatch):
    """It comes from another party: what it names is looked up, and no path in it is touched."""
    for where in ("is_file", "open", "exists", "read_bytes", "stat"):
        monkeypatch.setattr(Path, where, forbidden)
    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(UsageError, match="weights is .* it must be shipped, or the name of weights that every"):
        Plan(8, 2, policy=f"{name}(weights={value})")
    looked_up = eviction.parse(f"{name}(weights=..#0123456789abcdef)")
    with pytest.raises(eviction.PolicyError, match="no weights ..#0123456789abcdef are known here; start every party"):
        trained.load(looked_up.weights, name)


WHOLE = [
    (name, setting.name)
    for name, kind in eviction.POLICIES.items()
    for setting in fields(kind)
    if setting.metadata["kind"] in ("whole", "share")
]


@pytest.mark.parametrize(("name", "setting"), WHOLE)
def test_no_setting_of_a_policy_is_too_large_to_be_refused(name, setting):
    for large in (2**63, 10**30, "1e300", "-1e300", "nan", "inf", "9" * 900):
        with one_line(UsageError, f"policy {name}: {setting} is "):
            Plan(8, 2, policy=f"{name}({setting}={large})")
    with contextlib.suppress(UsageError):  # where it has a bound of its own
        Plan(8, 2, policy=f"{name}({setting}={2**40})")


def forbidden(*arguments, **options):
    raise AssertionError(f"{arguments} was opened")


def test_weights_of_a_policy_are_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with one_line(UsageError, "fifo is no regular file"):
        know_weights(str(tmp_path / "fifo"))
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with one_line(UsageError, "broken.safetensors: the weights broken cannot be read"):
        know_weights(str(tmp_path / "broken.safetensors"))


# Terminals.


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r\n"


@pytest.mark.parametrize("kind", [CryptenLLMError, UsageError, PartyError, ValueError, OSError])
def test_no_error_steers_a_terminal(kind):
    error = kind(5, ESCAPES, ESCAPES) if kind is OSError else kind(f"model {ESCAPES} is not there")
    for words in (last_words(error), public_words(error)):
        assert words.isprintable()


def test_a_long_value_is_cut_and_the_advice_stays():
    text = str(UsageError(f"hidden_act is {'x' * 10**6}; only 'silu' is supported"))
    assert text.startswith("hidden_act is xxx") and text.endswith("; only 'silu' is supported") and len(text) < 2010


def test_a_models_name_on_the_command_line(capsys):
    assert main(["cost", "--model", f"{ESCAPES}/x", "--prompt-tokens", "3", "--verbose"]) == 2
    err = capsys.readouterr().err
    assert "\\x1b" in err and all(c.isprintable() or c == "\n" for c in err)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_answer_is_text_on_a_terminal(monkeypatch, capsys, is_terminal):
    from crypten_llm.commands import show

    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    show.answer("ein \x1b[31mWort\x07\n\u202e\u200d👩")
    out = capsys.readouterr().out
    assert out == ("ein \\x1b[31mWort\\x07\n\u202e\u200d👩" if is_terminal else "ein \x1b[31mWort\x07\n\u202e\u200d👩")


def test_a_childs_words_are_shown_as_text(capsys):
    from crypten_llm.session import launch

    launch._show(f"measured {ESCAPES}")
    assert "\x1b" not in capsys.readouterr().err


# What may be there still works.


def test_sizes_of_real_models_are_within_the_caps(tmp_path):
    folder, _ = tiny(tmp_path, num_hidden_layers=1)
    config = LlamaConfig.from_folder(folder)
    assert config.parameters == sum(shape.numel() for shape in checkpoint.expected_shapes(config).values())
    largest = {**SIZES, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    largest |= {"num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128256}
    assert 4.0e11 < LlamaConfig.from_dict({**largest, "max_position_embeddings": 131072}).parameters < 4.1e11
    assert memory.available() > 1 << 20
