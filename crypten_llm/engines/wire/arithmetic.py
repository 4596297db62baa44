"""Arithmetic of eviction policies on engine ``wire``: sums, public coefficients, products and functions.

Owns the operations of ``eviction.operations`` that neither compare nor move rows. "Local" operations send nothing where
the shares' ring has room for the result; else one opening moves x to 64 bits. Shapes are those of
``eviction.operations.Operations``; what is revealed is said in ``wire_openings``.
"""

import torch

from crypten_llm.engines.wire.handles import Picks
from crypten_llm.engines.wire.numbers import ENOUGH, FACTOR, as_units, bits_for, times
from crypten_llm.engines.wire.openings import Openings
from crypten_llm.kernels import ring
from crypten_llm.protocols import fourier, lookup, products
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.normalize import normalize
from crypten_llm.protocols.opening import Opening, Overflow, Secret, Wire


class Arithmetic(Openings):
    """Handles are ``Secret``s and what stands for one."""

    # Local: linear with public coefficients.

    def public(self, value: torch.Tensor) -> Secret:
        """Error: none for multiples of 2^-16, else half of that. Cost: none."""
        units, fraction = as_units(value, FACTOR)
        return lookup.public(self.runtime, units, fraction, bits_for(value.abs().max().item()) + 1)

    def add(self, x, y):
        """Error: none. Cost: none where the result fits their ring; else 1 round, see ``_roomy``."""
        x, y = self._value(x), self._value(y)
        return self._sum(x, y, max(x.bits, y.bits) + 1)

    def residual(self, x, y):
        """As ``add``; the hidden state is declared below 2^residual_bits, however many layers are added up."""
        x, y = self._value(x), self._value(y)
        return self._sum(x, y, min(self.config.residual_bits, max(x.bits, y.bits) + 1))

    def _sum(self, x: Secret, y: Secret, bits: int) -> Secret:
        x, y = self._alike([x, y], bits, "add")
        return Secret(x.share + y.share, x.scale, min(x.width, y.width), bits)

    def _join(self, handles: list, dim: int) -> Secret:
        """``cat`` of values. Error: none. Cost: as ``add``."""
        values = [self._value(x) for x in handles]
        bits = max(x.bits for x in values)
        values = self._alike(values, bits, "cat")
        joined = torch.cat([x.share for x in values], dim)
        rows = all(isinstance(x, Picks) for x in values) and dim % joined.ndim == joined.ndim - 2
        made = (Picks if rows else Secret)(joined, values[0].scale, min(x.width for x in values), bits)
        if rows and all(x.opened is not None for x in values):
            made.opened = _join_wires([x.opened for x in values], dim)
        return made

    def scale(self, x, factor):
        """Error: none for factors that are multiples of 2^-16, else 2^-17 of x, or more where x has little room left.

        Cost: none where the result fits x's ring; else 1 round, see ``_roomy``.
        """
        x, factor = self._value(x), torch.as_tensor(factor, dtype=torch.float64)
        growth = bits_for(factor.abs().max().item())
        x, units, fraction = self._with_units(x, factor, growth, "scale")
        return Secret(times(x.share, units), x.scale + fraction, x.width, x.bits + growth)

    def total(self, x, dim):
        """Error: none. Cost: none where the result fits x's ring; else 1 round, see ``_roomy``."""
        x = self._value(x)
        growth = bits_for(x.shape[dim])
        x = self._roomy(x, growth, "total")
        return Secret(x.share.sum(dim), x.scale, x.width, x.bits + growth)

    def transform(self, x, matrix):
        """Error and Cost: as ``scale``, with the largest column sum of magnitudes as the factor."""
        x, matrix = self._value(x), matrix.double()
        growth = bits_for(matrix.abs().sum(0).max().item())
        one_hot = isinstance(x, Picks) and _is_one_hot(matrix)
        growth = 0 if one_hot else growth
        x, units, fraction = self._with_units(x, matrix, growth, "transform")
        shape = (*x.shape[:-1], matrix.shape[1])

        def turned(t):
            if t.is_meta:
                return shape_only(shape)
            return ring.matmul_nn(t.reshape(-1, t.shape[-1]), units).view(shape)

        made = (Picks if one_hot else Secret)(turned(x.share), x.scale + fraction, x.width, x.bits + growth)
        if one_hot and x.opened is not None:
            made.opened = x.opened._map(turned)
        return made

    def within(self, x, limit):
        """Error: none. Cost: none."""
        x = self._value(x)
        return type(x)(x.share, x.scale, x.width, min(x.bits, bits_for(limit) + 1))

    def _with_units(self, x: Secret, factor: torch.Tensor, growth: int, what: str):
        """x with room for the product, the factor's integers and their fractional bits."""
        room = x.width - (x.bits + growth + x.scale + 2) - 2
        units, fraction = as_units(factor, FACTOR if room < ENOUGH else min(FACTOR, room))
        return self._roomy(x, growth + fraction, what), units, fraction

    # Two secrets, and functions.

    def multiply(self, x, y):
        """Error: a unit of ``activation`` bits of each factor, times the other.

        Cost: 1 round; each factor in a ring of whole bytes and 16 dealer bytes an element; dealer 32 bytes for each
        element of the result.
        """
        f = self.config.activation
        factors = self._value(x), self._value(y)
        openings = [Opening(v) if v.width == 64 and v.scale <= f else self._lifted_from_bytes(v, f) for v in factors]
        first, second = self._open(*openings)
        return products.multiply(self.runtime, first, second)

    def sigmoid(self, x):
        """Error: that of the fit, 3e-6, and ``fourier.rounding``. Cost: 1 round of 3 bytes; dealer 16 * modes bytes."""
        x, fit = self._value(x), fourier.stored("sigmoid")
        (wire,) = self._open(Opening(x, ring=x.scale + fit.period, function=True))
        return fourier.evaluate(self.runtime, wire, fit, fraction=22, bits=1)

    def reciprocal(self, x, low, high):
        """4^k / (x 4^k) with the secret k that brings x to [1/4, 1).

        Error: 2e-4 of the result (a unit of ``activation`` bits of 1 / (2 x 4^k)), beside what x's own unit makes.
        Cost: 3 rounds: x, then x 4^k and 4^k, then the reciprocal; dealer material of ``normalize``, of 10 modes and of
        one product.
        Raises: ValueError unless 0 < low <= high; Overflow when x's ring does not hold ``high``.
        """
        if not 0 < low <= high:
            raise ValueError(f"reciprocal: from {low:g} to {high:g}; give 0 < low <= high")
        x, f, fit = self._value(x), self.config.activation, fourier.reciprocal()
        top = bits_for(high) + x.scale + 1
        if top > x.width - 1 or top < 2:
            raise Overflow(
                f"reciprocal: values up to {high:g} at scale 2^{x.scale} do not fit a ring of {x.width} bits"
            )
        segments = min(top // 2 + 1, (bits_for(high) + 1 - bits_for(low) + 3) // 2 + 1)
        (wire,) = self._open(Opening(x, ring=top + 1, function=True))
        scaled, power = normalize(self.runtime, wire, top, segments, [4**k for k in range(segments)])
        doubled = Secret(scaled.share, top - 1, 64, 1)  # twice x 4^k / 2^top: 1/2 to 2
        unit_wire, power_wire = self._open(Opening(doubled, ring=top - 1 + fit.period, function=True), Opening(power))
        inverse = fourier.evaluate(self.runtime, unit_wire, fit, fraction=22, bits=2)
        (inverse_wire,) = self._open(Opening(inverse, truncate=inverse.scale - f, lifted=True))
        bits = 2 - bits_for(low)
        return products.multiply(self.runtime, inverse_wire, power_wire, scale=f + top - 1 - x.scale, bits=bits)


def _join_wires(wires: list[Wire], dim: int) -> Wire:
    public = None if wires[0].public is None else torch.cat([wire.public for wire in wires], dim)
    mask = torch.cat([wire.masks[0][1] for wire in wires], dim)
    first = wires[0]
    return Wire(public, [(-1, mask)], first.scale, min(wire.width for wire in wires), first.bits)


def _is_one_hot(matrix: torch.Tensor) -> bool:
    return bool(((matrix == 0) | (matrix == 1)).all() and (matrix.sum(1) <= 1).all())
