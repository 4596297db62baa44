"""Rows divided by their length, whatever that is: the secret part of an RMSNorm.

Owns ``unit_rows``. Hidden states of a real model have lengths from 2^-4 to 2^16, so sums of squares need some 80 bits.
A row is opened once and lifted to the ring of that sum; a comparison key finds the power of two that brings the sum
near one, trigonometric sums give its inverse root times that power, and a product of two wires the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols import fits
from crypten_llm.protocols.dealer.runtime import Runtime
from crypten_llm.protocols.ladder import normalized
from crypten_llm.protocols.lookup import index_bits
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Secret, Wire
from crypten_llm.protocols.wide import Lifted, Opened, WideOpening, as_dealt, as_limbs, lift, lifted_share, to_lift
from crypten_llm.roles import OWNER

ROOT = 20  # fractional bits of the inverse root, which is 1 to 2 before its power of two
FACTORS = 26  # fractional bits of the public and of the dealt factors of its trigonometric sum
GUARD = 4  # bits that are dealt of what is dropped later
NARROWEST = 65  # bits of a number in limbs
SLACK = 2 * math.log2(3)  # of squares of numbers that are up to three times too large


@dataclass
class Rows:
    """unit: x / |x|. lifted: x as it was, in a ring of 64 bits, which the opening gave for nothing. beyond: XOR shares
    [..., 1], words 0 or 1, of whether the sum of squares is out of the domain, or within 2^-6 of its end.
    """

    unit: Secret
    lifted: Secret
    beyond: Tensor


@dataclass(frozen=True)
class _Plan:
    """Rings of a row, in bits. squares: of its sum of squares, which is below 2^``top`` in the domain and above
    2^``least``. wide: of the product with the inverse root, of which ``cut`` bits are dropped.
    """

    top: int
    least: int
    squares: int
    cut: int
    wide: int
    root: int

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, size: int, scale: int, eps: float, limit: int, fraction: int, width: int) -> _Plan:
        top = 2 * (limit + scale)
        assert top >= FACTORS, "a sum of squares has the bits that its inverse root is made of"
        cut = top // 2 + ROOT - fraction
        least = max(1, math.floor(math.log2(eps * size)) + 2 * scale)
        squares = max(NARROWEST, top + math.ceil(SLACK) + index_bits(size) + 1)
        wide = max(NARROWEST, width + cut)
        return cls(top, least, squares, cut, wide, wide + 2 * FACTORS - ROOT)


def unit_rows(runtime: Runtime, x: Secret, eps: float, limit: int, fraction: int, width: int) -> Protocol[Rows]:
    """x / sqrt(sum of x^2 + eps H) over the last dimension H, at ``fraction`` bits modulo 2^width, or somewhat more.

    limit: the domain is a sum of squares below 2^(2 limit - 1). What is beyond it, with |x| below 3 * 2^limit, is said
    in ``beyond`` where x's ring has limit + scale + 2 bits; in a narrower ring x must fit, and larger x may go unseen.
    eps > 0: bounds the sum from below; eps H is taken to the nearest square of x's unit, and the sum, with it, must be
    two of these.

    Reveals: openings behind fresh uniform masks: x, the sum, its top bits and power of two, the inverse root.
    Error: 1.1 units of ``fraction`` bits, and 2^(fraction - ROOT - limit) |x| of them: what is opened of the root is
    off by a unit of ``ROOT`` bits, which shows where x is close to 2^limit.
    Cost: 4 rounds. With x's ring of n bits, that of the sum of Q = 2 (limit + scale) + 5 + log2 H rounded up, and that
    of the product of W = width + limit + scale + ROOT - fraction: an element, n bits each way; dealer, to the client, 2
    (max(W, Q) - n) + (Q - n - 1) + (width + GUARD) + (W - n) bits. A row: Q + W + 27 + p bits each way, 2^(p - 3) being
    the largest power of two; dealer, to the client, Q + 2 (V - p) + 20 (3 V - p) bits, V = W + 2 FACTORS - ROOT, and to
    both ``ladder.normalized``'s key. (H = 576, width = 63: 37.6 bytes an element; a row 1 kB, and the key 2.6 kB.)
    Source: the normalisation by a secret power of two as in Catrina and Saxena (FC 2010); the rest is ours.
    """
    scale, (*rows, size) = x.scale, x.shape
    plan = _Plan.of(size, scale, eps, limit, fraction, width)
    (opened,) = yield [to_lift(runtime, x)]
    lifted = lift(runtime, opened, max(plan.wide, plan.squares))
    total = _sum_of_squares(runtime, lifted, plan.squares, round(eps * size * 2 ** (2 * scale)))
    (sums,) = yield [WideOpening(total, rows, plan.squares)]
    raw = None if sums.public is None else sums.public.reshape(-1, sums.public.shape[-1])
    mask = sums.mask.held.reshape(-1, sums.mask.held.shape[-1])
    scaled, power, beyond = normalized(runtime, raw, mask, rows, plan.squares, plan.top, plan.least, FACTORS)
    fit = fits.stored("inverse root")
    sum_wire, power_wire = yield [
        Opening(scaled, ring=FACTORS + fit.period, function=True),
        to_lift(runtime, power),
    ]
    root = _inverse_root(runtime, sum_wire, lift(runtime, power_wire, plan.root), fit)
    (roots,) = yield [WideOpening(root, rows, plan.wide)]
    unit = _times(runtime, lifted, roots, plan.wide, plan.cut)
    whole = runtime.share(x.shape, lambda: lifted_share(runtime, lifted)[..., 0])
    return Rows(Secret(unit, fraction, plan.wide - plan.cut, 0), Secret(whole, scale, 64, x.bits), beyond)


def _sum_of_squares(runtime: Runtime, x: Lifted, bits: int, more: int) -> Tensor:
    """Shares modulo 2^bits of the sum of x^2 over the last dimension, and a public number: limbs [..., L].

    Of x = M - r' with r'^2 = r^2 - 2^(n + 1) b (r - 2^(n - 1)) where r' = r - 2^n b.
    """
    kernels, n, shape = runtime.kernels, x.size, x.shape
    rest = bits - n - 1

    def of_masks() -> Tensor:
        return kernels.dot_wide(x.mask, kernels.widen(x.mask, bits, False), bits)

    def of_bits() -> Tensor:
        return as_dealt(runtime, x.top() * (x.mask - (1 << (n - 1))), rest)

    apart = as_limbs(runtime.deal(shape, of_bits, rest).held, rest)
    squared = runtime.deal(shape[:-1], of_masks, bits).held

    def share() -> Tensor:
        crossed = kernels.shift_wide(kernels.dot_wide(x.where, apart, bits), n, bits)
        crossed = kernels.add_wide(crossed, kernels.dot_wide(x.seen, x.mask, bits), bits)
        return kernels.subtract_wide(squared, kernels.shift_wide(crossed, 1, bits), bits)

    def owner() -> Tensor:
        known = kernels.dot_wide(x.seen, kernels.widen(x.seen, bits, True), bits)
        eps = torch.full(shape[:-1], more, device=runtime.device)
        known = kernels.add_wide(known, kernels.widen(eps, bits, False), bits)
        return kernels.add_wide(share(), known, bits)

    return runtime.share((*shape[:-1], ring.limbs(bits)), owner, share)


def _inverse_root(runtime: Runtime, total: Wire, power: Lifted, fit: fits.Fit) -> Tensor:
    """Shares of power * f(z) at ``ROOT`` fractional bits, for z opened modulo its period: limbs [...].

    With A_j public and c_j dealt, the sum over j of A_j c_j (P - r'), P - r' being the power.
    """
    kernels, bits, n, modes = runtime.kernels, power.bits, power.size, fit.modes
    shape, turn, scale = power.shape, 64 - FACTORS - fit.period, 2.0**FACTORS
    terms, rest = (*shape, 2 * modes), bits - n
    waves: list[Tensor] = []  # the dealer's, limbs

    def times(words: Tensor, to: int) -> Tensor:
        found = kernels.multiply_wide(
            kernels.reduce_wide(waves[0], to), kernels.widen(words, to, False)[..., None, :], to
        )
        return found if to > 64 else found[..., 0]

    def plain() -> Tensor:
        made = kernels.waves(total.mask.held.reshape(-1), turn, scale, modes)
        waves.append(kernels.widen(made.T.reshape(terms), bits, True))
        return waves[0]

    dealt = runtime.deal(terms, plain, bits).held
    masked = runtime.deal(terms, lambda: times(power.mask, bits), bits).held
    wrapped = as_limbs(runtime.deal(terms, lambda: times(power.top(), rest), rest).held, rest)

    def share() -> Tensor:
        cosine, sine = runtime.constant(fit.cosine), runtime.constant(fit.sine)
        factors = kernels.coefficients(total.seen.reshape(-1), turn, scale, cosine, sine).T.reshape(terms)
        constant = torch.full(shape, round(fit.constant * 2.0 ** (2 * FACTORS)), device=runtime.device)
        constant = kernels.widen(constant, bits, True)
        value = kernels.dot_wide(factors, dealt, bits)
        value = kernels.add_wide(value, _owned(runtime, constant), bits)
        value = kernels.multiply_wide(kernels.widen(power.seen, bits, True), value, bits)
        value = kernels.subtract_wide(value, kernels.dot_wide(factors, masked, bits), bits)
        value = kernels.subtract_wide(value, kernels.multiply_wide(constant, power.mask, bits), bits)
        chosen = factors * power.where[..., None]
        value = kernels.add_wide(value, kernels.shift_wide(kernels.dot_wide(chosen, wrapped, bits), n, bits), bits)
        return kernels.drop_wide(value, bits, 2 * FACTORS - ROOT, runtime.rounds_up)

    return runtime.share((*shape, ring.limbs(bits - 2 * FACTORS + ROOT)), share)


def _times(runtime: Runtime, x: Lifted, root: Opened, bits: int, cut: int) -> Tensor:
    """Shares of x * root / 2^cut modulo 2^(bits - cut), words; root: [...] against x [..., H].

    Of x = X - r' and root = Y - y: X (Y - y) - r' Y + r' y.
    """
    kernels, shape = runtime.kernels, x.shape
    kept, rest = max(0, cut - GUARD), bits - x.size

    def product(words: Tensor, to: int) -> Tensor:
        return kernels.multiply_wide(root.mask.held.unsqueeze(-2), kernels.widen(words, to, False), to)

    def of_masks() -> Tensor:
        return kernels.drop_wide(product(x.mask, bits), bits, kept, True)

    def of_bits() -> Tensor:
        found = product(x.top(), rest)
        return found if rest > 64 else found[..., 0]

    pairs = as_limbs(runtime.deal(shape, of_masks, bits - kept).held, bits - kept)
    wraps = as_limbs(runtime.deal(shape, of_bits, rest).held, rest)

    def share() -> Tensor:
        own = kernels.subtract_wide(_owned(runtime, root.seen), root.mask.held, bits)
        total = kernels.scale_lifted(x.seen, x.where, x.mask, own, root.seen, pairs, wraps, x.size, kept, bits)
        return kernels.drop_wide(total, bits, cut, runtime.rounds_up)

    return runtime.share(shape, share)


def _owned(runtime: Runtime, words: Tensor) -> Tensor:
    """Public limbs at the owner, zeros at the client: shares of them."""
    return runtime.input(OWNER, words.shape, lambda: words)
