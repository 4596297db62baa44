"""Parts of programs in Triton that compute with numbers in limbs, and how such programs are made and fed.

Owns arithmetic on a number whose limbs are a tuple of uint64, the lowest first, a lane each: how many there are is
known when a program is compiled, so no loop over limbs is left in it. ``top`` says how many bits of the highest limb
are in use, 1 to 64. No branch and no address depends on a value.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # numbers of a program


def program(function: Callable) -> Any:
    """A program that is compiled once for all numbers and addresses: what else it takes is a ``tl.constexpr``."""
    parameters = inspect.signature(function).parameters.items()
    given = [name for name, parameter in parameters if parameter.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=given)(function)


# Words.


@triton.jit
def kept(top):
    """A mask of the lowest ``top`` bits, 1 to 64."""
    return tl.full((), 0xFFFFFFFFFFFFFFFF, tl.uint64) >> (64 - top).to(tl.uint64)


@triton.jit
def word_at(words, place, ok):
    """A word of memory, unsigned; 0 where not ``ok``."""
    return tl.load(words + place, ok, 0).to(tl.uint64, bitcast=True)


@triton.jit
def added(x, y, carry):
    """x + y + carry, carry at most 1: the low word and the next carry."""
    once = x + y
    total = once + carry
    return total, (once < x).to(tl.uint64) | (total < once).to(tl.uint64)


# Numbers.


@triton.jit
def number_at(words, place, ok, given, LIMBS: tl.constexpr):
    """The lowest limbs of a number that has ``given`` of them in memory; 0 for what it lacks."""
    out = ()
    for j in tl.static_range(LIMBS):
        out += (word_at(words, place + j, ok & (j < given)),)
    return out


@triton.jit
def write(out, place, ok, x, LIMBS: tl.constexpr):
    """A number's limbs to memory."""
    for j in tl.static_range(LIMBS):
        tl.store(out + place + j, x[j].to(tl.int64, bitcast=True), ok)


@triton.jit
def window_of(words, place, start, ok, given):
    """64 bits of a number in memory from bit ``start`` on, a scalar of any sign; 0 for what lies outside of it."""
    limb, shift = start >> 6, (start & 63).to(tl.uint64)
    low = word_at(words, place + limb, ok & (limb >= 0) & (limb < given))
    high = word_at(words, place + limb + 1, ok & (limb >= -1) & (limb + 1 < given))
    return (low >> shift) | ((high << 1) << (63 - shift))


@triton.jit
def moved_at(words, place, start, ok, given, LIMBS: tl.constexpr):
    """Limbs of a number in memory from bit ``start`` on."""
    out = ()
    for j in tl.static_range(LIMBS):
        out += (window_of(words, place, start + 64 * j, ok, given),)
    return out


@triton.jit
def cut(x, top, LIMBS: tl.constexpr):
    """Without what is above."""
    out = ()
    for j in tl.static_range(LIMBS):
        if j < LIMBS - 1:
            out += (x[j],)
        else:
            out += (x[j] & kept(top),)
    return out


@triton.jit
def complement(x, LIMBS: tl.constexpr):
    """Every bit turned over."""
    out = ()
    for j in tl.static_range(LIMBS):
        out += (x[j] ^ 0xFFFFFFFFFFFFFFFF,)
    return out


@triton.jit
def chosen(x, mask, LIMBS: tl.constexpr):
    """A number where the mask is all ones, 0 where it is 0."""
    out = ()
    for j in tl.static_range(LIMBS):
        out += (x[j] & mask,)
    return out


@triton.jit
def plus(a, b, carry, LIMBS: tl.constexpr):
    """a + b + carry: as many limbs, and the next carry."""
    out = ()
    for j in tl.static_range(LIMBS):
        total, carry = added(a[j], b[j], carry)
        out += (total,)
    return out, carry


@triton.jit
def minus(a, b, LIMBS: tl.constexpr):
    """a - b, without what is above the limbs."""
    out, _ = plus(a, complement(b, LIMBS), a[0] * 0 + 1, LIMBS)
    return out


@triton.jit
def product(a, b, LEFT: tl.constexpr, RIGHT: tl.constexpr, MANY: tl.constexpr):
    """The lowest ``MANY`` limbs of a product of numbers of ``LEFT`` and ``RIGHT``, one after the other."""
    zero = a[0] * 0 + b[0] * 0
    first, second, third = zero, zero, zero
    out = ()
    for k in tl.static_range(MANY):
        for i in tl.static_range(LEFT):
            if k - i >= 0:
                if k - i < RIGHT:
                    low = a[i] * b[k - i]
                    first += low
                    if k < MANY - 1:
                        carried = tl.umulhi(a[i] + zero, b[k - i] + zero) + (first < low).to(tl.uint64)
                        second += carried
                        third += (second < carried).to(tl.uint64)
        out += (first,)
        first, second, third = second, third, zero
    return out


@triton.jit
def scaled(word, number, LIMBS: tl.constexpr):
    """A signed word, int64, times a number: of a negative one, 2^64 times the number is taken away."""
    whole = product((word.to(tl.uint64, bitcast=True),), number, 1, LIMBS, LIMBS)
    negative = (word >> 63).to(tl.uint64, bitcast=True)
    above = (negative * 0,)
    for j in tl.static_range(LIMBS - 1):
        above += (number[j] & negative,)
    return minus(whole, above, LIMBS)


@triton.jit
def folded(x, carry, top, LIMBS: tl.constexpr):
    """The number of q = 64 (LIMBS - 1) + top bits, plus carry 2^(64 LIMBS), less than 2^(q + 64), modulo 2^q - 1: what
    is above the lowest q bits is added to them. After the first time at most 2^q - 2 + 2^64, it is below 2^q after the
    second.
    """
    below, above = (top - 1).to(tl.uint64), (64 - top).to(tl.uint64)
    for _ in tl.static_range(2):
        carry = ((x[LIMBS - 1] >> below) >> 1) | (carry << above)
        x = cut(x, top, LIMBS)
        out = ()
        for j in tl.static_range(LIMBS):
            total = x[j] + carry
            carry = (total < x[j]).to(tl.uint64)
            out += (total,)
        x = out
    return x


@triton.jit
def limb_of(x, place, LIMBS: tl.constexpr):
    """The limb at a place that lanes may have of their own; 0 outside."""
    out = x[0] * 0
    for j in tl.static_range(LIMBS):
        out |= tl.where(place == j, x[j], 0)
    return out


@triton.jit
def moved(x, start, LIMBS: tl.constexpr, MANY: tl.constexpr):
    """``MANY`` limbs from bit ``start`` on, 0 or more; lanes may have their own."""
    out = ()
    for j in tl.static_range(MANY):
        place, shift = (start >> 6) + j, (start & 63).to(tl.uint64)
        low, high = limb_of(x, place, LIMBS), limb_of(x, place + 1, LIMBS)
        out += ((low >> shift) | ((high << 1) << (63 - shift)),)
    return out


@triton.jit
def lost(x, count, LIMBS: tl.constexpr):
    """1 where one of the lowest ``count`` bits is set, a scalar from 0 to 64 LIMBS."""
    below = x[0] * 0
    for j in tl.static_range(LIMBS):
        use = tl.minimum(tl.maximum(count - 64 * j, 0), 64)
        below |= tl.where(use > 0, x[j] & kept(tl.maximum(use, 1)), 0)
    return (below != 0).to(tl.uint64)


@triton.jit
def rotated(x, turn, q, top, LIMBS: tl.constexpr):
    """Times 2^turn modulo 2^q - 1, turn from 0 to q - 1, a lane's own: limbs are read off behind the number's end, too,
    where it begins again.
    """
    out = ()
    for j in tl.static_range(LIMBS):
        start = 64 * j - turn
        start = tl.where(start < 0, start + q, start)
        word = moved(x, start, LIMBS, 1)[0]
        room = q - start
        again = x[0] << (room & 63).to(tl.uint64)
        out += (word | tl.where(room < 64, again, 0),)
    return cut(out, top, LIMBS)


@triton.jit
def turns_of(x, q):
    """Whole numbers of any sign modulo q."""
    rest = x % q
    return tl.where(rest < 0, rest + q, rest)


# Sums over lanes.


@triton.jit
def halves_of(x, LIMBS: tl.constexpr):
    """Low halves of all limbs, then high ones: sums of below 2^31 of them carry nothing."""
    out = ()
    for j in tl.static_range(LIMBS):
        out += (x[j] & 0xFFFFFFFF,)
    for j in tl.static_range(LIMBS):
        out += (x[j] >> 32,)
    return out


@triton.jit
def sums_of(a, b, LIMBS: tl.constexpr):
    """Sums of halves, one by one."""
    out = ()
    for j in tl.static_range(2 * LIMBS):
        out += (a[j] + b[j],)
    return out


@triton.jit
def whole_sum(halves, LIMBS: tl.constexpr):
    """What lanes' sums of halves add up to: limbs, scalars, and what is above them."""
    out = ()
    carry = tl.full((), 0, tl.uint64)
    for j in tl.static_range(LIMBS):
        low = tl.sum(halves[j], 0) + carry
        high = tl.sum(halves[LIMBS + j], 0) + (low >> 32)
        out += ((high << 32) | (low & 0xFFFFFFFF),)
        carry = high >> 32
    return out, carry


# Where operands of an element-wise result lie.


@triton.jit
def place_of(at, middle, inner, s0, s1, s2, PLAIN: tl.constexpr):
    """Where element ``at`` of a result [any, middle, inner] has its operand, whose steps are s0, s1 and s2."""
    if PLAIN:
        place = at * s2
    else:
        row = at // inner
        first = row // middle
        place = first * s0 + (row - first * middle) * s1 + (at - row * inner) * s2
    return place


def lies(shape: Sequence[int], operands: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, int], list[int], bool]:
    """Operands [..., L] of a result of ``shape`` as ``place_of`` finds their numbers: tensors whose limbs lie side by
    side, the sizes of the last two dimensions that are left when what lies in one piece is one dimension, steps of
    each, three an operand; and whether one dimension is left.
    """
    given = [x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous() for x in operands]
    wide = [x.expand(*shape, x.shape[-1]) for x in given]
    dimensions = _merged(shape, wide)
    if len(dimensions) > 3:
        given = wide = [x.contiguous() for x in wide]
        dimensions = _merged(shape, wide)
    plain = len(dimensions) < 2
    dimensions = [(1, [0] * len(given))] * (3 - len(dimensions)) + dimensions
    steps = [strides[which] for which in range(len(given)) for _, strides in dimensions]
    return given, (dimensions[1][0], dimensions[2][0]), steps, plain


def _merged(shape: Sequence[int], operands: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """Dimensions of more than one element and their steps, neighbours as one where all operands lie so."""
    found: list[tuple[int, list[int]]] = []
    for place, size in enumerate(shape):
        steps = [x.stride(place) for x in operands]
        if size == 1:
            continue
        if found and all(outer == size * step for outer, step in zip(found[-1][1], steps, strict=True)):
            found[-1] = (found[-1][0] * size, steps)
        else:
            found.append((size, steps))
    return found


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Memory for words on the device of a tensor."""
    return torch.empty(tuple(shape), dtype=torch.int64, device=like.device)


def grid(count: int, block: int = BLOCK) -> tuple[int]:
    """As many programs as it takes."""
    return (triton.cdiv(count, block),)
