"""Kernels to read: products in the field of 2^64 elements, in Python's integers (``kernels.reference``)."""

from torch import Tensor

from crypten_llm.kernels.integers import as_words, integers
from crypten_llm.kernels.ring import broadcast

_MODULUS = 2**64 + 0b11011  # x^64 + x^4 + x^3 + x + 1


def multiply_field(a: Tensor, b: Tensor) -> Tensor:
    shape = broadcast(a.shape, b.shape)
    pairs = zip(integers(a.expand(shape)), integers(b.expand(shape)), strict=True)
    return as_words((_product(x % 2**64, y % 2**64) for x, y in pairs), shape)


def _product(x: int, y: int) -> int:
    """Of polynomials whose coefficients are bits, then what is left of it when the modulus has been divided out."""
    total = 0
    for bit in range(64):
        total ^= (y >> bit & 1) * (x << bit)
    for bit in range(127, 63, -1):
        total ^= (total >> bit & 1) * (_MODULUS << bit - 64)
    return total
