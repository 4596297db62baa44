"""What the dealer holds where a party holds a share: its shape.

Owns the arithmetic of shapes. torch's tensors without contents (device ``meta``) know it too, but each of their
operations costs many times what a party's does, and some load torch's compiler on first use. Those that protocols use
on shares are answered here in Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from crypten_llm.kernels.ring import broadcast


class Shape:
    """Stands for a tensor of 64-bit integers that nobody here has; operations give the shape of their result."""

    __slots__ = ("shape",)
    is_meta = True
    dtype = torch.int64

    def __init__(self, shape: Iterable[int]) -> None:
        self.shape = torch.Size(shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    # Views.

    def reshape(self, *shape: Any) -> Shape:
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if -1 in wanted:
            rest = math.prod(size for size in wanted if size != -1)
            wanted = [self.numel() // rest if size == -1 else size for size in wanted]
        assert math.prod(wanted) == self.numel(), f"{tuple(self.shape)} does not reshape to {tuple(wanted)}"
        return Shape(wanted)

    view = reshape

    def permute(self, *order: Any) -> Shape:
        wanted = order[0] if len(order) == 1 and not isinstance(order[0], int) else order
        return Shape([self.shape[place] for place in wanted])

    def transpose(self, first: int, second: int) -> Shape:
        shape = list(self.shape)
        shape[first], shape[second] = shape[second], shape[first]
        return Shape(shape)

    def expand(self, *shape: Any) -> Shape:
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        own = [1] * (len(wanted) - self.ndim) + list(self.shape)
        return Shape([mine if size == -1 else size for mine, size in zip(own, wanted, strict=True)])

    def unbind(self, dim: int = 0) -> list[Shape]:
        shape = list(self.shape)
        count = shape.pop(dim)
        return [Shape(shape) for _ in range(count)]

    def __getitem__(self, index: Any) -> Shape:
        parts = index if isinstance(index, tuple) else (index,)
        places = [place for place, part in enumerate(parts) if isinstance(part, Tensor)]
        if len(places) != 1 or parts[places[0]].dim() != 1 or parts[places[0]].dtype == torch.bool:
            return Shape(torch.empty(self.shape, dtype=torch.bool, device="meta")[index].shape)
        (place,) = places  # of one list of indices; with a tensor torch would load its compiler
        shape = list(self[(*parts[:place], slice(None), *parts[place + 1 :])].shape)
        before = parts[:place]
        left = sum(not isinstance(part, int) for part in before)
        right = sum(not isinstance(part, int) for part in parts[place + 1 :])
        shape[-1 - right if any(part is Ellipsis for part in before) else left] = len(parts[place])
        return Shape(shape)

    def __setitem__(self, index: Any, value: Any) -> None:
        pass

    def contiguous(self) -> Shape:
        return self

    # Results.

    def _elementwise(self, other: Any = None) -> Shape:
        shape = getattr(other, "shape", ())
        return self if not shape or shape == self.shape else Shape(broadcast(self.shape, shape))

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _elementwise
    __and__ = __lshift__ = __rshift__ = __neg__ = _elementwise

    def sum(self, dim: int, keepdim: bool = False) -> Shape:
        shape = list(self.shape)
        shape[dim] = 1
        if not keepdim:
            del shape[dim]
        return Shape(shape)

    def cumsum(self, dim: int) -> Shape:
        return self

    def new_empty(self, shape: Iterable[int]) -> Shape:
        return Shape(shape)

    new_zeros = new_empty

    def new_full(self, shape: Iterable[int], value: Any) -> Shape:
        return Shape(shape)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Shape:
        """torch's own functions on shapes."""
        assert function is torch.cat, f"{function} of a shape; add it to {__name__}"
        return _joined(*arguments, **(options or {}))


def shape_only(shape: Iterable[int]) -> Tensor:
    """A ``Shape``, which protocols take for a tensor."""
    made: Any = Shape(shape)
    return made


def _joined(parts: Sequence[Shape], dim: int = 0) -> Shape:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return Shape(shape)
