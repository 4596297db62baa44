"""Kernels in torch's own operations: tables turned by a mask, comparisons by digits, bits at secret places, rows chosen
by bits, and a field (``kernels.ring`` says what each does).
"""

import torch
from torch import Tensor

from crypten_llm.kernels.cuda_choice import hot
from crypten_llm.kernels.ring import DIGITS, SIGNS

_AT_ONCE = 1 << 27  # bytes of a step's largest tensor, about


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device)


# Tables.


@hot("triton_tables", 2)
def turn_table(table: Tensor, places: Tensor, words: Tensor) -> Tensor:
    size = words.shape[1]
    at = (_places(size, words) - places.reshape(-1, 1)) & (size - 1)
    return words.copy_(table.to(words.device)[at] - words)


@hot("triton_tables")
def read_table(words: Tensor, opened: Tensor, steps: Tensor) -> Tensor:
    at = (opened.reshape(-1, 1) - steps.to(words.device)) & (words.shape[1] - 1)
    return words.gather(1, at).long()


# Comparison by digits. The sign of digit j counts 2^j modulo 2^SIGNS: SIGNS - j bits, behind those of the digits below.

_FIELDS = [(j, SIGNS - j, sum(SIGNS - i for i in range(j))) for j in range(DIGITS)]  # digit, bits, place


@hot("triton_tables")
def turn_signs(masks: Tensor, digit_bits: int, words: Tensor) -> Tensor:
    size, given = words.shape[1], words.long()
    values, made = _places(size, words), torch.zeros_like(given)
    for j, bits, place in _FIELDS:
        digit = (masks.reshape(-1, 1) >> (digit_bits * j)) & (size - 1)
        sign = (values > digit).long() - (values < digit).long()
        made |= ((sign - (given >> place)) & ((1 << bits) - 1)) << place
    return words.copy_(made)


@hot("triton_tables")
def read_signs(words: Tensor, points: Tensor, digit_bits: int) -> Tensor:
    total = torch.zeros_like(points, memory_format=torch.contiguous_format)
    for j, bits, place in _FIELDS:
        word = words.gather(1, (points >> (digit_bits * j)) & (words.shape[1] - 1)).long()
        total += ((word >> place) & ((1 << bits) - 1)) << j
    return total


@hot("triton_tables")
def turn_bits(masks: Tensor, tops: Tensor, words: Tensor) -> Tensor:
    size = words.shape[2]
    below = ((_places(size, words) - masks[..., None]) & (size - 1)) >= size // 2
    return words.copy_((below.long() ^ tops.reshape(-1, 1, 1)) - words)


@hot("triton_tables")
def read_bits(words: Tensor, opened: Tensor, flips: Tensor, one: int) -> Tensor:
    bit = words.gather(2, opened[..., None])[..., 0].long()
    return torch.where(flips != 0, one - bit, bit)


# Bits at secret places.


@hot("triton_tables")
def flip_places(places: Tensor, words: Tensor) -> Tensor:
    place = places.reshape(-1, 1) & (8 * words.shape[1] - 1)
    byte = place >> 3
    bit = torch.ones_like(place) << (place & 7)
    return words.scatter_(1, byte, words.gather(1, byte) ^ bit.to(torch.uint8))


@hot("triton_tables")
def parities(words: Tensor, turns: Tensor, sets: Tensor) -> Tensor:
    """A product of bits, in floats that hold every whole number up to their sum."""
    (many, size), count = sets.shape, words.shape[0]
    chosen = sets.to(words.device).float().T
    out = torch.empty((count, many), dtype=torch.int64, device=words.device)
    for start in range(0, count, rows := max(1, _AT_ONCE // (8 * size))):
        part = slice(start, start + rows)
        place = (turns.reshape(-1, 1)[part] - _places(size, words)) & (size - 1)
        bits = (words[part].gather(1, place >> 3).long() >> (place & 7)) & 1
        out[part] = (bits.float() @ chosen).long() & 1
    return out


# Rows chosen by bits.


@hot("triton_tables")
def xor_rows(table: Tensor, chosen: Tensor) -> Tensor:
    rows, columns = table.shape
    out = torch.zeros((chosen.shape[0], columns), dtype=torch.int32, device=table.device)
    at = _places(rows, table)
    for t in range(chosen.shape[0] if rows else 0):
        bits = (chosen[t, at >> 6] >> (at & 63)) & 1
        part = table & -bits.int()[:, None]
        while part.shape[0] > 1:  # the upper half onto the lower, and what is in the middle stays
            half = part.shape[0] // 2
            part = torch.cat([part[:half] ^ part[-half:], part[half:-half]])
        out[t] = part[0]
    return out


@hot("triton_tables")
def multiply_field(a: Tensor, b: Tensor) -> Tensor:
    """By Horner's rule, the highest bit first; nothing branches on a bit."""
    a, b = torch.broadcast_tensors(a, b)
    total = torch.zeros_like(a, memory_format=torch.contiguous_format)
    for bit in range(63, -1, -1):
        total = (total << 1) ^ ((total >> 63) & 0b11011)
        total = total ^ (a & -((b >> bit) & 1))
    return total
