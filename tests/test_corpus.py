"""The corpus, its tokenizer, and a training run that is killed and goes on."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from zlib import crc32

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from crypten_llm.models.checkpoint import SHIPPED  # noqa: E402
from experiments.model import forward  # noqa: E402
from experiments.model.corpus import Encoder, sample  # noqa: E402
from experiments.model.drafts import TASKS  # noqa: E402
from experiments.model.evaluate import (  # noqa: E402
    draw_all,
    exact_match,
    measure_ranges,
    score,
)
from experiments.model.rows import ANSWER, training_batch  # noqa: E402
from experiments.model.schedule import SMOKE  # noqa: E402
from experiments.model.train import Run  # noqa: E402
from experiments.model.weights import new_model, save_model  # noqa: E402
from experiments.model.writer import is_held_out  # noqa: E402

LENGTHS = (64, 256, 2048)
PINNED = 1402764260
TINY = replace(SMOKE, steps=6, log_every=1, evaluate_every=3, evaluate_samples=1, checkpoint_every=2, batch_tokens=256)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SHIPPED)


@pytest.fixture(scope="module")
def encode(tokenizer):
    return Encoder(tokenizer)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_samples(task, length, tokenizer, encode):
    for index in range(5):
        drawn = sample(task, length, index, encode)
        ids = tokenizer(drawn.prompt)["input_ids"]
        assert ids == [encode.bos, *encode(drawn.prompt)], "the cached encoder must equal the tokenizer"
        assert length - 32 < len(ids) <= length
        assert drawn == sample(task, length, index, encode), "a sample is a function of its arguments"
        assert len(encode(drawn.answer)) <= 16
        # The last fact (of a chain: its end or beginning) holds the answer.
        stated = [drawn.prompt[start:end] for start, end in drawn.facts]
        assert not stated or any(drawn.answer.strip() in fact for fact in stated)


def test_samples_are_those_of_the_model_card(encode):
    """The figures of the card hold for these samples; whoever changes them measures again."""
    texts = [f"{s.prompt}{s.answer}" for s in (sample(task, 1024, i, encode) for task in TASKS for i in range(5))]
    assert crc32("".join(texts).encode()) == PINNED


def test_facts_lie_anywhere(encode):
    places = sorted(d.facts[0][0] / len(d.prompt) for d in (sample("one_hop", 512, i, encode) for i in range(60)))
    assert places[5] < 0.25 and 0.3 < places[30] < 0.7 and places[-5] > 0.75


def test_splits_share_no_fact(encode):
    for index in range(20):
        for split in ("train", "heldout"):
            drawn = sample("passkey", 128, index, encode, split)
            start, end = drawn.facts[0]
            place = drawn.prompt[start:end].split(" of the ")[1].split(" is ")[0]
            assert is_held_out("passkey", place, drawn.answer.strip()) == (split == "heldout")


def test_unknown_task_and_split(encode):
    with pytest.raises(ValueError, match="unknown task 'quiz': choose from passkey"):
        sample("quiz", 64, 0, encode)
    with pytest.raises(ValueError, match="unknown split 'test'"):
        sample("passkey", 64, 0, encode, split="test")


def test_tokenizer(tokenizer):
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "</s>", "<pad>"]
    rng = Random(0)
    noise = ["".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(40)) for _ in range(20)]
    for text in ["naïve café 北京 🦙\t\n  x  ", "it's 3.14", *noise]:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.tokenize("4821") == ["4", "8", "2", "1"]


def test_training_batch(tokenizer, encode):
    mix = {task: 1.0 for task in TASKS}
    ids, kinds, bridges = training_batch(1, 5, 48, 256, mix, encode)
    again, *_ = training_batch(1, 5, 48, 256, mix, encode)
    assert ids.shape == kinds.shape == (48, 256) and (ids == again).all()
    assert (ids[:, 0] == encode.bos).all() and (kinds == ANSWER).any()
    ends = ids == encode.eos
    assert (kinds[ends] == ANSWER).all() and ends.sum() > 48
    before_answers = ids[bridges >= 0]
    assert len(before_answers) and (before_answers == encode(":")[0]).all()


@pytest.fixture(scope="module")
def tiny(tokenizer):
    return new_model(TINY, tokenizer).eval()


def test_forward_equals_the_library(tiny):
    ids = torch.randint(3, 2048, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(forward.logits(tiny, ids), tiny(ids).logits, atol=1e-4)


def test_one_pass_equals_decoding(tiny, tokenizer, encode):
    def greedy(prompt_ids, max_new_tokens):
        """Decoding with the library's own `generate`."""
        ids = torch.tensor([prompt_ids])
        out = tiny.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False)
        return out[0, len(prompt_ids) :].tolist()

    # Answers that the untrained model gives, and others.
    drawn = []
    for i in range(6):
        prompt = sample("one_hop", 64, i, encode).prompt
        ids = greedy(tokenizer(prompt)["input_ids"], 3)
        drawn.append(replace(sample("one_hop", 64, i, encode), answer=tokenizer.decode(ids[:1]) if i % 2 else " no"))
    decoded = exact_match(greedy, tokenizer, drawn)
    assert score(tiny, encode, drawn)["exact_match"] == decoded
    with pytest.raises(ValueError, match="no samples"):
        exact_match(greedy, tokenizer, [])


def test_saved_model_loads(tiny, tokenizer, tmp_path):
    save_model(tiny, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for (name, a), (_, b) in zip(tiny.named_parameters(), again.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-3), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == TINY.rope_theta


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).eval()


@pytest.mark.parametrize("task", ["passkey", "key_value", "one_hop", "two_hop", "few_shot", "span_copy"])
def test_shipped_model_answers(task, shipped, encode):
    assert score(shipped, encode, [sample(task, 256, i, encode) for i in range(4)])["exact_match"] == 1


def test_shipped_model_is_small_and_bounded(shipped, encode):
    assert sum(p.numel() for p in shipped.parameters()) < 8e6
    assert (SHIPPED / "model.safetensors").stat().st_size <= 16 << 20
    ranges = measure_ranges(shipped, encode, [sample("two_hop", 256, 0, encode)])
    worst = {name: max(row.get(name, 0) for row in ranges.values()) for row in ranges.values() for name in row}
    assert worst["score"] < 25 and worst["gate"] < 12 and worst["residual"] < 60 and worst["logit"] < 40
    squares = [row["mean_square_min"] for row in ranges.values() if "mean_square_min" in row]
    assert min(squares) > 0.05 and worst["mean_square_max"] < 64 and worst["weight"] < 4


def test_killed_run_goes_on(tokenizer, tmp_path):
    """Killed after step 5, one past the checkpoint of step 4: the end is that of a run never killed."""
    whole = Run(TINY, tmp_path / "whole", tokenizer, "cpu")
    whole.train()
    Run(TINY, tmp_path / "cut", tokenizer, "cpu").train(stop_at=5)
    resumed = Run(TINY, tmp_path / "cut", tokenizer, "cpu")
    assert resumed.step == 4
    resumed.train()
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == TINY.steps
    assert (resumed.finish() / "model.safetensors").exists()


def test_samples_from_processes_are_the_same():
    assert draw_all(SHIPPED, ["passkey"], [64], 2, workers=2) == draw_all(SHIPPED, ["passkey"], [64], 2)
