"""What tests of CrypTen beside engine ``wire`` have owner, client and dealer do, each in a process of its own."""

from __future__ import annotations

import torch

from crypten_llm.engines.crypten.bridge import crypten
from crypten_llm.engines.crypten.interop import CryptenBeside
from crypten_llm.engines.wire import handles
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.errors import UsageError
from crypten_llm.insecure.audit import audited
from crypten_llm.protocols.dealer.roles import ROLES
from crypten_llm.protocols.dealer.tape import Tape
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Secret, as_secret
from crypten_llm.session.reveal import RevealLog

PRECISION = 15


def inputs(engine, *values):
    """Secrets of the owner."""
    return [engine.secret(value if engine.rank == 0 else None, value.shape, 0) for value in values]


def show(engine, secret):
    return RevealLog().open_to_client(engine, secret, 1, "a test's result", "to compare")


@torch.inference_mode()
def there_and_back(engine, value, kinds):
    """A secret of each (scale, width) as an MPCTensor and as a secret again; its value, and the cost of the way."""
    with CryptenBeside(engine, PRECISION) as beside:
        return [_there_and_back(engine, beside, value, scale, width) for scale, width in kinds]


def _there_and_back(engine, beside, value, scale, width):
    with engine.section(f"scale {scale}, width {width}"):
        whole = (value.double() * 2**scale).round().long()
        (secret,) = inputs(engine, value)
        share = engine.runtime.share(secret.shape, lambda: whole, lambda: torch.zeros_like(whole))
        before = engine.meter.snapshot()
        (tensor,) = beside.to_crypten(Secret(share, scale, width, 7))
        back = beside.to_wire(tensor, bits=7)
        spent = engine.meter.snapshot() - before
        sent = spent.online.bytes_sent, spent.dealer.bytes_received
        return show(engine, back), spent.online.rounds, sent, (back.scale, back.width)


@torch.inference_mode()
def at_once(engine, value):
    """Three conversions, two of which need an opening: their values and the rounds they take together."""
    with CryptenBeside(engine, PRECISION) as beside, engine.section("test"):
        (x,) = inputs(engine, value)
        (narrow,) = engine.rounds.open(Opening(x, truncate=2))
        first = as_secret(engine.runtime, narrow)
        wide = Secret(x.share << 4 if engine.rank < 2 else x.share, x.scale + 4, 64, x.bits)
        before = engine.meter.snapshot()
        tensors = beside.to_crypten(first, x, wide)
        rounds = (engine.meter.snapshot() - before).online.rounds
        return [show(engine, beside.to_wire(tensor)) for tensor in tensors], rounds


@torch.inference_mode()
def crypten_between(engine, x, w):
    """linear (wire) -> an operation of CrypTen -> linear (wire), for each: value, rounds and bytes; and the bits in
    which the first result is opened on its way to CrypTen.
    """
    runtime = audited(ROLES[engine.rank])(engine.transport, engine.runtime._keys)
    engine = WireEngine(engine.transport, runtime=runtime)
    found = {}
    with CryptenBeside(engine, PRECISION) as beside:
        for name, operation in OPERATIONS.items():
            with engine.section(name):
                weight = engine.parameter(w if engine.rank == 0 else None, w.shape)
                (secret,) = inputs(engine, x)
                first = engine.rounds.run(handles.value(engine, engine.linear(secret, weight)))
                before = engine.meter.snapshot()
                (tensor,) = beside.to_crypten(first)
                result = beside.to_wire(operation(tensor), bits=10)
                online = (engine.meter.snapshot() - before).online
                found[name] = show(engine, engine.linear(result, weight)), online.rounds, online.bytes_sent
    return found, first.width - max(0, first.scale - PRECISION)


OPERATIONS = {  # on MPCTensors and, to compare, on torch tensors
    "product": lambda x: x * (x + 1),
    "matmul": lambda x: x.matmul(x.transpose(-2, -1)).matmul(x),
    "square": lambda x: x.square(),
    "comparison": lambda x: x * (x > 0.25),
    "equality": lambda x: x * (x - x == 0),
    "exp": lambda x: (x * 0.25).exp(),
    "reciprocal": lambda x: (x.square() + 1).reciprocal(),
    "binary": lambda x: x.to(crypten.mpc.binary).to(crypten.mpc.arithmetic) if hasattr(x, "ptype") else x,
}


@torch.inference_mode()
def counted(engine, x, w):
    """What a job with both kinds of operations costs a party, or both parties where the engine only counts."""
    counts = engine.name == "cost"
    meters = engine.transport.meters if counts else [engine.meter]
    before = [meter.snapshot() for meter in meters]
    masked_rectifier(engine, x, w)
    totals = [meter.snapshot() - start for meter, start in zip(meters, before, strict=True)]
    found = [(t.online.rounds, t.online.bytes_sent, t.online.bytes_received, t.dealer.bytes_received) for t in totals]
    return found if counts else found[0]


@torch.inference_mode()
def masked_rectifier(engine, x, w):
    """linear (wire) -> x * (x > 0) (CrypTen) -> linear (wire), in one section: its value at the client."""
    with CryptenBeside(engine, PRECISION) as beside, engine.section("test"):
        weight = engine.parameter(w if engine.rank == 0 else None, w.shape)
        (secret,) = inputs(engine, x)
        (tensor,) = beside.to_crypten(engine.linear(secret, weight))
        return show(engine, engine.linear(beside.to_wire(tensor * (tensor > 0)), weight))


def from_tape(engine, folder, x, w):
    """``masked_rectifier`` with this party's tape; the dealer has nothing to do."""
    if engine.rank == 2:
        return None
    tape = Tape(folder, engine.rank, engine.transport, is_local=True)
    return masked_rectifier(WireEngine(engine.transport, material=tape), x, w)


@torch.inference_mode()
def mistakes(engine):
    """The message of each thing that is refused."""
    found = []

    def refused(act, kind=UsageError):
        try:
            act()
        except kind as error:
            found.append(str(error))

    value = torch.ones(2, 3)
    with CryptenBeside(engine, PRECISION) as beside, engine.section("test"):
        (x,) = inputs(engine, value)
        (tensor,) = beside.to_crypten(x)
        refused(lambda: beside.to_wire(tensor.to(crypten.mpc.binary)))
        refused(lambda: beside.to_wire(value))
        tensor.encoder._scale = 3
        refused(lambda: beside.to_wire(tensor))
        refused(lambda: beside.to_wire(beside.to_crypten(x)[0], bits=50), AssertionError)
        refused(lambda: beside.to_crypten(Secret(x.share, 14, 64, 48)), AssertionError)
        refused(lambda: beside.to_crypten(engine.rows(x)))
        refused(lambda: CryptenBeside(engine).__enter__())
    refused(lambda: crypten.mpc.primitives.ArithmeticSharedTensor.PRZS((2, 3)))
    return found
