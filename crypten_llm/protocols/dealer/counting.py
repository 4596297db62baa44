"""The dealer's program for shapes alone, which is what costs and the sizes of tapes are counted with.

Owns the role that draws nothing and makes nothing.
"""

import math

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.roles import Dealer, Parts
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.roles import CLIENT, OWNER


class Counting(Dealer):
    """The dealer's program for shapes alone: nothing is drawn or made, its size is told to ``material``, and what
    parties would send to ``transport`` (both of ``engines.wire.counted``, or of a tape).
    """

    def __init__(self, transport, material):
        super().__init__(transport, [], material)

    def mask(self, shape, bits=64):
        return Parts(shape_only(shape), shape_only(shape))

    def mask_of(self, party, shape):
        return shape_only(shape)

    def deal(self, shape, value, bits=64):
        self._material.add(CLIENT, ring.packed_size(math.prod(shape), bits))
        return Parts(shape_only(shape), shape_only(shape))

    def deal_table(self, shape, bits, turned):
        self._material.add(CLIENT, math.prod(shape) * bits // 8)

    def deal_common(self, sizes, value):
        for party in (CLIENT, OWNER):
            for shape, dtype in sizes:
                self._material.add(party, math.prod(shape) * dtype.itemsize)
            self._material.flush(party)
        return []

    def blocks(self, count, size):
        """All at once: what blocks take adds up to the same."""
        yield slice(0, count)

    def exchange(self, pieces):
        self.transport.passed(pieces)
        return super().exchange(pieces)
