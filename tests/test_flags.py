"""Flags: whether any is set is told, and nothing else."""

import pytest
import torch
from wire_parties import run

from crypten_llm.protocols.flags import Flags
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.rounds import Rounds
from crypten_llm.protocols.secret import Secret
from crypten_llm.roles import CLIENT, OWNER


def xor_shares(runtime, bits):
    theirs = torch.randint(2, bits.shape, generator=torch.Generator().manual_seed(bits.numel()))
    return runtime.share(bits.shape, lambda: bits ^ theirs, lambda: theirs)


def told(runtime, opened, *noted):
    rounds = Rounds(runtime)
    flags = Flags(runtime, rounds)
    for bits in noted:
        share = xor_shares(runtime, bits)
        if opened:
            (wire,) = rounds.open(Opening(Secret(share, 0, 1, 1), function=True))
            flags.note_opened(wire)
        else:
            flags.note(share)
    if not opened:
        rounds.open()
    first = rounds.run(flags.any_set())
    return first, rounds.run(flags.any_set())


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("shapes", [[(1,)], [(3, 1), (7,)], [(2, 2), (0,), (33,)]])
def test_any_set_flag_is_told_once(opened, shapes):
    none = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]
    assert run(told, opened, *none).results[:2] == [(False, False)] * 2
    for which, bits in enumerate(none):
        for place in {0, bits.numel() // 2, bits.numel() - 1} if bits.numel() else ():
            noted = [other.clone() for other in none]
            noted[which].view(-1)[place] = 1
            assert run(told, opened, *noted).results[:2] == [(True, False)] * 2
    assert run(told, opened, *[bits + 1 for bits in none]).results[:2] == [(True, False)] * 2


def test_cost():
    """A bit each way with the next message, 8 bytes of the dealer's; 1 round of 8 bytes when it is told."""
    rounds, from_owner, from_client, to_owner, to_client = run(told, False, torch.zeros(20, dtype=torch.int64)).cost()
    assert (rounds, from_owner, from_client, to_owner, to_client) == (3, 3 + 16, 3 + 16, 0, 160)


def test_the_word_that_tells_is_another_each_time():
    """Two flags or one, here or there: what is shown is uniform."""
    words = set()
    for seed in range(40):
        bits = torch.zeros(5, dtype=torch.int64)
        bits[seed % 5] = 1
        outcome = run(told, False, bits, seed=seed)
        shown = []
        for role in (OWNER, CLIENT):
            frames = [f.payload for f in outcome.frames[role] if len(f.payload) == 8]
            shown.append(int.from_bytes(frames[0], "little"))
        words.add(shown[0] ^ shown[1])
    assert len(words) == 40 and 15 < sum(word.bit_count() for word in words) / 40 < 49
