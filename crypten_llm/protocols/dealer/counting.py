"""The dealer's program for shapes alone, which is what costs and the sizes of tapes are counted with.

Owns the role that draws nothing and makes nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.roles import Dealer
from crypten_llm.protocols.dealer.runtime import Parts, Piece, Size
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.roles import CLIENT, OWNER


class Counting(Dealer):
    """The dealer's program for shapes alone: nothing is drawn or made, its size is told to ``material``, and what
    parties would send to ``transport`` (both of ``engines.wire.counted``, or of a tape).
    """

    def __init__(self, transport: Any, material: Any) -> None:
        super().__init__(transport, [], material)
        self._links = transport

    def mask(self, shape: Sequence[int], bits: int = 64) -> Parts:
        return _held(shape, bits)

    def mask_ones(self, shape: Sequence[int], bits: int) -> Parts:
        return _held(shape, bits)

    def mask_below(self, shape: Sequence[int], modulus: int) -> Parts:
        return _held(shape, 64)

    def mask_of(self, party: int, shape: Sequence[int]) -> Tensor:
        return shape_only(shape)

    def deal(self, shape: Sequence[int], value: Callable[[], Tensor], bits: int = 64) -> Parts:
        self._material.add(CLIENT, ring.packed_size(math.prod(shape), bits))
        return _held(shape, bits)

    def deal_ones(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Parts:
        self._material.add(CLIENT, ring.packed_size(math.prod(shape), bits))
        return _held(shape, bits)

    def deal_table(self, shape: Sequence[int], bits: int, turned: Callable[[Tensor], Tensor]) -> Tensor | None:
        self._material.add(CLIENT, math.prod(shape) * bits // 8)
        return None

    def deal_common(self, sizes: list[Size], value: Callable[[], list[Tensor]]) -> list[Tensor]:
        for party in (CLIENT, OWNER):
            for shape, dtype in sizes:
                self._material.add(party, math.prod(shape) * dtype.itemsize)
            self._material.flush(party)
        return []

    def blocks(self, count: int, size: int) -> Iterator[slice]:
        """All at once: what blocks take adds up to the same."""
        yield slice(0, count)

    def exchange(self, pieces: list[Piece]) -> list[Tensor | None]:
        self._links.passed(pieces)
        return super().exchange(pieces)


def _held(shape: Sequence[int], bits: int) -> Parts:
    """The shape of what would be held: words, or limbs."""
    held = (*shape,) if bits <= 64 else (*shape, ring.limbs(bits))
    return Parts(shape_only(held), shape_only(held))
