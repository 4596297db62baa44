"""What selection sends is uniform whatever it hides, and as much whatever the values are."""

import numpy as np
import pytest
import torch
from test_wire_security import assert_uniform, cut, words
from wire_parties import CLIENT, DEALER, OWNER, open_wires, play, run, share

from crypten_llm.engines.wire.numbers import PRECISION
from crypten_llm.kernels.ring import SIGNS
from crypten_llm.protocols import selection
from crypten_llm.protocols.comparison import below, bit_opening, ordered, times_bits
from crypten_llm.protocols.lookup import read
from crypten_llm.protocols.opening import Opening

COUNT = 4096
EXTREMES = {
    "equal": torch.zeros(COUNT, dtype=torch.int64),
    "rising": torch.arange(COUNT) - COUNT // 2,
    "falling": COUNT // 2 - torch.arange(COUNT),
    "extreme": torch.where(torch.arange(COUNT) % 2 == 0, 2**18 - 1, 1 - 2**18),
}
INPUTS = pytest.mark.parametrize("integers", EXTREMES.values(), ids=EXTREMES)


def opening_of(runtime, integers, shape=(COUNT,)):
    """x as opened for comparisons: 20 bits and a sign."""
    (wire,) = open_wires(runtime, [ordered(share(runtime, integers.reshape(shape), scale=13, bits=6), PRECISION, "x")])
    return wire


def compare(runtime, integers):
    wire = opening_of(runtime, integers)
    bits = play(runtime, below(runtime, wire, [0], 8))
    (bit,) = open_wires(runtime, [bit_opening(bits[..., 0])])
    times_bits(runtime, bit, wire)


@INPUTS
def test_the_openings_of_a_comparison_are_uniform(integers):
    """x in its ring, the sum of signs in 5 bits, the bit in 1: from each party, and as both see their sum."""
    outcomes = [run(compare, integers, seed=seed) for seed in range(3)]
    for role in (OWNER, CLIENT):
        frames = list(zip(*(outcome.frames[role] for outcome in outcomes), strict=True))
        for same, bits in zip(frames, (PRECISION + 1, SIGNS, 1), strict=True):
            payload = b"".join(cut(frame.payload, [(COUNT, bits)])[0] for frame in same)
            if bits == 1:
                ones = words(payload, bits).mean()
                assert abs(ones - 0.5) < 5 * 0.5 / (3 * COUNT) ** 0.5
            elif bits < 8:
                counts = np.bincount(words(payload, bits)[:, 0], minlength=2**bits)
                expected = 3 * COUNT / 2**bits
                assert (((counts - expected) ** 2) / expected).sum() < 2**bits + 6 * 2 ** (bits / 2 + 0.5)
            else:
                assert_uniform(payload, bits, f"opening of {bits} bits, rank {role}")


@INPUTS
def test_the_dealer_sends_uniform_tables_to_the_client_alone(integers):
    """Bytes of all tables, and bit by bit the words whose fields hold 14 bits."""
    frames = run(compare, integers).frames[DEALER]
    payload = b"".join(frame.payload for frame in frames)
    assert all(frame.target == CLIENT for frame in frames)
    # A flip and a masked flip are as wide as the ring of what is multiplied.
    digits, tables, flips = cut(payload, [(COUNT * 2**5, 16), (COUNT * 32, 8), (2 * COUNT, PRECISION + 1)])
    signs = np.frombuffer(digits, np.uint16)
    assert not (signs >> 14).any()
    for place in range(14):
        assert abs(((signs >> place) & 1).mean() - 0.5) < 5 * 0.5 / len(signs) ** 0.5, f"bit {place}"
    assert_uniform(tables, 8, "tables of bits")
    assert_uniform(flips, PRECISION + 1, "flips and masked flips")


@INPUTS
def test_tables_read_at_an_opened_value_are_uniform(integers):
    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, integers % 16, bits=5), ring=4, function=True)])
        read(runtime, wire, torch.arange(16), 32)

    payload = b"".join(frame.payload for frame in run(job).frames[DEALER])
    assert_uniform(payload, 32, "table")


def programs(runtime, integers):
    shape = (8, COUNT // 8)
    wire = opening_of(runtime, integers[:64], (2, 32))
    bits = play(runtime, selection.top(runtime, wire, 5, 64))
    play(runtime, selection.picks(runtime, bits, 5))
    play(runtime, selection.best(runtime, wire, 3))
    play(runtime, selection.largest(runtime, wire))
    wire = opening_of(runtime, integers, shape)
    play(runtime, selection.top(runtime, wire, 5, 64))
    play(runtime, selection.top(runtime, wire, 1, 64))


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
