"""Kernels in Triton: numbers modulo 2^q - 1, and exponentials there (``kernels.ring`` says what each does).

Owns rotations, which are products by powers of two, sums and windows of stretches, and what is multiplied by mantissas
(those of ``kernels.exponents``): one launch each. Where a number begins after a rotation is chosen among all its limbs,
not addressed; a mantissa is looked up.
"""

import triton.language as tl
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.cuda_limbs import top_of
from crypten_llm.kernels.cuda_ones import mantissas, spare_of
from crypten_llm.kernels.triton_limbs import (
    BLOCK,
    complement,
    cut,
    empty,
    folded,
    grid,
    halves_of,
    kept,
    lost,
    moved,
    number_at,
    plus,
    product,
    program,
    rotated,
    sums_of,
    turns_of,
    whole_sum,
    write,
)
from crypten_llm.kernels.triton_wide import ADD, MULTIPLY, SUBTRACT, of_two
from crypten_llm.kernels.triton_words import flat

_STRETCH = 512  # numbers of a stretch that are read at a time


def add_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    return of_two(a, b, q, ADD, True)


def subtract_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    return of_two(a, b, q, SUBTRACT, True)


def multiply_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    return of_two(a, b, q, MULTIPLY, True)


# Rotations.


@program
def _power(exponents, out, many, q, LIMBS: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    turn = turns_of(tl.load(exponents + at, ok, 0), q)
    one = tl.full((B,), 1, tl.uint64) << (turn & 63).to(tl.uint64)
    for j in tl.static_range(LIMBS):
        found = tl.where((turn >> 6) == j, one, 0)
        tl.store(out + at * LIMBS + j, found.to(tl.int64, bitcast=True), ok)


def power_ones(exponents: Tensor, q: int) -> Tensor:
    limbs = ring.limbs(q)
    out, many = empty((*exponents.shape, limbs), exponents), exponents.numel()
    if many:
        _power[grid(many)](flat(exponents), out, many, q, limbs, BLOCK)
    return out


@program
def _rotate(words, turns, out, many, q, top, LIMBS: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    x = number_at(words, at * LIMBS, ok, LIMBS, LIMBS)
    write(out, at * LIMBS, ok, rotated(x, turns_of(tl.load(turns + at, ok, 0), q), q, top, LIMBS), LIMBS)


def rotate_ones(words: Tensor, turns: Tensor, q: int) -> Tensor:
    limbs = ring.limbs(q)
    out, many = empty((*words.shape[:-1], limbs), words), turns.numel()
    if many:
        _rotate[grid(many)](flat(words), flat(turns), out, many, q, top_of(q), limbs, BLOCK)
    return out


# Stretches.


@program
def _sum(words, starts, out, top, LIMBS: tl.constexpr, B: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, B)
    zero = tl.zeros((B,), tl.uint64)
    halves = ()
    for _ in tl.static_range(2 * LIMBS):
        halves += (zero,)
    first, last = tl.load(starts + r), tl.load(starts + r + 1)
    for base in range(first, last, B):
        at = base + lane
        x = number_at(words, at * LIMBS, at < last, LIMBS, LIMBS)
        halves = sums_of(halves, halves_of(x, LIMBS), LIMBS)
    found, carry = whole_sum(halves, LIMBS)
    write(out, r * LIMBS, True, folded(found, carry, top, LIMBS), LIMBS)


def sum_ones(words: Tensor, starts: Tensor, q: int) -> Tensor:
    limbs, rows = ring.limbs(q), starts.numel() - 1
    out = empty((rows, limbs), words)
    if rows:
        _sum[(rows,)](flat(words), flat(starts.to(words.device)), out, top_of(q), limbs, _STRETCH)
    return out


@program
def _window(
    words, turns, starts, out, many, rows, steps, q, top, bits, LIMBS: tl.constexpr, UP: tl.constexpr, B: tl.constexpr
):
    """A lane finds its stretch, the last that starts at it or before it, by halving."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    low, high = at * 0, at * 0 + rows
    for _ in range(steps):
        middle = (low + high) >> 1
        before = tl.load(starts + middle, ok, 0) <= at
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    x = number_at(words, at * LIMBS, ok, LIMBS, LIMBS)
    x = rotated(x, turns_of(tl.load(turns + low, ok, 0), q), q, top, LIMBS)
    found = moved(x, q - bits, LIMBS, 1)[0]
    if UP:
        found += lost(x, q - bits, LIMBS)
    tl.store(out + at, (found & kept(bits)).to(tl.int64, bitcast=True), ok)


def window_ones(words: Tensor, turns: Tensor, starts: Tensor, q: int, bits: int, up: bool) -> Tensor:
    limbs, rows, device = ring.limbs(q), turns.numel(), words.device
    many = words.shape[0]
    out = empty((many,), words)
    if many:
        _window[grid(many)](
            flat(words), flat(turns.to(device)), flat(starts.to(device)), out,
            many, rows, rows.bit_length(), q, top_of(q), bits, limbs, bool(up), BLOCK,
        )  # fmt: skip
    return out


# Exponents.


@program
def _turn(mask, rotation, words, table, many, bits, spare, q, top, LIMBS: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    ring_mask = (tl.full((), 1, tl.int64) << bits.to(tl.int64)) - 1
    raised = (tl.load(mask + at, ok, 0) & ring_mask) * q
    factor = tl.load(table + ((raised & ring_mask) >> spare.to(tl.int64)), ok, 0).to(tl.uint64, bitcast=True)
    turn = turns_of(tl.load(rotation + at, ok, 0) - (raised >> bits.to(tl.int64)), q)
    x = (factor,)
    for _ in tl.static_range(LIMBS - 1):
        x += (factor * 0,)
    drawn = cut(complement(number_at(words, at * LIMBS, ok, LIMBS, LIMBS), LIMBS), top, LIMBS)
    x, carry = plus(rotated(x, turn, q, top, LIMBS), drawn, factor * 0, LIMBS)
    write(words, at * LIMBS, ok, folded(x, carry, top, LIMBS), LIMBS)


@program
def _read(words, opened, table, many, low, bits, spare, q, top, LIMBS: tl.constexpr, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    ring_mask = (tl.full((), 1, tl.int64) << bits.to(tl.int64)) - 1
    raised = (tl.load(opened + at, ok, 0) & ring_mask) * q
    factor = tl.load(table + ((raised & ring_mask) >> spare.to(tl.int64)), ok, 0).to(tl.uint64, bitcast=True)
    whole = product(number_at(words, at * LIMBS, ok, LIMBS, LIMBS), (factor,), LIMBS, 1, LIMBS + 1)
    x = ()
    for j in tl.static_range(LIMBS):
        x += (whole[j],)
    x = folded(x, whole[LIMBS], top, LIMBS)
    turn = turns_of((raised >> bits.to(tl.int64)) + low, q)
    write(words, at * LIMBS, ok, rotated(x, turn, q, top, LIMBS), LIMBS)


def turned_exponents(mask: Tensor, rotation: Tensor, bits: int, q: int, words: Tensor) -> Tensor:
    spare, many = spare_of(bits, q), mask.numel()
    made = words.contiguous()
    if many:
        table = mantissas(bits - spare, words.device)[1]
        _turn[grid(many)](
            flat(mask), flat(rotation), made, table, many, bits, spare, q, top_of(q), words.shape[-1], BLOCK
        )
    return _into(words, made)


def read_exponents(words: Tensor, opened: Tensor, low: int, bits: int, q: int) -> Tensor:
    spare, many = spare_of(bits, q), opened.numel()
    made = words.contiguous()
    if many:
        table = mantissas(bits - spare, words.device)[0]
        _read[grid(many)](made, flat(opened), table, many, low % q, bits, spare, q, top_of(q), words.shape[-1], BLOCK)
    return _into(words, made)


def _into(words: Tensor, made: Tensor) -> Tensor:
    """``words``, whose memory ``made`` is unless its layout is another."""
    return words if words.is_contiguous() else words.copy_(made)
