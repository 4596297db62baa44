"""``doctor --device``: a line for each thing that a placement of parties needs, on a machine that may have no GPU.

What CUDA's runtime says is put in its place; what is measured is measured on the processor.
"""

import threading
from types import SimpleNamespace

import pytest
import torch

from crypten_llm import devices, memory
from crypten_llm.commands import doctor, doctor_device
from crypten_llm.commands.cli import main
from crypten_llm.commands.doctor import Failed
from crypten_llm.models.checkpoint import SHIPPED
from crypten_llm.models.config import LlamaConfig


@pytest.fixture
def two_cards(monkeypatch):
    """Of an old kind, or a newer one; which of them reach each other is said by ``apart``."""
    there = SimpleNamespace(capability=(9, 0), apart=set(), free=100 * 10**9)
    monkeypatch.setattr(devices, "usable", torch.device)
    patched = {
        "device_count": lambda: 2,
        "mem_get_info": lambda device: (there.free, 150 * 10**9),
        "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0,
        "get_device_capability": lambda device: there.capability,
        "get_device_name": lambda device: "A Card",
        "can_device_access_peer": lambda first, second: (first, second) not in there.apart,
    }
    for name, stands_in in patched.items():
        monkeypatch.setattr(torch.cuda, name, stands_in)
    return there


@pytest.fixture
def measured(monkeypatch):
    """What cannot be measured here, by the name of its check; an exception is raised."""
    found = {"_pinned": "50 GB/s", "_sharing": "shared", "_between": "all", "_link": "us", "_kernels": "same"}

    def of(name):
        def check(*given):
            if isinstance(found[name], Exception):
                raise found[name]
            return found[name]

        return check

    for name in found:
        monkeypatch.setattr(doctor_device, name, of(name))
    monkeypatch.setattr(doctor_device, "_packages", lambda: "torch 2, Triton 3")
    return found


@pytest.mark.parametrize(
    ("placement", "names"),
    [
        ("cuda", "cuda:0|kernels of cuda:0|cuda:0 and pinned|link: sockets|sharing cuda:0|between|link: peer memory"),
        ("cuda:0,cuda:1,cpu", "cuda:0|cuda:1|kernels of cuda:1|cuda:1 and pinned|between|link: peer memory"),
        ("cuda:0,cuda:1,cuda", "sharing cuda:0|link: peer memory"),
        ("cuda:0,cpu,cpu", "cuda:0|link: sockets"),
    ],
)
def test_a_placement_is_looked_at(two_cards, measured, capsys, placement, names):
    assert main(["doctor", "--device", placement]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready" and all(line.startswith("ok  ") for line in lines[:-1])
    assert all(any(line.startswith(f"ok  {name}") for line in lines) for name in names.split("|"))
    assert any("A Card, 100.0 GB free of 150.0 GB, capability 9.0" in line for line in lines)
    assert ("sharing" in "".join(lines)) == ("sharing" in names)
    assert ("peer memory" in "".join(lines)) == ("peer memory" in names)


def test_what_a_run_needs_and_what_it_does_not(two_cards, measured, capsys):
    measured["_sharing"] = Failed("processes take turns; start nvidia-cuda-mps-control -d")
    assert main(["doctor", "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready, but for what is marked NO"
    assert any(line.startswith("NO  sharing cuda:0") and "nvidia-cuda-mps-control" in line for line in lines)
    two_cards.capability = (7, 5)
    assert main(["doctor", "--device", "cuda"]) == 1
    said = capsys.readouterr()
    assert "not ready" in said.out and "capability 7.5; take a card of 8.0 or later, or --device cpu" in said.out


def test_a_model_that_does_not_fit_is_said_with_what_each_needs(two_cards, measured, capsys):
    words = ["doctor", "--device", "cuda", "--model", "shipped", "--tokens", "300"]
    assert main(words) == 0
    held = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ok  memory"))
    assert "4,951,296 parameters and 300 tokens fit: owner" in held
    two_cards.free = 10**8
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "NO  memory" in said and "weights and caches (owner" in said and "cuda:0 has 100.0 MB left; " in said


def test_a_model_on_processors(monkeypatch):
    config = LlamaConfig.from_folder(SHIPPED)
    assert "fit" in doctor_device._fits(["cpu"], config, 50)
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    with pytest.raises(Failed, match="this machine has 1.0 MB left; ask for less, or use a machine with more"):
        doctor_device._fits(["cpu"], config, 50)


def test_cards_that_do_not_reach_each_other(two_cards):
    two_cards.apart.add((1, 0))
    with pytest.raises(Failed, match="no access from cuda:1 to cuda:0; leave --peer-memory out"):
        doctor_device._between()


def test_whether_processes_share_a_card_or_take_turns(monkeypatch):
    """The second process is a thread here, and really computes."""
    context, before = SimpleNamespace(Event=threading.Event, Process=threading.Thread), set(threading.enumerate())
    monkeypatch.setattr(doctor_device.multiprocessing, "get_context", lambda kind: context)
    for beside, says in ((3e-5, "share it"), (2e-3, "take turns")):
        seconds = iter((2e-5, beside))
        monkeypatch.setattr(doctor_device, "_small", lambda name, seconds=seconds: next(seconds))
        if says == "take turns":
            with pytest.raises(Failed, match="take turns: .* 20 us alone and 2000 us beside .*nvidia-cuda-mps-control"):
                doctor_device._sharing("cpu")
        else:
            assert says in doctor_device._sharing("cpu")
    assert set(threading.enumerate()) <= before, "the second process has ended"


def test_slow_copies_are_marked(monkeypatch):
    monkeypatch.setattr(doctor_device, "PINNED_BYTES", 1 << 16)
    assert "through pinned memory" in doctor_device._pinned("cpu")
    monkeypatch.setattr(doctor_device, "_seconds", lambda act, name: 1.0)
    with pytest.raises(Failed, match="a card in a full slot"):
        doctor_device._pinned("cpu")


def test_kernels_that_do_not_load_fail_here(monkeypatch):
    assert "whose kernels give" in doctor.kernels("cpu")
    with pytest.raises(Failed, match="torch cannot compute on device 'cuda:99'"):
        doctor_device._kernels("cuda:99")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-cuda on a machine that has one")
def test_a_card_that_is_there(capsys):
    assert main(["doctor", "--device", "cuda", "--model", "shipped", "--timeout", "250"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("torch and Triton", "cuda:0", "kernels of cuda:0", "cuda:0 and pinned", "link: sockets", "memory"):
        assert any(line.startswith(f"ok  {name}") for line in lines), name


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "gpu"], "device is 'gpu'; it must be cpu, cuda"),
        (["--device", "cuda:0,cuda:1"], "this run has 3 processes; name one device, or one each"),
        (["--model", "shipped", "--tokens", "2"], "--tokens is 2; give 3 or more"),
    ],
)
def test_mistakes(capsys, words, says):
    assert main(["doctor", *words]) == 2 and says in capsys.readouterr().err
