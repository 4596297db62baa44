"""Engine ``plain`` on another device: what a run needs is moved there once, and nothing is mixed with what is not."""

import pytest
import torch
from policy_table import ROWS
from second_device import DEVICE, SecondDevice, is_there

from crypten_llm.engines.plain.engine import PlainEngine
from crypten_llm.engines.wire import computing
from crypten_llm.errors import UsageError
from crypten_llm.kernels import ring
from crypten_llm.session.api import PrivateLlama
from crypten_llm.session.settings import split
from experiments import compare_baselines
from experiments.baselines import cells
from experiments.baselines.config import Ablation, Config
from experiments.measure import quality
from experiments.measure.quality import Scorer, draw
from experiments.tools.journal import Journal

POLICIES = ["full", *(f"{name}({row.small.replace(',weights=WEIGHTS', '')})" for name, row in ROWS.items())]
LENGTH = 160  # two pieces of the prompt


@pytest.fixture(scope="module")
def here():
    with PrivateLlama.from_pretrained("shipped", engine="plain", threads=1) as llama:
        yield llama


@pytest.fixture(scope="module")
def device():
    with SecondDevice() as entered:
        yield entered


@pytest.fixture(scope="module")
def there(device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlainEngine, "on", classmethod(lambda cls, name: cls(DEVICE) if name == "cuda" else cls(name)))
        llama = PrivateLlama.from_pretrained("shipped", engine="plain", threads=1, device="cuda")
    with llama:
        yield llama


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_the_same_there(policy, here, there):
    example = draw("span_copy", here.tokenizer, LENGTH, 1)[0]
    assert Scorer(there, True).rows(example, [policy]) == Scorer(here, True).rows(example, [policy])


def test_the_weights_and_the_logits_are_there(there, device):
    model = there.party.model
    assert is_there(model.embed_tokens) and device.moved > len(list(model.parameters()))
    with torch.inference_mode():
        assert is_there(model(model.engine.tokens(torch.tensor([5, 6]), 2, model.config.vocab_size), model.new_cache()))
    answer = there.generate("Question", max_new_tokens=3, do_sample=True, seed=1)
    assert len(answer.token_ids) <= 3


def test_mixing_is_found(device):
    apart = torch.ones(2).to(DEVICE)
    assert is_there(apart * 2 + torch.tensor(3.0)) and is_there(apart[torch.tensor([1])])
    for mixed in (lambda: apart + torch.ones(2), lambda: torch.cat([apart, torch.ones(1)]), lambda: apart.numpy()):
        with pytest.raises(AssertionError, match="mixes devices|no array|cannot become"):
            mixed()
    with pytest.raises(AssertionError, match="mixes devices"):
        torch.ones(2)[apart.long()]


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:x", "", 3])
def test_a_device_that_there_is_not(device):
    with pytest.raises(UsageError, match=f"device is {device!r}; it must be cpu, cuda"):
        PrivateLlama.from_pretrained("shipped", engine="plain", device=device)


def test_engine_crypten_chooses_tokens_on_the_processor():
    for call in (PrivateLlama.from_pretrained, PrivateLlama.serve):
        with pytest.raises(UsageError, match="device is 'cuda', and engine 'crypten' chooses tokens on the processor"):
            call("shipped", engine="crypten", device="cuda", reveal="tokens")


def test_a_machine_without_it_says_so(monkeypatch):
    def empty(*shape, device):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "empty", empty)
    for engine in ("plain", "wire"):
        with pytest.raises(UsageError, match="torch cannot compute on device 'cuda' .Torch not compiled with CUDA "):
            PrivateLlama.from_pretrained("shipped", engine=engine, device="cuda")


def test_engine_wire_says_that_it_has_no_kernels(monkeypatch):
    def on(device):
        raise ImportError("No module named 'triton'; install it")

    monkeypatch.setattr(computing.devices, "usable", torch.device)
    monkeypatch.setattr(ring, "on", on)
    with pytest.raises(UsageError, match="engine 'wire' cannot compute on device 'cuda': No module named 'triton'"):
        PrivateLlama.from_pretrained("shipped", device="cuda")


@pytest.mark.parametrize(
    "engine, device, tape", [("plain", "cpu,cpu", ""), ("wire", "cuda,cpu", ""), ("wire", "cpu,cpu,cuda", "tapes")]
)
def test_one_device_or_one_each(engine, device, tape):
    with pytest.raises(UsageError, match=f"device is '{device}', and this run has . processes; name one device, or"):
        split({"engine": engine, "device": device, "tape": tape})


def test_the_grid_hands_it_down_and_notes_it(tmp_path, monkeypatch):
    config = Config(
        policies=("full",),
        tasks=("few_shot",),
        lengths=(96,),
        samples=2,
        long_samples=2,
        ablation=Ablation(rows=(), budgets=(), lengths=()),
    )
    asked, opened = [], PrivateLlama.from_pretrained

    def from_pretrained(model, **settings):
        asked.append(settings.pop("device"))
        return opened(model, **settings)

    monkeypatch.setattr(quality.PrivateLlama, "from_pretrained", from_pretrained)
    for device in ("cuda", "cpu"):
        journal = Journal(tmp_path / f"{device}.jsonl", config.to_dict())
        cells.measure_accuracy(config, journal, 8, 1, device)
        assert [row.get("device", "cpu") for row in journal.of("accuracy")] == [device]
    assert asked == ["cuda", "cpu"]
    handed = []
    monkeypatch.setattr(cells, "measure_accuracy", lambda *given: handed.append(given[-1]))
    given = ["--quick", "--only", "accuracy", "--device", "cuda", "--out", str(tmp_path / "quick")]
    assert compare_baselines.main(given) == 0 and handed == ["cuda"]
