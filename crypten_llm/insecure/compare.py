"""Engine ``compare``: ``wire`` that opens everything and holds each operation against ``plain`` on the same inputs.

INSECURE by purpose: the client's role learns every intermediate value. For one machine, and for debugging alone.

Owns the comparison of what is not attention, which is in ``tracked``. Each operation runs as in ``wire``; its inputs,
as the shares stand for them, and its output are shown through ``reveal``, and ``plain`` computes what the output should
have been. So an error is an operation's own, whatever went wrong before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from crypten_llm.engines.domain import Calibration
from crypten_llm.engines.wire.handles import Normed, OneHot
from crypten_llm.engines.wire.layers import linear_bound
from crypten_llm.engines.wire.operations import bound_of, unit
from crypten_llm.insecure.finding import outside, worst
from crypten_llm.insecure.tracked import Tracked, TrackedEngine, doubled
from crypten_llm.protocols.secret import as_secret

if TYPE_CHECKING:
    from crypten_llm.links.transport import Transport
    from crypten_llm.session.calibration import Ranges
    from eviction.operations import Handle


class CompareEngine(TrackedEngine):
    """``findings``, at the client: every operation in order."""

    name = "compare"
    shown_what = "inputs and outputs of every operation"
    shown_why = "debug-compare: nothing is private"

    def __init__(self, transport: Transport, weights: list) -> None:
        """weights: an empty list that the three roles share; the owner's values are put there for the client."""
        super().__init__(transport)
        self._weights = weights
        self._indices: dict[int, int] = {}

    def _plain_weight(self, weight: Handle) -> torch.Tensor:
        """At the client. The owner put it there before it sent the client its first matrix."""
        return self._weights[self._indices[id(weight)]].double()

    def calibrate(self, measure: Callable[[], Ranges]) -> Calibration:
        return Calibration(self.name)  # a model outside wire's domain is not refused: it is found where it leaves it

    def parameter(self, value: torch.Tensor | None, shape: Sequence[int]) -> Handle:
        weight = super().parameter(value, shape)
        self._indices[id(weight)] = len(self._indices)
        if value is not None:
            self._weights.append(value)
        return weight

    def _exact(self, handle: Handle) -> Tracked:
        """A handle with what its shares stand for now."""
        seen = self.see(handle)
        return Tracked(handle, seen, None if seen is None else torch.zeros_like(seen))

    def _held(self, name: str, *arguments: Any) -> Handle:
        """An operation on handles, held on its own: the model goes on with the shares."""
        given = [self._exact(self.settled(a)) if hasattr(a, "shape") and not _is_public(a) else a for a in arguments]
        out = self._run(name, [], [a.secret if isinstance(a, Tracked) else a for a in given])
        made = self._exact(out)
        if self.is_shown:
            twin = getattr(self.twin, name)(*(a.value if isinstance(a, Tracked) else doubled(a) for a in given))
            bound = bound_of(name)(self, Tracked(out, twin, made.error), *given)
            left = self._outside(name, given, made)
            self.findings.append(worst(self.meter.where, name, made.value, twin, bound, left))
        return out

    # Operations.

    def rotate(self, x: Handle, cos: torch.Tensor, sin: torch.Tensor) -> Handle:
        return self._held("rotate", x, cos, sin)

    def swiglu(self, gate: Handle, up: Handle) -> Handle:
        return self._held("swiglu", gate, up)

    def residual(self, x: Handle, y: Handle) -> Handle:
        return self._held("residual", x, y)

    def embed(self, one_hot: OneHot, weight: Handle) -> Handle:
        out = super().embed(one_hot, weight)
        seen = self.see(out)
        if self.is_shown:
            expected = self._plain_weight(weight)[one_hot.ids]
            self.findings.append(
                worst(self.meter.where, "embed", seen, expected, bound_of("embed")(self, None, one_hot, weight))
            )
        return out

    def rms_norm(self, x: Handle, weight: Handle, eps: float, scale: float) -> Handle:
        before = self._exact(self.settled(x))
        out = super().rms_norm(before.secret, weight, eps, scale)
        row = self.see(as_secret(self.runtime, out.wire))
        if self.is_shown:
            assert row is not None, "the client sees it"
            expected = self.twin.rms_norm(before.value, torch.ones(()), eps, scale)
            made, given = Tracked(out, expected), (before, weight, eps, scale)
            bound = bound_of("rms_norm")(self, made, *given)
            left = self._outside("rms_norm", list(given), made)
            seen = row * x.shape[-1] ** 0.5
            self.findings.append(worst(self.meter.where, "rms_norm", seen, expected, bound, left))
        return out

    def linear(self, x: Handle, weight: Handle, bias: Handle = None) -> Handle:
        x = x.secret if isinstance(x, Tracked) else x
        row = self.see(as_secret(self.runtime, x.wire) if isinstance(x, Normed) else x)
        out = super().linear(x, weight, bias)
        seen = self.see(out)
        if not self.is_shown:
            return out
        matrix = self._plain_weight(weight)
        added = 0 if bias is None else self._plain_weight(bias)
        assert row is not None, "the client sees every input"
        name, left, c = "linear", "", self.config
        expected = row @ matrix.T + added
        if isinstance(x, Normed):
            name, matrix = "linear of a norm", matrix * self._plain_weight(x.gamma) * x.size**0.5
            expected = row @ matrix.T + added
            bound = linear_bound(60, c.weight_of(weight.name, True), row, matrix)  # the row is the wire's own
        else:
            bound = linear_bound(c.input_of(weight.name)[0], c.weight_of(weight.name, False), row, matrix)
            bound += unit(c.hidden)
            left = outside(c, "residual added", expected)
        self.findings.append(worst(self.meter.where, name, seen, expected, bound, left))
        return out


def _is_public(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor)
