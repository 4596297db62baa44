"""Kernels in Triton: what travels, and key streams (``kernels.ring`` says what each does).

Owns how words are packed: each word of a message takes what it has of the number that is there when it begins, and then
of those that begin in it, so that all are written side by side. Limbs are uint64 here. Widths are numbers at run time:
one program serves all of them.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.cuda_limbs import word
from crypten_llm.kernels.triton_limbs import kept

BLOCK = 512  # numbers of a program; a multiple of 64, so that its last bit ends a word


@triton.jit
def _word(words, number, limb, ok, keep, LIMBS: tl.constexpr):
    """A limb of a number, without what is above it; 0 behind the highest."""
    found = tl.load(words + number * LIMBS + limb, ok & (limb < LIMBS), 0).to(tl.uint64, bitcast=True)
    return tl.where(limb == LIMBS - 1, found & keep, found)


@triton.jit(do_not_specialize=["numbers", "bits", "size"])
def _pack(words, out, numbers, bits, size, LIMBS: tl.constexpr, B: tl.constexpr):
    """Rows of ``numbers`` numbers as rows of ``size`` words."""
    row = tl.program_id(1).to(tl.int64)
    keep = kept(bits - (LIMBS - 1) * 64)
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < size
    start = at * 64
    first = start // bits
    place = start - first * bits
    number = row * numbers + first
    limb, shift = place >> 6, (place & 63).to(tl.uint64)
    there = ok & (first < numbers)
    found = _word(words, number, limb, there, keep, LIMBS) >> shift
    found |= (_word(words, number, limb + 1, there, keep, LIMBS) << 1) << (63 - shift)
    for j in range(1, 63 // bits + 2):
        place = (first + j) * bits - start
        there = ok & (place < 64) & (first + j < numbers)
        found |= _word(words, number + j, place * 0, there, keep, LIMBS) << (place & 63).to(tl.uint64)
    tl.store(out + row * size + at, found.to(tl.int64, bitcast=True), ok)


@triton.jit
def window_at(data, place, ok, end):
    """64 bits from a place on; words that begin at ``end`` or behind it are not read."""
    at, shift = place >> 6, (place & 63).to(tl.uint64)
    words = data.to(tl.pointer_type(tl.int64))
    low = tl.load(words + at, ok & (at < end), 0).to(tl.uint64, bitcast=True)
    high = tl.load(words + at + 1, ok & (at + 1 < end) & (shift > 0), 0).to(tl.uint64, bitcast=True)
    return (low >> shift) | ((high << 1) << (63 - shift))


@triton.jit(do_not_specialize=["many", "numbers", "bits", "skipped", "row", "end"])
def _unpack(
    data, value, out, many, numbers, bits, skipped, row, end, LIMBS: tl.constexpr, ADDED: tl.constexpr, B: tl.constexpr
):
    """Numbers of rows of ``row`` bits, behind ``skipped`` bits, plus a value if it is added, which has one limb."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    keep = kept(bits - (LIMBS - 1) * 64)
    line = at // numbers
    start = skipped + line * row + (at - line * numbers) * bits
    for j in tl.static_range(LIMBS):
        found = window_at(data, start + 64 * j, ok, end)
        if j == LIMBS - 1:
            found &= keep
        if ADDED:
            found = (found + tl.load(value + at, ok, 0).to(tl.uint64, bitcast=True)) & keep
        tl.store(out + at * LIMBS + j, found.to(tl.int64, bitcast=True), ok)


@triton.jit
def _hidden(share, mask, offset, at, ok, keep):
    return ((tl.load(share + at, ok, 0) + tl.load(mask + at, ok, 0) + offset).to(tl.uint64, bitcast=True)) & keep


@triton.jit(do_not_specialize=["offset", "many", "bits"])
def _hide(share, mask, offset, value, out, many, bits, B: tl.constexpr):
    """share + mask + offset, and the same packed: both of a program's numbers, which begin and end with a word."""
    start = tl.program_id(0).to(tl.int64) * B
    keep = kept(bits)
    at = start + tl.arange(0, B)
    tl.store(value + at, _hidden(share, mask, offset, at, at < many, keep).to(tl.int64, bitcast=True), at < many)
    place = tl.arange(0, B)
    to = start // 64 * bits + place
    ok = (place < B // 64 * bits) & (to * 64 < many.to(tl.int64) * bits)
    bit = to * 64
    first = bit // bits
    shift = bit - first * bits
    found = _hidden(share, mask, offset, first, ok & (first < many), keep) >> shift.to(tl.uint64)
    found = tl.where(first < many, found, 0)
    for j in range(1, 63 // bits + 2):
        shift = (first + j) * bits - bit
        there = ok & (shift < 64) & (first + j < many)
        more = _hidden(share, mask, offset, first + j, there, keep) << (shift & 63).to(tl.uint64)
        found |= tl.where(there, more, 0)
    tl.store(out + to, found.to(tl.int64, bitcast=True), ok)


@triton.jit(do_not_specialize=["many", "bits"])
def _unwrap(opened, shown, wrap, many, bits, B: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    word = tl.load(opened + at, ok, 0)
    one = tl.full((), 1, tl.int64)
    tl.store(shown + at, word - (one << (bits - 2).to(tl.int64)), ok)
    tl.store(wrap + at, (1 - ((word >> (bits - 1).to(tl.int64)) & 1)) << bits.to(tl.int64), ok)


def flat(words: Tensor) -> Tensor:
    """In one piece; the same memory where they are."""
    return words.reshape(-1).contiguous()


def pack_rows(numbers: Tensor, bits: int) -> Tensor:
    """Limbs [R, M, L] to bytes [R, ceil(M bits / 8)]."""
    rows, many, limbs = numbers.shape
    bytes_ = ring.packed_size(many, bits)
    size = -(-bytes_ // 8)
    out = torch.empty((rows, size), dtype=torch.int64, device=numbers.device)
    if rows and size:
        _pack[(triton.cdiv(size, BLOCK), rows)](numbers.contiguous(), out, many, bits, size, limbs, BLOCK)
    return out.view(torch.uint8)[:, :bytes_].contiguous()


def unpack_rows(data: Tensor, bits: int, many: int) -> Tensor:
    """Bytes [R, ...] to limbs [R, M, L]."""
    rows, size = data.shape
    out = torch.empty((rows, many, ring.limbs(bits)), dtype=torch.int64, device=data.device)
    _unpacked(data.contiguous().view(-1), bits, many, 8 * size, out, None)
    return out


def aligned(data: Tensor) -> tuple[Tensor, int, int]:
    """Bytes, one or more in one piece, as memory that begins with a word; how many of its bits are before them; and how
    many words have some of them. What begins inside a word is read from where that begins: it is of the same storage.
    """
    inside = data.data_ptr() % 8
    if inside > data.storage_offset():
        data, inside = data.clone(), 0
    words = data.as_strided((1,), (1,), data.storage_offset() - inside)
    return words, 8 * inside, -(-(inside + data.numel()) // 8)


def _unpacked(data: Tensor, bits: int, numbers: int, row: int, out: Tensor, value: Tensor | None) -> None:
    limbs = ring.limbs(bits)
    many = out.numel() // limbs
    if many:
        words, skipped, end = aligned(data)
        _unpack[(triton.cdiv(many, BLOCK),)](
            words,
            out if value is None else value,
            out,
            many,
            numbers,
            bits,
            skipped,
            row,
            end,
            limbs,
            value is not None,
            BLOCK,
        )


def pack(words: Tensor, bits: int) -> Tensor:
    rows = words.long().reshape(1, -1, words.shape[-1] if bits > 64 else 1)
    if rows.shape[-1] > ring.limbs(bits):
        rows = rows[..., : ring.limbs(bits)]
    return pack_rows(rows, bits).view(-1)


def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    whole = (*shape, ring.limbs(bits)) if bits > 64 else tuple(shape)
    if bits % 64 == 0 and data.storage_offset() % 8 == 0:
        return data.view(torch.int64).view(whole)
    out = torch.empty(whole, dtype=torch.int64, device=data.device)
    _unpacked(data.contiguous(), bits, max(1, math.prod(shape)), 0, out, None)
    return out


def hide(share: Tensor, mask: Tensor, offset: int, bits: int) -> tuple[Tensor, Tensor]:
    many = share.numel()
    value = torch.empty(many, dtype=torch.int64, device=share.device)
    out = torch.empty(-(-many * bits // 64), dtype=torch.int64, device=share.device)
    if many:
        _hide[(triton.cdiv(many, BLOCK),)](flat(share), flat(mask), word(offset), value, out, many, bits, BLOCK)
    return value, out.view(torch.uint8)[: ring.packed_size(many, bits)]


def show(value: Tensor, packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    out = torch.empty(tuple(shape), dtype=torch.int64, device=value.device)
    _unpacked(packed.contiguous(), bits, max(1, value.numel()), 0, out, flat(value))
    return out


def unwrap(opened: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    shown, wrap = (torch.empty(opened.shape, dtype=torch.int64, device=opened.device) for _ in range(2))
    if opened.numel():
        _unwrap[(triton.cdiv(opened.numel(), BLOCK),)](flat(opened), shown, wrap, opened.numel(), bits, BLOCK)
    return shown, wrap
