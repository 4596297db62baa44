"""Products of wires: element-wise, squares, and matrix products. Nothing is opened here.

Owns the arithmetic of public parts, shared masks and dealt products of masks. With x = X - a and y = Y - b,
x y = X Y - X [b] - [a] Y + [a b]; the dealer knows a b, and deals it modulo the ring of the result.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crypten_llm.kernels.ring import broadcast
from crypten_llm.protocols.dealer.roles import Parts, Runtime
from crypten_llm.protocols.opening import Message
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire, masked
from crypten_llm.roles import CLIENT, OWNER


def check(bits: int, scale: int, width: int, what: str) -> None:
    """Raises Overflow, with the name ``what``, where |x| < 2^bits at ``scale`` does not fit a share of that width."""
    if bits + scale > width - 1:
        raise Overflow(f"{what}: |x| < 2^{bits} at scale 2^{scale} does not fit a share valid modulo 2^{width}")


def multiply(runtime: Runtime, x: Wire, y: Wire, scale: int | None = None, bits: int | None = None) -> Secret:
    """x * y element-wise with broadcasting; local.

    Shapes: any two that broadcast. scale, bits: of the result, where the caller knows better than the sum of the
    factors' (a power of two that was chosen to bring x into a range).

    Error: none. Cost: dealer, for an element of the result, the w bits of its ring; and where a factor was lifted from
    n bits, w - n, where both were, also w - n - n'.
    Raises: Overflow when the declared result does not fit the narrower of the two widths.
    Source: Beaver (CRYPTO 1991), with the factors' openings shared by all products as in Turbospeedz (ACNS 2019).
    """
    shape = broadcast(x.shape, y.shape)
    scale = x.scale + y.scale if scale is None else scale
    bits, width = x.bits + y.bits if bits is None else bits, min(x.width, y.width)
    check(bits, scale, width, "product")
    pairs = [
        (sign, coefficients, runtime.deal(shape, functools.partial(operator.mul, left.held, right.held), width - up))
        for sign, coefficients, up, left, right in _pairs(x, y)
        if up < width
    ]

    def share() -> Tensor:  # X share(y) + masked(x) Y + the products of masks
        total = x.seen * runtime.plus(masked(y), y.seen)
        total.addcmul_(masked(x), y.seen)
        for sign, coefficients, pair in pairs:
            _add_times(total, sign, coefficients, pair.held)
        return total

    return Secret(runtime.share(shape, share), scale, width, bits)


def _pairs(x: Wire, y: Wire) -> Iterator[tuple[int, list[Tensor | None], int, Parts, Parts]]:
    """The products of what two wires' masks are made of: its sign, its public coefficients, the power of two that
    these have in common, and the two factors."""
    yield 1, [], 0, x.mask, y.mask
    if y.wrap is not None:
        yield -1, [y.wrap.coefficient], y.wrap.size, x.mask, y.wrap.bit
    if x.wrap is not None:
        yield -1, [x.wrap.coefficient], x.wrap.size, x.wrap.bit, y.mask
    if x.wrap is not None and y.wrap is not None:
        size = x.wrap.size + y.wrap.size
        yield 1, [x.wrap.coefficient, y.wrap.coefficient], size, x.wrap.bit, y.wrap.bit


def _add_times(total: Tensor, sign: int, coefficients: Sequence[Tensor | None], pair: Tensor) -> None:
    """total += sign * the coefficients * pair."""
    known = [coefficient for coefficient in coefficients if coefficient is not None]
    if not known:
        total += pair
    else:
        total.addcmul_(functools.reduce(operator.mul, known), pair, value=sign)


def square(runtime: Runtime, x: Wire) -> Secret:
    """x^2 element-wise; local.

    Error: none. Cost: dealer the w bits of x's ring an element, and w - n - 1 where it was lifted from n bits.
    Raises: Overflow when the declared result does not fit the width.
    """
    check(2 * x.bits, 2 * x.scale, x.width, "square")
    rest = _square_without_first(runtime, x)
    squared = runtime.deal(x.shape, lambda: x.mask.held * x.mask.held, x.width)
    total = runtime.share(x.shape, lambda: rest() + squared.held)
    return Secret(total, 2 * x.scale, x.width, 2 * x.bits)


def sum_of_squares(runtime: Runtime, x: Wire, bits: int) -> Secret:
    """Sum of x^2 over the last dimension, kept as 1; local.

    bits: the sum is below 2^bits by the caller's word, which is not checked against the number of terms.
    Error: none. Cost: dealer the w bits of x's ring a row, and w - n - 1 an element that was lifted from n bits.
    Raises: Overflow when 2^bits does not fit the width.
    """
    check(bits, 2 * x.scale, x.width, "sum of squares")
    rest = _square_without_first(runtime, x)
    shape = (*x.shape[:-1], 1)
    squared = runtime.deal(shape, lambda: (x.mask.held * x.mask.held).sum(-1, keepdim=True), x.width)
    total = runtime.share(shape, lambda: rest().sum(-1, keepdim=True) + squared.held)
    return Secret(total, 2 * x.scale, x.width, bits)


def _square_without_first(runtime: Runtime, x: Wire) -> Callable[[], Tensor]:
    """Gives x^2 but for the square of the mask; what is added where that has wrapped is a bit, its own square."""
    wrap, pair = x.wrap, None
    if wrap is not None:  # of 2 * 2^size * bit * mask
        bit = wrap.bit.held
        pair = runtime.deal(x.shape, lambda: bit * x.mask.held, x.width - wrap.size - 1)

    def share() -> Tensor:
        public = x.seen
        total = runtime.plus(2 * public * masked(x), lambda: public * public)
        if wrap is not None and pair is not None:
            assert wrap.coefficient is not None, "parties have opened it"
            total += wrap.coefficient * (wrap.coefficient * wrap.bit.held - 2 * pair.held)
        return total

    return share


@dataclass
class Operand:
    """A exact wire folded for the right side of matrix products.

    public: Y (``None`` at the dealer). own: what this role multiplies X by: Y - b0 at the owner, -b1 at the client; at
    the dealer the mask b itself. Folding once lets a cached row serve every later product as it is.
    """

    public: Tensor | None
    own: Tensor
    scale: int
    width: int
    bits: int

    @property
    def shape(self) -> torch.Size:
        return self.own.shape


def fold(runtime: Runtime, wire: Wire) -> Operand:
    """``wire``, which must be narrow, as an ``Operand``; local."""
    assert wire.wrap is None, "matrix products take exact wires"
    return Operand(wire.public, _turned(runtime, wire.public, wire.mask.held), wire.scale, wire.width, wire.bits)


def unfold(runtime: Runtime, operand: Operand) -> Wire:
    """The wire that ``fold`` made an operand of; local."""
    mask = Parts(_turned(runtime, operand.public, operand.own))
    return Wire(operand.public, mask, operand.scale, operand.width, operand.bits)


def _turned(runtime: Runtime, public: Tensor | None, own: Tensor) -> Tensor:
    """A party's share of x from its part of the mask, or its part from its share; the dealer's mask as it is."""
    return own if public is None else runtime.plus(-own, public)


def matmul(runtime: Runtime, x: Wire, y: Wire | Operand, transposed: bool, bits: int) -> Secret:
    """x @ y, or x @ y.T when ``transposed``, of two exact wires; local.

    Shapes: [..., M, K] by [..., K, N] or [..., N, K], the same batch, to [..., M, N]. bits: as in ``sum_of_squares``.
    Error: none. Cost: dealer the bits of the narrower ring an element of the result.
    Raises: Overflow when 2^bits does not fit the narrower width.
    """
    right = y if isinstance(y, Operand) else fold(runtime, y)
    assert x.wrap is None, "matrix products take exact wires"
    scale, width = x.scale + right.scale, min(x.width, right.width)
    check(bits, scale, width, "matrix product")
    product = runtime.kernels.matmul_nt if transposed else runtime.kernels.matmul_nn
    shape = (*x.shape[:-1], right.shape[-2] if transposed else right.shape[-1])
    dealt = runtime.deal(shape, lambda: product(x.mask.held, right.own), width)

    def share() -> Tensor:  # the owner: X (Y - b0) - a0 Y + c0; the client: -X b1 - a1 Y + c1
        assert right.public is not None, "parties have opened both"
        return product(x.seen, right.own) - product(x.mask.held, right.public) + dealt.held

    return Secret(runtime.share(shape, share), scale, width, bits)


class OwnedMatrix:
    """A matrix that the owner knows: the owner's plain integers, and W - R at the client for a fixed mask R.

    The owner multiplies by small plain integers; the client's part of a product does not depend on what was opened.
    R comes from the owner's stream, uniform modulo 2^64 and used for this matrix alone, so W - R is uniform too.

    plain: at the owner, int32. hidden: W - R at the client. mask: R at the dealer.
    """

    def __init__(self, shape: Sequence[int], scale: int) -> None:
        self.shape, self.scale = torch.Size(shape), scale
        self.plain: Tensor | None = None
        self.hidden: Tensor | None = None
        self.mask: Tensor | None = None


def own(runtime: Runtime, value: Tensor | None, shape: Sequence[int], scale: int) -> Protocol[OwnedMatrix]:
    """An ``OwnedMatrix``. value: float [out, in] at the owner, ``None`` elsewhere.

    Cost: the owner sends the client 8 bytes an element, once.
    Raises: Overflow for a weight that does not fit 32 bits.
    """
    made = OwnedMatrix(shape, scale)
    mask = runtime.mask_of(OWNER, shape)
    words = None
    if value is not None:
        scaled = (value.double() * 2**scale).round()
        if not scaled.abs().max() < 2**31:  # nor NaN
            raise Overflow(f"a weight of {value.abs().max():.3g} does not fit 32 bits at scale 2^{scale}")
        assert mask is not None, "the owner draws the mask of its weights"
        words, made.plain = scaled.long() - mask, scaled.to(torch.int32)
    (made.hidden,) = yield [Message(OWNER, tuple(shape), 64, words)]
    made.mask = runtime.known_to_dealer(mask)
    return made


def linear(runtime: Runtime, x: Wire, matrix: OwnedMatrix, bits: int) -> Secret:
    """x @ W.T for a exact wire [T, in] and the owner's W [out, in]; local.

    The owner computes (X - a0) W, the client -a1 (W - R), and the dealer shares a1 R, masked afresh for every product.
    bits: as in ``sum_of_squares``. Error: none.
    Cost: dealer the bits of x's ring an element of the result; one product with plain weights at the owner, one of
    64-bit words at the client and at the dealer, neither of which needs the opening.
    Raises: Overflow when 2^bits does not fit the width.
    """
    shape = (*x.shape[:-1], matrix.shape[0])
    return _by_owned(runtime, x, matrix, bits, shape, runtime.kernels.matmul_nt, "linear layer")


def lookup(runtime: Runtime, ids: Tensor | None, count: int, matrix: OwnedMatrix, bits: int) -> Protocol[Secret]:
    """Rows of the owner's [V, H] for token ids that only the client holds; ids is ``None`` elsewhere.

    Reveals: one-hot rows plus a uniform mask, to the owner.
    Error: none. Cost: 4 bytes for each of count * V words to the owner; dealer 32 bits an element of the result.
    """
    vocabulary, hidden = matrix.shape
    width, product = 32, runtime.kernels.matmul_nn
    check(bits, matrix.scale, width, "embedding")
    mask = runtime.mask_of(CLIENT, (count, vocabulary))
    hot = None
    if ids is not None:
        assert mask is not None, "the client draws the mask of its tokens"
        assert len(ids) == count, f"{len(ids)} token ids, {count} announced"
        for token in ids.tolist():
            if not 0 <= token < vocabulary:
                raise ValueError(f"token id {token} is not in a vocabulary of {vocabulary}")
        hot = mask.clone()
        hot[torch.arange(count), ids] += 1
    (seen,) = yield [Message(CLIENT, (count, vocabulary), width, hot)]

    def masks() -> Tensor:
        assert mask is not None and matrix.mask is not None, "the dealer knows both masks"
        return product(mask, matrix.mask)

    def owner() -> Tensor:
        assert matrix.plain is not None, "the owner has the table"
        return product(seen, matrix.plain) - dealt

    def client() -> Tensor:
        assert mask is not None and matrix.hidden is not None, "the client was sent the hidden table"
        return -product(mask, matrix.hidden) - dealt

    shape = (count, hidden)
    dealt = runtime.deal(shape, masks, width).held
    return Secret(runtime.share(shape, owner, client), matrix.scale, width, bits)


def times_owned(runtime: Runtime, x: Wire, vector: OwnedMatrix, bits: int) -> Secret:
    """x * v along the last dimension for a exact wire [..., H] and the owner's v [H]; local.

    As ``linear``, element by element. Error: none. Cost: dealer the bits of x's ring an element.
    Raises: Overflow when 2^bits does not fit the width.
    """
    return _by_owned(runtime, x, vector, bits, x.shape, operator.mul, "product with a weight")


def _by_owned(
    runtime: Runtime,
    x: Wire,
    weight: OwnedMatrix,
    bits: int,
    shape: Sequence[int],
    product: Callable[[Tensor, Tensor], Tensor],
    what: str,
) -> Secret:
    """``product``, which is linear in both, of a exact wire and the owner's weight: [...] to ``shape``."""
    assert x.wrap is None, "products with the owner's weights take exact wires"
    scale = x.scale + weight.scale
    check(bits, scale, x.width, what)

    def masks() -> Tensor:
        part = x.mask.client
        assert part is not None and weight.mask is not None, "the dealer knows both masks"
        return product(part, weight.mask)

    def owner() -> Tensor:
        assert weight.plain is not None, "the owner has the weights"
        return product(x.seen - x.mask.held, weight.plain) - dealt

    def client() -> Tensor:
        assert weight.hidden is not None, "the client was sent the hidden weights"
        return -product(x.mask.held, weight.hidden) - dealt

    dealt = runtime.deal(shape, masks, x.width).held
    return Secret(runtime.share(shape, owner, client), scale, x.width, bits)
