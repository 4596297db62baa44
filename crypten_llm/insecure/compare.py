"""Engine ``compare``: ``wire`` that opens everything and holds each operation against ``plain`` on the same inputs.

INSECURE by purpose: the client's role learns every intermediate value. For one machine, and for debugging alone.

Owns the comparison of what is not attention, which is in ``compare_selection``. Each operation runs as in ``wire``; its
inputs, as the shares stand for them, and its output are shown through ``reveal``, and ``plain`` computes what the
output should have been. So an error is an operation's own, whatever went wrong before it.
"""

import math

import torch

from crypten_llm.engines.wire import bounds
from crypten_llm.engines.wire.handles import Normed
from crypten_llm.insecure.finding import worst
from crypten_llm.insecure.opened import OpenedEngine
from crypten_llm.insecure.tracked import TrackedSelection


class CompareEngine(TrackedSelection, OpenedEngine):
    """``findings``, at the client: every operation in order."""

    name = "compare"
    shown_what = "inputs and outputs of every operation"
    shown_why = "debug-compare: nothing is private"

    def __init__(self, transport, weights: list):
        """weights: an empty list that the three roles share; the owner's values are put there for the client."""
        super().__init__(transport)
        self._weights = weights
        self._indices: dict[int, int] = {}

    def _plain_weight(self, weight) -> torch.Tensor:
        """At the client. The owner put it there before it sent the client its first matrix."""
        return self._weights[self._indices[id(weight)]].double()

    def _note(self, operation: str, seen, expected, bound, outside: str = "") -> None:
        self.findings.append(worst(self.meter.where, operation, seen, expected, bound, outside))

    # Operations.

    def calibrate(self, config, weights):
        return {}  # a model outside wire's domain is not refused: it is found where it leaves it

    def parameter(self, value, shape):
        weight = super().parameter(value, shape)
        self._indices[id(weight)] = len(self._indices)
        if value is not None:
            self._weights.append(value)
        return weight

    def embed(self, one_hot, weight):
        out = super().embed(one_hot, weight)
        seen = self.see(out)
        if self.is_shown:
            table = self._plain_weight(weight)
            self._note("embed", seen, table[one_hot.ids], bounds.embed(self.config))
        return out

    def linear(self, x, weight, bias=None):
        inputs = (self.see(x.unit), self.see(x.root)) if isinstance(x, Normed) else (self.see(x),)
        out = super().linear(x, weight, bias)
        seen = self.see(out)
        if not self.is_shown:
            return out
        matrix = self._plain_weight(weight)
        added = 0 if bias is None else self._plain_weight(bias)
        if isinstance(x, Normed):
            unit, root = inputs
            folded = matrix * self._plain_weight(x.gamma) * math.sqrt(x.shape[-1])
            bound = bounds.linear_of_norm(self.config, unit, root, folded, whole="whole" in x.wires)
            self._note("linear of a norm", seen, root * (unit @ folded.T) + added, bound)
        else:
            bound = bounds.linear(self.config, inputs[0], matrix)
            self._note("linear", seen, inputs[0] @ matrix.T + added, bound)
        return out

    def rms_norm(self, x, weight, eps, scale):
        before = self.see(x)
        out = super().rms_norm(x, weight, eps, scale)
        unit, root = self.see(out.unit), self.see(out.root)
        if self.is_shown:
            expected = self._plain.rms_norm(before, 1.0, eps, scale)
            seen = unit * root * math.sqrt(x.shape[-1])
            outside = bounds.outside(self.config, "rms_norm", before.square().sum(-1) + eps * x.shape[-1])
            self._note("rms_norm", seen, expected, bounds.rms_norm(self.config, before, expected), outside)
        return out

    def rotate(self, x, cos, sin):
        before = self.see(x)
        out = super().rotate(x, cos, sin)
        seen = self.see(out)
        if self.is_shown:
            expected = self._plain.rotate(before, cos.double(), sin.double())
            self._note("rotate", seen, expected, bounds.rotate(self.config, before))
        return out

    def swiglu(self, gate, up):
        gate_seen, up_seen = self.see(gate), self.see(up)
        out = super().swiglu(gate, up)
        seen = self.see(out)
        if self.is_shown:
            expected = self._plain.swiglu(gate_seen, up_seen)
            bound = bounds.swiglu(self.config, gate_seen, up_seen)
            self._note("swiglu", seen, expected, bound, bounds.outside(self.config, "swiglu", gate_seen))
        return out

    def residual(self, x, y):
        before = self.see(x), self.see(y)
        out = super().residual(x, y)
        seen = self.see(out)
        if self.is_shown:
            self._note("residual", seen, self._plain.residual(*before), bounds.residual(self.config))
        return out
