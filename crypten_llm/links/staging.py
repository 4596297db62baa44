"""Memory of the processor beside a device: what is computed there travels from it, and arrives in it.

Owns these copies. Sockets know the processor's memory alone. A GPU copies to and from pinned memory by itself, without
a copy more and, inwards, without anybody waiting for it; torch keeps such memory and gives it out again once the copies
from it are done.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Between the processor's memory and ``device``; where they are the same, nothing is copied."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.is_apart = self.device != torch.device("cpu")
        self._pinned = self.device.type == "cuda"

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for what will arrive."""
        if self._pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        if dtype is torch.uint8 and 0 not in shape:  # in a third of the time
            return torch.from_numpy(np.empty(shape, np.uint8))
        return torch.empty(shape, dtype=dtype)

    def to_host(self, data: Tensor) -> Tensor:
        """Contiguous data of the device in the processor's memory; waits until they are there."""
        if not self.is_apart:
            return data
        return self.empty(data.shape, data.dtype).copy_(data) if self._pinned else data.cpu()

    def to_device(self, data: Tensor) -> Tensor:
        """The processor's data on the device."""
        return data.to(self.device, non_blocking=True) if self.is_apart else data
