"""Kernels for processors: products in the field of 2^64 elements (``kernels.ring`` says what each does)."""

import numpy as np
import torch
from torch import Tensor

from crypten_llm.kernels.compiling import compiled

_REST = np.uint64(0b11011)  # what x^64 is there


@compiled
def _multiply(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    """By Horner's rule, the highest bit first; nothing branches on a bit."""
    one, top = np.uint64(1), np.uint64(63)
    for i in range(out.shape[0]):
        total = np.uint64(0)
        for bit in range(63, -1, -1):
            total = (total << one) ^ (_REST & (np.uint64(0) - (total >> top)))
            total ^= a[i] & (np.uint64(0) - (b[i] >> np.uint64(bit) & one))
        out[i] = total


def multiply_field(a: Tensor, b: Tensor) -> Tensor:
    left, right = np.broadcast_arrays(a.numpy(), b.numpy())
    out = np.empty(left.size, dtype=np.uint64)
    _multiply(left.reshape(-1).view(np.uint64), right.reshape(-1).view(np.uint64), out)
    return torch.from_numpy(out.view(np.int64).reshape(left.shape))
