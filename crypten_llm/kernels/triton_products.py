"""Kernels in Triton: matrix products modulo 2^64 with few rows, which take as long as the matrix is read.

More rows go to tensor cores, in ``cuda_products``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels import cuda_products

FEW = 16  # rows; each reads the matrix again, from the cache where they are next to each other


@triton.jit(do_not_specialize=["columns", "depth"])
def _product(
    x, w, out, columns, depth, xb, xm, xk, wb, wn, wk, ob, om, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """out[b, m, n] = sum over k of x[b, m, k] w[b, n, k]; by their strides. M: rows, the fastest in the grid."""
    m, b = tl.program_id(0).to(tl.int64) % M, tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) // M * N + tl.arange(0, N)
    left, right = x + b * xb + m * xm, w + b * wb + n[:, None] * wn
    total = tl.zeros((N, K), tl.int64)
    for start in range(0, depth, K):
        k = start + tl.arange(0, K)
        row = tl.load(left + k * xk, k < depth, 0)
        found = tl.load(right + k[None, :].to(tl.int64) * wk, (n[:, None] < columns) & (k[None, :] < depth), 0)
        total += found.to(tl.int64) * row[None, :]
    tl.store(out + b * ob + m * om + n, tl.sum(total, 1), n < columns)


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    return _few(x, w, 4, 256) if x.shape[-2] <= FEW else cuda_products.matmul_nt(x, w)


def matmul_nn(x: Tensor, w: Tensor) -> Tensor:
    return _few(x, w.transpose(-2, -1), 32, 32) if x.shape[-2] <= FEW else cuda_products.matmul_nn(x, w)


def _few(x: Tensor, w: Tensor, many: int, deep: int) -> Tensor:
    """x @ w.T, by blocks of that many columns and of that depth; w: [..., N, K]."""
    batch, (rows, depth), columns = x.shape[:-2], x.shape[-2:], w.shape[-2]
    assert batch == w.shape[:-2], f"batches {tuple(x.shape)} and {tuple(w.shape)} differ"
    out = torch.empty((*batch, rows, columns), dtype=torch.int64, device=x.device)
    count = math.prod(batch)
    if not out.numel():
        return out
    left, right, result = (
        x.reshape(count, rows, depth),
        w.reshape(count, columns, depth),
        out.view(count, rows, columns),
    )
    grid = (triton.cdiv(columns, many) * rows, count)
    _product[grid](
        left, right, result, columns, depth, *left.stride(), *right.stride(), *result.stride()[:2], rows, many, deep
    )
    return out
