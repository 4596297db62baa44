"""Selection on engine ``wire``: what is the largest, and products with one-hot rows that say so.

Owns the operations of ``eviction.operations`` that compare and gather, and nothing of a protocol: those are in
``wire.selection``, ``wire.comparison`` and ``wire.lookup``. Shapes are those of ``eviction.operations.Operations``;
what is revealed is said in ``wire_openings``.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from crypten_llm.engines.wire.handles import Picks
from crypten_llm.engines.wire.numbers import KEEPING, PRECISION, SCATTERED, bits_for, whole_bytes
from crypten_llm.engines.wire.openings import Openings
from crypten_llm.protocols import lookup, products, selection
from crypten_llm.protocols.comparison import below, bit_opening, ordered, times_bits
from crypten_llm.protocols.dealer.roles import PARTY0
from crypten_llm.protocols.opening import Opening, Secret, Wire

# Up to so many candidates all pairs are compared. For one row of 256 scores that takes 3.5 MB and 3 rounds, the search
# 1.2 MB and 26 rounds (tests/test_wire_selection_cost.py); 23 rounds of a wide network (20 ms) take as long as 5.7 MB
# of it (100 Mbit/s), but rows share rounds and not bytes.
PAIRS = 256


class Selection(Openings):
    """Values are compared as rounded to ``PRECISION`` bits below their declared bound, for ``top`` to ``KEEPING``; ties
    go to the lower index. A value closer to its bound than a unit of that rounding has left the domain of all
    comparisons (``comparison.ordered``), and may count as the other extreme.
    """

    # Comparisons.

    def top(self, x, count):
        """Error: x is rounded to ``KEEPING`` bits below its declared bound 2^b, from which it is a unit, 2^(b + 1 -
        ``KEEPING``), or more away.

        Cost: 1 round and ``selection.top``'s.
        """
        x = self._value(x)
        if not 0 <= count <= x.shape[-1]:
            raise ValueError(f"top: the {count} largest of {x.shape[-1]} values; give 0 to {x.shape[-1]}")
        if count in (0, x.shape[-1]):
            return lookup.public(self.runtime, torch.full(x.shape, int(count > 0)))
        wire = self._ordered(x, "top")
        return selection.top(self.runtime, self._open, wire, count, PAIRS)

    def best(self, x, count):
        """Error: x is rounded to ``PRECISION`` bits below its declared bound 2^b, from which it is a unit, 2^(b + 1 -
        ``PRECISION``), or more away; beyond ``PAIRS`` values as ``top``.

        Cost: 1 round and ``selection.best``'s; beyond ``PAIRS`` values that of top and picks.
        """
        x = self._value(x)
        if count == 0 or x.shape[-1] == 1 or x.shape[-1] > PAIRS:
            return self.picks(self.top(x, count), count)
        wire = self._ordered(x, "best")
        return Picks.of(selection.best(self.runtime, self._open, wire, count))

    def picks(self, bits, count):
        """Error: none. Cost: ``selection.picks``'s."""
        return Picks.of(selection.picks(self.runtime, self._open, self._value(bits), count))

    def largest(self, x, dim):
        """Error: as ``best``. Cost: 1 round and ``selection.largest``'s. The result is valid modulo its ring alone."""
        x = self._value(x)
        dim = dim % len(x.shape)
        x = self._comparable(x).permute(*(d for d in range(len(x.shape)) if d != dim), dim)
        return selection.largest(self.runtime, self._open, self._ordered(x, "largest"))

    def above(self, x, threshold):
        """Error: as ``best``; the threshold is rounded down to that unit.

        Cost: 2 rounds; the opening of x, and ``Below``'s with words of 4 bytes.
        """
        wire = self._ordered(self._value(x), "above")
        end = 1 << (wire.width - 2)
        limit = min(max(math.floor(threshold * 2.0**wire.scale) + 1, -end), end)
        less = below(self.runtime, self._open, wire, [limit], selection.BIT)[..., 0]
        one = int(self.runtime.role == PARTY0)
        return less._like(one - less.share)

    def choose(self, bits, x, y):
        """y + bits (x - y). Error: none.

        Cost: 1 round; x - y in a ring of whole bytes and 1 byte a bit each way; dealer 8 bytes a bit and 8 for each
        element of the result.
        """
        bits, x, y = self._value(bits), self._value(x), self._value(y)
        largest = max(x.bits, y.bits)
        x, y = self._alike([x, y], largest + 2, "choose")
        shape, scale, width = np.broadcast_shapes(x.shape, y.shape), x.scale, min(x.width, y.width)
        one, other = x.share.expand(shape), y.share.expand(shape)
        apart = Secret(one - other, scale, width, largest + 1)
        size = min(width, whole_bytes(largest + scale + 3))
        bit, wire = self._open(bit_opening(bits), Opening(apart, ring=size))
        chosen = times_bits(self.runtime, bit, wire)
        return Secret(chosen.share + other, scale, size, largest)

    def _comparable(self, x: Secret) -> Secret:
        """x with room for the sign of a difference."""
        return self._roomy(x, 0, "comparison")

    def _comparison(self, x: Secret, what: str) -> Opening:
        """Of x, in the fewest whole bytes an element."""
        return ordered(self._comparable(x), KEEPING if what == "top" else PRECISION, what)

    def _ordered(self, x: Secret, what: str) -> Wire:
        """x opened for comparisons, as a narrow wire. Cost: 1 round."""
        (wire,) = self._open(self._comparison(x, what))
        return wire

    # Gathering.

    def gather(self, picks, x):
        """Error: none. Cost: 1 round; x and, once, the picks, in rings of whole bytes that hold the result; dealer 8
        bytes an element of it.
        """
        x = self._value(x)
        growth = 0 if isinstance(picks, Picks) else bits_for(picks.shape[-1]) + picks.bits - 1
        if isinstance(picks, Picks) and isinstance(x, Picks):  # they will pick something, in a ring that holds it
            return Picks.of(self._pick(picks, x, 1, self.config.picks_width))
        return self._pick(picks, x, x.bits + growth)

    def gather_scores(self, choice, scores):
        """Error: none. Cost: that of ``gather`` for [G, k, C] by [G, C, M * size]; none without picks."""
        parts = [scores[..., choice.rows]] if len(choice.rows) else []
        if choice.picks is not None:
            heads, queries, _ = scores.shape
            count, blocks = choice.picks.shape[-2:]
            stretch = scores[..., choice.first : choice.first + blocks * choice.size]
            stretch = stretch.reshape(heads, queries, blocks, choice.size).permute(0, 2, 1, 3)
            stretch = stretch.reshape(heads, blocks, queries * choice.size)
            limit = bits_for(self.config.score_limit)  # softmax sees scores modulo 2^(limit + 1) only
            found = self._pick(choice.picks, stretch, min(scores.bits, limit), spare=1)
            found = found.reshape(heads, count, queries, choice.size).permute(0, 2, 1, 3)
            parts.append(found.reshape(heads, queries, count * choice.size))
        if len(parts) == 1:
            return parts[0]
        joined = torch.cat([part.share for part in parts], -1)
        return Secret(joined, scores.scale, min(part.width for part in parts), min(part.bits for part in parts))

    def scatter_weights(self, choice, weights, count):
        """Error: a unit of ``SCATTERED`` bits of each weight, where some were picked; ``mix`` divides by the rounded
        ones' sum.

        Cost: 1 round (none without picks): the G * M * count weights in 7 bytes each way with 8 of the dealer's each,
        and the picks where ``gather_scores`` has not opened them; dealer 8 bytes for each of G * M * C * size results.
        """
        x, shape = weights.weights, (*weights.weights.shape[:-1], count)
        if choice.picks is None:
            placed = x.share.new_zeros(shape)
            if not self.runtime.is_dealer:
                placed.index_add_(-1, choice.rows, x.share)
            return replace(weights, weights=Secret(placed, x.scale, x.width, x.bits))
        cut = max(0, x.scale - SCATTERED)
        hot = self._hot_opening(choice.picks, self.config.picks_width)
        wires = self._open(Opening(x, ring=self.config.picks_width + cut, truncate=cut), *([hot] if hot else []))
        if hot:
            choice.picks.opened = wires[1]
        wire, fixed = wires[0], len(choice.rows)
        (heads, queries, _), (kept, blocks) = x.shape, choice.picks.shape[-2:]

        def by_block(t):
            chosen = t[..., fixed:].reshape(heads, queries, kept, choice.size).permute(0, 2, 1, 3)
            return chosen.reshape(heads, kept, queries * choice.size)

        found = self._product(choice.picks.opened.transpose(-1, -2), wire._map(by_block), x.bits)
        found = found.reshape(heads, blocks, queries, choice.size).permute(0, 2, 1, 3)
        placed = found.share.new_zeros(shape)
        if not self.runtime.is_dealer:
            placed.index_add_(-1, choice.rows, selection.shares_of(self.runtime, wire)[..., :fixed])
            stop = choice.first + blocks * choice.size
            placed[..., choice.first : stop] += found.share.reshape(heads, queries, -1)
        return replace(weights, weights=Secret(placed, wire.scale, found.width, x.bits))

    def _hot(self, picks: Secret, width: int) -> Wire:
        """One-hot rows as a wire of at least ``width`` bits: opened once."""
        opening = self._hot_opening(picks, width)
        if opening is not None:
            (picks.opened,) = self._open(opening)
        return picks.opened

    def _hot_opening(self, picks: Secret, width: int) -> Opening | None:
        if picks.opened is not None and picks.opened.width >= width:
            return None
        picks = self._roomy(picks, 0, "gather", width=width)
        return Opening(picks, ring=min(picks.width, whole_bytes(max(width, self.config.picks_width))))

    def _pick(self, picks: Secret, x: Secret, bits: int, width: int = 0, spare: int = 2) -> Secret:
        """picks @ x, valid modulo 2^width at least; what has not been opened is opened together.

        bits: of the result. spare: bits of room beside it; 1 is for the sign, and no less than 2 can be lifted.
        """
        x = self._roomy(x, max(0, bits - x.bits), "gather", width)
        size = min(x.width, whole_bytes(max(width, bits + x.scale + spare)))
        unopened = x.opened is None or x.opened.width < size
        hot = self._hot_opening(picks, size)
        openings = [Opening(x, ring=size, function=True)] if unopened else []
        wires = self._open(*openings, *([hot] if hot else [])) if openings or hot else []
        if hot:
            picks.opened = wires[-1]
        wire = selection.plain(wires[0]) if unopened else x.opened
        return self._product(picks.opened, wire, bits)

    def _product(self, hot: Wire, x: Wire, bits: int) -> Secret:
        """hot @ x, where one of them may be the same for all kv heads."""
        heads, shape = x.shape[:-2], x.shape
        if hot.shape[:-2] == heads:
            return products.matmul(self.runtime, hot, x, transposed=False, bits=bits)
        if hot.shape[0] == 1:
            wide = x.transpose(0, 1).reshape(1, shape[1], shape[0] * shape[2])
            found = products.matmul(self.runtime, hot, wide, transposed=False, bits=bits)
            return found.reshape(-1, shape[0], shape[2]).permute(1, 0, 2)
        each = x._map(lambda t: t.expand(*hot.shape[:-2], *shape[-2:]))
        return products.matmul(self.runtime, hot, each, transposed=False, bits=bits)
