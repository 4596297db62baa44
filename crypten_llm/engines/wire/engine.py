"""Engine ``wire``: two parties and a dealer, every secret of a layer opened at most once.

Owns one role of it: its runtime, its rounds, and what goes in and comes out. The operations are entered into a table
from the files of their topics (``operations``); a method of the engine runs one to its end.
"""

import abc
import functools
from contextlib import contextmanager

import torch

from crypten_llm.engines.base import Engine
from crypten_llm.engines.wire import arithmetic, attention, choosing, gathering, keeping, layers  # noqa: F401
from crypten_llm.engines.wire.handles import OneHot, Weight, is_waiting, settle, value
from crypten_llm.engines.wire.numbers import SHOWN, SHOWN_FACTORS, WireConfig
from crypten_llm.engines.wire.operations import OPERATIONS, Operation
from crypten_llm.errors import UsageError
from crypten_llm.kernels import ring
from crypten_llm.protocols import products
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.opening import Message, Overflow, Rounds, Secret
from crypten_llm.roles import CLIENT, OWNER

_REMEDIES = {  # the same model, or a smaller promise, within the range
    "softmax row": "try a lower max_position_embeddings, to which rows are continued, or ",
    "mix": "divide v_proj by a power of two and multiply o_proj by it, or ",
}


class WireEngine(Engine):
    """One role over a connected transport: two parties and a dealer, or two parties with a tape each."""

    name = "wire"
    is_private = True
    layer_error = 0.01
    shown_dtype = torch.float32  # of values that are opened
    shown_bits, shown_factors = SHOWN, SHOWN_FACTORS  # fractional bits of them, and of what they are a product of

    def __init__(self, transport, config: WireConfig | None = None, material=None, runtime=None):
        """config: the defaults unless given.

        material: a ``Tape``, or where a dealer that runs alone writes; ``None`` where a dealer runs along. runtime:
        made from transport and material unless given.
        """
        self.transport = transport
        self.rank = transport.rank
        self.config = config or WireConfig()
        self.dealer_follows = material is None
        self._material = material
        self.runtime = runtime or roles.make(transport, material)
        self.rounds = Rounds(self.runtime)

    @property
    def meter(self):
        return self.transport.meter

    @contextmanager
    def section(self, label):
        if self.rounds.is_shared:  # programs side by side are in one section
            yield
            return
        self.runtime.begin(label)
        yield
        self.runtime.end()  # not after an error, which leaves a section half done

    def expect(self, verb, facts, request):
        if self._material is not None:
            self._material.expect(verb, facts, request)

    # What goes in.

    def calibrate(self, config, weights):
        from crypten_llm.session.calibration import measure  # runs the model definition, which is above engines

        limits = domains(self.config)
        for name, (lowest, highest) in measure(config, weights).limited.items():
            what, low, high = limits[name]
            # The other parties are told why this one stops, so the message holds no measured number.
            if not low <= lowest <= highest <= high:
                raise UsageError(
                    f"this model's {what} leave the range of engine 'wire', {low:.3g} to {high:.3g}, on random "
                    f"tokens; {_REMEDIES.get(name, '')}use engine 'crypten'"
                )
        return {}

    def parameter(self, value, shape):
        return Weight(self.runtime.held_by(OWNER, value), shape)

    def prepare(self, weight, norm=None):
        scale = 1.0 if norm is None else weight.shape[1] ** 0.5
        self.rounds.run(self.matrix(weight, norm, scale))

    def matrix(self, weight: Weight, gamma: Weight | None = None, scale: float = 1.0):
        """A protocol: the owner's weight as an operand, made once: W, or W * diag(gamma) * scale after a norm."""
        key = gamma, scale
        if key not in weight.matrices:
            folded = weight.value
            if folded is not None:
                folded = folded * scale if gamma is None else folded * gamma.value * scale
            made = yield from products.own(self.runtime, folded, weight.shape, self.config.weight)
            weight.matrices[key] = made
        return weight.matrices[key]

    def tokens(self, ids, count, vocab_size):
        return OneHot(self.runtime.held_by(CLIENT, ids), count, vocab_size)

    def secret(self, value, shape, source):
        scale = self.config.activation
        share = self.runtime.input(source, shape, lambda: (value.double() * 2**scale).round().long())
        return Secret(share, scale, 64, self.config.linear_bits)

    def matmul(self, x, y):
        raise Overflow("engine wire multiplies through scores and mix, whose operands it keeps as wires")

    # What comes out.

    def open_to(self, x, rank):
        """The other party sends its share without the bits below the ``shown_bits``th: they would show how the value
        was computed, such as a factor that all logits have in common.

        Reveals: to ``rank``, x rounded to ``shown_bits`` fractional bits. Error: half a unit of them.
        Cost: 1 round of l - d bits an element one way, for a ring of l bits and d bits dropped.
        """
        return self.rounds.run(self._show(x, rank))

    def _show(self, x, rank):
        if is_waiting(x):
            yield from settle(self, getattr(x, "source", x).normed, *self.shown_factors)
        x = yield from value(self, x)
        cut = max(0, x.scale - self.shown_bits)
        (other,) = yield [Message(OWNER + CLIENT - rank, tuple(x.shape), x.width - cut, x.share >> cut)]
        if other is None:
            return None
        words = self._shown(x.share, other, cut, x.width)
        return words.double().div(2.0**x.scale).to(self.shown_dtype)

    def _shown(self, share, other, cut: int, width: int):
        """The signed integers behind both shares, the other of which came without its ``cut`` low bits."""
        words = ring.low_bits(share + (other << cut) + ((1 << cut) >> 1), width)
        return words if width == 64 else words - (ring.top_bit(words, width) << width)


def _method(operation: Operation):
    """An operation as a method, which runs it to its end."""
    if operation.is_local:
        return operation.protocol

    @functools.wraps(operation.protocol)
    def run(self, *arguments, **options):
        return self.rounds.run(operation.protocol(self, *arguments, **options))

    return run


for _name, _operation in OPERATIONS.items():
    setattr(WireEngine, _name, _method(_operation))
abc.update_abstractmethods(WireEngine)


def domains(config: WireConfig) -> dict[str, tuple[str, float, float]]:
    """What is limited, from where to where, by the operation, "softmax row" being softmax's of whole rows: beyond, its
    result is wrong without a word.
    """
    found = {}
    for name, operation in OPERATIONS.items():
        for which, domain in operation.domains.items():
            key = name if which == "domain" else f"{name} {which}"
            found[key] = domain.what, domain.low(config), domain.high(config)
    return found
