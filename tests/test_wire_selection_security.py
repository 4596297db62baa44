"""What selection sends is uniform whatever it hides, and as much whatever the values are."""

import numpy as np
import pytest
import torch
from test_wire_security import assert_uniform
from wire_parties import CLIENT, DEALER, OWNER, run, share

from crypten_llm.engines.wire.numbers import PRECISION
from crypten_llm.protocols import selection
from crypten_llm.protocols.comparison import SIGNS, Below, bit_opening, ordered, times_bits
from crypten_llm.protocols.lookup import read
from crypten_llm.protocols.opening import Opening, open_wires

COUNT = 4096
EXTREMES = {
    "equal": torch.zeros(COUNT, dtype=torch.int64),
    "rising": torch.arange(COUNT) - COUNT // 2,
    "falling": COUNT // 2 - torch.arange(COUNT),
    "extreme": torch.where(torch.arange(COUNT) % 2 == 0, 2**18 - 1, 1 - 2**18),
}
INPUTS = pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)


def opening_of(runtime, integers, shape=(COUNT,)):
    """What opens, and x as opened for comparisons: 20 bits and a sign."""
    open_ = lambda *openings: open_wires(runtime, list(openings))  # noqa: E731
    (wire,) = open_(ordered(share(runtime, integers.reshape(shape), scale=13, bits=6), PRECISION, "x"))
    return open_, wire


def compare(runtime, integers):
    open_, wire = opening_of(runtime, integers)
    comparison = Below(runtime, wire, [0])
    (opened,) = open_(comparison.opening)
    bits = comparison.bits(opened, np.uint8)
    (bit,) = open_(bit_opening(bits[..., 0]))
    times_bits(runtime, bit, wire)


@INPUTS
def test_the_openings_of_a_comparison_are_uniform(integers):
    """x in its ring, the sum of signs in 5 bits, the bit in 1: from each party, and as both see their sum."""
    outcomes = [run(compare, integers, seed=seed) for seed in range(3)]
    for role in (OWNER, CLIENT):
        frames = list(zip(*(outcome.frames[role] for outcome in outcomes), strict=True))
        for same, bits in zip(frames, (PRECISION + 1, SIGNS, 1), strict=True):
            payload = b"".join(frame.payload for frame in same)
            if bits == 1:
                ones = np.frombuffer(payload, np.uint8).mean()
                assert set(payload) == {0, 1} and abs(ones - 0.5) < 5 * 0.5 / len(payload) ** 0.5
            elif bits < 8:
                counts = np.bincount(np.frombuffer(payload, np.uint8), minlength=256)
                assert not counts[2**bits :].any()
                expected = len(payload) / 2**bits
                assert (((counts[: 2**bits] - expected) ** 2) / expected).sum() < 2**bits + 6 * 2 ** (bits / 2 + 0.5)
            else:
                assert_uniform(payload, bits, f"opening of {bits} bits, rank {role}")


@INPUTS
def test_the_dealer_sends_uniform_tables_to_the_client_alone(integers):
    """Bytes of all tables, and bit by bit the words whose fields hold 14 bits."""
    frames = run(compare, integers).frames[DEALER]
    payload = b"".join(frame.payload for frame in frames)
    assert all(frame.target == CLIENT for frame in frames)
    digits = COUNT * 2 * 2**5
    words = np.frombuffer(payload[:digits], np.uint16)
    assert not (words >> 14).any()
    for place in range(14):
        assert abs(((words >> place) & 1).mean() - 0.5) < 5 * 0.5 / len(words) ** 0.5, f"bit {place}"
    assert_uniform(payload[digits : digits + 32 * COUNT], 8, "tables of bits")
    assert_uniform(payload[digits + 32 * COUNT :], 64, "flips and masked flips")


@INPUTS
def test_tables_read_at_an_opened_value_are_uniform(integers):
    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, integers % 16, bits=5), ring=4, function=True)])
        read(runtime, wire, torch.arange(16), np.uint32)

    payload = b"".join(frame.payload for frame in run(job).frames[DEALER])
    assert_uniform(payload, 32, "table")


def programs(runtime, integers):
    shape = (8, COUNT // 8)
    open_, wire = opening_of(runtime, integers[:64], (2, 32))
    bits = selection.top(runtime, open_, wire, 5, 64)
    selection.picks(runtime, open_, bits, 5)
    selection.best(runtime, open_, wire, 3)
    selection.largest(runtime, open_, wire)
    open_, wire = opening_of(runtime, integers, shape)
    selection.top(runtime, open_, wire, 5, 64)
    selection.top(runtime, open_, wire, 1, 64)


def test_traffic_depends_on_shapes_alone():
    """Ties, order and sign change no size and no order of messages, and nothing that the dealer sends."""
    outcomes = [run(programs, integers) for integers in EXTREMES.values()]
    for outcome in outcomes[1:]:
        assert outcome.cost() == outcomes[0].cost()
        assert outcome.frames[DEALER] == outcomes[0].frames[DEALER]
        for role in (OWNER, CLIENT):
            sizes = [[len(frame.payload) for frame in seen.frames[role]] for seen in (outcome, outcomes[0])]
            assert sizes[0] == sizes[1] and len(sizes[0]) > 40
            assert not [frame for frame in outcome.frames[role] if frame.target == DEALER]
