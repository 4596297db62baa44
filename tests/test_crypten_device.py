"""Engine ``crypten`` on a GPU: CrypTen's own path for one gives what it does on a processor; what it lacks is said.

Without a GPU all of that path runs around the processor's tensors (``crypten_elsewhere``).
"""

import json
import subprocess
import sys

import party_jobs
import pytest
import torch
from hf_models import EVERY_CASE, tiny
from parties import run
from test_engines import IDS, MATMUL, OPERATIONS, check, load_plain, logits_in_pieces, outcomes

from crypten_llm.errors import UsageError
from crypten_llm.session.settings import split


def test_every_operation_on_cryptens_tensors_for_a_gpu():
    """Also with products of more than 256 words, which CrypTen cuts into smaller blocks."""
    wide = [name for name in OPERATIONS if name.startswith(("softmax over", "rms_norm of mean"))]
    cases = {name: case for name, case in OPERATIONS.items() if name not in wide[1:]}
    for case, outcome in zip(cases.values(), outcomes(cases.values(), elsewhere=True), strict=True):
        check(case, outcome)
    (outcome,) = outcomes([MATMUL], parties=3, elsewhere=True)
    assert (outcome[0] - MATMUL.secrets[0] @ MATMUL.secrets[1]).abs().max() < MATMUL.tolerance


def test_a_model_on_cryptens_tensors_for_a_gpu(tmp_path):
    folder, _ = tiny(tmp_path, **EVERY_CASE["attention_bias"])
    expected = logits_in_pieces(load_plain(folder), IDS[:6], [4, 2], 6)
    value = run(party_jobs.logits, str(folder), IDS[:6], [4, 2], elsewhere=True)[1]
    assert (value - expected).abs().max() < 0.02 * expected.abs().max()


def test_what_it_cannot_do_there_is_said():
    split({"engine": "crypten", "device": "cuda:1,cuda:1,cpu"})
    with pytest.raises(UsageError, match="engine 'crypten' chooses tokens on the processor alone; leave --device"):
        split({"engine": "crypten", "device": "cuda", "reveal": "tokens"})
    policies = "streaming_llm", "h2o"
    (found, _) = run(party_jobs.refused_policies, policies)
    assert run(party_jobs.held)[0] == [(8, 8), (8, 8), (0, 0)]
    assert [text.partition(":")[0] for text in found] == [
        f"engine 'crypten' runs policy {name} on the processor alone" for name in policies
    ]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-cuda on a machine that has one")
@pytest.mark.parametrize("device", ["cuda", "cuda,cpu,cuda"])
def test_a_private_answer(device):
    command = [sys.executable, "-m", "crypten_llm", "generate", "--json", "--prompt-ids", "5,6,7,8"]
    command += ["--max-new-tokens", "3", "--greedy"]
    runs = [
        subprocess.run([*command, *more], capture_output=True, text=True, timeout=250)
        for more in (["--engine", "plain"], ["--engine", "crypten", "--device", device])
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[1].stderr
    expected, found = (json.loads(run.stdout)["token_ids"] for run in runs)
    assert found == expected
