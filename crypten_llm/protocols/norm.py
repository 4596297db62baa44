"""Rows divided by their length, whatever that is: the secret part of an RMSNorm.

Owns ``unit_rows``. Hidden states of a real model have lengths from 2^-4 to 2^16, so sums of squares need some 80 bits.
A row is opened once and lifted to the ring of that sum; a comparison key finds the power of two that brings the sum
near one, trigonometric sums give its inverse root times that power, and a product of two wires the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols import fits
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.ladder import normalized
from crypten_llm.protocols.lookup import index_bits
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret
from crypten_llm.protocols.wide import Lifted, Opened, WideOpening, lift, lifted_share, limbs_for, to_lift
from crypten_llm.roles import OWNER

ROOT = 16  # fractional bits of the inverse root, which is 1 to 2 before its power of two
FACTORS = 26  # fractional bits of the public and of the dealt factors of its trigonometric sum
GUARD = 4  # bits that are dealt of what is dropped later
SLACK = 2 * math.log2(3)  # a number up to three times too large is lifted to one that is too large


@dataclass
class Rows:
    """unit: x / |x|. lifted: x as it was, in a wider ring, which the opening gave for nothing. beyond: XOR shares
    [..., 2] of whether the sum of squares is out of the domain, or within 2^-6 of its end: either bit; words 0 or 1.
    """

    unit: Secret
    lifted: Secret
    beyond: Tensor


def unit_rows(runtime: Runtime, x: Secret, eps: float, limit: int, fraction: int, width: int) -> Protocol[Rows]:
    """x / sqrt(sum of x^2 + eps * H) over the last dimension H, at ``fraction`` bits modulo 2^width.

    limit: |x| < 2^limit, and a row's sum of squares below 2^(2 limit - 1), are the domain. What leaves it by less than
    three times is seen, and said in ``beyond``. eps > 0: bounds the sum from below; eps * H is taken to the nearest
    unit of x^2.

    Reveals: openings behind fresh uniform masks: x, the sum, its top bits and power of two, the inverse root.
    Error: 1.1 units of ``fraction`` bits, and 2^(fraction - ROOT - limit) |x| of them: what is opened of the root is
    off by a unit of ``ROOT`` bits, which shows where x is close to 2^limit.
    Cost: 4 rounds. An element: n bits, those of x's ring, each way; dealer about 6 (W - n) + 2 n, W = width + limit +
    14. A row: some 350 bits each way and 6 kB of the dealer's.
    Source: the normalisation by a secret power of two as in Catrina and Saxena (FC 2010); the rest is ours.
    """
    scale, (*rows, size) = x.scale, x.shape
    top = 2 * (limit + scale)  # the domain's squares are below 2^(top - 1), and what is still lifted below 2^squares
    squares = top + math.ceil(SLACK) + index_bits(size) + 1
    cut = top // 2 + ROOT - fraction
    wide = width + cut
    (opened,) = yield [to_lift(runtime, x)]
    lifted = lift(runtime, opened, max(wide, squares))
    total = _sum_of_squares(runtime, lifted, squares, round(eps * size * 2 ** (2 * scale)))
    (sums,) = yield [WideOpening(total, rows, squares)]
    least = max(1, math.floor(math.log2(eps * size)) + 2 * scale)
    raw = None if sums.public is None else sums.public.reshape(-1, sums.public.shape[-1])
    mask = sums.mask.held.reshape(-1, sums.mask.held.shape[-1])
    scaled, power, beyond = normalized(runtime, raw, mask, rows, squares, top, least, FACTORS)
    fit = fits.stored("inverse root")
    unit_wire, power_wire = yield [
        Opening(scaled, ring=FACTORS + fit.period, function=True),
        to_lift(runtime, power),
    ]
    root = _inverse_root(
        runtime, unit_wire.public, unit_wire.mask.held, lift(runtime, power_wire, wide + 2 * FACTORS - ROOT), fit
    )
    (roots,) = yield [WideOpening(root, rows, wide)]
    unit = _times(runtime, lifted, roots, wide, cut)
    whole = runtime.share(x.shape, lambda: lifted_share(runtime, lifted)[..., 0])
    return Rows(Secret(unit, fraction, width, 0), Secret(whole, scale, 64, x.bits), beyond)


def _sum_of_squares(runtime: Runtime, x: Lifted, bits: int, more: int) -> Tensor:
    """Shares modulo 2^bits of the sum of x^2 over the last dimension, and a public number: limbs [..., L]."""
    kernels, n, shape = runtime.kernels, x.size, x.mask.shape if x.public is None else x.seen.shape
    least = bits - n - 1
    pair = runtime.deal(shape, lambda: limbs_for(runtime, x.bit * x.mask, least), least).held

    def masks() -> Tensor:
        words = kernels.widen(x.mask, bits, False)
        return kernels.sum_wide(kernels.multiply_wide(words, words, bits), bits)[..., 0, :]

    squared = runtime.deal(shape[:-1], masks, bits).held

    def share() -> Tensor:  # X (X - 2 r + 2 2^n b) + 2^2n b - 2 2^n b r, and r^2, where b only counts if unwrapped
        public = kernels.widen(x.seen, bits, True)
        bit = kernels.shift_wide(x.where_unwrapped(x.bit), n, bits)
        apart = kernels.subtract_wide(bit, x.mask, bits)
        twice = kernels.add_wide(apart, apart, bits)
        first = kernels.widen(runtime.plus(torch.zeros_like(x.seen), x.seen), bits, True)
        product = kernels.multiply_wide(public, kernels.add_wide(first, twice, bits), bits)
        pairs = kernels.widen(pair, bits, False) if least <= 64 else pair
        rest = kernels.subtract_wide(
            kernels.shift_wide(bit, n, bits), kernels.shift_wide(x.where_unwrapped(pairs), n + 1, bits), bits
        )
        summed = kernels.sum_wide(kernels.add_wide(product, rest, bits), bits)[..., 0, :]
        known = kernels.widen(torch.full(shape[:-1], runtime.plus(0, more), dtype=torch.int64), bits, False)
        return kernels.add_wide(kernels.add_wide(summed, squared, bits), known, bits)

    return runtime.share((*shape[:-1], ring.limbs(bits)), share)


def _inverse_root(runtime: Runtime, public: Tensor | None, mask: Tensor, power: Lifted, fit: fits.Fit) -> Tensor:
    """Shares of power * f(z) at ``ROOT`` fractional bits, for z opened modulo its period: limbs [...]."""
    kernels, bits, n, modes = runtime.kernels, power.bits, power.size, fit.modes
    shape, turn, scale = mask.shape, 64 - FACTORS - fit.period, 2.0**FACTORS
    all_modes = (2 * modes, *shape)

    def waves() -> Tensor:
        return kernels.waves(mask.reshape(-1), turn, scale, modes).view(all_modes)

    def times(words: Tensor, bits: int) -> Tensor:
        """The waves times dealer's words, limbs."""
        found = kernels.multiply_wide(kernels.widen(waves(), bits, True), kernels.widen(words, bits, False), bits)
        return found if bits > 64 else found[..., 0]

    plain = runtime.deal(all_modes, lambda: kernels.widen(waves(), bits, True), bits).held
    masked = runtime.deal(all_modes, lambda: times(power.mask, bits), bits).held
    wrapped = runtime.deal(all_modes, lambda: times(power.bit, bits - n), bits - n).held

    def share() -> Tensor:
        assert public is not None, "parties have opened it"
        factors = kernels.coefficients(public.reshape(-1), turn, scale, fit.cosine, fit.sine).view(all_modes)
        known = kernels.multiply_wide(kernels.widen(power.seen, bits, True), plain, bits)
        wraps = kernels.widen(wrapped, bits, False) if bits - n <= 64 else wrapped
        known = kernels.add_wide(known, kernels.shift_wide(power.where_unwrapped(wraps), n, bits), bits)
        products = kernels.subtract_wide(known, masked, bits)
        terms = kernels.multiply_wide(kernels.widen(factors, bits, True), products, bits)
        total = kernels.sum_wide(terms.movedim(0, -2), bits)[..., 0, :]
        constant = round(fit.constant * 2.0 ** (2 * FACTORS))
        first = kernels.widen(torch.full(shape, constant, dtype=torch.int64), bits, True)
        total = kernels.add_wide(total, kernels.multiply_wide(first, lifted_share(runtime, power), bits), bits)
        return kernels.drop_wide(total, bits, 2 * FACTORS - ROOT, runtime.rounds_up)

    return runtime.share((*shape, ring.limbs(bits - 2 * FACTORS + ROOT)), share)


def _times(runtime: Runtime, x: Lifted, root: Opened, bits: int, cut: int) -> Tensor:
    """Shares of x * root / 2^cut modulo 2^(bits - cut), words; root: [...] against x [..., H]."""
    kernels, n = runtime.kernels, x.size
    shape = x.mask.shape if x.public is None else x.seen.shape
    kept, rest = max(0, cut - GUARD), bits - n

    def product(words: Tensor, to: int) -> Tensor:
        return kernels.multiply_wide(root.mask.held.unsqueeze(-2), kernels.widen(words, to, False), to)

    def of_masks() -> Tensor:
        return kernels.drop_wide(product(x.mask, bits), bits, kept, True)

    pair = runtime.deal(shape, of_masks, bits - kept).held

    def of_bits() -> Tensor:
        found = product(x.bit, rest)
        return found if rest > 64 else found[..., 0]

    wrapped = runtime.deal(shape, of_bits, rest).held

    def share() -> Tensor:  # X (Y - y) - r Y + r y + 2^n (Y b - y b), where b only counts if unwrapped
        seen = root.seen.unsqueeze(-2)
        own = kernels.subtract_wide(_owned(runtime, seen), root.mask.held.unsqueeze(-2), bits)
        total = kernels.multiply_wide(kernels.widen(x.seen, bits, True), own, bits)
        pairs = kernels.widen(pair, bits, False) if bits - kept <= 64 else pair
        total = kernels.add_wide(total, kernels.shift_wide(pairs, kept, bits), bits)
        wraps = kernels.widen(wrapped, bits, False) if rest <= 64 else wrapped
        bit = kernels.subtract_wide(kernels.multiply_wide(x.bit, seen, bits), wraps, bits)
        bit = kernels.shift_wide(x.where_unwrapped(bit), n, bits)
        total = kernels.add_wide(total, bit, bits)
        total = kernels.subtract_wide(total, kernels.multiply_wide(x.mask, seen, bits), bits)
        return kernels.drop_wide(total, bits, cut, runtime.rounds_up)

    return runtime.share(shape, share)


def _owned(runtime: Runtime, words: Tensor) -> Tensor:
    """Public limbs at the owner, zeros at the client: shares of them."""
    return runtime.input(OWNER, words.shape, lambda: words)
