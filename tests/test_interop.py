"""CrypTen beside engine ``wire``: conversions are local or exact, CrypTen computes in between, costs are as said."""

from __future__ import annotations

import interop_jobs
import pytest
import torch
from parties import run

from crypten_llm.engines.crypten import bridge
from crypten_llm.engines.crypten.interop import CryptenBeside
from crypten_llm.engines.wire.counted import CostEngine, Links
from crypten_llm.engines.wire.engine import WireEngine
from crypten_llm.errors import UsageError
from crypten_llm.kernels.ring import packed_size
from crypten_llm.links.frames import HEADER
from crypten_llm.protocols.dealer import roles
from crypten_llm.protocols.dealer.counting import Counting
from crypten_llm.protocols.dealer.manifest import make_manifest
from crypten_llm.protocols.dealer.recording import Recording, Sizes
from crypten_llm.session.producing import Absent

UNIT = 2.0**-interop_jobs.PRECISION


def numbers(*shape, seed=0, size=2.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


TRAVELLERS = numbers(3, 50, size=20.0)
ROUNDS = {(14, 64): 0, (15, 64): 0, (18, 64): 1, (14, 40): 1, (10, 33): 1, (20, 48): 1}  # by scale and width


@pytest.fixture(scope="module")
def travelled():
    _, client, _ = run(interop_jobs.there_and_back, TRAVELLERS, list(ROUNDS), wire=True)
    return dict(zip(ROUNDS, client, strict=True))


@pytest.mark.parametrize(("scale", "width"), ROUNDS)
def test_there_and_back(travelled, scale, width):
    found, took, sent, kind = travelled[scale, width]
    value, rounds = TRAVELLERS, ROUNDS[scale, width]
    assert kind == (interop_jobs.PRECISION, 64)
    dropped = max(0, scale - interop_jobs.PRECISION)  # by each party for itself, so that these bits do not travel
    bits, count = width - dropped, value.numel()
    opened, lifting = packed_size(count, bits), packed_size(2 * count, 64 - bits)
    assert took == rounds and sent == ((HEADER.size + opened, HEADER.size + lifting) if rounds else (0, 0))
    exact = (value.double() * 2**scale).round() / 2**scale
    error = (found.double() - exact).abs().max()
    assert error < UNIT if scale > interop_jobs.PRECISION else error < 1e-5  # shown as float32


def test_conversions_travel_together():
    value = numbers(4, 5)
    _, (found, rounds), _ = run(interop_jobs.at_once, value, wire=True)
    assert rounds == 1
    for each in found:
        assert (each - value).abs().max() < 2.0**-11


def test_crypten_between_two_operations_of_wire():
    """Products, comparisons, functions, and bits: every kind of correlation that the dealer makes for CrypTen."""
    x, w = numbers(4, 6), numbers(6, 6, seed=1, size=0.4)
    (owner, _), (client, bits), (dealer, _) = run(interop_jobs.crypten_between, x, w, wire=True)
    for name, operation in interop_jobs.OPERATIONS.items():
        expected = operation(x @ w.T) @ w.T
        found, *online = client[name]
        bound = 0.02 if name in ("exp", "reciprocal") else 4 * UNIT
        assert (found - expected).abs().max() < bound * (1 + expected.abs().max()), name
        assert owner[name] == (None, *online) and dealer[name] == (None, 0, 0), name
    opened = HEADER.size + packed_size(24, bits)  # the linear layer's result, of more fractional bits than CrypTen's
    assert client["product"][1:] == (2, opened + HEADER.size + 2 * 24 * 8)
    assert client["square"][1:] == (2, opened + HEADER.size + 24 * 8)


def test_cost_is_counted_without_parties():
    """The dealer follows CrypTen's program by its shapes, so the engine that only counts does too."""
    x, w = numbers(3, 5), numbers(5, 5, seed=1, size=0.4)
    *measured, _ = run(interop_jobs.counted, x, w, wire=True)
    assert interop_jobs.counted(CostEngine(Links()), x, w) == measured
    assert not bridge.is_started()


def test_a_tape_serves_crypten_too(tmp_path):
    """The dealer alone, ahead of the parties and from shapes: nothing in CrypTen's program asks it for anything."""
    x, w = numbers(3, 5), numbers(5, 5, seed=1, size=0.4)

    def deal(material, role):
        links = Absent(iter(()))
        runtime = role(links, material)
        interop_jobs.masked_rectifier(WireEngine(links, material=material, runtime=runtime), x, w)

    sizes = Sizes()
    deal(sizes, Counting)
    manifest = make_manifest({}, {}, "test", {}, 1)
    with Recording(tmp_path / "tape", manifest, sizes) as recording:
        deal(recording, roles.make)
    _, found, _ = run(interop_jobs.from_tape, tmp_path / "tape", x, w, wire=True)
    assert (found - (x @ w.T).relu() @ w.T).abs().max() < 8 * UNIT


@pytest.mark.parametrize("act", [lambda engine: CryptenBeside(engine, 31), lambda engine: CryptenBeside(engine, 0)])
def test_precision_that_crypten_cannot_multiply(act):
    with pytest.raises(UsageError, match="precision_bits is"):
        act(None)


def test_mistakes():
    expected = [
        "is no arithmetic MPCTensor; convert it first",
        "Tensor is no arithmetic MPCTensor",
        "scale 3 has no whole number of fractional bits",
        "a secret: |x| < 2^50 with 15 fractional bits does not fit 62 bits",
        "an MPCTensor: |x| < 2^48 with 15 fractional bits does not fit 62 bits",
        "Rows is no plain value of engine 'wire'",
        "CrypTen already runs in this process",
        "CrypTen was stopped and draws no shares",
    ]
    for found in run(interop_jobs.mistakes, wire=True):
        assert len(found) == len(expected)
        for message, part in zip(found, expected, strict=True):
            assert part in message and "\n" not in message
