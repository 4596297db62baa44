"""Between tensors and Python's integers, for the kernels to read (``kernels.reference`` and its parts).

Owns how words and limbs are read and written there, one element after the other, in order. Integers have no width here,
so where a ring ends is written down each time.
"""

from collections.abc import Iterable, Iterator
from itertools import product

import torch
from torch import Tensor

from crypten_llm.kernels.ring import limbs


def integers(words: Tensor) -> list[int]:
    """The elements as unsigned 64-bit integers."""
    return [value % 2**64 for value in words.flatten().tolist()]


def signed(value: int, bits: int = 64) -> int:
    """The integer in [-2^(bits-1), 2^(bits-1)) that is ``value`` modulo 2^bits."""
    value %= 2**bits
    return value - 2**bits if value >> (bits - 1) else value


def as_words(values: Iterable[int], shape: Iterable[int]) -> Tensor:
    """Integers modulo 2^64 as words of ``shape``."""
    return torch.tensor([signed(value) for value in values], dtype=torch.int64).reshape(tuple(shape))


def numbers(wide: Tensor) -> list[int]:
    """The numbers that limbs [..., L] are."""
    rows = wide.reshape(-1, wide.shape[-1]).tolist()
    return [sum(limb % 2**64 << 64 * place for place, limb in enumerate(row)) for row in rows]


def wide(values: Iterable[int], bits: int, shape: Iterable[int]) -> Tensor:
    """Integers from 0 up to 2^bits - 1 as limbs [*shape, L]."""
    count = limbs(bits)
    return as_words((value >> 64 * place for value in values for place in range(count)), (*shape, count))


def indices(words: Tensor) -> Iterator[tuple[int, ...]]:
    """Every index, the last dimension fastest."""
    return product(*map(range, words.shape))


def write(words: Tensor, index: tuple[int, ...], value: int) -> None:
    """words[index] = value modulo the width of a table's words, of which 8 bits are held unsigned."""
    bits = 8 * words.element_size()
    words[index] = value % 2**bits if words.dtype == torch.uint8 else signed(value, bits)
