"""Kernels for device cuda (signatures and meanings: ``kernels.ring``).

Owns the list. Tensors on a GPU go to programs in Triton (``triton_words`` and beside it), which a CUDA graph can hold
once they were launched before. Tensors of the processor go to torch's own operations, which run on any device: so these
are held against the readable twins where there is no GPU.
"""

import torch
from torch import Tensor

from crypten_llm.kernels import (
    cuda_keys,
    cuda_lifted,
    cuda_limbs,
    cuda_ones,
    cuda_products,
    cuda_streams,
    cuda_tables,
    cuda_waves,
)

DEVICE = "cuda"  # where key streams are made: the process's current one (torch.cuda.set_device)


class KeyStream:
    """ChaCha20 under ``key``, 32 bytes, made on the current CUDA device. Its place, in bytes, only moves forward."""

    def __init__(self, key: bytes) -> None:
        self._key = torch.frombuffer(bytearray(key), dtype=torch.int32).to(DEVICE)
        self.place = 0

    def take_key(self, other: "KeyStream") -> None:
        """Puts another's key where kernels that were captured of this one read theirs."""
        self._key.copy_(other._key)

    def fill(self, count: int, over: Tensor | None = None) -> Tensor:
        first, skipped = divmod(self.place, cuda_streams.BYTES)
        self.place += count
        blocks = -(-(skipped + count) // cuda_streams.BYTES)
        made = cuda_streams.stream(self._key, first, blocks)[skipped : skipped + count]
        return made if over is None else made ^ over


matmul_nt = cuda_products.matmul_nt
matmul_nn = cuda_products.matmul_nn
pack, unpack = cuda_limbs.pack, cuda_limbs.unpack
hide, show = cuda_limbs.hide, cuda_limbs.show
unwrap = cuda_limbs.unwrap
waves, combine = cuda_waves.waves, cuda_waves.combine
coefficients = cuda_waves.coefficients
cosines, add_cosines = cuda_waves.cosines, cuda_waves.add_cosines
hide_wide, show_wide = cuda_limbs.hide_wide, cuda_limbs.show_wide
reduce_wide, widen = cuda_limbs.reduce_wide, cuda_limbs.widen
add_wide, subtract_wide = cuda_limbs.add_wide, cuda_limbs.subtract_wide
multiply_wide, sum_wide = cuda_limbs.multiply_wide, cuda_limbs.sum_wide
shift_wide, drop_wide = cuda_limbs.shift_wide, cuda_limbs.drop_wide
lift_mask, dot_wide = cuda_lifted.lift_mask, cuda_lifted.dot_wide
scale_lifted = cuda_lifted.scale_lifted
add_ones, subtract_ones = cuda_ones.add_ones, cuda_ones.subtract_ones
multiply_ones, sum_ones = cuda_ones.multiply_ones, cuda_ones.sum_ones
power_ones, rotate_ones = cuda_ones.power_ones, cuda_ones.rotate_ones
turned_exponents, read_exponents = cuda_ones.turned_exponents, cuda_ones.read_exponents
window_ones = cuda_ones.window_ones
flip_places, parities, xor_rows = cuda_tables.flip_places, cuda_tables.parities, cuda_tables.xor_rows
multiply_field = cuda_tables.multiply_field
turn_table, read_table = cuda_tables.turn_table, cuda_tables.read_table
turn_signs, read_signs = cuda_tables.turn_signs, cuda_tables.read_signs
turn_bits, read_bits = cuda_tables.turn_bits, cuda_tables.read_bits
compare_keys, compare = cuda_keys.compare_keys, cuda_keys.compare
