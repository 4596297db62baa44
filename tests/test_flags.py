"""Flags: whether any is set is told, and nothing else."""

import pytest
import torch
from wire_parties import run

from crypten_llm.protocols.flags import TELLS, Flags
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
    """A bit each way with the next message, 16 bytes of the dealer's; 1 round of 8 bytes when it is told."""
    rounds, from_owner, from_client, to_owner, to_client = run(told, False, torch.zeros(20, dtype=torch.int64)).cost()
    assert (rounds, from_owner, from_client, to_owner, to_client) == (3, 3 + 16, 3 + 16, 0, 320)


def words_of(runtime, bits):
    """A role's shares of both words."""
    rounds = Rounds(runtime)
    flags = Flags(runtime, rounds)
    flags.note(xor_shares(runtime, bits))
    rounds.open()
    return flags._words.tolist()


def test_the_words_that_tell_are_others_each_time():
    """Two flags or one, here or there: what is shown is uniform, and one word says nothing of the other."""
    words = set()
    for seed in range(40):
        bits = torch.zeros(5, dtype=torch.int64)
        bits[seed % 5] = 1
        owner, client, _ = run(words_of, bits, seed=seed).results
        words |= {(mine ^ theirs) % 2**64 for mine, theirs in zip(owner, client, strict=True)}
    assert len(words) == 80 and 0.45 < sum(word.bit_count() for word in words) / (80 * 64) < 0.55


@pytest.mark.parametrize("party", [OWNER, CLIENT])
def test_a_party_that_sends_back_what_it_is_sent_hides_no_flag(party):
    """What the other tells is its share of another word than the one of which it is told."""
    bits, other = torch.ones(3, dtype=torch.int64), OWNER + CLIENT - party
    told = run(words_of, bits).results[other][TELLS.index(other)]  # in every run with these masks

    def job(runtime):
        rounds = Rounds(runtime)
        flags = Flags(runtime, rounds)
        flags.note(xor_shares(runtime, bits))
        rounds.open()
        if runtime.role == party:
            flags._words = torch.full_like(flags._words, told)
        return rounds.run(flags.any_set())

    outcome = run(job)
    assert told.to_bytes(8, "little", signed=True) in {f.payload for f in outcome.frames[other]}
    assert outcome.results[other] is True
