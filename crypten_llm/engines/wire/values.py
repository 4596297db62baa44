"""Values of engine ``wire`` on their way: what is behind a handle, and what to open of it.

Owns the openings that operations have in common. Products of a norm's output wait until somebody needs them
(``handles.Scaled``), so that all of them travel together.
"""

from crypten_llm.engines.wire.handles import Normed, Scaled, Weight
from crypten_llm.engines.wire.numbers import ROOM, ROW_BITS, whole_bytes
from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Opening, Overflow, Protocol, Secret, Wire, as_secret

# What to open.


def narrow(x: Secret, scale: int) -> Opening:
    """``x`` as a narrow wire with at most ``scale`` fractional bits."""
    return Opening(x, truncate=max(0, x.scale - scale))


def lifted(x: Secret, scale: int) -> Opening:
    """``x`` as a wire modulo 2^64 with at most ``scale`` fractional bits."""
    return Opening(x, truncate=max(0, x.scale - scale), lifted=x.scale > scale or x.width < 64)


def lifted_from_bytes(x: Secret, scale: int) -> Opening:
    """As ``lifted``, opened in the fewest whole bytes that hold the declared |x|."""
    size = min(x.width, whole_bytes(x.bits + x.scale + 2))
    return Opening(x, ring=size, truncate=max(0, x.scale - scale), lifted=True)


# What is behind a handle.


def value(engine, x) -> Protocol:
    """The shares behind a handle."""
    if isinstance(x, Secret):
        return x
    if isinstance(x, Normed):
        return (yield from whole(engine, x))
    if isinstance(x, Scaled):
        if x.value is None:
            yield from settle(engine, x.normed)
        return x.value
    return x.applied((yield from value(engine, x.source)))


def is_waiting(x) -> bool:
    """Whether a handle is a product, or a view of one, that has not been computed."""
    source = getattr(x, "source", x)
    return isinstance(source, Scaled) and source.value is None


def settle(engine, normed: Normed, raw_bits: int | None = None, root_bits: int | None = None) -> Protocol:
    """Computes every product of this norm that waits: one round for all of them.

    raw_bits, root_bits: fractional bits of the two factors. By default what keys have room for: their opening drops
    all but ``key`` of these and of the rotation's bits, and has to leave room for scores.
    """
    waiting, normed.waiting = normed.waiting, []
    raw_bits, root_bits = (bits or engine.config.activation + 1 for bits in (raw_bits, root_bits))
    *wires, root = yield [*(lifted(item.raw, raw_bits) for item in waiting), lifted(normed.root, root_bits)]
    for item, wire in zip(waiting, wires, strict=True):
        item.value = products.multiply(engine.runtime, wire, root, bits=engine.config.linear_bits)
        add_bias(engine, item.value, item.bias)


def whole_wire(engine, x: Normed) -> Protocol:
    """x / |x| as a narrow wire: the root multiplied in. Cost: 2 rounds, once."""
    if x.whole is None:
        f = x.fraction(engine.config)
        unit, root = yield [lifted(x.unit, f), lifted(x.root, ROW_BITS)]
        product = products.multiply(engine.runtime, unit, root, bits=1)
        (x.whole,) = yield [narrow(product, f)]
    return x.whole


def whole(engine, x: Normed) -> Protocol:
    """The norm's output itself, for what is no linear layer: its weight and sqrt(H) are multiplied in.

    Error: a unit of the normalised row, and half a unit of the weights, each times the other.
    Cost: 2 rounds, and of the owner's weight 8 bytes an element once; dealer the bits of the ring an element.
    """
    wire: Wire = yield from whole_wire(engine, x)
    gamma = yield from engine.matrix(x.gamma, scale=x.size**0.5)
    return products.times_owned(engine.runtime, wire, gamma, engine.config.linear_bits)


def add_bias(engine, x: Secret, bias: Weight | None) -> None:
    """x + bias, in its place."""
    if bias is not None:
        x.share = engine.runtime.plus(x.share, lambda: (bias.value.double() * 2**x.scale).round().long())


# Room.


def alike(engine, values: list[Secret], bits: int, what: str) -> Protocol:
    """The same values at one scale, in rings with room for numbers below 2^bits; else ``roomy``."""
    made = []
    for x in values:
        made.append((yield from roomy(engine, x, max(0, bits - x.bits), what)))
    scale = max(x.scale for x in made)
    return [x.at_scale(scale) for x in made]


def roomy(engine, x: Secret, growth: int, what: str, width: int = 0) -> Protocol:
    """x, or x opened to 64 bits where its ring has no room for ``growth`` bits more and an opening's offset.

    Error: none, or a unit of ``ROOM`` bits. Cost: none, or 1 round with x and 128 dealer bits an element.
    Raises: Overflow, with the name ``what``, where x does not fit its ring or the result 64 bits.
    """
    if x.bits + growth + x.scale + 2 <= x.width and width <= x.width:
        return x
    if x.bits + x.scale + 2 > x.width:
        raise Overflow(f"{what}: |x| < 2^{x.bits} at scale 2^{x.scale} does not fit a share valid modulo 2^{x.width}")
    (wire,) = yield [lifted_from_bytes(x, ROOM)]
    made = as_secret(engine.runtime, wire)
    if made.bits + growth + made.scale + 2 > 64:
        raise Overflow(f"{what}: a result below 2^{x.bits + growth} does not fit 64 bits at scale 2^{made.scale}")
    x.become(made)
    return x
