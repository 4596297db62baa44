"""Triton's programs on a machine without a GPU, by Triton's interpreter: the same lines, computed by numpy.

Owns how they are reached there. The interpreter is asked for before Triton is imported; where that is not installed, or
where a GPU is, whose programs are to be compiled, there is a reason to skip.
"""

import importlib.util
import os
import sys

import torch

from crypten_llm.kernels import cuda
from crypten_llm.kernels.cuda_choice import triton

MISSING = ""
if torch.cuda.is_available():
    MISSING = "where there is a GPU, `make test-cuda` runs the programs on it"
elif importlib.util.find_spec("triton") is None:
    MISSING = "needs Triton, which its interpreter is of: pip install triton"
elif "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    MISSING = "Triton was imported before its interpreter was asked for: run this file alone"


class Interpreted:
    """Kernels of device cuda for tensors of the processor: each in Triton, not in torch's operations."""

    def __getattr__(self, name):
        return getattr(triton(getattr(cuda, name).module), name)


def interpreter():
    """The kernels, once what a number of one element is has been told to it, which numpy from 2.4 on refuses to say."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter as of_triton

    patch = of_triton._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if patch.__name__ != patched.__name__:
        of_triton._patch_lang_tensor = patched
    return Interpreted()
