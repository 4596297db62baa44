"""Kernels in torch's own operations: numbers that were opened in a narrow ring and are used in a wide one
(``kernels.ring`` says what each does). Lists of limbs as in ``kernels.cuda_limbs``.
"""

from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.cuda_choice import hot
from crypten_llm.kernels.cuda_limbs import (
    HALF,
    LOW,
    Limbs,
    cut,
    listed,
    minus,
    moved,
    multiplied,
    of_halves,
    plus,
    stacked,
)


def _scaled(words: Tensor, numbers: Limbs) -> Limbs:
    """Signed words times numbers: of a negative word, 2^64 times the number is taken away."""
    zero = numbers[0] * 0
    above = [zero, *(limb & (words >> 63) for limb in numbers[:-1])]
    return minus(multiplied([words], numbers, len(numbers)), above)


@hot("triton_lifted")
def lift_mask(mask: Tensor, carry: Tensor, bit: Tensor, unwrapped: Tensor, size: int, bits: int) -> Tensor:
    count = ring.limbs(bits)
    chosen = -unwrapped
    wrapped, _ = plus(listed(carry, count), [limb & chosen for limb in listed(bit, count)])
    zero = mask * 0
    out = minus([mask, *[zero] * (count - 1)], moved(wrapped, -size, count))
    return stacked(cut(out, bits), mask.shape)


@hot("triton_lifted")
def dot_wide(words: Tensor, numbers: Tensor, bits: int) -> Tensor:
    terms = stacked(_scaled(words, listed(numbers, ring.limbs(bits))), words.shape)
    limbs, _ = of_halves((terms & LOW).sum(-2), ring.shift_right(terms, HALF).sum(-2))
    return stacked(cut(limbs, bits), words.shape[:-1])


@hot("triton_lifted")
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
    count, chosen = ring.limbs(bits), -unwrapped
    factor, opened = (listed(x[..., None, :], count) for x in (own, shown))
    out, _ = plus(_scaled(public, factor), moved(listed(pairs, count), -kept, count))
    out = minus(out, multiplied(listed(mask, count), opened, count))
    out = minus(out, moved([limb & chosen for limb in listed(wraps, count)], -size, count))
    return stacked(cut(out, bits), public.shape)
