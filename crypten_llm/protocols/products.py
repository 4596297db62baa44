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
from crypten_llm.protocols.dealer.runtime import Parts, Runtime
from crypten_llm.protocols.opening import Message
from crypten_llm.protocols.rounds import Protocol
from crypten_llm.protocols.secret import Overflow, Secret, Wire, masked
from crypten_llm.roles import OWNER


def check(bits: int, scale: int, width: int, what: str) -> None:
    """Raises Overflow, with the name ``what``, where |x| < 2^bits at ``scale`` does not fit a share of that width."""
    if bits + scale > width - 1:
        raise Overflow(f"{what}: |x| < 2^{bits} at scale 2^{scale} does not fit a share valid modulo 2^{width}")


NARROW = 32  # bits of a ring whose products are of int32
MANY = 8  # rows from which a cached operand is worth turning into int32
GUARD = 4  # bits that are dealt of those that will be dropped: each dealt product moves a result by a 32nd of its unit


def _dealt(
    runtime: Runtime,
    shape: Sequence[int],
    value: Callable[[], Tensor],
    bits: int,
    dropped: int = 0,
    visible: Tensor | None = None,
) -> Callable[[], Tensor]:
    """Gives this party's shares of ``value()``, without the low bits of ``dropped`` that will not be missed, and where
    ``visible``, a public mask of that shape, says that they are needed; zeros elsewhere.
    """
    cut = max(0, min(dropped - GUARD, bits - 1))

    def short() -> Tensor:
        found = value() if places is None else value()[places]
        return (found + ((1 << cut) >> 1)) >> cut if cut else found

    count, places = shape, visible
    if visible is not None:
        count, places = (int(visible.sum()),), runtime.moved(visible)
    held = runtime.deal(count, short, bits - cut).held

    def shares() -> Tensor:
        if places is None:
            return held << cut if cut else held
        found = held.new_zeros(tuple(shape))
        found[places] = held << cut
        return found

    return shares


def multiply(
    runtime: Runtime, x: Wire, y: Wire, scale: int | None = None, bits: int | None = None, dropped: int = 0
) -> Secret:
    """x * y element-wise with broadcasting; local.

    Shapes: any two that broadcast. scale, bits: of the result, where the caller knows better than the sum of the
    factors' (a power of two that was chosen to bring x into a range). dropped: low bits that the caller will drop.

    Error: none; where bits are dropped a 32nd of a unit of what is left for each product that is dealt, of which there
    are one, two with a lifted factor, four with two.
    Cost: dealer, for an element of the result, the w bits of its ring; and where a factor was lifted from n bits,
    w - n, where both were, also w - n - n'. Of each d - 4 bits less where d are dropped.
    Raises: Overflow when the declared result does not fit the narrower of the two widths.
    Source: Beaver (CRYPTO 1991), with the factors' openings shared by all products as in Turbospeedz (ACNS 2019).
    """
    shape = broadcast(x.shape, y.shape)
    scale = x.scale + y.scale if scale is None else scale
    bits, width = x.bits + y.bits if bits is None else bits, min(x.width, y.width)
    check(bits, scale, width, "product")
    pairs = [
        (
            sign,
            coefficients,
            _dealt(runtime, shape, functools.partial(operator.mul, left.held, right.held), width - up, dropped - up),
        )
        for sign, coefficients, up, left, right in _pairs(x, y)
        if up < width
    ]

    def share() -> Tensor:  # X share(y) + masked(x) Y + the products of masks
        total = x.seen * runtime.plus(masked(y), y.seen)
        total.addcmul_(masked(x), y.seen)
        for sign, coefficients, pair in pairs:
            _add_times(total, sign, coefficients, pair())
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


def matmul(
    runtime: Runtime,
    x: Wire,
    y: Wire | Operand,
    transposed: bool,
    bits: int,
    dropped: int = 0,
    visible: Tensor | None = None,
) -> Secret:
    """x @ y, or x @ y.T when ``transposed``, of two exact wires; local.

    Shapes: [..., M, K] by [..., K, N] or [..., N, K], the same batch, to [..., M, N]. bits: as in ``sum_of_squares``.
    dropped: as in ``multiply``. visible: public bool [..., M, N], entries that will be read; others are garbage.
    Error: none, or as ``multiply``'s. Cost: dealer the bits of the narrower ring an element of the result, or those
    that are not dropped and 4.
    Raises: Overflow when 2^bits does not fit the narrower width.
    """
    right = y if isinstance(y, Operand) else fold(runtime, y)
    assert x.wrap is None, "matrix products take exact wires"
    scale, width = x.scale + right.scale, min(x.width, right.width)
    check(bits, scale, width, "matrix product")
    product = runtime.kernels.matmul_nt if transposed else runtime.kernels.matmul_nn
    shape = (*x.shape[:-1], right.shape[-2] if transposed else right.shape[-1])
    fit = functools.partial(fitted, width=width if x.shape[-2] >= MANY else 64)
    dealt = _dealt(runtime, shape, lambda: product(fit(x.mask.held), fit(right.own)), width, dropped, visible)

    def share() -> Tensor:  # the owner: X (Y - b0) - a0 Y + c0; the client: -X b1 - a1 Y + c1
        assert right.public is not None, "parties have opened both"
        return product(fit(x.seen), fit(right.own)) - product(fit(x.mask.held), fit(right.public)) + dealt()

    return Secret(runtime.share(shape, share), scale, width, bits)


def fitted(words: Tensor, width: int) -> Tensor:
    """Words for products modulo 2^width: int32 where that is enough, at a third to a sixth of the time."""
    return words if width > NARROW or words.is_meta else words.to(torch.int32)


class OwnedMatrix:
    """A matrix that the owner knows: the owner's plain integers, and W - R at the client for a fixed mask R.

    The owner multiplies by small plain integers; the client's part of a product does not depend on what was opened.
    R comes from the owner's stream, uniform modulo 2^64 and used for this matrix alone, so W - R is uniform too.

    plain: at the owner, int32. hidden: W - R at the client. mask: R at the dealer. bits: of the rings in which these
    are used; both are int32 up to 32 of them.
    """

    def __init__(self, shape: Sequence[int], scale: int, bits: int) -> None:
        self.shape, self.scale, self.bits = torch.Size(shape), scale, bits
        self.plain: Tensor | None = None
        self.hidden: Tensor | None = None
        self.mask: Tensor | None = None


def own(
    runtime: Runtime,
    value: Tensor | None,
    shape: Sequence[int],
    scale: int,
    bits: int = 64,
    factors: float | Tensor = 1.0,
) -> Protocol[OwnedMatrix]:
    """An ``OwnedMatrix``. value: float [out, in] at the owner, ``None`` elsewhere. bits: of the rings it is used in.
    factors: multiplied in by the owner, a number or one for each column [in].

    Cost: the owner sends the client ``bits`` an element, once.
    Raises: Overflow for a weight that does not fit 32 bits.
    """
    made = OwnedMatrix(shape, scale, bits)
    mask = runtime.mask_of(OWNER, shape)
    words = None
    if value is not None:
        assert mask is not None, "the owner draws the mask of its weights"
        words, made.plain = mask, torch.empty(tuple(shape), dtype=torch.int32, device=runtime.device)
        factors = runtime.moved(factors) if isinstance(factors, Tensor) else factors
        for rows in row_blocks(value):
            scaled = (runtime.moved(value[rows]).double() * factors).mul_(2**scale).round_()
            largest = scaled.abs().max()
            if not largest < 2**31:  # nor NaN
                raise Overflow(f"a weight of {largest / 2**scale:.3g} does not fit 32 bits at scale 2^{scale}")
            made.plain[rows] = scaled
            words[rows] = scaled.long() - mask[rows]  # in the place of R, which is of no more use here
    (hidden,) = yield [Message(OWNER, tuple(shape), bits, words)]
    mask = runtime.known_to_dealer(mask)
    made.hidden, made.mask = (None if part is None else fitted(part, bits) for part in (hidden, mask))
    return made


BLOCK = 1 << 18  # elements that are made integers at a time: a few copies of them fit a core's cache


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Stretches of rows, so that what is computed of a large matrix takes no copies of the whole of it."""
    size = max(1, BLOCK // max(1, matrix[:1].numel()))
    for start in range(0, matrix.shape[0], size):
        yield slice(start, start + size)


def row_lengths(matrix: Tensor, factors: Tensor) -> Tensor:
    """Lengths [out], float64, of the rows of matrix * factors: float [out, in] and one for each column."""
    return torch.cat([(matrix[rows].double() * factors).norm(dim=1) for rows in row_blocks(matrix)])


def linear(runtime: Runtime, x: Wire, matrix: OwnedMatrix, bits: int, dropped: int = 0) -> Secret:
    """x @ W.T for a exact wire [T, in] and the owner's W [out, in]; local.

    The owner computes (X - a0) W, the client -a1 (W - R), and the dealer shares a1 R, masked afresh for every product.
    bits: as in ``sum_of_squares``. dropped: as in ``multiply``. Error: none, or as ``multiply``'s.
    Cost: dealer the bits of x's ring an element of the result, or those that are not dropped and 4; one product with
    plain weights at the owner, one of 64-bit words at the client and at the dealer, neither of which needs the opening.
    Raises: Overflow when 2^bits does not fit the width.
    """
    shape = (*x.shape[:-1], matrix.shape[0])
    return _by_owned(runtime, x, matrix, bits, shape, runtime.kernels.matmul_nt, "linear layer", dropped)


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
    dropped: int = 0,
) -> Secret:
    """``product``, which is linear in both, of a exact wire and the owner's weight: [...] to ``shape``."""
    assert x.wrap is None, "products with the owner's weights take exact wires"
    scale, width = x.scale + weight.scale, min(x.width, weight.bits)
    check(bits, scale, width, what)
    fit = functools.partial(fitted, width=weight.bits)  # as the weight is

    def masks() -> Tensor:
        part = x.mask.client
        assert part is not None and weight.mask is not None, "the dealer knows both masks"
        return product(fit(part), weight.mask)

    def owner() -> Tensor:
        assert weight.plain is not None, "the owner has the weights"
        return product(fit(x.seen - x.mask.held), weight.plain) - dealt()

    def client() -> Tensor:
        assert weight.hidden is not None, "the client was sent the hidden weights"
        return -product(fit(x.mask.held), weight.hidden) - dealt()

    dealt = _dealt(runtime, shape, masks, width, dropped)
    return Secret(runtime.share(shape, owner, client), scale, width, bits)
