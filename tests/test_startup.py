"""What a process imports before its first token: packages that take long come only where they are used."""

import json
import subprocess
import sys

import pytest

NEEDLESS = {"transformers", "sympy", "torch._dynamo", "datasets", "matplotlib", "pandas", "huggingface_hub", "numba"}
NEEDLESS |= {"starlette", "uvicorn", "prometheus_client"}  # of the command serve
GENERATE = ["generate", "--offline", "--engine", "plain", "--max-new-tokens", "1", "--threads", "1"]


def imported(code: str) -> set[str]:
    """Modules that a fresh process has imported after ``code``."""
    code = f"import json, sys; {code}; print(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return set(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize("prompt", [["--prompt-ids", "5,6,7"], ["--prompt", "The passkey is 4711."]])
def test_a_run_in_the_clear(prompt):
    found = imported(f"from crypten_llm.commands.cli import main; main({[*GENERATE, *prompt]!r})")
    assert "torch" in found and not found & NEEDLESS


def test_a_party_of_engine_wire():
    """The owner and the dealer, before they meet: no tokenizer, X.509, engine of CrypTen's own or command either."""
    found = imported("import crypten_llm.session.api, crypten_llm.engines.wire.engine")
    needless = {"tokenizers", "cryptography.x509", "crypten_llm.engines.crypten.bridge", "crypten_llm.commands.show"}
    assert "torch" in found and not found & (NEEDLESS | needless)
