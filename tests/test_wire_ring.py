"""Arithmetic modulo 2^64: compiled kernels against torch, packing and shifts against Python integers."""

import pytest
import torch

from crypten_llm.kernels import ring

WORDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF]


def words(*shape, seed=0, bound=2**63):
    return torch.randint(-bound, bound - 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("small", [False, True], ids=["int64", "int32"])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 1, 1), (1, 37, 19), (5, 8, 1), (3, 130, 67), (0, 4, 3)])
def test_matrix_products_wrap_as_torch_does(rows, inner, columns, small):
    x = words(2, rows, inner)
    w = words(2, inner, columns, seed=1, bound=2**31 if small else 2**63)
    expected = x @ w
    w = w.int() if small else w
    assert torch.equal(ring.matmul_nn(x, w), expected)
    assert torch.equal(ring.matmul_nt(x, w.transpose(1, 2)), expected)
    assert torch.equal(ring.matmul_nn(x[0], w[0]), expected[0])


def test_matrix_products_refuse_batches_that_differ():
    with pytest.raises(AssertionError, match="batches"):
        ring.matmul_nn(words(2, 3, 4), words(3, 4, 5))


@pytest.mark.parametrize("bits", range(1, 65))
def test_words_of_every_width(bits):
    x = torch.cat([torch.tensor(WORDS), words(20, seed=bits)])
    unsigned = [int(v) % 2**64 for v in x]
    low = ring.low_bits(x, bits)
    assert [int(v) % 2**64 for v in low] == [v % 2**bits for v in unsigned]
    assert [int(v) for v in ring.top_bit(low, bits)] == [v >> (bits - 1) & 1 for v in unsigned]
    assert [int(v) % 2**64 for v in ring.shift_right(x, bits - 1)] == [v >> (bits - 1) for v in unsigned]
    packed = ring.pack(low, bits)
    assert packed.numel() == ring.packed_size(len(x), bits) == len(x) * -(-bits // 8)
    assert torch.equal(ring.unpack(packed, bits, (2, len(x) // 2)).flatten(), low)


def test_packing_takes_words_out_of_any_layout():
    x = words(3, 4).t()
    assert torch.equal(ring.unpack(ring.pack(x, 64), 64, (4, 3)), x)
