"""Kernels on a GPU: each gives what its twin on processors gives, to the last bit, in memory that held other bits.

Needs a GPU (`make test-cuda`). Sizes are such that several programs share the work, and its last one is not full.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import kernel_cases
import pytest
import torch
from kernel_twins import called, same, tensors, words

from crypten_llm.kernels import cpu, cuda, ring
from crypten_llm.kernels.ring import Group

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-cuda on a machine that has one"),
]


def moved(value, device):
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    return value.to(device) if torch.is_tensor(value) else value


def check(name, *arguments):
    """The result of the processor. Freed memory is what a GPU gives out next: it is filled before."""
    expected = called(cpu, name, arguments)
    for byte in (0x5A, 0xFF):
        size = sum(t.numel() * t.element_size() for t in tensors(expected)) + 4096
        torch.full((4 * size,), byte, dtype=torch.uint8, device="cuda")
        found = called(cuda, name, moved(arguments, "cuda"))
        pairs = list(zip(tensors(found), tensors(expected), strict=True))
        assert all(t.is_cuda for t, _ in pairs), f"{name} leaves the device"
        assert all(same(t.cpu(), due) for t, due in pairs), f"{name} differs from the processor"
    return expected


@pytest.mark.parametrize("small", [False, True], ids=["int64", "int32"])
@pytest.mark.parametrize(
    ("batch", "rows", "depth", "columns"),
    [((), 1, 1000, 77), ((), 1, 4096, 512), ((3,), 2, 130, 67), ((2, 3), 16, 64, 130), ((0,), 1, 4, 4), ((), 3, 0, 5)]
    + [((), 17, 40, 21), ((2,), 100, 300, 70), ((), 33, 8200, 48)],
)
def test_products(small, batch, rows, depth, columns):
    x = words(*batch, rows, depth)
    right = words(*batch, columns, depth, seed=1, bound=2**31).int() if small else words(*batch, columns, depth, seed=1)
    check("matmul_nt", x, right)
    check("matmul_nn", x, right.transpose(-2, -1).contiguous())
    check("matmul_nn", x, right.transpose(-2, -1))


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1000, 77), (17, 40, 21), (100, 8200, 70)])
def test_products_of_int32(rows, depth, columns):
    """Whose upper halves count for nothing."""
    x, w = (words(n, depth, seed=n, bound=2**31).int() for n in (rows, columns))
    due = ring.low_bits(cpu.matmul_nt(x, w), 32)
    for found in (cuda.matmul_nt(x.cuda(), w.cuda()), cuda.matmul_nn(x.cuda(), w.cuda().T)):
        assert torch.equal(ring.low_bits(found.cpu(), 32), due)


def test_products_of_the_largest_limbs():
    """Sums of as many of them as are added up at a time."""
    extreme = -0x7F7F7F7F7F7F7F80  # -128 in every limb
    check("matmul_nt", torch.full((20, 9000), extreme), torch.full((32, 9000), extreme))
    ends = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32).repeat(16, 4500)
    check("matmul_nt", words(20, 9000), ends)


@pytest.mark.parametrize("start", [0, 2**38 - 128, 2**45])
def test_key_streams(start):
    mine, theirs = (kernels.KeyStream(bytes(range(32))) for kernels in (cuda, cpu))
    mine.place = theirs._position = start
    theirs._start()
    for count in (1, 63, 64, 8, 5000, 1 << 20):
        assert same(mine.fill(count).cpu(), theirs.fill(count))
        over = torch.arange(count).to(torch.uint8)
        assert same(mine.fill(count, over.cuda()).cpu(), theirs.fill(count, over))


@pytest.mark.parametrize("bits", [1, 7, 8, 24, 35, 40, 63, 64])
@pytest.mark.parametrize("count", [0, 1, 511, 5001])
def test_what_travels(bits, count):
    kernel_cases.travel(check, bits, count)


@pytest.mark.parametrize("bits", [65, 79, 128, 132, 256, 300])
def test_limbs(bits):
    for rows, size in ((40, 30), (1, 1), (0, 5), (1, 2500), (257, 3)):
        kernel_cases.limbs(check, bits, rows, size)
        kernel_cases.lifted(check, bits, rows, size)


@pytest.mark.parametrize("q", [64, 104, 128, 256, 300, 512])
def test_modulo_ones(q):
    for count in (0, 1, 600, 5001):
        kernel_cases.ones(check, q, count)


def test_any_layout():
    kernel_cases.any_layout(check)


@pytest.mark.parametrize("shift", [0, 29, 46])
def test_waves(shift):
    kernel_cases.waves(check, shift, 20000)


@pytest.mark.parametrize("count", [0, 1, 500, 4097])
def test_tables_and_places(count):
    kernel_cases.tables(check, count)


def test_rows_chosen_by_bits_and_a_field():
    kernel_cases.rows_and_fields(check)


@pytest.mark.parametrize("group", kernel_cases.GROUPS, ids=str)
def test_comparison_keys(group):
    kernel_cases.keys(check, group, 70)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # of a kernel that is given nothing
def test_nothing_is_copied_from_the_processor():
    """So that it can be captured in a CUDA graph: each is launched once before, as what is captured is."""

    def captured(name, *arguments):
        given = moved(arguments, "cuda")
        expected = called(cuda, name, given)
        again = copy.deepcopy(given)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = getattr(cuda, name)(*again)
        graph.replay()
        assert all(same(*pair) for pair in zip(tensors(found), tensors(expected), strict=True)), name
        return moved(expected, "cpu")

    kernel_cases.travel(captured, 40, 511)
    kernel_cases.limbs(captured, 98, 3, 300)
    kernel_cases.lifted(captured, 98, 3, 300)
    kernel_cases.ones(captured, 104, 300)
    kernel_cases.waves(captured, 29, 300)
    kernel_cases.tables(captured, 300)
    kernel_cases.rows_and_fields(captured)
    kernel_cases.keys(captured, Group(2, 88), 20)


@pytest.mark.parametrize("device", ["cuda", "cuda,cpu,cpu", "cpu,cuda,cuda"])
def test_a_private_answer(device):
    """Of parties on a GPU and on the processor, in one run."""
    command = [sys.executable, "-m", "crypten_llm", "generate", "--json", "--prompt-ids", "5,6,7,8"]
    command += ["--max-new-tokens", "3", "--greedy"]
    runs = [
        subprocess.run([*command, *more], capture_output=True, text=True, timeout=250)
        for more in (["--engine", "plain"], ["--device", device])
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[1].stderr
    expected, found = (json.loads(run.stdout)["token_ids"] for run in runs)
    assert found == expected


def test_every_kernel_of_the_list_is_here():
    text = "".join(Path(path).read_text("utf-8") for path in (__file__, kernel_cases.__file__))
    listed = [name for name in vars(ring.Kernels) if name[0] != "_"]
    assert [name for name in listed if f'"{name}"' not in text and name != "KeyStream"] == []
