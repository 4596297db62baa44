"""``doctor`` passes on a machine that works, and a check that fails neither hides the others nor the exit code."""

from crypten_llm.commands import doctor
from crypten_llm.commands.cli import main


def test_a_machine_that_works(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready"
    assert all(line.startswith("ok") for line in lines[:-1]) and len(lines) == 8
    assert all("tokens equal plaintext's" in line for line in lines[-3:-1])


def test_a_machine_that_does_not(capsys, monkeypatch):
    def broken():
        raise doctor.Failed("no key stream; install cryptography")

    def crash():
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "_randomness", broken)
    monkeypatch.setattr(doctor, "_packages", crash)
    monkeypatch.setattr(doctor, "_inference", lambda engine, timeout: "skipped")
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[-1] == "not ready"
    assert lines[0].startswith("NO  packages") and "RuntimeError: first line second line" in lines[0]
    assert any(line.startswith("NO  key stream") and "install cryptography" in line for line in lines)
    assert lines[-2].startswith("ok  engine wire")
    assert "error: the machine is not ready" in captured.err
