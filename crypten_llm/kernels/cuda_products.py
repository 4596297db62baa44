"""Kernels in torch's own operations: matrix products modulo 2^64 (``kernels.ring`` says what each does).

torch multiplies no matrices of 64-bit integers on a GPU. Here they are cut into digits of which so few bits are taken
that a sum of their products is a whole number that a double holds, whatever the order in which it is added up.
"""

import torch
from torch import Tensor

from crypten_llm.kernels.cuda_choice import hot

_EXACT = 53  # bits of a double's whole numbers
_DEPTH = 1 << 13  # terms of a sum at a time


@hot("triton_products")
def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    return matmul_nn(x, w.transpose(-2, -1))


@hot("triton_products")
def matmul_nn(x: Tensor, w: Tensor) -> Tensor:
    assert x.shape[:-2] == w.shape[:-2], f"batches {tuple(x.shape)} and {tuple(w.shape)} differ"
    depth = x.shape[-1]
    out = torch.zeros((*x.shape[:-1], w.shape[-1]), dtype=torch.int64, device=x.device)
    for start in range(0, depth, _DEPTH):
        out += _product(x[..., start : start + _DEPTH], w[..., start : start + _DEPTH, :])
    return out


def _product(x: Tensor, w: Tensor) -> Tensor:
    digit = (_EXACT - x.shape[-1].bit_length()) // 2
    left, right = _digits(x, digit), _digits(w, digit)
    out = None
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            if (i + j) * digit < 64:
                part = (a @ b).long() << ((i + j) * digit)
                out = part if out is None else out + part
    assert out is not None
    return out


def _digits(x: Tensor, digit: int) -> list[Tensor]:
    bits = 8 * x.element_size()
    places = range(0, bits, digit)
    parts = [x >> place for place in places]
    return [  # with the sign in the highest
        (part if place + digit >= bits else part & ((1 << digit) - 1)).double()
        for place, part in zip(places, parts, strict=True)
    ]
