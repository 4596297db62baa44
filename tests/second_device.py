"""A device beside the processor, on a machine that has none: tensors that were moved there are marked as being there.

Owns the rules by which torch mixes devices. What is computed is right, and on the processor; an operation on tensors of
both devices fails as it does where there are two: but for numbers without a dimension, and indices from the processor.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu:0")  # for torch the same place as "cpu", by another name


def is_there(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "there", False)


def _moves(func, args, kwargs) -> bool:
    """Whether a call names the device on which its result is to be."""
    given = [*args, kwargs.get("device")]
    return any(isinstance(each, torch.device) and each.index == DEVICE.index for each in given)


class SecondDevice(TorchFunctionMode):
    """A with block in which ``DEVICE`` is apart. moved: how many tensors went there."""

    moved = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor for tensor in tensors if is_there(tensor)]
        name = getattr(func, "__name__", str(func))
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and _moves(func, args, kwargs):
            self.moved += 1
            out = out.detach()  # another object, as a copy would be
            out.there = True
            return out
        if not there or not tree_leaves(out):
            return out
        if name == "cpu":
            return out.detach()
        assert name != "numpy", "a tensor elsewhere cannot become an array"
        here = [tensor for tensor in tensors if not is_there(tensor) and tensor.dim()]
        indexed = name in ("__getitem__", "__setitem__") and is_there(args[0])
        shapes = [tuple(tensor.shape) for tensor in here]
        assert not here or indexed, f"{name} mixes devices: {shapes} are on the processor"
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                leaf.there = True
        return out
