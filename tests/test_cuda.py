"""Kernels on a GPU: each gives what its twin on processors gives, to the last bit, in memory that held other bits.

Needs a GPU (`make test-cuda`). Sizes are such that several programs share the work, and its last one is not full.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_twins import called, same, table_words, tensors, wide_words, words

from crypten_llm.kernels import cpu, cuda, ring
from crypten_llm.kernels.ring import Comparison, Group

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-cuda on a machine that has one"),
]
FLOATS = torch.linspace(-3, 3, 7, dtype=torch.float64) * 2**20
EIGHTHS = torch.tensor([(k << 61) + step for k in range(4) for step in (-1, 0, 1)][1:])


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


def test_products_of_the_largest_limbs():
    """Sums of as many of them as are added up at a time."""
    extreme = -0x7F7F7F7F7F7F7F80  # -128 in every limb
    check("matmul_nt", torch.full((20, 9000), extreme), torch.full((32, 9000), extreme))
    ends = torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32).repeat(16, 4500)
    check("matmul_nt", words(20, 9000), ends)


@pytest.mark.parametrize("start", [0, 2**38 - 128, 2**45])
def test_key_streams(start):
    mine, theirs = (kernels.KeyStream(bytes(range(32))) for kernels in (cuda, cpu))
    mine._position = theirs._position = start
    theirs._start()
    for count in (1, 63, 64, 8, 5000, 1 << 20):
        assert same(mine.fill(count).cpu(), theirs.fill(count))
        over = torch.arange(count).to(torch.uint8)
        assert same(mine.fill(count, over.cuda()).cpu(), theirs.fill(count, over))


@pytest.mark.parametrize("bits", [1, 7, 8, 24, 35, 40, 63, 64])
@pytest.mark.parametrize("count", [0, 1, 511, 5001])
def test_what_travels(bits, count):
    x, mask = words(count), words(count, seed=1)
    check("unpack", check("pack", x, bits), bits, (count,))
    value, packed = check("hide", x, mask, 1 << max(0, bits - 2), bits)
    for skipped in (0, 3):
        message = torch.cat([torch.zeros(skipped, dtype=torch.uint8), packed])
        check("show", value, message[skipped:], bits, (count,))
    if 1 < bits < 64:
        check("unwrap", value, bits)
    check("pack", x.int(), min(bits, 31))


@pytest.mark.parametrize("bits", [65, 79, 128, 132, 256, 300])
def test_limbs(bits):
    x, y = wide_words(bits, 40, 30), wide_words(bits, 40, 30, seed=1)
    check("unpack", check("pack", x, bits), bits, (40, 30))
    for ones in (False, True):
        value, packed = check("hide_wide", x, y, 1 << (bits - 2), bits, ones)
        check("show_wide", value, packed, bits, ones, (40, 30))
    check("reduce_wide", x, bits - 3)
    check("widen", words(40, 30), bits, True)
    for name in ("add_wide", "subtract_wide", "multiply_wide"):
        check(name, x, y, bits)
        check(name, x, y[:1], bits)
    check("sum_wide", x, bits)
    for count in (1, 64, 70, -9):
        check("shift_wide", x, count, bits)
    for up in (False, True):
        check("drop_wide", x, bits, 36, up)
    bit = words(40, 30) & 1
    check("lift_mask", words(40, 30, bound=2**30) & (2**30 - 1), x, y, bit, 31, bits)
    check("dot_wide", words(40, 30), x, bits)
    check("scale_lifted", words(40, 30), bit, x, y[:, 0], y[:, 1], x, y, 35, 32, bits)


@pytest.mark.parametrize("q", [64, 104, 256, 300])
def test_modulo_ones(q):
    x, y, turns = wide_words(q, 600), wide_words(q, 600, seed=1), words(600)
    for name in ("add_ones", "subtract_ones", "multiply_ones"):
        check(name, x, y, q)
    starts = torch.tensor([0, 300, 300, 600])
    check("sum_ones", x, starts, q)
    check("power_ones", turns, q)
    check("rotate_ones", x, turns, q)
    for up in (False, True):
        check("window_ones", x, turns[:3], starts, q, 40, up)
    check("turned_exponents", turns, words(600, seed=2) % q, 16, q, x)
    check("read_exponents", x, turns, 126, 16, q)


@pytest.mark.parametrize("shift", [0, 29, 46])
def test_waves(shift):
    angle = torch.cat([EIGHTHS, EIGHTHS >> shift, words(20000)])
    n, scale = angle.numel(), 2.0**31 * 1.1
    check("waves", angle, shift, scale, 7)
    check("coefficients", angle, shift, scale, FLOATS / 2**20, FLOATS.flip(0) / 2**20)
    check("combine", angle, shift, scale, FLOATS / 2**20, FLOATS.flip(0) / 2**20, words(14, n), -5)
    check("cosines", angle, shift, words(7), FLOATS)
    check("add_cosines", angle, shift, words(7), FLOATS, torch.arange(7) * 9, words(7, 2, n), 77)


def test_tables_and_places():
    rows, places = table_words(8, 500, 32), words(500)
    sets = words(3, 256) & 1 == 1
    check("flip_places", places, rows)
    check("parities", rows, places, sets)
    check("xor_rows", table_words(32, 130, 40), words(5, 3))
    check("multiply_field", words(3, 50), words(50, seed=1))
    for bits in (8, 32, 64):
        check("turn_table", words(64), places, table_words(bits, 500, 64))
        check("read_table", table_words(bits, 500, 64), places, words(7))
    check("turn_signs", words(500), 5, table_words(16, 500, 32))
    check("read_signs", table_words(16, 500, 32), words(500, 9), 5)
    check("turn_bits", words(500, 3) & 31, places & 1, table_words(16, 500, 3, 32))
    check("read_bits", table_words(16, 500, 3, 32), words(500, 3) & 31, words(500, 3, seed=1) & 1, 1)


@pytest.mark.parametrize(
    "group", [Group.residues(256), Group(2, 88), Group(2, 64), Group(1, 64), Group(1, 90), Group(2, 20)], ids=str
)
def test_comparison_keys(group):
    comparison = Comparison(79, (0, 1 << 30, 1 << 60), (0, 20, 50), group)
    limbs = (wide_words(group.bits, 70, group.count), wide_words(group.bits, 70, group.count, seed=1))
    if group.modulus:
        limbs = tuple(x % group.modulus for x in limbs)
    mask, opened = wide_words(79, 70), wide_words(79, 70, seed=1)
    seeds = words(70, 2), words(70, 2, seed=1)
    common = check("compare_keys", comparison, mask, limbs[0], *seeds)
    for party in (0, 1):
        check("compare", comparison, seeds[party], common, party, opened, limbs[1])


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
    text = Path(__file__).read_text("utf-8")
    listed = [name for name in vars(ring.Kernels) if name[0] != "_"]
    assert [name for name in listed if f'"{name}"' not in text and name != "KeyStream"] == []
