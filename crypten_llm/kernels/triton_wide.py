"""Kernels in Triton: numbers wider than 64 bits, in limbs (``kernels.ring`` says what each does).

Owns their programs, one launch each, and those that sums, differences and products modulo 2^q - 1 share with them. A
lane has a number, and programs of sums a row of numbers.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.cuda_limbs import top_of, word
from crypten_llm.kernels.triton_limbs import (
    BLOCK,
    complement,
    cut,
    empty,
    folded,
    grid,
    halves_of,
    lies,
    lost,
    moved,
    moved_at,
    number_at,
    place_of,
    plus,
    product,
    program,
    sums_of,
    whole_sum,
    write,
)
from crypten_llm.kernels.triton_words import aligned, flat, window_at

ADD, SUBTRACT, MULTIPLY = (tl.constexpr(which) for which in range(3))
_MESSAGE = 64  # numbers of a program that packs: as many as let its last bit end a word
_ROW = 1024  # numbers of a sum that are read at a time, at most


# What travels.


@triton.jit
def _hidden(share, mask, offset, at, ok, top, LIMBS: tl.constexpr, OFFSET: tl.constexpr, ONES: tl.constexpr):
    """share + mask + offset, the latter's limbs in memory."""
    x, y = number_at(share, at * LIMBS, ok, LIMBS, LIMBS), number_at(mask, at * LIMBS, ok, LIMBS, LIMBS)
    zero = x[0] * 0
    x, carry = plus(x, y, zero, LIMBS)
    if OFFSET:
        x, second = plus(x, number_at(offset, 0, True, LIMBS, LIMBS), zero, LIMBS)
        carry += second
    if ONES:
        x = folded(x, carry, top, LIMBS)
    else:
        x = cut(x, top, LIMBS)
    return x


@program
def _hide(
    share, mask, offset, value, out, many, bits, top,
    LIMBS: tl.constexpr, OFFSET: tl.constexpr, ONES: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The sums, and the same packed: each word has bits of two numbers at most, which are made once more for it."""
    start = tl.program_id(0).to(tl.int64) * B
    at = start + tl.arange(0, B)
    write(value, at * LIMBS, at < many, _hidden(share, mask, offset, at, at < many, top, LIMBS, OFFSET, ONES), LIMBS)
    end = B // 64 * bits
    for base in range(0, end, B):
        to = start // 64 * bits + base + tl.arange(0, B)
        bit = to * 64
        ok = (base + tl.arange(0, B) < end) & (bit < many.to(tl.int64) * bits)
        first = bit // bits
        x = _hidden(share, mask, offset, first, ok, top, LIMBS, OFFSET, ONES)
        found = moved(x, bit - first * bits, LIMBS, 1)[0]
        room = (first + 1) * bits - bit
        there = ok & (room < 64) & (first + 1 < many)
        y = _hidden(share, mask, offset, first + 1, there, top, LIMBS, OFFSET, ONES)
        found |= tl.where(there, y[0] << (room & 63).to(tl.uint64), 0)
        tl.store(out + to, found.to(tl.int64, bitcast=True), ok)


@program
def _show(value, data, out, many, bits, top, skipped, end, LIMBS: tl.constexpr, ONES: tl.constexpr, B: tl.constexpr):
    """Numbers plus what is packed behind ``skipped`` bits."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    theirs = ()
    for j in tl.static_range(LIMBS):
        theirs += (window_at(data, skipped + at * bits + 64 * j, ok, end),)
    mine = number_at(value, at * LIMBS, ok, LIMBS, LIMBS)
    x, carry = plus(mine, cut(theirs, top, LIMBS), mine[0] * 0, LIMBS)
    if ONES:
        x = folded(x, carry, top, LIMBS)
    else:
        x = cut(x, top, LIMBS)
    write(out, at * LIMBS, ok, x, LIMBS)


@lru_cache(maxsize=64)
def _constant(number: int, count: int, device: torch.device) -> Tensor:
    """A public number's limbs on a device, where they stay."""
    return torch.tensor([word(number >> 64 * j) for j in range(count)], dtype=torch.int64, device=device)


def hide_wide(share: Tensor, mask: Tensor, offset: int, bits: int, ones: bool) -> tuple[Tensor, Tensor]:
    limbs = share.shape[-1]
    many, rest = share.numel() // limbs, offset % ((1 << bits) - ones)
    value, out = empty((many, limbs), share), empty((-(-many * bits // 64),), share)
    if many:
        added = _constant(rest, limbs, share.device) if rest else value
        _hide[grid(many, _MESSAGE)](
            flat(share), flat(mask), added, value, out, many, bits, top_of(bits),
            limbs, rest != 0, bool(ones), _MESSAGE, num_warps=2,
        )  # fmt: skip
    return value, out.view(torch.uint8)[: ring.packed_size(many, bits)]


def show_wide(value: Tensor, packed: Tensor, bits: int, ones: bool, shape: Sequence[int]) -> Tensor:
    limbs = ring.limbs(bits)
    many, out = value.shape[0], empty((*shape, limbs), value)
    if many:
        data, skipped, end = aligned(packed.contiguous())
        _show[grid(many)](flat(value), data, out, many, bits, top_of(bits), skipped, end, limbs, bool(ones), BLOCK)
    return out


# Element by element.


@program
def _of_two(
    a, b, out, many, middle, inner, a0, a1, a2, b0, b1, b2, a_limbs, b_limbs, top,
    LIMBS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    WHICH: tl.constexpr, ONES: tl.constexpr, PLAIN: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """a + b, a - b, or a b; modulo 2^q - 1 a difference is a plus the complement of b. LEFT, RIGHT: limbs that may be
    other than zero.
    """
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    x = number_at(a, place_of(at, middle, inner, a0, a1, a2, PLAIN), ok, a_limbs, LIMBS)
    y = number_at(b, place_of(at, middle, inner, b0, b1, b2, PLAIN), ok, b_limbs, LIMBS)
    carry = x[0] * 0
    if WHICH == MULTIPLY:
        if ONES:  # the product's high q bits are added to its low ones
            whole = product(x, y, LIMBS, LIMBS, 2 * LIMBS)
            low, high = (), ()
            for j in tl.static_range(LIMBS):
                low += (whole[j],)
                upper = (whole[LIMBS - 1 + j] >> (top - 1).to(tl.uint64)) >> 1
                high += (upper | (whole[LIMBS + j] << (64 - top).to(tl.uint64)),)
            x, carry = plus(cut(low, top, LIMBS), high, carry, LIMBS)
        else:
            x = product(x, y, LEFT, RIGHT, LIMBS)
    else:
        if WHICH == SUBTRACT:
            y = complement(y, LIMBS)
            if ONES:
                y = cut(y, top, LIMBS)
            else:
                carry += 1
        x, carry = plus(x, y, carry, LIMBS)
    if ONES:
        x = folded(x, carry, top, LIMBS)
    else:
        x = cut(x, top, LIMBS)
    write(out, at * LIMBS, ok, x, LIMBS)


def of_two(a: Tensor, b: Tensor, bits: int, which: tl.constexpr, ones: bool) -> Tensor:
    """``ADD``, ``SUBTRACT`` or ``MULTIPLY``, modulo 2^bits or, where ``ones``, 2^bits - 1. Leading dimensions
    broadcast.
    """
    shape, limbs = ring.broadcast(a.shape[:-1], b.shape[:-1]), ring.limbs(bits)
    out = empty((*shape, limbs), a)
    many = out.numel() // limbs
    if many:
        left, right = (min(x.shape[-1], limbs) if which.value == MULTIPLY.value else limbs for x in (a, b))
        (a, b), sizes, steps, plain = lies(shape, (a, b))
        _of_two[grid(many)](
            a, b, out, many, *sizes, *steps, a.shape[-1], b.shape[-1], top_of(bits),
            limbs, left, right, which, ones, plain, BLOCK,
        )  # fmt: skip
    return out


def add_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return of_two(a, b, bits, ADD, False)


def subtract_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return of_two(a, b, bits, SUBTRACT, False)


def multiply_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return of_two(a, b, bits, MULTIPLY, False)


@program
def _widen(words, out, many, top, LIMBS: tl.constexpr, SIGNED: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    low = tl.load(words + at, ok, 0)
    above = (low >> 63).to(tl.uint64, bitcast=True)
    x = (low.to(tl.uint64, bitcast=True),)
    for _ in tl.static_range(LIMBS - 1):
        if SIGNED:
            x += (above,)
        else:
            x += (above * 0,)
    write(out, at * LIMBS, ok, cut(x, top, LIMBS), LIMBS)


def widen(words: Tensor, bits: int, signed: bool) -> Tensor:
    out, limbs = empty((*words.shape, ring.limbs(bits)), words), ring.limbs(bits)
    if words.numel():
        _widen[grid(words.numel())](flat(words), out, words.numel(), top_of(bits), limbs, bool(signed), BLOCK)
    return out


@program
def _shift(a, out, many, given, count, top, LIMBS: tl.constexpr, GIVEN: tl.constexpr, B: tl.constexpr):
    """The bits from ``count`` on, which may be negative; plus 1 where GIVEN limbs are there, all of a number's, and a
    bit below them is set.
    """
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    x = moved_at(a, at * given, count, ok, given, LIMBS)
    if GIVEN > 0:
        carry = lost(number_at(a, at * given, ok, given, GIVEN), count, GIVEN)
        out_of = ()
        for j in tl.static_range(LIMBS):
            total = x[j] + carry
            carry = (total < carry).to(tl.uint64)
            out_of += (total,)
        x = out_of
    write(out, at * LIMBS, ok, cut(x, top, LIMBS), LIMBS)


def _shifted(a: Tensor, count: int, up: bool, bits: int, whole: bool = True) -> Tensor:
    limbs, given = ring.limbs(bits), a.shape[-1]
    out = empty((*a.shape[:-1], limbs) if whole else a.shape[:-1], a)
    many = out.numel() // limbs
    if many:
        _shift[grid(many)](
            flat(a), out, many, given, count, top_of(bits), limbs, given if up and count > 0 else 0, BLOCK
        )
    return out


def reduce_wide(words: Tensor, bits: int) -> Tensor:
    return _shifted(words, 0, False, bits)


def shift_wide(a: Tensor, count: int, bits: int) -> Tensor:
    return _shifted(a, -count, False, bits)


def drop_wide(a: Tensor, bits: int, count: int, up: bool) -> Tensor:
    return _shifted(a, count, up, bits - count, bits - count > 64)


# Sums of rows.


@program
def _sum(a, out, middle, inner, a0, a1, a2, row, size, top, LIMBS: tl.constexpr, PLAIN: tl.constexpr, B: tl.constexpr):
    """Of ``size`` numbers, ``row`` apart, of element of the result."""
    r = tl.program_id(0).to(tl.int64)
    start = place_of(r, middle, inner, a0, a1, a2, PLAIN)
    lane = tl.arange(0, B)
    zero = tl.zeros((B,), tl.uint64)
    halves = ()
    for _ in tl.static_range(2 * LIMBS):
        halves += (zero,)
    for base in range(0, size, B):
        at = base + lane
        x = number_at(a, start + at.to(tl.int64) * row, at < size, LIMBS, LIMBS)
        halves = sums_of(halves, halves_of(x, LIMBS), LIMBS)
    found, _ = whole_sum(halves, LIMBS)
    write(out, r * LIMBS, True, cut(found, top, LIMBS), LIMBS)


def lanes_of(size: int) -> tuple[int, int]:
    """Numbers that a program reads at a time, and its warps."""
    lanes = max(32, min(_ROW, triton.next_power_of_2(size)))
    return lanes, max(1, lanes // 128)


def sum_wide(a: Tensor, bits: int) -> Tensor:
    *shape, size, limbs = a.shape
    out = empty((*shape, 1, limbs), a)
    many = out.numel() // limbs
    if many:
        a = a if limbs == 1 or a.stride(-1) == 1 else a.contiguous()
        if size == 0:
            return out.zero_()
        (rows,), sizes, steps, plain = lies(shape, (a.select(-2, 0),))
        row = a.stride(-2)
        if rows.data_ptr() != a.data_ptr():
            return sum_wide(a.contiguous(), bits)
        lanes, warps = lanes_of(size)
        _sum[(many,)](rows, out, *sizes, *steps, row, size, top_of(bits), limbs, plain, lanes, num_warps=warps)
    return out
