"""On a GPU: Triton's kernels beside the processor's, bit by bit, and a private answer of parties that compute there.

Without one these are skipped; ``make test-cuda`` runs them.
"""

import json
import subprocess
import sys

import pytest
import torch

from crypten_llm.kernels import cpu, ring
from crypten_llm.kernels.ring import Comparison, Group
from crypten_llm.protocols import fits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-cuda")

GENERATOR = torch.Generator().manual_seed(1)
COMPARISONS = [
    Comparison(20, (1, 2, 3, 4), (0, 3, 3, 10), Group(1, 64)),
    Comparison(70, (1 << 67, (1 << 67) + 1, (1 << 67) + 2), (60, 50, 66), Group(2, 70)),
    Comparison(20, (1, 2), (0, 5), Group(2, 20)),
    Comparison(150, (1 << 147, (1 << 147) + 1, (1 << 147) + 2), (140, 120, 130), Group.residues(512)),
    Comparison(90, (1 << 87, (1 << 87) + 1), (70, 80), Group(1, 90)),
    Comparison(30, (1, 2), (9, 4), Group(2, 64)),
]


def words(*shape):
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=GENERATOR)


def moved(value, device):
    """Tensors in an argument or a result on that device; a view that is not contiguous stays one."""
    if isinstance(value, (tuple, list)):
        return [moved(each, device) for each in value]
    return value.to(device) if torch.is_tensor(value) else value


def check(name, *arguments):
    """A kernel gives there what it gives here; returns that."""
    expected = getattr(cpu, name)(*arguments)
    found = moved(getattr(ring.on("cuda"), name)(*moved(arguments, "cuda")), "cpu")
    pairs = zip(found, expected, strict=True) if isinstance(expected, (tuple, list)) else [(found, expected)]
    assert all(torch.equal(*pair) for pair in pairs), f"{name} differs from the processor's"
    return expected


def test_key_streams():
    mine, theirs = (ring.on(device).KeyStream(bytes(range(32))) for device in ("cuda", "cpu"))
    for count in (0, 1, 63, 64, 65, 5, 1 << 16, 3):
        assert torch.equal(mine.fill(count).cpu(), theirs.fill(count))


@pytest.mark.parametrize("bits", [1, 2, 5, 8, 13, 22, 31, 46, 63, 64, 65, 90, 128, 200, 256])
def test_what_travels(bits):
    count = 173
    x = words(count, ring.limbs(bits)) if bits > 64 else words(count)
    packed = check("pack", x, bits)
    check("unpack", packed, bits, (count,))
    if bits <= 64:
        check("hide", x, words(count), 5, bits)
        check("show", x, packed, bits, (count,))
        check("pack", x.int(), min(bits, 31))
    if 1 < bits < 64:
        check("unwrap", x, bits)


@pytest.mark.parametrize("rows", [1, 3, 16, 40])
def test_products(rows):
    x, small = words(rows, 300), words(37, 300).int()
    for w in (words(37, 300), small):
        check("matmul_nt", x, w)
        check("matmul_nn", x, w.T.contiguous())
    cached, query = words(3, 100, 64)[:, :70], words(3, rows, 64)
    check("matmul_nt", query, cached)
    check("matmul_nn", words(3, rows, 70), cached)


def test_waves():
    reciprocal, silu, count = fits.stored("reciprocal"), fits.stored_even("silu"), 700
    mask, scale = words(count), 2.0**22
    check("waves", mask, 40, scale, 10)
    check("coefficients", mask, 40, scale, reciprocal.cosine, reciprocal.sine)
    check("combine", mask, 40, scale, reciprocal.cosine, reciprocal.sine, words(20, count), 12345)
    scales, ups = torch.tensor([2.0 ** (14 - j) for j in range(7)], dtype=torch.float64), torch.arange(7)
    check("cosines", mask, 36, silu.frequencies, scales)
    check("add_cosines", mask, 36, silu.frequencies, silu.coefficients * 2**14, ups, words(7, 2, count), -77)


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_comparison_keys(comparison):
    count, group, width = 5, comparison.group, comparison.width
    payload = words(count, group.count, group.limbs)
    top = (group.bits - 1) % 64 + 1
    payload = payload % group.modulus if group.modulus else payload
    payload[..., -1] = ring.low_bits(payload[..., -1], top)
    seeds = words(count, 2), words(count, 2)
    common = check("compare_keys", comparison, words(count, ring.limbs(width)), payload, *seeds)
    opened = words(count, ring.limbs(width))
    for party, seed in enumerate(seeds):
        check("compare", comparison, seed, common, party, opened, payload)


@pytest.mark.parametrize("device", ["cuda", "cuda,cpu,cpu", "cpu,cuda,cuda"])
def test_an_answer(device):
    """Parties of the same run on a GPU and on the processor."""
    command = [sys.executable, "-m", "crypten_llm", "generate", "--json", "--prompt-ids", "5,6,7,8"]
    command += ["--max-new-tokens", "3", "--greedy"]
    runs = [
        subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
        for more in (["--engine", "plain"], ["--device", device])
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[1].stderr
    expected, found = (json.loads(run.stdout)["token_ids"] for run in runs)
    assert found == expected
