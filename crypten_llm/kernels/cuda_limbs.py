"""Kernels in torch's own operations, for tensors of any device: words and numbers in limbs (``kernels.ring`` says what
each does).

Owns arithmetic on lists of limbs: int64 tensors, the lowest first, read from 0 to 2^64 - 1. torch has no such integers
on a GPU, and shifts signed ones: what is shifted in from above is cut off, and a carry is read off the top bits. No
operation here waits for the device or depends on values. ``top`` says how many bits of the highest limb are in use.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.kernels.cuda_choice import hot

HALF, LOW = 32, 2**32 - 1
Limbs = list[Tensor]

# Words.


def word(value: int) -> int:
    """An integer modulo 2^64 as a signed one."""
    value %= 2**64
    return value - 2**64 if value >> 63 else value


def kept(bits: int) -> int:
    """A mask of the lowest bits, 0 to 64."""
    return word(2**bits - 1)


def lower(x: Tensor, count: int) -> Tensor:
    """x / 2^count, rounded down, 0 <= count <= 64."""
    return x * 0 if count == 64 else ring.shift_right(x, count)


def raised(x: Tensor, count: int) -> Tensor:
    """x 2^count, 0 <= count <= 64."""
    return x * 0 if count == 64 else x << count


def window(low: Tensor, high: Tensor, start: Tensor) -> Tensor:
    """The 64 bits from ``start`` on, 0 to 63, of two words one behind the other."""
    rest = 63 - start
    return ((low >> start) & ~(-2 << rest)) | ((high << 1) << rest)


def carry_of(x: Tensor, y: Tensor | int, total: Tensor) -> Tensor:
    """What x + y, plus 1 or not, is above 2^64, where its low word is ``total``."""
    return (((x & y) | ((x | y) & ~total)) >> 63) & 1


# Lists of limbs.


def top_of(bits: int) -> int:
    """Bits of the highest limb that are in use."""
    return (bits - 1) % 64 + 1


def listed(words: Tensor, count: int) -> Limbs:
    """Limbs [..., L] as a list of that many: zeros for what they lack, without what is above."""
    found = list(words.unbind(-1))[:count]
    return found + [torch.zeros((), dtype=torch.int64, device=words.device)] * (count - len(found))


def stacked(limbs: Limbs, shape: Sequence[int]) -> Tensor:
    """A list of limbs as [*shape, L], in memory of its own."""
    return torch.stack([limb.expand(shape) for limb in limbs], -1)


def cut(limbs: Limbs, bits: int) -> Limbs:
    """Without what is above ``bits`` in the highest of ``ring.limbs(bits)``."""
    return [*limbs[:-1], ring.low_bits(limbs[-1], top_of(bits))]


def plus(a: Sequence[Tensor], b: Sequence[Tensor | int], carry: Tensor | int = 0) -> tuple[Limbs, Tensor]:
    """a + b + carry: as many limbs, and the next carry."""
    out = []
    for x, y in zip(a, b, strict=True):
        total = x + y + carry
        carry = carry_of(x, y, total)
        out.append(total)
    assert isinstance(carry, Tensor)
    return out, carry


def minus(a: Limbs, b: Limbs) -> Limbs:
    """a - b, without what is above the limbs."""
    return plus(a, [~y for y in b], 1)[0]


def moved(limbs: Limbs, count: int, many: int) -> Limbs:
    """The bits from ``count`` on, which may be negative: ``many`` limbs."""
    first, bits = count >> 6, count & 63
    zero = torch.zeros((), dtype=torch.int64, device=limbs[0].device)
    out = []
    for j in range(first, first + many):
        low = limbs[j] if 0 <= j < len(limbs) else zero
        high = limbs[j + 1] if 0 <= j + 1 < len(limbs) else zero
        out.append(ring.shift_right(low, bits) | raised(high, 64 - bits))
    return out


def folded(limbs: Limbs, carry: Tensor, q: int) -> Limbs:
    """The number plus carry 2^(64 L), less than 2^(q + 64), modulo 2^q - 1: what is above the lowest q bits is added to
    them. After the first time at most 2^q - 2 + 2^64, it is below 2^q after the second.
    """
    top = top_of(q)
    for _ in range(2):
        high = lower(limbs[-1], top) | raised(carry, 64 - top)
        limbs, carry = plus(cut(limbs, q), [high, *[0] * (len(limbs) - 1)])
    return limbs


def multiplied(a: Limbs, b: Limbs, many: int) -> Limbs:
    """The lowest ``many`` limbs of a product: digits of 32 bits by digits, then the sums of each place."""
    left, right, places = _digits(a[:many]), _digits(b[:many]), 2 * many
    shape = torch.broadcast_tensors(a[0], b[0])[0].shape
    products = left[..., :, None] * right[..., None, :]
    sums = torch.zeros((*shape, places + 1), dtype=torch.int64, device=products.device)
    for half, part in enumerate((products & LOW, ring.shift_right(products, HALF))):
        for i in range(min(left.shape[-1], places - half)):  # of sums below 2^32 each, far fewer than 2^31
            size = min(right.shape[-1], places - half - i)
            sums[..., i + half : i + half + size] += part[..., i, :size]
    out, carry = [], torch.zeros(shape, dtype=torch.int64, device=products.device)
    for j in range(many):
        low = sums[..., 2 * j] + carry
        high = sums[..., 2 * j + 1] + (low >> HALF)
        out.append((high << HALF) | (low & LOW))
        carry = ring.shift_right(high, HALF)
    return out


def _digits(limbs: Limbs) -> Tensor:
    whole = torch.stack(torch.broadcast_tensors(*limbs), -1)
    return torch.stack([whole & LOW, ring.shift_right(whole, HALF)], -1).flatten(-2)


# What travels. The lowest bit comes first; rows of numbers, each in bytes of its own.


@hot("triton_words")
def pack_rows(numbers: Tensor, bits: int) -> Tensor:
    """Numbers, limbs [R, M, L], as bytes [R, ceil(M bits / 8)]: each word takes what it has of the number that is there
    when it begins, and then of those that begin in it.
    """
    rows, many = numbers.shape[:2]
    size, count = ring.packed_size(many, bits), ring.limbs(bits)
    limbs = numbers[..., :count].clone()
    limbs[..., -1] = ring.low_bits(limbs[..., -1], top_of(bits))
    inside = 63 // bits + 1  # numbers that begin behind a word's first bit, at most
    padded = torch.nn.functional.pad(limbs, (0, 1, 0, inside + 1))
    start = torch.arange(-(-size // 8), device=numbers.device) * 64
    number = start // bits
    place = start - number * bits
    out = window(padded[:, number, place >> 6], padded[:, number, (place >> 6) + 1], place & 63)
    for j in range(1, inside + 1):
        place = (number + j) * bits - start
        out |= torch.where(place < 64, padded[:, number + j, 0] << (place & 63), 0)
    return out.view(torch.uint8)[:, :size].contiguous()


@hot("triton_words")
def unpack_rows(data: Tensor, bits: int, many: int) -> Tensor:
    """The inverse: bytes [R, ...] to limbs [R, M, L]."""
    rows, count = data.shape[0], ring.limbs(bits)
    size = -(-data.shape[1] // 8) + 1
    words = torch.zeros((rows, 8 * size), dtype=torch.uint8, device=data.device)
    words[:, : data.shape[1]] = data
    words = words.view(torch.int64)
    start = torch.arange(many, device=data.device)[:, None] * bits + torch.arange(count, device=data.device) * 64
    at = (start >> 6).clamp(max=size - 2)
    out = window(words[:, at], words[:, at + 1], start & 63)
    out[..., -1] = ring.low_bits(out[..., -1], top_of(bits))
    return out


@hot("triton_words")
def pack(words: Tensor, bits: int) -> Tensor:
    flat = words.reshape(1, -1, words.shape[-1]) if bits > 64 else words.reshape(1, -1, 1)
    if bits % 8 == 0 and flat.shape[-1] * 64 >= bits:
        return flat.contiguous().view(torch.uint8)[0, :, : bits // 8].clone(memory_format=CONTIGUOUS).view(-1)
    return pack_rows(flat, bits).view(-1)


@hot("triton_words")
def unpack(data: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    count, whole = ring.limbs(bits), tuple(shape) + ((ring.limbs(bits),) if bits > 64 else ())
    if bits % 64 == 0 and data.storage_offset() % 8 == 0:
        return data.view(torch.int64).view(whole)
    if bits % 8 == 0:
        out = torch.zeros((math.prod(shape), 8 * count), dtype=torch.uint8, device=data.device)
        out[:, : bits // 8] = data.view(-1, bits // 8)
        return out.view(torch.int64).view(whole)
    return unpack_rows(data.view(1, -1), bits, math.prod(shape)).view(whole)


CONTIGUOUS = torch.contiguous_format


@hot("triton_words")
def hide(share: Tensor, mask: Tensor, offset: int, bits: int) -> tuple[Tensor, Tensor]:
    value = ring.low_bits(share.reshape(-1) + mask.reshape(-1) + word(offset), bits)
    return value, pack(value, bits)


@hot("triton_words")
def show(value: Tensor, packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    return ring.low_bits(value + unpack(packed, bits, (value.numel(),)), bits).view(tuple(shape))


@hot("triton_words")
def unwrap(opened: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return opened - (1 << (bits - 2)), (1 - ring.top_bit(opened, bits)) << bits


@hot("triton_wide")
def hide_wide(share: Tensor, mask: Tensor, offset: int, bits: int, ones: bool) -> tuple[Tensor, Tensor]:
    size = share.shape[-1]
    rest = offset % ((1 << bits) - ones)
    limbs, first = plus(listed(share.reshape(-1, size), size), listed(mask.reshape(-1, size), size))
    limbs, second = plus(limbs, [word(rest >> 64 * j) for j in range(size)])
    limbs = folded(limbs, first + second, bits) if ones else cut(limbs, bits)
    value = torch.stack(limbs, -1)
    return value, pack(value, bits)


@hot("triton_wide")
def show_wide(value: Tensor, packed: Tensor, bits: int, ones: bool, shape: Sequence[int]) -> Tensor:
    count = ring.limbs(bits)
    theirs = unpack(packed, bits, (value.shape[0],))
    limbs, carry = plus(listed(value, count), listed(theirs, count))
    limbs = folded(limbs, carry, bits) if ones else cut(limbs, bits)
    return torch.stack(limbs, -1).view(*shape, count)


# Arithmetic.


@hot("triton_wide")
def reduce_wide(words: Tensor, bits: int) -> Tensor:
    return stacked(cut(listed(words, ring.limbs(bits)), bits), words.shape[:-1])


@hot("triton_wide")
def widen(words: Tensor, bits: int, signed: bool) -> Tensor:
    above = words >> 63 if signed else torch.zeros_like(words)
    return stacked(cut([words, *[above] * (ring.limbs(bits) - 1)], bits), words.shape)


@hot("triton_wide")
def add_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    limbs, _ = plus(*_pair(a, b, bits))
    return _wide(limbs, a, b, bits)


@hot("triton_wide")
def subtract_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    return _wide(minus(*_pair(a, b, bits)), a, b, bits)


@hot("triton_wide")
def multiply_wide(a: Tensor, b: Tensor, bits: int) -> Tensor:
    shape = ring.broadcast(a.shape[:-1], b.shape[:-1])
    x, y = (listed(v.expand(*shape, v.shape[-1]), min(v.shape[-1], ring.limbs(bits))) for v in (a, b))
    return stacked(cut(multiplied(x, y, ring.limbs(bits)), bits), shape)


def _pair(a: Tensor, b: Tensor, bits: int) -> tuple[Limbs, Limbs]:
    ring.broadcast(a.shape[:-1], b.shape[:-1])
    return listed(a, ring.limbs(bits)), listed(b, ring.limbs(bits))


def _wide(limbs: Limbs, a: Tensor, b: Tensor, bits: int) -> Tensor:
    return stacked(cut(limbs, bits), ring.broadcast(a.shape[:-1], b.shape[:-1]))


@hot("triton_wide")
def shift_wide(a: Tensor, count: int, bits: int) -> Tensor:
    return shifted(a, -count, False, bits)


@hot("triton_wide")
def drop_wide(a: Tensor, bits: int, count: int, up: bool) -> Tensor:
    dropped = shifted(a, count, up, bits - count)
    return dropped[..., 0] if bits - count <= 64 else dropped


def shifted(a: Tensor, count: int, up: bool, bits: int) -> Tensor:
    """The bits from ``count`` on, which may be negative, plus 1 where ``up`` and a bit below them is set."""
    limbs, out = listed(a, a.shape[-1]), []
    out = moved(limbs, count, ring.limbs(bits))
    if up and count > 0:
        whole, rest = divmod(count, 64)
        lost = ring.low_bits(limbs[whole], rest) if rest and whole < len(limbs) else torch.zeros_like(limbs[0])
        for limb in limbs[:whole]:
            lost = lost | limb
        out, _ = plus(out, [(lost != 0).long(), *[0] * (len(out) - 1)])
    return stacked(cut(out, bits), a.shape[:-1])


def of_halves(low: Tensor, high: Tensor) -> tuple[Limbs, Tensor]:
    """Limbs of sums of low halves and of high ones, [..., L] each, and what is above them."""
    out, carry = [], torch.zeros_like(low[..., 0])
    for j in range(low.shape[-1]):
        first = low[..., j] + carry
        second = high[..., j] + ring.shift_right(first, HALF)
        out.append((second << HALF) | (first & LOW))
        carry = ring.shift_right(second, HALF)
    return out, carry


@hot("triton_wide")
def sum_wide(a: Tensor, bits: int) -> Tensor:
    limbs, _ = of_halves((a & LOW).sum(-2, keepdim=True), ring.shift_right(a, HALF).sum(-2, keepdim=True))
    return torch.stack(cut(limbs, bits), -1)
