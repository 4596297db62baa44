"""Kernels in Triton: ChaCha20's block function, and key streams of it (``kernels.ring``)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from crypten_llm.kernels.cuda_streams import BYTES, LONG

_BLOCKS = 128  # of a program

# "expa", "nd 3" or "nd 1", "2-by" or "6-by", "te k": what Bernstein gives for keys of 256 or 128 bits.
EXPA, TE_K = tl.constexpr(0x61707865), tl.constexpr(0x6B206574)
ND_3, TWO_BY = tl.constexpr(0x3320646E), tl.constexpr(0x79622D32)
ND_1, SIX_BY = tl.constexpr(0x3120646E), tl.constexpr(0x79622D36)


@triton.jit
def _turned(x, left: tl.constexpr):
    return (x << left) | (x >> (32 - left))


@triton.jit
def _quarter(a, b, c, d):
    a += b
    d = _turned(d ^ a, 16)
    c += d
    b = _turned(b ^ c, 12)
    a += b
    d = _turned(d ^ a, 8)
    c += d
    b = _turned(b ^ c, 7)
    return a, b, c, d


@triton.jit
def block(second, third, k0, k1, k2, k3, k4, k5, k6, k7, c0, c1):
    """A block for each lane, sixteen uint32; second, third: words of the constant. Key and counter: uint32. Nonce 0."""
    z = c0 * 0
    f0, f1, f2, f3 = z + EXPA, z + second, z + third, z + TE_K
    f4, f5, f6, f7, f8, f9, f10, f11 = z + k0, z + k1, z + k2, z + k3, z + k4, z + k5, z + k6, z + k7
    f12, f13 = c0, z + c1
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = (
        f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11, f12, f13, z, z
    )  # fmt: skip
    for _ in range(10):
        x0, x4, x8, x12 = _quarter(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter(x3, x4, x9, x14)
    return (
        x0 + f0, x1 + f1, x2 + f2, x3 + f3, x4 + f4, x5 + f5, x6 + f6, x7 + f7,
        x8 + f8, x9 + f9, x10 + f10, x11 + f11, x12 + f12, x13 + f13, x14, x15,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "blocks"])
def _stream(key, out, first, blocks, B: tl.constexpr):
    """key: eight uint32 in memory, so that a captured launch reads what is there when it is replayed."""
    k0, k1, k2, k3 = tl.load(key), tl.load(key + 1), tl.load(key + 2), tl.load(key + 3)
    k4, k5, k6, k7 = tl.load(key + 4), tl.load(key + 5), tl.load(key + 6), tl.load(key + 7)
    lane = tl.arange(0, B)
    place = tl.program_id(0).to(tl.int64) * B + lane
    counter = first.to(tl.int64) + place
    second, third = tl.full((), ND_3, tl.uint32), tl.full((), TWO_BY, tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15 = block(
        second, third, k0, k1, k2, k3, k4, k5, k6, k7, counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    )
    # join puts its axis last: a word's number has its lowest bit from the outermost join.
    even = tl.join(tl.join(tl.join(x0, x8), tl.join(x4, x12)), tl.join(tl.join(x2, x10), tl.join(x6, x14)))
    odd = tl.join(tl.join(tl.join(x1, x9), tl.join(x5, x13)), tl.join(tl.join(x3, x11), tl.join(x7, x15)))
    words = tl.reshape(tl.join(even, odd), (B, 16))
    to = out + place[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(to, words, (place < blocks)[:, None])


@triton.jit(do_not_specialize=["many", "counter"])
def _words(seeds, out, many, counter, B: tl.constexpr):
    """Eight words of 64 bits for each seed, of which all words are a row of ``out``; a seed is a key, twice."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    low, high = tl.load(seeds + 2 * at, ok, 0), tl.load(seeds + 2 * at + 1, ok, 0)
    k0, k1 = low.to(tl.uint32), (low >> 32).to(tl.uint32)
    k2, k3 = high.to(tl.uint32), (high >> 32).to(tl.uint32)
    second, third = tl.full((), ND_1, tl.uint32), tl.full((), SIX_BY, tl.uint32)
    x = block(second, third, k0, k1, k2, k3, k0, k1, k2, k3, k0 * 0 + counter.to(tl.uint32), k0 * 0)
    for j in tl.static_range(8):
        word = x[2 * j].to(tl.int64) | (x[2 * j + 1].to(tl.int64) << 32)
        tl.store(out + j * many.to(tl.int64) + at, word, ok)


def words_of(seeds: Tensor, many: int) -> Tensor:
    """At least the first ``many`` words that seeds [..., 2] make: [W, ...]."""
    flat = seeds.reshape(-1, 2).contiguous()
    count, blocks = flat.shape[0], -(-many // LONG)
    out = torch.empty((blocks, LONG, count), dtype=torch.int64, device=flat.device)
    if count:
        for counter in range(blocks):
            _words[(triton.cdiv(count, 32),)](flat, out[counter], count, counter, 32, num_warps=1)
    return out.view(blocks * LONG, *seeds.shape[:-1])


def stream(key: Tensor, first: int, count: int) -> Tensor:
    """Bytes of ``count`` blocks from block ``first`` on: uint8. key: int32 [8]."""
    out = torch.empty(count * BYTES // 4, dtype=torch.int32, device=key.device)
    if count:
        grid = (triton.cdiv(count, _BLOCKS),)
        _stream[grid](key.view(torch.uint32), out.view(torch.uint32), first, count, _BLOCKS)
    return out.view(torch.uint8)
