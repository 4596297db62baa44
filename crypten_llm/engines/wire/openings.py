"""What engine ``wire`` opens, and with what else: the base of its operations.

Owns the queue. Openings that do not depend on each other travel together, so products wait until somebody needs them
(``Scaled``), and new rows of the cache go along with the next message. Every operation opens through here.

Reveals, for every operation of the engine: openings behind fresh masks that are uniform over their ring, to both
parties, whose number and sizes follow from shapes, counts and settings.
"""

from contextlib import contextmanager

import torch

from crypten_llm.engines.base import Engine
from crypten_llm.engines.wire.handles import Scaled, Weight
from crypten_llm.engines.wire.numbers import ROOM, SHOWN, SHOWN_FACTORS, WireConfig, at_scale, whole_bytes
from crypten_llm.engines.wire.rows import Rows
from crypten_llm.protocols import products
from crypten_llm.protocols.dealer.roles import PARTY0, Runtime, agree_on_keys
from crypten_llm.protocols.opening import Opening, Overflow, Secret, Wire, as_secret, open_wires


class Openings(Engine):
    """One role over a connected transport: two parties and a dealer, or two parties with a tape each."""

    name = "wire"
    is_private = True
    layer_error = 0.01
    shown_dtype = torch.float32  # of values that are opened
    shown_bits, shown_factors = SHOWN, SHOWN_FACTORS  # fractional bits of them, and of what they are a product of

    def __init__(self, transport, config: WireConfig | None = None, material=None):
        """config: the defaults unless given.

        material: a ``Tape``, or where a dealer that runs alone writes; ``None`` where a dealer runs along.
        """
        self.transport = transport
        self.rank = transport.rank
        self.config = config or WireConfig()
        self.dealer_follows = material is None
        self._material = material
        keys = agree_on_keys(transport) if material is None else material.keys
        self.runtime = Runtime(transport.rank, transport, keys, material)
        self._waiting: list[Scaled] = []
        self._new_rows: list[Rows] = []

    @property
    def meter(self):
        return self.transport.meter

    @contextmanager
    def section(self, label):
        self.runtime.begin(label)
        yield
        self.runtime.end()  # not after an error, which leaves a section half done

    def expect(self, verb, facts, request):
        if self._material is not None:
            self._material.expect(verb, facts, request)

    # Messages.

    def _open(self, *openings: Opening) -> list[Wire]:
        """Opens these and everything that waits to be opened, in one round."""
        rows, self._new_rows = self._new_rows, []
        extra = [self._row_opening(row) for row in rows]
        wires = open_wires(self.runtime, [*openings, *extra])
        for row, wire in zip(rows, wires[len(openings) :], strict=True):
            if row.values and row.pending.scale > self.config.value:
                row.pending = as_secret(self.runtime, wire)
                self._new_rows.append(row)
            else:
                row.settle(products.fold(self.runtime, wire))
        return wires[: len(openings)]

    def _row_opening(self, row: Rows) -> Opening:
        """Values are not needed at once: a first opening brings them to their scale, a second makes them rows."""
        c, x = self.config, row.pending
        if not row.values:
            return Opening(x, truncate=x.scale - c.key)
        if x.scale > c.value:
            return self._lifted(x, c.value)
        return Opening(x, ring=min(x.width, c.mixed_width))

    def _flush(self, *parts: Rows) -> None:
        """Opens what waits, if any of these rows does; values may take two rounds."""
        while any(rows.pending is not None for rows in parts):
            self._open()

    def _settle(self, raw_bits: int | None = None, root_bits: int | None = None) -> None:
        """Computes every ``Scaled`` that waits: one round for all of them.

        raw_bits, root_bits: fractional bits of the two factors. By default what keys have room for: their opening drops
        all but ``key`` of these and of the rotation's bits, and has to leave room for scores.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        roots = list({id(item.root): item.root for item in waiting}.values())
        raw_bits, root_bits = (bits or self.config.activation + 1 for bits in (raw_bits, root_bits))
        openings = [self._lifted(item.raw, raw_bits) for item in waiting]
        openings += [self._lifted(root, root_bits) for root in roots]
        wires = self._open(*openings)
        by_root = {id(root): wire for root, wire in zip(roots, wires[len(waiting) :], strict=True)}
        for item, wire in zip(waiting, wires, strict=False):
            root = by_root[id(item.root)]
            item.value = products.multiply(self.runtime, wire, root, bits=self.config.linear_bits)
            self._add_bias(item.value, item.bias)

    # What to open.

    def _narrow(self, x: Secret, scale: int) -> Opening:
        """``x`` as a narrow wire with at most ``scale`` fractional bits."""
        return Opening(x, truncate=max(0, x.scale - scale))

    def _lifted(self, x: Secret, scale: int) -> Opening:
        """``x`` as a wire modulo 2^64 with at most ``scale`` fractional bits."""
        return Opening(x, truncate=max(0, x.scale - scale), lifted=x.scale > scale or x.width < 64)

    def _lifted_from_bytes(self, x: Secret, scale: int) -> Opening:
        """As ``_lifted``, opened in the fewest whole bytes that hold the declared |x|."""
        size = min(x.width, whole_bytes(x.bits + x.scale + 2))
        return Opening(x, ring=size, truncate=max(0, x.scale - scale), lifted=True)

    # Values.

    def _value(self, x) -> Secret:
        """The shares behind a handle."""
        if isinstance(x, Secret):
            return x
        if isinstance(x, Scaled):
            if x.value is None:
                self._settle()
            return x.value
        return x.applied(self._value(x.source))

    def _add_bias(self, x: Secret, bias: Weight | None) -> None:
        if bias is not None and self.rank == PARTY0:
            x.share = x.share + (bias.value.double() * 2**x.scale).round().long()

    def _alike(self, values: list[Secret], bits: int, what: str) -> list[Secret]:
        """The same values at one scale, in rings with room for numbers below 2^bits; else ``_roomy``."""
        values = [self._roomy(x, max(0, bits - x.bits), what) for x in values]
        scale = max(x.scale for x in values)
        return [at_scale(x, scale) for x in values]

    def _roomy(self, x: Secret, growth: int, what: str, width: int = 0) -> Secret:
        """x, or x opened to 64 bits where its ring has no room for ``growth`` bits more and an opening's offset.

        Error: none, or a unit of ``ROOM`` bits. Cost: none, or 1 round with x and 16 dealer bytes an element.
        Raises: Overflow, with the name ``what``, where x does not fit its ring or the result 64 bits.
        """
        if x.bits + growth + x.scale + 2 <= x.width and width <= x.width:
            return x
        if x.bits + x.scale + 2 > x.width:
            raise Overflow(
                f"{what}: |x| < 2^{x.bits} at scale 2^{x.scale} does not fit a share valid modulo 2^{x.width}"
            )
        (wire,) = self._open(self._lifted_from_bytes(x, ROOM))
        lifted = as_secret(self.runtime, wire)
        if lifted.bits + growth + lifted.scale + 2 > 64:
            raise Overflow(f"{what}: a result below 2^{x.bits + growth} does not fit 64 bits at scale 2^{lifted.scale}")
        x.become(lifted)
        return x
