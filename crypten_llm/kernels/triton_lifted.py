"""Kernels in Triton: numbers that were opened in a narrow ring and are used in a wide one (``kernels.ring`` says what
each does).

Owns their masks, and sums and products in which such a number is one factor: one launch each.
"""

import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.cuda_limbs import top_of
from crypten_llm.kernels.triton_limbs import (
    BLOCK,
    chosen,
    cut,
    empty,
    grid,
    halves_of,
    minus,
    moved_at,
    number_at,
    plus,
    product,
    program,
    scaled,
    sums_of,
    whole_sum,
    write,
)
from crypten_llm.kernels.triton_wide import lanes_of
from crypten_llm.kernels.triton_words import flat


@triton.jit
def _where(unwrapped, at, ok):
    """All ones where a number's word is 1, 0 where it is 0."""
    return (-tl.load(unwrapped + at, ok, 0)).to(tl.uint64, bitcast=True)


@program
def _lift(mask, carry, bit, unwrapped, out, many, carries, bits_, size, top, LIMBS: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    x = number_at(mask, at, ok, 1, LIMBS)
    x = minus(x, moved_at(carry, at * carries, -size, ok, carries, LIMBS), LIMBS)
    wrapped = moved_at(bit, at * bits_, -size, ok, bits_, LIMBS)
    x = minus(x, chosen(wrapped, _where(unwrapped, at, ok), LIMBS), LIMBS)
    write(out, at * LIMBS, ok, cut(x, top, LIMBS), LIMBS)


def lift_mask(mask: Tensor, carry: Tensor, bit: Tensor, unwrapped: Tensor, size: int, bits: int) -> Tensor:
    limbs = ring.limbs(bits)
    out, many = empty((*mask.shape, limbs), mask), mask.numel()
    if many:
        _lift[grid(many)](
            flat(mask), flat(carry), flat(bit), flat(unwrapped), out,
            many, carry.shape[-1], bit.shape[-1], size, top_of(bits), limbs, BLOCK,
        )  # fmt: skip
    return out


@program
def _dot(words, numbers, out, size, given, top, LIMBS: tl.constexpr, B: tl.constexpr):
    """A row's sum of words times numbers."""
    r = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, B)
    zero = tl.zeros((B,), tl.uint64)
    halves = ()
    for _ in tl.static_range(2 * LIMBS):
        halves += (zero,)
    for base in range(0, size, B):
        ok = base + lane < size
        at = r * size + base + lane
        term = scaled(tl.load(words + at, ok, 0), number_at(numbers, at * given, ok, given, LIMBS), LIMBS)
        halves = sums_of(halves, halves_of(term, LIMBS), LIMBS)
    found, _ = whole_sum(halves, LIMBS)
    write(out, r * LIMBS, True, cut(found, top, LIMBS), LIMBS)


def dot_wide(words: Tensor, numbers: Tensor, bits: int) -> Tensor:
    *shape, size = words.shape
    limbs = ring.limbs(bits)
    out = empty((*shape, limbs), words)
    if out.numel():
        lanes, warps = lanes_of(size)
        _dot[(out.numel() // limbs,)](
            flat(words), flat(numbers), out, size, numbers.shape[-1], top_of(bits), limbs, lanes, num_warps=warps
        )
    return out


@program
def _scale(
    public, unwrapped, mask, own, shown, pairs, wraps, out, many, width,
    mask_limbs, own_limbs, shown_limbs, pair_limbs, wrap_limbs, size, kept, top, LIMBS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    row = at // width
    opened = number_at(shown, row * shown_limbs, ok, shown_limbs, LIMBS)
    x = scaled(tl.load(public + at, ok, 0), number_at(own, row * own_limbs, ok, own_limbs, LIMBS), LIMBS)
    masked = number_at(mask, at * mask_limbs, ok, mask_limbs, LIMBS)
    x = minus(x, product(masked, opened, LIMBS, LIMBS, LIMBS), LIMBS)
    x, _ = plus(x, moved_at(pairs, at * pair_limbs, -kept, ok, pair_limbs, LIMBS), x[0] * 0, LIMBS)
    wrapped = moved_at(wraps, at * wrap_limbs, -size, ok, wrap_limbs, LIMBS)
    x = minus(x, chosen(wrapped, _where(unwrapped, at, ok), LIMBS), LIMBS)
    write(out, at * LIMBS, ok, cut(x, top, LIMBS), LIMBS)


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
    limbs = ring.limbs(bits)
    out, many = empty((*public.shape, limbs), public), public.numel()
    if many:
        given = mask, own, shown, pairs, wraps
        _scale[grid(many)](
            flat(public), flat(unwrapped), *map(flat, given), out, many, public.shape[-1],
            *(x.shape[-1] for x in given), size, kept, top_of(bits), limbs, BLOCK,
        )  # fmt: skip
    return out
