"""Attention on engine ``wire``: rotary embedding, scores, softmax, and what its weights are used for.

Norms and softmax divide late: by a secret power of two at once, by the rest after the next product. Keys and values are
opened once, when they join the cache, and stay wires. How far each operation may be from ``plain`` is declared in
``wire_bounds``.
"""

import torch

from crypten_llm.engines.wire.handles import Weights
from crypten_llm.engines.wire.numbers import (
    DRAWN,
    FACTOR,
    MIXED_BITS,
    ROOT_FRACTIONS,
    ROW_BITS,
    SPREAD_BITS,
    SPREAD_SEGMENTS,
    as_units,
    bits_for,
    times,
)
from crypten_llm.engines.wire.openings import Openings
from crypten_llm.engines.wire.rows import Rows
from crypten_llm.kernels import ring
from crypten_llm.protocols import fourier, products
from crypten_llm.protocols.dealer.roles import DEALER
from crypten_llm.protocols.normalize import normalize
from crypten_llm.protocols.opening import Opening, Overflow, Secret, Wire, as_secret


class Attention(Openings):
    """From queries, keys and values to mixed values."""

    def rotate(self, x, cos, sin):
        """Error: a unit of ``rope`` bits, times the largest x, and of ``ROOM`` bits where x's ring was too small
        (``wire_bounds.rotate``).

        Cost: none where the result fits x's ring; else 1 round, see ``_roomy``.
        """
        p = self.config.rope
        x = self._roomy(self._value(x), p + 1, "rotate")
        if self.rank == DEALER:
            return Secret(x.share, x.scale + p, x.width, x.bits)
        half = x.shape[-1] // 2
        cosine, sine = ((table.double() * 2**p).round().long() for table in (cos, sin))
        turned = torch.cat([-x.share[..., half:], x.share[..., :half]], -1)
        return Secret(x.share * cosine + turned * sine, x.scale + p, x.width, x.bits)

    def rows(self, x, values=False):
        """Error: a unit of ``key`` bits, of ``value`` bits for values, when they are opened (``wire_bounds.rows``)."""
        x, scale = self._value(x), self.config.value if values else self.config.key
        if x.scale < scale:
            x = Secret(x.share << (scale - x.scale), scale, x.width, x.bits)
        row = Rows(x, values=values)
        self._new_rows.append(row)
        return row

    def scores(self, query, keys):
        """Error: a unit of the query (``wire_bounds.scores``)."""
        query = self._value(query)
        if query.opened is None:
            (query.opened,) = self._open(self._narrow(query, self.config.activation))
        elif keys.pending is not None:
            self._open()
        operand = keys.operand
        room = min(query.opened.width, operand.width) - query.opened.scale - operand.scale - 2
        return products.matmul(self.runtime, query.opened, operand, transposed=True, bits=min(6, room))

    def softmax(self, scores, mask=None):
        """From roots exp((s - limit) / 2), so that one fit serves every row and no maximum is needed.

        The sum z of their squares says how large the row is. Each root is multiplied by the power of two that brings
        z to [1/4, 1), opened, and squared: weights whose sum is that, with the resolution that the row needs.

        Error: the fit's and a unit of 28 bits in each root, relative to the row's largest; a unit of ``root`` bits
        (``wire_bounds.softmax``), for scores and rows in the domain (``wire_bounds.domains``).
        """
        c, runtime, fit = self.config, self.runtime, fourier.exponential()
        half = Secret(scores.share, scores.scale + 1, scores.width, scores.bits)  # the same integers, read as s / 2
        (wire,) = self._open(Opening(half, ring=half.scale + fit.period, function=True))
        public, dealt = ROOT_FRACTIONS
        root = fourier.evaluate(runtime, wire, fit, public, bits=1, shift=-c.score_limit / 2, dealt=dealt)
        self._mask(root, mask)
        fraction, spread = 28, SPREAD_BITS  # z < 2^spread
        top = 2 * fraction + spread
        (root_wire,) = self._open(self._lifted(root, fraction))
        total = products.sum_of_squares(runtime, root_wire, bits=spread)
        (total_wire,) = self._open(Opening(total, ring=top + 1, function=True))
        powers = [2**k for k in range(SPREAD_SEGMENTS)]
        _, power = normalize(runtime, total_wire, top, SPREAD_SEGMENTS, powers)
        (power_wire,) = self._open(Opening(power))
        # root 2^k / 2^(spread / 2): the integers stay, their scale says it
        unit = products.multiply(runtime, root_wire, power_wire, scale=fraction + spread // 2, bits=1)
        (unit_wire,) = self._open(
            Opening(unit, ring=unit.scale + unit.bits + 2, truncate=unit.scale - c.root, lifted=True)
        )
        weights = products.square(runtime, unit_wire)
        weights.bits = 0
        return Weights(weights)

    def _mask(self, x: Secret, mask) -> None:
        if mask is not None and self.rank != DEALER:
            x.share = x.share * mask.long()

    def mix(self, weights, values):
        """Error: a unit of the result and of the reciprocal (``wire_bounds.mix``), for |results| below
        2^``MIXED_BITS``.
        """
        f, inverse = self.config.activation + 3, fourier.reciprocal()
        (wire,) = self._open(Opening(weights.weights, ring=min(weights.weights.width, self.config.mixed_width)))
        mixed = products.matmul(self.runtime, wire, values.operand, transposed=False, bits=MIXED_BITS)
        doubled = _row_sums(wire, wire.scale - 1, inverse.period)  # of twice the weights: 1/2 to 2
        total = fourier.evaluate(self.runtime, doubled, inverse, fraction=22, bits=2)
        mixed_wire, total_wire = self._open(self._lifted(mixed, f), self._lifted(total, ROW_BITS))
        scale = f + ROW_BITS - 1  # the total's reciprocal is half of what is needed
        weights.wires = wire, total_wire
        return products.multiply(self.runtime, mixed_wire, total_wire, scale=scale, bits=self.config.linear_bits)

    def mass(self, weights, queries):
        """Error: a unit of b = 22 - g bits of 1 / sum in each row, 2^g being the sum of queries or more; and a unit of
        ``DRAWN`` bits.

        ``mix`` has left the wires of weights and of 1 / sum. Cost: 2 rounds; for each of G * M rows 8 bytes each way
        and 8 of the dealer's, for each of G * N results 7 bytes each way and 24 of the dealer's.
        """
        wire, inverse = weights.wires  # inverse: of twice the sum
        growth = bits_for(queries.abs().sum().item())
        keep = wire.width - wire.scale - growth - 2
        if keep < 6:
            raise Overflow(f"mass: {len(queries)} queries of weight {queries.abs().sum():g} in all: give 2^16 at most")
        units, fraction = as_units(queries, max(0, min(FACTOR, 64 - wire.width + keep - inverse.scale)))
        turned = as_secret(self.runtime, inverse)
        turned = Secret(times(turned.share, units[:, None]), turned.scale + fraction, 64, inverse.bits + growth)
        (turned_wire,) = self._open(Opening(turned, truncate=max(0, turned.scale - keep)))
        row = turned_wire.transpose(1, 2)
        half = products.matmul(self.runtime, row, wire, transposed=False, bits=growth)
        drawn = Secret(half.share, half.scale - 1, half.width, growth + 1)
        (drawn_wire,) = self._open(self._lifted_from_bytes(drawn, DRAWN))
        return as_secret(self.runtime, drawn_wire)[:, 0]


def _row_sums(wire: Wire, scale: int, period: int) -> Wire:
    """The sums over the last dimension of a narrow wire, as one opened value modulo 2^(scale + period); local.

    scale: at which the sums are read, which need not be the wire's.
    """
    size = scale + period
    assert wire.width >= size, "the wire must cover the ring of its sum"
    public, mask = wire.public, wire.masks[0][1].sum(-1, keepdim=True)
    raw = None if public is None else ring.low_bits(public.sum(-1, keepdim=True), size)
    return Wire(None, [(-1, mask)], scale, size, 1, raw, ring.low_bits(mask, size))
