"""Kernels to read: numbers that were opened in a narrow ring and are used in a wide one, in Python's integers.

Owns the twins of ``kernels.lifted``; they share no code with it.
"""

from torch import Tensor

from crypten_llm.kernels import integers
from crypten_llm.kernels.integers import wide


def lift_mask(mask: Tensor, carry: Tensor, bit: Tensor, unwrapped: Tensor, size: int, bits: int) -> Tensor:
    parts = zip(
        mask.flatten().tolist(),
        integers.numbers(carry),
        integers.numbers(bit),
        unwrapped.flatten().tolist(),
        strict=True,
    )
    return wide(((r - ((c + u * b) << size)) % 2**bits for r, c, b, u in parts), bits, mask.shape)


def dot_wide(words: Tensor, numbers: Tensor, bits: int) -> Tensor:
    size = words.shape[-1]
    terms = [x * y for x, y in zip(words.flatten().tolist(), integers.numbers(numbers), strict=True)]
    sums = (sum(terms[start : start + size]) % 2**bits for start in range(0, len(terms), size))
    return wide(sums, bits, words.shape[:-1])


def scale_lifted(
    public: Tensor,
    unwrapped: Tensor,
    mask: Tensor,
    own: Tensor,
    shown: Tensor,
    pairs: Tensor,
    wraps: Tensor,
    size: int,
    kept: int,
    bits: int,
) -> Tensor:
    width, factors, opened = public.shape[-1], integers.numbers(own), integers.numbers(shown)
    elements = zip(
        *(words.flatten().tolist() for words in (public, unwrapped)),
        *map(integers.numbers, (mask, pairs, wraps)),
        strict=True,
    )
    found = (
        x * factors[i // width] - r * opened[i // width] + (pair << kept) - (u * wrap << size)
        for i, (x, u, r, pair, wrap) in enumerate(elements)
    )
    return wide((value % 2**bits for value in found), bits, public.shape)
