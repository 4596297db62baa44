"""Kernels in Triton: matrix products modulo 2^64 (``kernels.ring`` says what each does).

Few rows of x are multiplied by words as they come from memory, whose rate is the limit. Of many, both sides are cut
into signed bytes, limbs of eight bits, whose products the tensor cores add up: one call of torch's ``_int_mm`` for each
power of 256, over the limbs that make it side by side, and one pass that adds the powers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEW = 16  # rows
_DEPTH = 1 << 13  # terms of a sum of limbs' products: eight times as many of at most 2^14 each are below 2^31
_PLACES = 8  # powers of 256 below 2^64


@triton.jit(do_not_specialize=["rows", "columns", "depth"])
def _nt(x, w, out, rows, columns, depth, BN: tl.constexpr, BK: tl.constexpr):
    """A row of x by some rows of w; programs beside each other read the same rows of w."""
    m, batch = tl.program_id(0) % rows, (tl.program_id(0) // rows).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    there = n < columns
    of_x = x + (batch * rows + m) * depth
    of_w = w + (batch * columns + n.to(tl.int64))[:, None] * depth + k[None, :]
    total = tl.zeros((BN, BK), dtype=tl.int64)
    for start in range(0, depth, BK):
        ok = start + k < depth
        factor = tl.load(of_x + start + k, ok, 0).to(tl.int64)
        found = tl.load(of_w + start, there[:, None] & ok[None, :], 0).to(tl.int64)
        total += found * factor[None, :]
    tl.store(out + (batch * rows + m) * columns + n, tl.sum(total, 1), there)


@triton.jit(do_not_specialize=["rows", "columns", "depth", "part"])
def _nn(x, w, out, rows, columns, depth, part, BN: tl.constexpr, BK: tl.constexpr):
    """``part`` rows of w, by some of its columns; sums of other programs are added to the same words."""
    m, batch = tl.program_id(0) % rows, (tl.program_id(0) // rows).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * part
    last = tl.minimum(depth, first + part)
    k = tl.arange(0, BK)
    there = n < columns
    total = tl.zeros((BK, BN), dtype=tl.int64)
    for start in range(first, last, BK):
        ok = start + k < last
        factor = tl.load(x + (batch * rows + m) * depth + start + k, ok, 0).to(tl.int64)
        of_w = w + (batch * depth + (start + k).to(tl.int64))[:, None] * columns + n[None, :]
        found = tl.load(of_w, ok[:, None] & there[None, :], 0).to(tl.int64)
        total += found * factor[:, None]
    tl.atomic_add(out + (batch * rows + m) * columns + n, tl.sum(total, 0), there)


@triton.jit(do_not_specialize=["rows", "depth", "row", "column", "width"])
def _split(w, out, rows, depth, row, column, width, PLANES: tl.constexpr, BACK: tl.constexpr, B: tl.constexpr):
    """Limb j of w [rows, depth], of any layout, at out[:, p width :]: p is j, or from the highest one back."""
    n = tl.program_id(0) * B + tl.arange(0, B)
    k = tl.program_id(1) * B + tl.arange(0, B)
    ok = (n < rows)[:, None] & (k < depth)[None, :]
    at = n.to(tl.int64)[:, None] * row + k.to(tl.int64)[None, :] * column
    word = tl.load(w + at, ok, 0).to(tl.int64)
    half = tl.full((), -0x7F7F7F7F7F7F7F80, tl.int64)  # 0x80 in every byte
    limbs = (word + half) ^ half
    to = out + n.to(tl.int64)[:, None] * (PLANES * width) + k[None, :]
    for j in tl.static_range(PLANES):
        p = PLANES - 1 - j if BACK else j
        tl.store(to + p * width, (limbs >> (8 * j)).to(tl.int8), (n < rows)[:, None] & (k < width)[None, :])


@triton.jit(do_not_specialize=["many"])
def _gather(sums, out, many, PLACES: tl.constexpr, MORE: tl.constexpr, B: tl.constexpr):
    """The sum of int32 [PLACES, many] times powers of 256, and of what ``out`` holds."""
    at = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    ok = at < many
    total = tl.zeros((B,), dtype=tl.int64)
    for j in tl.static_range(PLACES):
        total += tl.load(sums + j * many.to(tl.int64) + at, ok, 0).to(tl.int64) << (8 * j)
    if MORE:
        total += tl.load(out + at, ok, 0)
    tl.store(out + at, total, ok)


def matmul_nt(x: Tensor, w: Tensor) -> Tensor:
    return _multiplied(x, w, True)


def matmul_nn(x: Tensor, w: Tensor) -> Tensor:
    return _multiplied(x, w, False)


def _multiplied(x: Tensor, w: Tensor, transposed: bool) -> Tensor:
    assert x.shape[:-2] == w.shape[:-2], f"batches {tuple(x.shape)} and {tuple(w.shape)} differ"
    rows, depth = x.shape[-2:]
    columns, batch = w.shape[-2 if transposed else -1], x.shape[:-2].numel()
    out = torch.zeros((*x.shape[:-1], columns), dtype=torch.int64, device=x.device)
    if not out.numel() or not depth:
        return out
    if rows > _FEW:
        by_rows = w if transposed else w.transpose(-2, -1)
        parts = zip(x.reshape(batch, rows, depth), by_rows.reshape(batch, columns, depth), strict=True)
        for result, (left, right) in zip(out.view(batch, rows, columns), parts, strict=True):
            by_limbs(left, right, result)
    elif transposed:
        _nt[(batch * rows, triton.cdiv(columns, 4))](x.contiguous(), w.contiguous(), out, rows, columns, depth, 4, 256)
    else:
        tiles = batch * rows * triton.cdiv(columns, 64)
        part = max(64, triton.cdiv(triton.cdiv(depth, max(1, 2048 // tiles)), 32) * 32)
        grid = (batch * rows, triton.cdiv(columns, 64), triton.cdiv(depth, part))
        _nn[grid](x.contiguous(), w.contiguous(), out, rows, columns, depth, part, 64, 32)
    return out


def by_limbs(x: Tensor, w: Tensor, out: Tensor) -> None:
    """out = x @ w.T: [M, K], [N, K] of any layout, [M, N] in one piece. Five limbs hold an int32,
    and four modulo 2^32.
    """
    for start in range(0, x.shape[1], _DEPTH):
        part = slice(start, start + _DEPTH)
        _by_limbs(x[:, part], w[:, part], out, start > 0)


def _by_limbs(x: Tensor, w: Tensor, out: Tensor, more: bool) -> None:
    (rows, depth), columns = x.shape, w.shape[0]
    width, high, wide = -(-depth // 16) * 16, max(32, -(-rows // 16) * 16), -(-columns // 16) * 16
    places = _PLACES if x.dtype == torch.int64 else _PLACES // 2
    planes = min(places, _PLACES if w.dtype == torch.int64 else 5)
    left, right = limbs_of(x, high, width, places, False), limbs_of(w, wide, width, planes, True)
    sums = torch.empty((places, high, wide), dtype=torch.int32, device=x.device)
    for place in range(places):
        first = max(0, place - planes + 1)  # of x's limbs; w's are there from the highest one back
        behind = (planes - 1 - place + first) * width
        ours = left[:, first * width : (place + 1) * width]
        torch._int_mm(ours, right[:, behind : behind + ours.shape[1]].t(), out=sums[place])
    sums = sums[:, :rows, :columns].contiguous()
    _gather[(triton.cdiv(out.numel(), 1024),)](sums, out, out.numel(), places, more, 1024)


def limbs_of(w: Tensor, rows: int, width: int, planes: int, back: bool) -> Tensor:
    """int8 [rows, planes width]: the limbs of w [N, K] in planes beside each other, zeros where w ends."""
    made = torch.zeros if rows > w.shape[0] else torch.empty
    out = made((rows, planes * width), dtype=torch.int8, device=w.device)
    grid = (triton.cdiv(w.shape[0], 64), triton.cdiv(width, 64))
    _split[grid](w, out, *w.shape, *w.stride(), width, planes, back, 64)
    return out
