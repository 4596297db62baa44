"""Kernels in torch's own operations: numbers modulo 2^q - 1, and exponentials there (``kernels.ring`` says what each
does). Lists of limbs as in ``kernels.cuda_limbs``; the mantissas are those of ``kernels.exponents``.
"""

from functools import lru_cache

import torch
from torch import Tensor

from crypten_llm.kernels import exponents, ring
from crypten_llm.kernels.cuda_choice import hot
from crypten_llm.kernels.cuda_limbs import (
    HALF,
    LOW,
    Limbs,
    cut,
    folded,
    kept,
    listed,
    moved,
    multiplied,
    of_halves,
    plus,
    shifted,
    stacked,
    top_of,
    window,
)


def _pair(a: Tensor, b: Tensor, q: int) -> tuple[Limbs, Limbs, tuple[int, ...]]:
    return listed(a, ring.limbs(q)), listed(b, ring.limbs(q)), ring.broadcast(a.shape[:-1], b.shape[:-1])


def _complement(limbs: Limbs, q: int) -> Limbs:
    """2^q - 1 less a number."""
    return cut([~limb for limb in limbs], q)


@hot("triton_ones")
def add_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    x, y, shape = _pair(a, b, q)
    return stacked(folded(*plus(x, y), q), shape)


@hot("triton_ones")
def subtract_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    x, y, shape = _pair(a, b, q)
    return stacked(folded(*plus(x, _complement(y, q)), q), shape)


@hot("triton_ones")
def multiply_ones(a: Tensor, b: Tensor, q: int) -> Tensor:
    x, y, shape = _pair(a, b, q)
    count = len(x)
    whole = multiplied(x, y, 2 * count)
    low, high = cut(whole[:count], q), moved(whole, q, count)
    return stacked(folded(*plus(low, high), q), shape)


@hot("triton_ones")
def sum_ones(words: Tensor, starts: Tensor, q: int) -> Tensor:
    """As differences of running sums, whose overflows cancel."""
    places = starts.to(words.device)
    halves = torch.cat([words & LOW, ring.shift_right(words, HALF)], -1).cumsum(0)
    halves = torch.nn.functional.pad(halves, (0, 0, 1, 0))[places].diff(dim=0)
    return torch.stack(folded(*of_halves(*halves.chunk(2, -1)), q), -1)


@hot("triton_ones")
def power_ones(exponents: Tensor, q: int) -> Tensor:
    turn = exponents % q
    one = torch.ones_like(turn) << (turn & 63)
    return torch.stack([torch.where(turn >> 6 == j, one, 0) for j in range(ring.limbs(q))], -1)


def _rotated(limbs: Limbs, turns: Tensor, q: int) -> Limbs:
    """Times 2^turns, 0 to q - 1: read off the number written twice, one behind the other."""
    count, top = len(limbs), top_of(q)
    above = moved(limbs, -top, count + 1)  # from limb count - 1 on, where the lowest of the upper one goes
    zero = above[0] * 0
    twice = [*limbs[:-1], limbs[-1] | above[0], *above[1:], zero]
    whole = stacked(twice, torch.broadcast_tensors(limbs[0], turns)[0].shape)
    start = q - turns
    place = (start >> 6)[..., None] + torch.arange(count + 1, device=turns.device)
    read = whole.gather(-1, place.expand(*whole.shape[:-1], count + 1)).unbind(-1)
    out = [window(low, high, start & 63) for low, high in zip(read, read[1:], strict=False)]
    return cut(out, q)


@hot("triton_ones")
def rotate_ones(words: Tensor, turns: Tensor, q: int) -> Tensor:
    return stacked(_rotated(listed(words, ring.limbs(q)), turns % q, q), words.shape[:-1])


@hot("triton_ones")
def window_ones(words: Tensor, turns: Tensor, starts: Tensor, q: int, bits: int, up: bool) -> Tensor:
    device = words.device
    stretch = torch.searchsorted(
        starts.to(device).contiguous(), torch.arange(words.shape[0], device=device), right=True
    )
    rotated = rotate_ones(words, turns.to(device)[stretch - 1], q)
    return shifted(rotated, q - bits, up, bits)[..., 0].contiguous()


# Exponents.


@lru_cache(maxsize=16)
def mantissas(e: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Those of 0 <= f < 2^e, and of -f, as words on a device."""
    rising, falling = (torch.from_numpy(table.astype("int64")).to(device) for table in exponents.mantissas(e))
    return rising, falling


def spare_of(bits: int, q: int) -> int:
    """The factors 2 of q, which need no place in a table of 2^bits mantissas: at most ``bits``."""
    return min(bits, (q & -q).bit_length() - 1)


def split(value: Tensor, bits: int, q: int, sign: int) -> tuple[Tensor, Tensor]:
    """The whole exponents of q value / 2^bits, and the mantissas of what is left, or of minus that."""
    spare = spare_of(bits, q)
    scaled = (value & kept(bits)) * q
    table = mantissas(bits - spare, value.device)[sign]
    return scaled >> bits, table[(scaled & kept(bits)) >> spare]


@hot("triton_ones")
def turned_exponents(mask: Tensor, rotation: Tensor, bits: int, q: int, words: Tensor) -> Tensor:
    whole, factor = split(mask, bits, q, 1)
    turned = _rotated([factor, *[factor * 0] * (words.shape[-1] - 1)], (rotation - whole) % q, q)
    limbs = folded(*plus(turned, _complement(listed(words, words.shape[-1]), q)), q)
    return words.copy_(torch.stack(limbs, -1))


@hot("triton_ones")
def read_exponents(words: Tensor, opened: Tensor, low: int, bits: int, q: int) -> Tensor:
    whole, factor = split(opened, bits, q, 0)
    count = words.shape[-1]
    *limbs, carry = multiplied(listed(words, count), [factor], count + 1)
    limbs = _rotated(folded(limbs, carry, q), (whole + low % q) % q, q)
    return words.copy_(torch.stack(limbs, -1))
