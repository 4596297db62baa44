"""What the dealer holds where a party holds a share: its shape.

Owns the arithmetic of shapes. torch's tensors without contents (device ``meta``) know it too, but find the shape of a
sum or a join in Python, for which torch loads its compiler on first use. Those are answered here, everything else is
left to torch.
"""

import torch
from torch import Tensor


class Shape(Tensor):
    """A tensor of 64-bit integers without contents."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        rule = RULES.get(function)
        if rule is None:
            return super().__torch_function__(function, types, arguments, options or {})
        return shape_only(rule(*arguments, **(options or {})))


def shape_only(shape) -> Shape:
    return torch.empty(tuple(shape), dtype=torch.int64, device="meta").as_subclass(Shape)


def broadcast(*shapes) -> tuple[int, ...]:
    """The shape of an element-wise result. torch's own function imports sympy on first use."""
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for place, size in enumerate(shape, len(result) - len(shape)):
            if size != 1:
                if result[place] not in (1, size):
                    raise ValueError(f"shapes {', '.join(str(tuple(shape)) for shape in shapes)} do not broadcast")
                result[place] = size
    return tuple(result)


def _elementwise(*operands):
    return broadcast(*(x.shape for x in operands if isinstance(x, Tensor)))


def _joined(parts, dim=0):
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return shape


def _summed(x, dim, keepdim=False):
    shape = list(x.shape)
    shape[dim] = 1
    return shape if keepdim else shape[: dim % len(shape)] + shape[dim % len(shape) + 1 :]


RULES = {
    Tensor.add: _elementwise,
    Tensor.sub: _elementwise,
    Tensor.__rsub__: _elementwise,
    Tensor.mul: _elementwise,
    Tensor.neg: _elementwise,
    Tensor.__and__: _elementwise,
    Tensor.__lshift__: _elementwise,
    Tensor.__rshift__: _elementwise,
    Tensor.cumsum: lambda x, dim: x.shape,
    Tensor.sum: _summed,
    torch.cat: _joined,
}
