"""CrypTen's path on a GPU, on a machine that has none: its own tensors for one around a processor's.

Owns what is put in the place of a GPU. All of CrypTen's code for one runs, its products of doubles too; its tensors are
on a second device (``second_device``), on which one that was made without naming it meets the others and fails.
"""

import torch
from crypten.cuda import CUDALongTensor
from second_device import DEVICE, SecondDevice, is_there
from torch.utils._pytree import tree_leaves

from crypten_llm.engines.crypten import bridge


def put_in_place() -> torch.device:
    """From now on every tensor of shares in this process is CrypTen's own for a GPU; on which device it is."""
    CUDALongTensor.__init__ = _of_the_device
    CUDALongTensor.is_cuda = True
    CUDALongTensor.device = DEVICE
    CUDALongTensor.__torch_function__ = _not_mixed
    bridge.wrapped, bridge.placed = _wrapped, lambda tensor, like: _there(tensor)
    SecondDevice().__enter__()
    return DEVICE


_function = CUDALongTensor.__torch_function__


def _not_mixed(self, func, types, args=(), kwargs=None):
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            assert is_there(leaf), f"{func.__name__} mixes devices: {tuple(leaf.shape)} is on the processor"
    return _function(self, func, types, args, kwargs)


def _there(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    tensor.there = True
    return tensor


def _wrapped(tensor: torch.Tensor):
    return CUDALongTensor(tensor) if tensor.numel() or getattr(tensor, "there", False) else tensor


def _of_the_device(self, data=None, device=None):
    self._tensor = data if data is None else _there(bridge.bare(data).long())
