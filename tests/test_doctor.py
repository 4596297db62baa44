"""``doctor`` passes on a machine that works, and a check that fails neither hides the others nor the exit code."""

import pytest
import torch

from crypten_llm import devices
from crypten_llm.commands import doctor
from crypten_llm.commands.cli import main
from crypten_llm.engines.wire import computing
from crypten_llm.errors import UsageError
from crypten_llm.kernels import cpu


def test_a_machine_that_works(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready"
    assert all(line.startswith("ok") for line in lines[:-1]) and len(lines) == 9 + bool(devices.found())
    assert all("tokens equal plaintext's" in line for line in lines[-3:-1])


def test_a_machine_that_does_not(capsys, monkeypatch):
    def broken():
        raise doctor.Failed("no key stream; install cryptography")

    def crash():
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "_randomness", broken)
    monkeypatch.setattr(doctor, "_packages", crash)
    monkeypatch.setattr(doctor, "_inference", lambda engine, timeout, device="cpu": "skipped")
    monkeypatch.setattr(doctor, "_cards", dict)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[-1] == "not ready"
    assert lines[0].startswith("NO  packages") and "RuntimeError: first line second line" in lines[0]
    assert any(line.startswith("NO  key stream") and "install cryptography" in line for line in lines)
    assert lines[-2].startswith("ok  engine wire")
    assert "error: the machine is not ready" in captured.err


def test_what_is_said_of_a_card(monkeypatch):
    """On a machine that may have none: the kernels of a card that is called so are the processor's."""
    monkeypatch.setattr(doctor, "_cards", lambda: {"cuda:0": "A Card, 80 GiB"})
    monkeypatch.setattr(computing, "usable", lambda name: torch.device("cpu"))
    assert doctor._devices() == "cpu; cuda:0: A Card, 80 GiB, whose kernels give what the processor's do"
    made = torch.zeros(30, 30, dtype=torch.int64)
    monkeypatch.setattr(cpu, "matmul_nt", lambda x, w: made.add_(1).clone())
    with pytest.raises(doctor.Failed, match="the kernels of cuda:0 give other words than the processor's"):
        doctor._devices()

    def unusable(name):
        raise UsageError("engine 'wire' cannot compute on device 'cuda:0': No module named 'triton'")

    monkeypatch.setattr(computing, "usable", unusable)
    assert doctor._devices().endswith("cannot compute on device 'cuda:0': No module named 'triton'")
