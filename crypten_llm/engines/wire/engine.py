"""Engine ``wire``: two parties and a dealer, every secret of a layer opened at most once.

Owns the plan of a Llama on wires: its inputs, its layers, and what is shown in the end. What travels together is said
in ``wire_openings``, attention is in ``wire_attention``, and what eviction policies are handed beside it is in
``wire_arithmetic``, ``wire_selection`` and ``wire_eviction``. How far each operation may be from ``plain`` on the same
inputs is declared in ``wire_bounds``.
"""

import math

import torch

from crypten_llm.engines.wire import bounds as wire_bounds
from crypten_llm.engines.wire.eviction import Eviction
from crypten_llm.engines.wire.handles import Normed, OneHot, Reshaped, Scaled, Weight
from crypten_llm.engines.wire.numbers import ROW_BITS, SQUARES_BITS, SQUARES_SEGMENTS
from crypten_llm.errors import UsageError
from crypten_llm.kernels import ring
from crypten_llm.protocols import fourier, products
from crypten_llm.protocols.dealer.roles import DEALER, PARTY0
from crypten_llm.protocols.dealer.shapes import shape_only
from crypten_llm.protocols.normalize import normalize
from crypten_llm.protocols.opening import Opening, Overflow, Secret, as_secret

_REMEDIES = {  # the same model, or a smaller promise, within the range
    "softmax of a row": "try a lower max_position_embeddings, to which rows are continued, or ",
    "mix": "divide v_proj by a power of two and multiply o_proj by it, or ",
}


class WireEngine(Eviction):
    """All operations of one role."""

    # Inputs.

    def calibrate(self, config, weights):
        from crypten_llm.session.calibration import measure  # runs the model definition, which is above engines

        domains = wire_bounds.domains(self.config)
        for operation, (lowest, highest) in measure(config, weights).limited.items():
            what, low, high = domains[operation]
            # The other parties are told why this one stops, so the message holds no measured number.
            if not low <= lowest <= highest <= high:
                raise UsageError(
                    f"this model's {what} leave the range of engine 'wire', {low:.3g} to {high:.3g}, on random "
                    f"tokens; {_REMEDIES.get(operation, '')}use engine 'crypten'"
                )
        return {}

    def parameter(self, value, shape):
        return Weight(value if self.rank == PARTY0 else None, shape)

    def tokens(self, ids, count, vocab_size):
        return OneHot(ids, count, vocab_size)

    def secret(self, value, shape, source):
        scale, bits = self.config.activation, self.config.linear_bits
        if self.rank == DEALER:
            return Secret(shape_only(shape), scale, 64, bits)
        share = torch.zeros(tuple(shape), dtype=torch.int64)  # nothing is sent: a share of zero at the other party
        if self.rank == source:
            share = (value.double() * 2**scale).round().long()
        return Secret(share, scale, 64, bits)

    # Layers.

    def prepare(self, weight, norm=None):
        self._matrix(weight, norm)

    def _matrix(self, weight: Weight, gamma: Weight | None = None):
        """The owner's matrix as an operand, made once: W, or W * diag(gamma) * sqrt(H) after a norm."""
        if gamma not in weight.matrices:
            value = weight.value
            if value is not None and gamma is not None:
                value = value * gamma.value * math.sqrt(weight.shape[1])
            weight.matrices[gamma] = products.OwnedMatrix(self.runtime, value, weight.shape, self.config.weight)
        return weight.matrices[gamma]

    def embed(self, one_hot, weight):
        """Error: half a unit of the table (``wire_bounds.embed``)."""
        return products.lookup(self.runtime, one_hot.ids, one_hot.count, self._matrix(weight), bits=6)

    def linear(self, x, weight, bias=None):
        """Error: a unit of x, half a unit of the weights; after a norm also a unit of the product (``wire_bounds``)."""
        if isinstance(x, Normed):
            return self._linear_of_norm(x, weight, bias)
        x = self._value(x)
        (wire,) = self._open(self._narrow(x, self.config.weight))
        out = products.linear(self.runtime, wire, self._matrix(weight), self.config.linear_bits)
        self._add_bias(out, bias)
        return out

    def _linear_of_norm(self, x: Normed, weight: Weight, bias):
        """Unit rows times W * gamma * sqrt(H); the root is multiplied in later, or first where the output is large."""
        hidden = x.shape[-1]
        matrix = self._matrix(weight, x.gamma)
        f = self.config.activation + round(math.log2(hidden) / 2)
        if weight.shape[0] > 4 * hidden:
            if "whole" not in x.wires:
                unit, root = self._open(self._lifted(x.unit, f), self._lifted(x.root, ROW_BITS))
                whole = products.multiply(self.runtime, unit, root, bits=1)
                (x.wires["whole"],) = self._open(self._narrow(whole, f))
            out = products.linear(self.runtime, x.wires["whole"], matrix, self.config.linear_bits)
            self._add_bias(out, bias)
            return out
        if "unit" not in x.wires:
            (x.wires["unit"],) = self._open(self._narrow(x.unit, f))
        raw = products.linear(self.runtime, x.wires["unit"], matrix, self.config.linear_bits)
        out = Scaled(raw, x.root, bias)
        self._waiting.append(out)
        return out

    def rms_norm(self, x, weight, eps, scale):
        """Error: a unit of x over its root mean square (``wire_bounds.rms_norm``); the root is good to 1e-5."""
        hidden, f = x.shape[-1], self.config.activation
        (wire,) = self._open(self._lifted(x, f))
        x.become(as_secret(self.runtime, wire))  # the opening lifted the residual too
        top, segments = SQUARES_BITS, SQUARES_SEGMENTS
        total = products.sum_of_squares(self.runtime, wire, bits=top - 2 * f)
        if self.rank == PARTY0:
            total.share = total.share + round(eps * hidden * 2**total.scale)
        (square,) = self._open(Opening(total, ring=top + 1, function=True))
        scaled, power = normalize(self.runtime, square, top, segments, [2**k for k in range(segments)])
        unit_wire, power_wire = self._open(Opening(scaled, ring=top + 1, function=True), Opening(power))
        root = fourier.evaluate(self.runtime, unit_wire, fourier.inverse_root(), fraction=22, bits=2)
        unit = products.multiply(self.runtime, wire, power_wire, scale=top // 2, bits=1)  # of norm below one
        return Normed(unit, root, weight, {})

    def swiglu(self, gate, up):
        """Error: the fit's, and a unit of 16 bits of silu and of ``up`` (``wire_bounds.swiglu``)."""
        f, function = self.config.activation + 2, fourier.silu_even()
        self._settle(raw_bits=f, root_bits=ROW_BITS)
        gate, up = self._value(gate), self._value(up)
        gate_wire, up_wire = self._open(
            Opening(gate, ring=gate.scale + function.period, function=True), self._lifted(up, f)
        )
        activated = fourier.evaluate(self.runtime, gate_wire, function, fraction=22, bits=5)
        half = activated.scale - gate.scale - 1  # x / 2, valid where the gate's share is
        if self.rank != DEALER:
            activated.share = activated.share + (gate.share << half)
        activated.width = min(activated.width, gate.width + half)
        (activated_wire,) = self._open(self._lifted(activated, 16))
        return products.multiply(self.runtime, activated_wire, up_wire, bits=self.config.linear_bits + 1)

    def matmul(self, x, y):
        raise Overflow("engine wire multiplies through scores and mix, whose operands it keeps as wires")

    # The end.

    def open_to(self, x, rank):
        """The other party sends its share without the bits below the ``shown_bits``th: they would show how the value
        was computed, such as a factor that all logits have in common.

        Reveals: to ``rank``, x rounded to ``shown_bits`` fractional bits. Error: half a unit of them.
        Cost: 1 round of l - d bits an element one way, for a ring of l bits and d bits dropped.
        """
        source = x.source if isinstance(x, Reshaped) else x
        if isinstance(source, Scaled) and source.value is None:
            self._settle(*self.shown_factors)
        x = self._value(x)
        cut = max(0, x.scale - self.shown_bits)
        width = x.width - cut
        size = ring.packed_size(x.share.numel(), width)
        if self.rank == DEALER:
            self.runtime.overhear(size, sender=1 - rank)
            return None
        if self.rank != rank:
            self.transport.send(rank, ring.pack(ring.low_bits(x.share >> cut, width), width))
            return None
        other = ring.unpack(self.transport.recv(1 - rank, (size,), torch.uint8), width, x.shape)
        value = self._shown(x.share, other, cut, x.width)
        return value.double().div(2.0**x.scale).to(self.shown_dtype)

    def _shown(self, share, other, cut: int, width: int):
        """The signed integers behind both shares, the other of which came without its ``cut`` low bits."""
        value = ring.low_bits(share + (other << cut) + ((1 << cut) >> 1), width)
        return value if width == 64 else value - (ring.top_bit(value, width) << width)
