"""GGUF files: configuration and weights as of the Hugging Face folder they were made from, or an error that helps."""

import json
import os
import shutil

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from hf_models import EVERY_CASE, reference_logits, tiny
from test_engines import IDS, load_plain, logits_in_pieces
from transformers import LlamaConfig as ReferenceConfig
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from crypten_llm.commands import cli
from crypten_llm.errors import UsageError
from crypten_llm.models import checkpoint, tokenizer
from crypten_llm.models.checkpoint import SHIPPED, load_tokenizer, load_weights, resolve_model
from crypten_llm.models.config import LlamaConfig
from experiments.tools import real_model

SAME = (
    *("gqa", "mha", "mqa", "wide_heads", "narrow_heads", "tied", "attention_bias", "mlp_bias", "eps_and_theta"),
    *("rope_linear", "rope_llama3", "mistral", "qwen2", "qwen2_options", "qwen2_rope", "qwen3", "qwen3_options"),
)


@pytest.mark.parametrize("case", SAME)
def test_equals_hugging_face(tmp_path, case):
    folder, reference = tiny(tmp_path, **EVERY_CASE[case])
    path = gguf_files.write(folder)
    model, config = load_plain(path), LlamaConfig.from_folder(folder)
    for name in ("context", "head_dim", "num_key_value_heads", "tie_word_embeddings", "eos_token_ids", "bos_token_id"):
        assert getattr(model.config, name) == getattr(config, name)
    assert LlamaConfig.from_dict(json.loads(json.dumps(model.config.to_dict()))) == model.config
    torch.testing.assert_close(
        logits_in_pieces(model, IDS, [20, 10], 30), reference_logits(reference, IDS), atol=1e-4, rtol=0
    )
    same = dict(load_weights(folder, config))
    assert list(same) == [name for name, _ in load_weights(path, model.config)]
    assert all(torch.equal(value, same[name]) for name, value in load_weights(path, model.config))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_the_floats_they_stand_for(tmp_path, kind):
    folder, reference = tiny(tmp_path, intermediate_size=64)
    path = gguf_files.write(folder, kind)
    config = LlamaConfig.from_folder(path)
    state, rounded = reference.state_dict(), 0
    for name, value in load_weights(path, config):
        expected = state[name].numpy()
        if value.dim() == 2:
            quantised = gguf.quants.quantize(expected, gguf.GGMLQuantizationType[kind])
            expected = gguf.quants.dequantize(quantised, gguf.GGMLQuantizationType[kind])
            rounded += int((expected != state[name].numpy()).any())
        # Queries and keys were rounded in another order of rows; blocks are within a row.
        assert np.array_equal(value.numpy(), expected), name
        state[name] = value
    assert rounded == 16, "every matrix was rounded, or the test sees nothing"
    reference.load_state_dict(state)
    found = logits_in_pieces(load_plain(path), IDS, [30], 30)
    torch.testing.assert_close(found, reference_logits(reference, IDS), atol=1e-4, rtol=0)


def test_blocks_of_256(tmp_path):
    """The package has no writer of these types: blocks at random, with a scale that keeps them small."""
    folder, _ = tiny(tmp_path, hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    kind = gguf.GGMLQuantizationType.Q6_K
    _, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (256, size), dtype=np.uint8)
    blocks[:, -2:] = np.array([2**-12], dtype=np.float16).view(np.uint8)
    path = gguf_files.write(folder)
    copied = tmp_path / "mixed.gguf"
    _replaced(path, copied, "blk.0.ffn_down.weight", blocks, kind)
    weights = dict(load_weights(copied, LlamaConfig.from_folder(copied)))
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
    assert torch.equal(weights["model.layers.0.mlp.down_proj.weight"], expected) and expected.std() > 0


def _replaced(path, copied, name, blocks, kind):
    """A copy of a file with one tensor's raw data instead."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(copied, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_head_s_size_that_is_not_told_follows_from_the_others(tmp_path):
    folder, reference = tiny(tmp_path, **EVERY_CASE["qwen3"] | {"head_dim": 8})
    path = gguf_files.write(
        folder, leave_out=["attention.key_length", "attention.value_length", "rope.dimension_count"]
    )
    assert LlamaConfig.from_folder(path).head_dim == 8
    found = logits_in_pieces(load_plain(path), IDS, [30], 30)
    torch.testing.assert_close(found, reference_logits(reference, IDS), atol=1e-4, rtol=0)


def test_every_end_of_a_turn_ends_an_answer(tmp_path):
    more = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    path = gguf_files.write(tiny(tmp_path)[0], add=more)
    assert LlamaConfig.from_folder(path).eos_token_ids == (2, 5)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count is 8; this is not supported and may change"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096; this is not supported"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5; this is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope type is 'yarn'; supported are default"),
        ({"llama.rope.scaling.type": "linear"}, "factor of rope type linear is None"),
        ({"split.count": 3}, "is one of 3 parts of a model; join them with 'llama-gguf-split --merge'"),
    ],
)
def test_what_would_be_another_model(tmp_path, add, message):
    path = gguf_files.write(tiny(tmp_path)[0], add=add)
    with pytest.raises(UsageError, match=f"F32.gguf.*{message}") as caught:
        LlamaConfig.from_folder(path)
    assert "\n" not in str(caught.value) and str(caught.value).count("F32.gguf") == 1


def test_what_changes_nothing_is_no_obstacle(tmp_path):
    add = {"llama.expert_count": 0, "llama.attention.causal": True, "llama.rope.scaling.attn_factor": 1.0}
    add |= {"general.name": "x", "llama.tensor_data_layout": "Meta AI original pth", "llama.rope.scaling.type": "none"}
    assert LlamaConfig.from_folder(gguf_files.write(tiny(tmp_path)[0], add=add)).context == 64


def test_another_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "g.gguf", "granite")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match="general.architecture is 'granite'; supported are llama, qwen2, qwen3$"):
        LlamaConfig.from_folder(tmp_path / "g.gguf")


def test_heads_of_unequal_widths(tmp_path):
    path = gguf_files.write(
        tiny(tmp_path)[0], leave_out=["rope.dimension_count"], add={"llama.rope.dimension_count": 4}
    )
    with pytest.raises(UsageError, match="attention.key_length 8, .*rope.dimension_count 4: these must be equal"):
        LlamaConfig.from_folder(path)


def test_stretches_that_contradict(tmp_path):
    folder, _ = tiny(tmp_path, **EVERY_CASE["rope_llama3"])
    path = gguf_files.write(folder, add={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    with pytest.raises(UsageError, match="rope.scaling.type is 'linear' beside rope_freqs.weight; only one"):
        LlamaConfig.from_folder(path)


def test_divisors_of_another_head(tmp_path):
    path = gguf_files.write(tiny(tmp_path)[0], tensors={"rope_freqs.weight": np.ones(3, dtype=np.float32)})
    with pytest.raises(UsageError, match="rope type divided has 3 divisors; .* head of 8 needs half as many"):
        LlamaConfig.from_folder(path)


def test_tensors_that_do_not_fit(tmp_path):
    folder, _ = tiny(tmp_path)
    more = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    path = gguf_files.write(
        folder, tensors=more, leave_out=["feed_forward_length"], add={"llama.feed_forward_length": 50}
    )
    with pytest.raises(UsageError) as caught:
        load_weights(path, LlamaConfig.from_folder(path))
    assert f"{path}: the weights do not fit its metadata: unexpected: blk.0.attn_sinks.weight; wrong shape: " in str(
        caught.value
    )


def test_a_type_that_cannot_be_read(tmp_path):
    folder, _ = tiny(tmp_path)
    path, copied = gguf_files.write(folder), tmp_path / "copied.gguf"
    _replaced(path, copied, "output_norm.weight", np.ones(32, dtype=np.int32), gguf.GGMLQuantizationType.I32)
    with pytest.raises(UsageError, match="not of a type that can be read: model.norm.weight I32"):
        load_weights(copied, LlamaConfig.from_folder(copied))


@pytest.mark.parametrize("cut", [0, 3, 100, 4000])
def test_a_broken_file(tmp_path, cut):
    path = gguf_files.write(tiny(tmp_path)[0])
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UsageError, match="F32.gguf cannot be read as GGUF .*; download it again"):
        LlamaConfig.from_folder(path)


def test_a_file_that_is_changed_is_read_again(tmp_path):
    folder, _ = tiny(tmp_path)
    assert LlamaConfig.from_folder(gguf_files.write(folder)).context == 64
    path = gguf_files.write(folder, leave_out=["context_length"], add={"llama.context_length": 32})
    os.utime(path, ns=(0, 0))
    assert LlamaConfig.from_folder(path).context == 32


def test_where_a_model_is(tmp_path):
    path = gguf_files.write(tiny(tmp_path)[0])
    assert resolve_model(path) == resolve_model(str(path)) == path
    with pytest.raises(UsageError, match="none.gguf: no such file; give a GGUF file, a model folder"):
        resolve_model(tmp_path / "none.gguf")
    with pytest.raises(UsageError, match=r"no config.json; give the GGUF file itself, .*F32.gguf$"):
        LlamaConfig.from_folder(tmp_path)


def test_a_folder_with_a_gguf_file_and_no_weights_names_it(tmp_path):
    folder, _ = tiny(tmp_path)
    shutil.move(gguf_files.write(folder), folder / "m.gguf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no model.safetensors or model.safetensors.index.json but m.gguf"):
        checkpoint.load_weights(folder, LlamaConfig.from_folder(folder))


# Commands.


@pytest.fixture
def talking(tmp_path):
    """A model with the shipped tokenizer, as a GGUF file."""
    folder, _ = tiny(tmp_path, vocab_size=2048, num_hidden_layers=1, seed=3)
    path = gguf_files.write(folder, add=gguf_files.tokens(SHIPPED, "smollm"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / name, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder, path


@pytest.mark.parametrize("engine", ["plain", "wire"])
def test_a_private_answer_is_that_of_the_folder(talking, engine, capsys):
    answers = []
    for model in talking:
        asked = ["--prompt", "The key is 4711", "--max-new-tokens", "4", "--engine", engine, "--json"]
        assert cli.main(["generate", "--model", str(model), *asked]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["token_ids"] == answers[1]["token_ids"] and answers[0]["text"] == answers[1]["text"]
    assert answers[0]["prompt_tokens"] == answers[1]["prompt_tokens"] > 4


def test_cost_of_a_file(talking, capsys):
    _, path = talking
    assert cli.main(["cost", "--model", str(path), "--prompt-tokens", "9", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["prompt_tokens"] == 9


# The real thing, where it is installed.


@pytest.fixture(scope="module")
def smollm2():
    path = real_model.find()
    if path is None:
        pytest.skip(real_model.ABSENT)
    return path


@pytest.mark.slow
def test_smollm2(smollm2):
    """Q4_1 and Q8_0, against transformers' own reading of the same file (`from_pretrained` would want accelerate)."""
    reference = LlamaForCausalLM(ReferenceConfig(**load_gguf_checkpoint(smollm2)["config"]))
    read = load_gguf_checkpoint(smollm2, return_tensors=True, model_to_load=reference)
    reference.load_state_dict({"lm_head.weight": reference.lm_head.weight} | read["tensors"])
    reference.tie_weights()
    model, spoken = load_plain(smollm2), load_tokenizer(smollm2)
    ids = torch.tensor(spoken("The capital of France is Paris. 12 + 30 = 42, they say.\n")["input_ids"])
    expected = reference_logits(reference.eval(), ids)
    found = logits_in_pieces(model, ids, [7, len(ids) - 8, 1], len(ids))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert spoken.decode([int(expected[4].argmax())]) == " Paris"


@pytest.mark.slow
def test_smollm2_talks(smollm2, capsys):
    asked = ["--prompt", "What is the capital of France?", "--chat", "--max-new-tokens", "9", "--engine", "plain"]
    assert cli.main(["generate", "--model", str(smollm2), *asked, "--json"]) == 0
    assert "The capital of France is Paris" in json.loads(capsys.readouterr().out)["text"]
    assert tokenizer.digest(smollm2) == tokenizer.digest_of(load_tokenizer(smollm2))
