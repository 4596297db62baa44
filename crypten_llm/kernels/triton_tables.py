"""Kernels in Triton: tables turned by a mask, comparisons by digits, bits at secret places, rows chosen by bits, and a
field (``kernels.ring`` says what each does). One launch each; ``xor_rows`` fills its result with zeros before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.ring import DIGITS, SIGNS
from crypten_llm.kernels.triton_limbs import BLOCK, empty, grid, lies, place_of, program
from crypten_llm.kernels.triton_words import flat

_DIGITS, _SIGNS, _FIELD = tl.constexpr(DIGITS), tl.constexpr(SIGNS), tl.constexpr(2**SIGNS - 1)
_WORDS = 512  # of tables, of a program
_BITS = 1024  # of a row whose parity is asked for, at a time
_COLUMNS = 128  # of rows chosen by bits, of a program
_CHOICES = 8  # at a time, and as many rows; a single choice takes more rows
_LONG = 512  # rows of a program


def _there(words: Tensor, like: Tensor) -> Tensor:
    return words.to(like.device).contiguous()


def _into(words: Tensor, made: Tensor) -> Tensor:
    """``words``, whose memory ``made`` is unless its layout is another."""
    return words if words.is_contiguous() else words.copy_(made)


# Tables: of ``size`` words, a power of two.


@program
def _turn_table(table, places, words, many, size, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    row = at // size
    place = (at - row * size - tl.load(places + row, ok, 0)) & (size - 1)
    found = tl.load(table + place, ok, 0) - tl.load(words + at, ok, 0).to(tl.int64)
    tl.store(words + at, found.to(words.dtype.element_ty), ok)


@program
def _read_table(words, opened, steps, out, many, columns, size, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    row = at // columns
    place = (tl.load(opened + row, ok, 0) - tl.load(steps + at - row * columns, ok, 0)) & (size - 1)
    tl.store(out + at, tl.load(words + row * size + place, ok, 0).to(tl.int64), ok)


def turn_table(table: Tensor, places: Tensor, words: Tensor) -> Tensor:
    made, many = words.contiguous(), words.numel()
    if many:
        _turn_table[grid(many, _WORDS)](_there(table, words), flat(places), made, many, words.shape[1], _WORDS)
    return _into(words, made)


def read_table(words: Tensor, opened: Tensor, steps: Tensor) -> Tensor:
    rows, columns = words.shape[0], steps.numel()
    out = empty((rows, columns), words)
    if out.numel():
        _read_table[grid(rows * columns)](
            words.contiguous(), flat(opened), _there(steps, words), out, rows * columns, columns, words.shape[1], BLOCK
        )
    return out


# Comparison by digits: the sign of digit j counts 2^j modulo 2^SIGNS, so it has SIGNS - j bits, behind those of the
# digits below.


@program
def _turn_signs(masks, words, many, size, digit_bits, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    row = at // size
    value, mask = at - row * size, tl.load(masks + row, ok, 0)
    word = tl.load(words + at, ok, 0).to(tl.int64)
    made = word * 0
    for j in tl.static_range(_DIGITS):
        digit = (mask >> (digit_bits * j).to(tl.int64)) & (size - 1)
        sign = (value > digit).to(tl.int64) - (value < digit).to(tl.int64)
        place = j * _SIGNS - j * (j - 1) // 2
        made |= ((sign - (word >> place)) & (_FIELD >> j)) << place
    tl.store(words + at, made.to(words.dtype.element_ty), ok)


@program
def _read_signs(words, points, out, many, columns, size, digit_bits, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    table, point = words + at // columns * size, tl.load(points + at, ok, 0)
    total = point * 0
    for j in tl.static_range(_DIGITS):
        digit = (point >> (digit_bits * j).to(tl.int64)) & (size - 1)
        place = j * _SIGNS - j * (j - 1) // 2
        total += ((tl.load(table + digit, ok, 0).to(tl.int64) >> place) & (_FIELD >> j)) << j
    tl.store(out + at, total, ok)


@program
def _turn_bits(masks, tops, words, many, columns, size, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    table = at // size
    place = (at - table * size - tl.load(masks + table, ok, 0)) & (size - 1)
    bit = (place >= size // 2).to(tl.int64) ^ tl.load(tops + table // columns, ok, 0)
    found = bit - tl.load(words + at, ok, 0).to(tl.int64)
    tl.store(words + at, found.to(words.dtype.element_ty), ok)


@program
def _read_bits(words, opened, flips, out, many, size, one, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    bit = tl.load(words + at * size + tl.load(opened + at, ok, 0), ok, 0).to(tl.int64)
    tl.store(out + at, tl.where(tl.load(flips + at, ok, 0) != 0, one - bit, bit), ok)


def turn_signs(masks: Tensor, digit_bits: int, words: Tensor) -> Tensor:
    made, many = words.contiguous(), words.numel()
    if many:
        _turn_signs[grid(many, _WORDS)](flat(masks), made, many, words.shape[1], digit_bits, _WORDS)
    return _into(words, made)


def read_signs(words: Tensor, points: Tensor, digit_bits: int) -> Tensor:
    out, many = empty(points.shape, points), points.numel()
    if many:
        _read_signs[grid(many)](
            words.contiguous(), flat(points), out, many, points.shape[1], words.shape[1], digit_bits, BLOCK
        )
    return out


def turn_bits(masks: Tensor, tops: Tensor, words: Tensor) -> Tensor:
    made, many = words.contiguous(), words.numel()
    if many:
        _turn_bits[grid(many, _WORDS)](flat(masks), flat(tops), made, many, words.shape[1], words.shape[2], _WORDS)
    return _into(words, made)


def read_bits(words: Tensor, opened: Tensor, flips: Tensor, one: int) -> Tensor:
    out, many = empty(opened.shape, opened), opened.numel()
    if many:
        _read_bits[grid(many)](words.contiguous(), flat(opened), flat(flips), out, many, words.shape[2], one, BLOCK)
    return out


# Bits at secret places.


@program
def _flip(places, words, rows, size, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = row < rows
    place = tl.load(places + row, ok, 0) & (8 * size - 1)
    byte = words + row * size + (place >> 3)
    bit = tl.full((B,), 1, tl.int64) << (place & 7)
    tl.store(byte, (tl.load(byte, ok, 0).to(tl.int64) ^ bit).to(tl.uint8), ok)


def flip_places(places: Tensor, words: Tensor) -> Tensor:
    made, rows = words.contiguous(), words.shape[0]
    if rows:
        _flip[grid(rows)](flat(places), made, rows, words.shape[1], BLOCK)
    return _into(words, made)


@program
def _parities(words, turns, sets, out, many, size, B: tl.constexpr):
    """Of ``size`` bits of a row and a set."""
    row, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    lane, turn = tl.arange(0, B), tl.load(turns + row)
    total = tl.zeros((B,), tl.int64)
    for base in range(0, size, B):
        place = base + lane
        ok = place < size
        bit = (tl.load(words + row * (size // 8) + (place >> 3), ok, 0).to(tl.int64) >> (place & 7)) & 1
        total += bit & tl.load(sets + which * size + ((turn - place) & (size - 1)), ok, 0).to(tl.int64)
    tl.store(out + row * many + which, tl.sum(total, 0) & 1)


def parities(words: Tensor, turns: Tensor, sets: Tensor) -> Tensor:
    rows, (many, size) = words.shape[0], sets.shape
    out = empty((rows, many), turns)
    if out.numel():
        lanes = min(_BITS, size)
        _parities[(rows, many)](
            words.contiguous(), flat(turns), _there(sets, words).view(torch.uint8), out, many, size, lanes
        )
    return out


# Rows chosen by bits.


@program
def _xor_rows(
    table, chosen, out, rows, columns, many, words, stretch, BT: tl.constexpr, BV: tl.constexpr, BH: tl.constexpr
):
    """What a stretch of rows adds to some columns of some choices; other programs' is xored to the same words."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    first = tl.program_id(2) * stretch
    last = tl.minimum(first + stretch, rows)
    asked, there = t < many, h < columns
    total = tl.zeros((BT, BV, BH), tl.int32)
    for base in range(first, last, BV):
        v = base + tl.arange(0, BV)
        ok = v < last
        at = table + v.to(tl.int64)[:, None] * columns + h[None, :]
        row = tl.load(at, ok[:, None] & there[None, :], 0)
        word = tl.load(chosen + t.to(tl.int64)[:, None] * words + (v >> 6)[None, :], asked[:, None] & ok[None, :], 0)
        bit = ((word >> (v & 63).to(tl.int64)[None, :]) & 1).to(tl.int32)
        total ^= row[None, :, :] & -bit[:, :, None]
    found = tl.xor_sum(total, 1)
    tl.atomic_xor(out + t.to(tl.int64)[:, None] * columns + h[None, :], found, asked[:, None] & there[None, :])


def xor_rows(table: Tensor, chosen: Tensor) -> Tensor:
    (rows, columns), many = table.shape, chosen.shape[0]
    out = torch.zeros((many, columns), dtype=torch.int32, device=table.device)
    if rows and out.numel():
        choices, together = (1, 64) if many == 1 else (_CHOICES, _CHOICES)
        parts = triton.cdiv(many, choices), triton.cdiv(columns, _COLUMNS), triton.cdiv(rows, _LONG)
        _xor_rows[parts](
            table.contiguous(), chosen.contiguous(), out, rows, columns, many, chosen.shape[1], _LONG,
            choices, together, _COLUMNS, num_warps=8,
        )  # fmt: skip
    return out


@program
def _field(a, b, out, many, middle, inner, a0, a1, a2, b0, b1, b2, PLAIN: tl.constexpr, B: tl.constexpr):
    """By Horner's rule, the highest bit first; nothing branches on a bit."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    x = tl.load(a + place_of(at, middle, inner, a0, a1, a2, PLAIN), ok, 0)
    y = tl.load(b + place_of(at, middle, inner, b0, b1, b2, PLAIN), ok, 0)
    total = x * 0
    for _ in range(64):
        total = (total << 1) ^ ((total >> 63) & 0b11011)
        total ^= x & (y >> 63)
        y <<= 1
    tl.store(out + at, total, ok)


def multiply_field(a: Tensor, b: Tensor) -> Tensor:
    shape = ring.broadcast(a.shape, b.shape)
    out = empty(shape, a)
    if out.numel():
        (left, right), sizes, steps, plain = lies(shape, (a[..., None], b[..., None]))
        _field[grid(out.numel())](left, right, out, out.numel(), *sizes, *steps, plain, BLOCK)
    return out
