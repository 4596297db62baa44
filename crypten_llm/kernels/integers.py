"""Between tensors and Python's integers, for the kernels to read (``kernels.reference``).

Owns how words and limbs are read and written there: one element after the other, in order.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from crypten_llm.kernels.ring import limbs


def integers(words: Tensor) -> list[int]:
    """The elements as unsigned 64-bit integers, in order."""
    return [value % 2**64 for value in words.flatten().tolist()]


def signed(value: int, bits: int = 64) -> int:
    """The integer in [-2^(bits-1), 2^(bits-1)) that is ``value`` modulo 2^bits."""
    value %= 2**bits
    return value - 2**bits if value >> (bits - 1) else value


def words(values: Iterable[int], shape: Iterable[int]) -> Tensor:
    """Integers modulo 2^64 as words of ``shape``."""
    return torch.tensor([signed(value) for value in values], dtype=torch.int64).reshape(tuple(shape))


def numbers(wide: Tensor) -> list[int]:
    """The numbers that limbs [..., L] are, in order."""
    rows = wide.reshape(-1, wide.shape[-1]).tolist()
    return [sum(limb % 2**64 << 64 * place for place, limb in enumerate(row)) for row in rows]


def wide(values: Iterable[int], bits: int, shape: Iterable[int]) -> Tensor:
    """Integers from 0 up to 2^bits - 1 as limbs [*shape, L]."""
    count = limbs(bits)
    return words((value >> 64 * place for value in values for place in range(count)), (*shape, count))
