"""Kernels for tensors on a GPU (signatures and meanings: ``kernels.ring``).

Owns which of them are Triton's: those that in torch's own operations (``cuda``) would be most of the launches. They are
held against the processor's by ``make test-cuda``, on a machine that has a GPU.
"""

from crypten_llm.kernels import cuda, triton_chacha, triton_keys, triton_products, triton_waves, triton_words
from crypten_llm.kernels.cuda import (  # noqa: F401  (all of the list is here)
    add_ones,
    add_wide,
    dot_wide,
    drop_wide,
    flip_places,
    hide_wide,
    lift_mask,
    multiply_field,
    multiply_ones,
    multiply_wide,
    parities,
    power_ones,
    read_bits,
    read_exponents,
    read_signs,
    read_table,
    reduce_wide,
    rotate_ones,
    scale_lifted,
    shift_wide,
    show_wide,
    subtract_ones,
    subtract_wide,
    sum_ones,
    sum_wide,
    turn_bits,
    turn_signs,
    turn_table,
    turned_exponents,
    widen,
    window_ones,
    xor_rows,
)


class KeyStream(cuda.KeyStream):
    """The same bytes, of one launch."""

    _blocks = staticmethod(triton_chacha.stream)


matmul_nt, matmul_nn = triton_products.matmul_nt, triton_products.matmul_nn
pack, unpack = triton_words.pack, triton_words.unpack
hide, show, unwrap = triton_words.hide, triton_words.show, triton_words.unwrap
waves, combine, coefficients = triton_waves.waves, triton_waves.combine, triton_waves.coefficients
cosines, add_cosines = triton_waves.cosines, triton_waves.add_cosines
compare_keys, compare = triton_keys.compare_keys, triton_keys.compare
