"""How the compiled loops are compiled.

Owns Numba's options, and two instructions that Numba has not. The products here are of 64-bit integers, which have a
vector instruction in AVX-512 alone; LLVM avoids vectors that wide unless it is told not to, and is told so before
anything is compiled.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from llvmlite import binding, ir
from numba.extending import intrinsic

Loop = TypeVar("Loop", bound=Callable)


def _prefer_wide_vectors() -> None:
    """Asks for 512-bit vectors where the processor multiplies 64-bit integers in them; a user's choice stays."""
    features = binding.get_host_cpu_features()
    settings = vars(numba.config)  # made when Numba is imported
    if features.get("avx512dq") and not (settings["CPU_NAME"] or settings["CPU_FEATURES"]):
        settings["CPU_NAME"] = binding.get_host_cpu_name()
        settings["CPU_FEATURES"] = features.flatten() + ",-prefer-256-bit"


_prefer_wide_vectors()
# The decorator of every compiled loop, which is called with what its Python says.
compiled: Callable[[Loop], Loop] = cast(Any, numba.njit(nogil=True, cache=True, boundscheck=False))
# The decorator of a part of such loops that LLVM finds too long to put in place of its call.
inlined: Callable[[Loop], Loop] = cast(Any, numba.njit(inline="always"))


@cast(Any, intrinsic)
def high_word(context: Any, x: Any, y: Any) -> tuple[Any, Callable]:
    """Of x y, the upper 64 bits of 128: one instruction, where four products of halves are otherwise needed."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list) -> ir.Value:
        double = ir.IntType(128)
        whole = builder.mul(*(builder.zext(argument, double) for argument in arguments))
        return builder.trunc(builder.lshr(whole, ir.Constant(double, 64)), ir.IntType(64))

    word = numba.types.uint64
    return word(word, word), generate


@cast(Any, intrinsic)
def word_at(context: Any, data: Any, place: Any) -> tuple[Any, Callable]:
    """The word in bytes ``place`` to ``place + 7`` of uint8 in one piece, wherever that begins: one load."""
    assert data.layout == "C" and data.dtype == numba.types.uint8, f"bytes in one piece, not {data}"

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list) -> ir.Value:
        bytes_of, where = arguments
        first = context.make_array(signature.args[0])(context, builder, bytes_of).data
        word = builder.bitcast(builder.gep(first, [where]), ir.PointerType(ir.IntType(64)))
        return builder.load(word, align=1)

    return numba.types.uint64(data, numba.types.int64), generate
