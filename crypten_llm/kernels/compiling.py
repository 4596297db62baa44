"""How the compiled loops are compiled.

Owns Numba's options. The products here are of 64-bit integers, which have a vector instruction in AVX-512 alone; LLVM
avoids vectors that wide unless it is told not to, and is told so before anything is compiled.
"""

import numba
from llvmlite import binding


def _prefer_wide_vectors() -> None:
    """Asks for 512-bit vectors where the processor multiplies 64-bit integers in them; a user's choice stays."""
    features = binding.get_host_cpu_features()
    if features.get("avx512dq") and not (numba.config.CPU_NAME or numba.config.CPU_FEATURES):
        numba.config.CPU_NAME = binding.get_host_cpu_name()
        numba.config.CPU_FEATURES = features.flatten() + ",-prefer-256-bit"


_prefer_wide_vectors()
compiled = numba.njit(nogil=True, cache=True, boundscheck=False)  # the decorator of every compiled loop
