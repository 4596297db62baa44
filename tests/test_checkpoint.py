"""Weights arrive bit for bit, wrong checkpoints are named, and no pickle is ever opened or downloaded."""

import json
import shlex
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from hf_models import CASES, EVERY_CASE, tiny, with_tokenizer
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

from crypten_llm.commands import cli
from crypten_llm.errors import UsageError
from crypten_llm.models import checkpoint
from crypten_llm.models.checkpoint import expected_shapes, load_tokenizer, load_weights, resolve_model
from crypten_llm.models.config import LlamaConfig


def load(folder, **changes):
    d = json.loads((folder / "config.json").read_text()) | changes
    return dict(load_weights(folder, LlamaConfig.from_dict(d)))


def edit(folder, change):
    """Rewrite the single weight file after `change(tensors)`."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def folder(tmp_path):
    return tiny(tmp_path)[0]


@pytest.mark.parametrize("case", EVERY_CASE)
def test_equals_hugging_face(case, tmp_path):
    folder, model = tiny(tmp_path, **EVERY_CASE[case])
    config = LlamaConfig.from_folder(folder)
    reference = model.state_dict()
    if config.tie_word_embeddings:
        del reference["lm_head.weight"]
    weights = dict(load_weights(folder, config))
    assert weights.keys() == reference.keys()
    assert list(weights) == list(expected_shapes(config))
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and tensor.shape == expected_shapes(config)[name]
        assert torch.equal(tensor, reference[name])


def test_writing_into_a_tensor_leaves_the_file(folder):
    load(folder)["lm_head.weight"].zero_()
    assert load(folder)["lm_head.weight"].any()


def test_harmless_extras(tmp_path):
    folder, model = tiny(tmp_path, tie_word_embeddings=True)
    embedding = model.state_dict()["model.embed_tokens.weight"]
    extras = {"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    edit(folder, lambda tensors: tensors.update(extras))
    assert "lm_head.weight" not in load(folder)


def test_tied_but_different(tmp_path):
    folder, _ = tiny(tmp_path, tie_word_embeddings=True)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(97, 32)}))
    with pytest.raises(UsageError, match="tie_word_embeddings is true but lm_head.weight differs"):
        load(folder)


def test_every_misfit_in_one_message(folder):
    def change(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
        tensors["lm_head.weight"] = torch.ones(96, 32)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)

    edit(folder, change)
    with pytest.raises(UsageError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder}: the weights do not fit config.json: "
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "unexpected: model.layers.0.self_attn.q_proj.bias; "
        "wrong shape: lm_head.weight [96, 32] instead of [97, 32]; "
        "not float32, float16, bfloat16: model.layers.0.mlp.up_proj.weight I8"
    )


def test_hundreds_of_misfits_are_shortened(folder):
    with pytest.raises(UsageError, match=r"model.layers.3.\S+ and \d\d\d more$") as caught:
        load(folder, num_hidden_layers=40)
    assert len(str(caught.value)) < 1500


def test_misfits_are_raised_before_iterating(folder):
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UsageError, match="missing: model.norm.weight"):
        load_weights(folder, LlamaConfig.from_folder(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite(folder, value):
    edit(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[5].fill_(value))
    with pytest.raises(UsageError, match="model.layers.1.mlp.up_proj.weight has NaN or infinite values"):
        load(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "model.safetensors cannot be read as safetensors"),
        (b"\x10\0\0\0\0\0\0\0nonsense", "model.safetensors cannot be read as safetensors .*; download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, .* 'git lfs pull'"),
    ],
)
def test_corrupt_file(folder, content, message):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load(folder)


def test_truncated_file(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(UsageError, match="model.safetensors cannot be read as safetensors"):
        load(folder)


def test_a_folder_in_place_of_a_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(UsageError, match="model.safetensors cannot be read as safetensors"):
        load(folder)


@pytest.fixture
def sharded(tmp_path):
    return tiny(tmp_path, **CASES["sharded"])[0]


def test_missing_shards_are_all_named(sharded):
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    for shard in shards[1:3]:
        (sharded / shard).unlink()
    with pytest.raises(UsageError, match=f"{shards[1]}, {shards[2]} missing; download the model again"):
        load(sharded)


def test_dangling_shard(sharded):
    """A cache whose link leads nowhere: the file is listed but cannot be opened."""
    shard = min(sharded.glob("*.safetensors"))
    shard.unlink()
    shard.symlink_to(sharded / "gone")
    with pytest.raises(UsageError, match=f"{shard.name} missing"):
        load(sharded)


@pytest.mark.parametrize(
    "index, message",
    [
        ("{", "model.safetensors.index.json: not valid JSON.*no usable index"),
        ("[]", "no usable index"),
        ('{"metadata": {}}', "no usable index"),
        ('{"weight_map": []}', "names files of this folder"),
        ('{"weight_map": {"a": 1}}', "no usable index"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "names files of this folder"),
    ],
)
def test_bad_index(sharded, index, message):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UsageError, match=message):
        load(sharded)


def test_pickles_are_not_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(UsageError, match=r"only pickle checkpoints \(pytorch_model.bin\).*save_pretrained"):
        load(folder)


def test_the_conversion_that_is_printed_gives_a_folder_that_runs(tmp_path, capsys):
    folder = with_tokenizer(tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(tmp_path / "kept.safetensors")
    with pytest.raises(UsageError) as caught:
        load(folder)
    _, _, code = shlex.split(str(caught.value).partition("convert to safetensors: ")[2])
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    (tmp_path / "kept.safetensors").rename(folder / "model.safetensors")
    answers = []
    for model in (folder, f"{folder}-safetensors"):
        asked = ["--model", str(model), "--engine", "plain", "--prompt", "a key", "--max-new-tokens", "3", "--json"]
        assert cli.main(["generate", *asked]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["token_ids"] == answers[1]["token_ids"] and answers[0]["text"] == answers[1]["text"]


def test_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="no model.safetensors or .*index.json but adapter_model.safetensors; give a"):
        load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match="no model.safetensors or model.safetensors.index.json; give a folder"):
        load(folder)


def test_no_folder(folder):
    config = LlamaConfig.from_folder(folder)
    with pytest.raises(UsageError, match="none: no such folder"):
        load_weights(folder / "none", config)


def test_resolve_local(folder, monkeypatch):
    assert resolve_model(folder) == resolve_model(str(folder)) == folder
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve_model("~/model") == folder


def test_resolve_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    assert resolve_model("shipped") == tmp_path
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path / "none")
    with pytest.raises(UsageError, match="the shipped model is not part of this installation"):
        resolve_model("shipped")


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c", "", "owner/na me", "owner/"])
def test_resolve_nothing(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UsageError, match="no such folder; give a model folder, a Hugging Face id"):
        resolve_model(name)


def test_resolve_a_file(folder):
    with pytest.raises(UsageError, match="config.json is a file; give the model folder"):
        resolve_model(folder / "config.json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands in for the hub: records each request, answers with a folder or raises."""

    class Hub:
        answer, requests = tmp_path, []

        def download(self, name, **settings):
            self.requests.append((name, settings))
            if isinstance(self.answer, Exception):
                raise self.answer
            return str(self.answer)

    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    return fake


@pytest.mark.parametrize("offline", [False, True])
def test_hub_requests_no_pickles(hub, offline):
    assert resolve_model("owner/name", offline) == hub.answer
    name, settings = hub.requests[-1]
    assert name == "owner/name" and settings["local_files_only"] is offline
    patterns = settings["allow_patterns"]
    assert "*.safetensors" in patterns and "*.json" in patterns and "tokenizer.model" in patterns
    wanted = ["model.safetensors", "config.json", "tokenizer.model", "pytorch_model.bin", "x.pt", "onnx/a.json"]
    kept = huggingface_hub.utils.filter_repo_objects(
        wanted, allow_patterns=patterns, ignore_patterns=settings["ignore_patterns"]
    )
    assert list(kept) == wanted[:3]


def http_error(kind):
    """These need a response of the HTTP library, which differs between versions; the message is all that counts."""
    error = kind.__new__(kind)
    Exception.__init__(error, "401 Client Error")
    return error


@pytest.mark.parametrize(
    "answer, offline, message",
    [
        (
            http_error(errors.GatedRepoError),
            False,
            "access to this model is restricted; accept its licence .* 'hf auth",
        ),
        (
            http_error(errors.RepositoryNotFoundError),
            False,
            "no such folder, and no such model on the Hugging Face hub",
        ),
        (errors.HFValidationError("bad"), False, "no such folder, and no such model"),
        (
            errors.LocalEntryNotFoundError("-"),
            True,
            "not complete in the local Hugging Face cache; .*without --offline",
        ),
        (errors.LocalEntryNotFoundError("-"), False, "hub cannot be reached to download it; check the network"),
        (OSError(28, "No space left on device"), False, "download .* failed .*No space left on device.*; try again"),
        (RuntimeError("first line\nsecond"), False, r"download .* failed \(first line\); try again"),
    ],
)
def test_hub_failures(hub, answer, offline, message):
    hub.answer = answer
    with pytest.raises(UsageError, match=f"^owner/name: .*{message}") as caught:
        resolve_model("owner/name", offline)
    assert "\n" not in str(caught.value)


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "private": 1, "inference": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def test_tokenizer(folder, hub):
    save_tokenizer(folder)
    assert load_tokenizer(folder)("private inference")["input_ids"] == [1, 2]
    hub.answer = folder
    assert load_tokenizer("owner/name", offline=True)("inference")["input_ids"] == [2]
    assert "*.safetensors" not in hub.requests[-1][1]["allow_patterns"]


def test_no_tokenizer(folder):
    with pytest.raises(UsageError, match="no tokenizer .*; give token ids with --prompt-ids instead"):
        load_tokenizer(folder)


def test_bad_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match=r"the tokenizer cannot be used \(.*--prompt-ids"):
        load_tokenizer(folder)


def test_tokenizer_code_is_not_run(folder):
    save_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "custom.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Custom: pass\n")
    try:
        load_tokenizer(folder)
    except UsageError:
        pass
    assert not (folder / "ran").exists()
