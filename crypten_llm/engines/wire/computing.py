"""On which devices private engines compute: those that torch has here and that there are kernels for."""

import torch

from crypten_llm import devices
from crypten_llm.errors import UsageError, first_line
from crypten_llm.kernels import ring


def usable(name: str, engine: str = "wire") -> torch.device:
    """The device of that name. Raises UsageError where torch cannot compute there, or there are no kernels for it.

    engine: on whose behalf; every private engine draws its randomness by these kernels.
    """
    device = devices.usable(name)
    try:
        ring.on(device)
    except (ValueError, ImportError) as error:
        raise UsageError(f"engine {engine!r} cannot compute on device {name!r}: {first_line(error)}") from None
    return device
