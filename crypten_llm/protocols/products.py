"""Products of wires: element-wise, squares, and matrix products. No message is sent here.

Owns the arithmetic of public parts, shared masks and dealt products of masks. With x = X - a and y = Y - b,
x y = X Y - X [b] - [a] Y + [a b]; the dealer knows a b.
"""

from dataclasses import dataclass

import numpy as np
import torch

from crypten_llm.kernels import ring
from crypten_llm.protocols.dealer.roles import PARTY0, PARTY1
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.opening import Overflow, Secret, Wire


def _check(bits: int, scale: int, width: int, what: str) -> None:
    if bits + scale > width - 1:
        raise Overflow(f"{what}: |x| < 2^{bits} at scale 2^{scale} does not fit a share valid modulo 2^{width}")


def multiply(runtime, x: Wire, y: Wire, scale: int | None = None, bits: int | None = None) -> Secret:
    """x * y element-wise with broadcasting; local.

    Shapes: any two that broadcast. scale, bits: of the result, where the caller knows better than the sum of the
    factors' (a power of two that was chosen to bring x into a range).

    Error: none. Cost: dealer 8 bytes an element of the result for each pair of masks (1 for narrow wires, 4 for
    two lifted ones).
    Raises: Overflow when the declared result does not fit the narrower of the two widths.
    Source: Beaver (CRYPTO 1991), with the factors' openings shared by all products as in Turbospeedz (ACNS 2019).
    """
    shape = np.broadcast_shapes(x.shape, y.shape)  # numpy's: torch's imports sympy on first use
    scale = x.scale + y.scale if scale is None else scale
    bits, width = x.bits + y.bits if bits is None else bits, min(x.width, y.width)
    _check(bits, scale, width, "product")
    total = None
    if not runtime.is_dealer:  # X share(y) + masked(x) Y + the products of masks
        left, right = _masked(x), _masked(y)
        total = x.public * (y.public + right if runtime.role == PARTY0 else right)
        total.addcmul_(left, y.public)
    for left_coefficient, left in x.masks:
        for right_coefficient, right in y.masks:
            pair = runtime.deal(shape, lambda left=left, right=right: left * right)
            if total is not None:
                _add_times(total, left_coefficient, right_coefficient, pair)
    return Secret(shape_only(shape) if total is None else total, scale, width, bits)


def _masked(x: Wire) -> torch.Tensor:
    """This party's part of x without the public one: the sum of coefficient * mask."""
    (_, first), *others = x.masks
    total = -first
    for coefficient, mask in others:
        total.addcmul_(coefficient, mask)
    return total


def _add_times(total, one, other, pair) -> None:
    """total += one * other * pair, where a coefficient may be the number -1."""
    tensors = [coefficient for coefficient in (one, other) if isinstance(coefficient, torch.Tensor)]
    if not tensors:
        total += pair
    elif len(tensors) == 1:
        total.addcmul_(tensors[0], pair, value=-1)
    else:
        total.addcmul_(tensors[0] * tensors[1], pair)


def square(runtime, x: Wire) -> Secret:
    """x^2 element-wise; local.

    Error: none. Cost: dealer 8 bytes an element, 16 when lifted.
    Raises: Overflow when the declared result does not fit the width.
    """
    _check(2 * x.bits, 2 * x.scale, x.width, "square")
    total = _square_without_first(runtime, x)
    first = x.masks[0][1]
    squared = runtime.deal(x.shape, lambda: first * first)
    if total is not None:
        total += squared
    return Secret(shape_only(x.shape) if total is None else total, 2 * x.scale, x.width, 2 * x.bits)


def sum_of_squares(runtime, x: Wire, bits: int) -> Secret:
    """Sum of x^2 over the last dimension, kept as 1; local.

    bits: the sum is below 2^bits by the caller's word, which is not checked against the number of terms.
    Error: none. Cost: dealer 8 bytes a row, and 8 bytes an element when lifted.
    Raises: Overflow when 2^bits does not fit the width.
    """
    _check(bits, 2 * x.scale, x.width, "sum of squares")
    total = _square_without_first(runtime, x)
    first = x.masks[0][1]
    shape = (*x.shape[:-1], 1)
    squared = runtime.deal(shape, lambda: (first * first).sum(-1, keepdim=True))
    if total is not None:
        total = total.sum(-1, keepdim=True) + squared
    return Secret(shape_only(shape) if total is None else total, 2 * x.scale, x.width, bits)


def _square_without_first(runtime, x: Wire):
    """x^2 but for the square of the first mask, whose coefficient is -1; the second mask is a bit, its own square."""
    total = None
    if not runtime.is_dealer:
        total = x.public * x.public if runtime.role == PARTY0 else torch.zeros_like(x.public)
        for coefficient, mask in x.masks:
            total += 2 * x.public * (coefficient * mask)
    if len(x.masks) == 2:
        (_, first), (coefficient, bit) = x.masks
        pair = runtime.deal(x.shape, lambda: first * bit)
        if total is not None:
            total += coefficient * coefficient * bit - 2 * coefficient * pair
    return total


@dataclass
class Operand:
    """A narrow wire folded for the right side of matrix products.

    public: Y (``None`` at the dealer). own: what this role multiplies X by: Y - b0 at party 0, -b1 at party 1; at the
    dealer the mask b itself. Folding once lets a cached row serve every later product as it is.
    """

    public: torch.Tensor | None
    own: torch.Tensor
    scale: int
    width: int
    bits: int

    @property
    def shape(self):
        return self.own.shape


def fold(runtime, wire: Wire) -> Operand:
    """``wire``, which must be narrow, as an ``Operand``; local."""
    assert len(wire.masks) == 1, "matrix products take narrow wires"
    own = wire.masks[0][1]
    if not runtime.is_dealer:
        own = wire.public - own if runtime.role == PARTY0 else -own
    return Operand(wire.public, own, wire.scale, wire.width, wire.bits)


def matmul(runtime, x: Wire, y: Wire | Operand, transposed: bool, bits: int) -> Secret:
    """x @ y, or x @ y.T when ``transposed``, of two narrow wires; local.

    Shapes: [..., M, K] by [..., K, N] or [..., N, K], the same batch, to [..., M, N]. bits: as in ``sum_of_squares``.
    Error: none. Cost: dealer 8 bytes an element of the result.
    Raises: Overflow when 2^bits does not fit the narrower width.
    """
    y = y if isinstance(y, Operand) else fold(runtime, y)
    assert len(x.masks) == 1, "matrix products take narrow wires"
    left = x.masks[0][1]
    scale, width = x.scale + y.scale, min(x.width, y.width)
    _check(bits, scale, width, "matrix product")
    product = ring.matmul_nt if transposed else ring.matmul_nn
    shape = (*x.shape[:-1], y.shape[-2] if transposed else y.shape[-1])
    dealt = runtime.deal(shape, lambda: product(left, y.own))
    if runtime.is_dealer:
        return Secret(shape_only(shape), scale, width, bits)
    # Party 0: X (Y - b0) - a0 Y + c0; party 1: -X b1 - a1 Y + c1.
    total = product(x.public, y.own) - product(left, y.public) + dealt
    return Secret(total, scale, width, bits)


class OwnedMatrix:
    """A matrix that the owner (party 0) knows: the owner's plain integers, and W - R at party 1 for a fixed mask R.

    The owner multiplies by small plain integers; party 1's part of a product does not depend on what was opened.
    R comes from the owner's stream, uniform modulo 2^64 and used for this matrix alone, so W - R is uniform too.
    """

    def __init__(self, runtime, value, shape, scale: int):
        """value: float [out, in] at party 0, ``None`` elsewhere. Sends W - R to party 1: 8 bytes an element, once."""
        self.shape, self.scale = torch.Size(shape), scale
        self.plain = self.hidden = None
        self.mask = runtime.mask_of(PARTY0, shape)
        if runtime.role == PARTY0:
            scaled = (value.double() * 2**scale).round()
            if not scaled.abs().max() < 2**31:  # nor NaN
                raise Overflow(f"a weight of {value.abs().max():.3g} does not fit 32 bits at scale 2^{scale}")
            runtime.transport.send(PARTY1, scaled.long() - self.mask)
            self.plain, self.mask = scaled.to(torch.int32), None
        elif runtime.role == PARTY1:
            self.hidden = runtime.transport.recv(PARTY0, shape, torch.int64)
        else:
            runtime.overhear(8 * self.shape.numel(), sender=PARTY0)


def linear(runtime, x: Wire, matrix: OwnedMatrix, bits: int) -> Secret:
    """x @ W.T for a narrow wire [T, in] and the owner's W [out, in]; local.

    Party 0 computes (X - a0) W, party 1 -a1 (W - R), and the dealer shares a1 R, masked afresh for every product.
    bits: as in ``sum_of_squares``. Error: none.
    Cost: dealer 8 bytes an element of the result; one product with plain weights at the owner, one of 64-bit words
    at party 1 and at the dealer, neither of which needs the opening.
    Raises: Overflow when 2^bits does not fit the width.
    """
    assert len(x.masks) == 1, "matrix products take narrow wires"
    scale = x.scale + matrix.scale
    _check(bits, scale, x.width, "linear layer")
    mask = x.masks[0][1]
    shape = (*x.shape[:-1], matrix.shape[0])
    if runtime.is_dealer:
        runtime.deal(shape, lambda: ring.matmul_nt(x.share1, matrix.mask))
        return Secret(shape_only(shape), scale, x.width, bits)
    if runtime.role == PARTY0:
        total = ring.matmul_nt(x.public - mask, matrix.plain) - runtime.deal(shape)
    else:
        total = -ring.matmul_nt(mask, matrix.hidden) - runtime.deal(shape)
    return Secret(total, scale, x.width, bits)


def lookup(runtime, ids, count: int, matrix: OwnedMatrix, bits: int) -> Secret:
    """Rows of the owner's [V, H] for token ids that only the client (party 1) holds; ids is ``None`` elsewhere.

    Reveals: one-hot rows plus a uniform mask, to the owner.
    Error: none. Cost: 4 bytes for each of count * V words to the owner; dealer 8 bytes an element of the result.
    """
    vocabulary, hidden = matrix.shape
    size = 32
    packed = ring.packed_size(count * vocabulary, size)
    _check(bits, matrix.scale, size, "embedding")
    mask = runtime.mask_of(PARTY1, (count, vocabulary))
    shape = (count, hidden)
    if runtime.is_dealer:
        runtime.overhear(packed, sender=PARTY1)
        runtime.deal(shape, lambda: ring.matmul_nn(mask, matrix.mask))
        return Secret(shape_only(shape), matrix.scale, size, bits)
    if runtime.role == PARTY1:
        assert len(ids) == count, f"{len(ids)} token ids, {count} announced"
        for token in ids.tolist():
            if not 0 <= token < vocabulary:
                raise ValueError(f"token id {token} is not in a vocabulary of {vocabulary}")
        hot = mask.clone()
        hot[torch.arange(count), ids] += 1
        runtime.transport.send(PARTY0, ring.pack(hot, size))
        total = -ring.matmul_nn(mask, matrix.hidden) - runtime.deal(shape)
    else:
        data = runtime.transport.recv(PARTY1, (packed,), torch.uint8)
        total = ring.matmul_nn(ring.unpack(data, size, (count, vocabulary)), matrix.plain) - runtime.deal(shape)
    return Secret(total, matrix.scale, size, bits)
