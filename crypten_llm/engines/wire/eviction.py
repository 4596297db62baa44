"""Rows of the cache under an eviction policy on engine ``wire``: kept, dropped, joined, or made coarser.

Owns the operations of ``eviction.operations`` that make rows from rows. Shapes are those of
``eviction.operations.Operations``; what is revealed is said in ``wire_openings``.
"""

import math

import numpy as np

from crypten_llm.engines.wire.arithmetic import Arithmetic
from crypten_llm.engines.wire.attention import Attention
from crypten_llm.engines.wire.choosing import Selection
from crypten_llm.engines.wire.numbers import at_scale
from crypten_llm.engines.wire.rows import Rows, join, rearranged, unfolded
from crypten_llm.protocols import products, selection
from crypten_llm.protocols.comparison import below, bit_opening, difference, times_bits
from crypten_llm.protocols.dealer.roles import PARTY0
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Secret


class Eviction(Attention, Arithmetic, Selection):
    """Rows that are still to be opened are opened first."""

    def cat(self, handles, dim):
        """Error: none. Cost: that of ``add`` for values; of rows, 1 round where older ones have not been opened."""
        first, *others = handles
        if not isinstance(first, Rows):
            return self._join(handles, dim)
        assert dim == 1, "rows are joined along 1"
        if len(others) == 1 and others[0].is_new and first.pending is None:  # they wait, behind the cache's
            joined = Rows(others[0].pending, first)
            self._new_rows = [joined if row is others[0] else row for row in self._new_rows]
            return joined
        self._flush(*handles)
        return join(handles)

    def contents(self, rows):
        """Error: none. Cost: none, or 1 round when the newest rows have not been opened."""
        self._flush(rows)
        operand = rows.operand
        share = shape_only(operand.own.shape) if self.runtime.is_dealer else operand.own
        return Secret(share, operand.scale, operand.width, operand.bits)

    def fixed(self, x, values=False):
        """Error: a unit of ``key`` bits, of ``value`` bits for values.

        Cost: with the next message, ceil(l / 8) bytes an element each way for a ring of l bits, and 8 of the dealer's.
        First 1 round where x's ring is too small for products.
        """
        c, x = self.config, self._value(x)
        scale, width = (c.value, c.mixed_width) if values else (c.key, c.activation + c.key + 8)
        if values or x.width - max(0, x.scale - scale) < width:
            x = self._roomy(x, 0, "fixed", width=max(x.scale, scale) - scale + width)
        return self.rows(at_scale(x, max(scale, x.scale)), values)

    def take(self, rows, index):
        """Error: none. Cost: none, or 1 round when the newest rows have not been opened."""
        self._flush(rows)
        return Rows.opened(rearranged(rows.operand, lambda t: t[:, index]), rows.values)

    def keep(self, rows, picks):
        """Error: none.

        Cost: 1 round with 7 bytes each way for each of the [G or 1, K, N] picks, once; dealer 8 bytes for each of the
        [G, K, D] results, which are opened with the next message as new rows are.
        """
        self._flush(rows)
        operand = rows.operand
        heads, count, dim = operand.shape
        wire = self._hot(picks, max(operand.width, self.config.mixed_width))  # keys and values share it
        if wire.shape[0] != heads:
            operand = rearranged(operand, lambda t: t.transpose(0, 1).reshape(1, count, heads * dim))
        kept = products.matmul(self.runtime, wire, operand, transposed=False, bits=operand.bits)
        if wire.shape[0] != heads:
            kept = kept.reshape(-1, heads, dim).permute(1, 0, 2)
        return self.rows(kept, rows.values)

    def drop(self, rows, hot):
        """Each row moves up by one from the dropped one on: row j is row j + 1, or itself if the dropped one is later.

        Error: none. Cost: 1 round with 1 byte each way for each of [G or 1, N - 1]; dealer 8 bytes for each and 8 for
        each of the [G, N - 1, D] results, which are opened with the next message as new rows are.
        """
        self._flush(rows)
        hot, wire = self._value(hot), unfolded(self.runtime, rows.operand)
        later = (hot.share.sum(-1, keepdim=True) - hot.share.cumsum(-1))[..., :-1, None]
        (bit,) = self._open(bit_opening(hot._like(later)))
        one, other = wire._map(lambda t: t[:, :-1]), wire._map(lambda t: t[:, 1:])
        moved = times_bits(self.runtime, bit, difference(one, other))
        moved.share = moved.share + selection.shares_of(self.runtime, other)
        moved.bits = wire.bits
        return self.rows(moved, rows.values)

    def coarse(self, rows, bits):
        """The number of levels' limits that lie below x is the level. Rows are held as others are: no memory is saved.

        Error: as ``top`` where x is next to a limit; a unit of ``key`` or ``value`` bits of the level.
        Cost: 3 rounds: x, then ``Below``'s with 2^bits - 2 thresholds and words of 1 byte (2 from 7 bits on), then the
        level in as many and 16 of the dealer's; the rows are opened with the next message as new ones are.
        """
        most = 2 ** (bits - 1) - 1
        wire = self._ordered(self.contents(rows), "coarse")
        limits = [math.ceil((level + 0.5) / most * 2.0**wire.scale) for level in range(-most, most)]
        less = below(self.runtime, self._open, wire, limits, np.uint8 if bits < 7 else np.uint16)
        one = int(self.runtime.role == PARTY0)
        level = Secret(one * most - less.share.sum(-1), 0, less.width, bits - 1)
        value = self.scale(self._roomy(level, 0, "coarse", width=64), 1 / most)
        scale = self.config.value if rows.values else self.config.key
        return self.rows(at_scale(value, max(scale, value.scale)), rows.values)
