"""Openings of what is no word, and lifting to rings wider than a word, against Python's integers."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire_security import assert_uniform, surprise
from wire_parties import CLIENT, DEALER, OWNER, check_cost, play, run, share

from crypten_llm.kernels.integers import numbers, wide
from crypten_llm.kernels.ring import limbs, packed_size
from crypten_llm.protocols.secret import Overflow
from crypten_llm.protocols.wide import ResidueOpening, WideOpening, lift, lifted_share, to_lift


def opened(request):
    """The wire of one request."""
    return (yield [request])[0]


def wide_share(runtime, values, bits, modulus, seed=0):
    """Additive shares of integers modulo ``modulus``, limbs."""
    draw = random.Random(seed)
    theirs = [draw.randrange(modulus) for _ in values]
    mine = [(x - other) % modulus for x, other in zip(values, theirs, strict=True)]
    shape = (len(values), limbs(bits))
    return runtime.share(
        shape, *(lambda part=part: wide(part, bits, (len(values),)).view(shape) for part in (mine, theirs))
    )


def open_wide(values, bits, ones=False, seed=0):
    modulus = 2**bits - ones

    def job(runtime):
        held = wide_share(runtime, values, bits, modulus)
        return play(runtime, opened(WideOpening(held, (len(values),), bits, ones)))

    return run(job, seed=seed)


def edges(modulus, draw):
    return [0, 1, modulus - 1, modulus // 2, *(draw.randrange(modulus) for _ in range(5))]


@pytest.mark.parametrize("ones", [False, True])
@pytest.mark.parametrize("bits", [65, 100, 127, 128, 129, 256, 300])
def test_wide_openings_are_exact(bits, ones):
    """Both see the same; less the mask, which the dealer has whole, it is what was shared."""
    modulus = 2**bits - ones
    values = edges(modulus, random.Random(bits))
    owner, client, dealer = run_results = open_wide(values, bits, ones).results
    assert numbers(owner.seen) == numbers(client.seen) and dealer.public is None
    masks = [numbers(result.mask.held) for result in run_results]
    for x, public, first, second, whole in zip(values, numbers(owner.seen), *masks, strict=True):
        assert (public - x - whole) % modulus == 0 == (first + second - whole) % modulus
        assert 0 <= public < 2**bits


@pytest.mark.parametrize("modulus", [2, 3, 208, 255, 256, 2**20 + 1])
def test_residues_are_opened_behind_a_mask_that_was_drawn_before(modulus):
    values = torch.tensor(edges(modulus, random.Random(modulus)))

    def job(runtime):
        mask = runtime.mask_below(values.shape, modulus)
        theirs = torch.randint(0, modulus, values.shape, generator=torch.Generator().manual_seed(modulus))
        held = runtime.share(values.shape, lambda: (values - theirs) % modulus, lambda: theirs)
        return play(runtime, opened(ResidueOpening(held, mask, modulus)))

    outcome = run(job)
    owner, client, dealer = outcome.results
    assert torch.equal(owner.seen, client.seen) and owner.seen.min() >= 0 and owner.seen.max() < modulus
    assert torch.equal((owner.seen - dealer.mask.held) % modulus, values % modulus)
    sent = packed_size(len(values), (modulus - 1).bit_length())
    assert outcome.cost() == (1, sent, sent, 0, 0)


@pytest.mark.parametrize(("bits", "ones"), [(65, False), (128, False), (256, True), (139, False)])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_a_wide_opening_costs_its_bits(bits, ones, count):
    def job(runtime):
        held = wide_share(runtime, [0] * count, bits, 2**bits - ones)
        play(runtime, opened(WideOpening(held, (count,), bits, ones)))

    check_cost(job, (1, packed_size(count, bits), packed_size(count, bits), 0, 0))


@pytest.mark.parametrize("value", [0, 2**256 - 2, 12345 << 200])
def test_what_is_opened_modulo_2_256_less_1_is_uniform(value):
    outcome = open_wide([value] * 2048, 256, ones=True)
    for role in (OWNER, CLIENT):
        (frame,) = outcome.frames[role]
        for word in range(4):
            part = np.frombuffer(frame.payload, np.uint64).reshape(-1, 4)[:, word]
            assert_uniform(part.tobytes(), 64, f"word {word} of rank {role}")


@pytest.mark.parametrize("value", [0, 1, 207])
def test_what_is_opened_modulo_a_small_number_is_uniform(value):
    count, modulus = 1 << 15, 208

    def job(runtime):
        mask = runtime.mask_below((count,), modulus)
        held = runtime.share((count,), lambda: torch.full((count,), value), lambda: torch.zeros(count).long())
        return play(runtime, opened(ResidueOpening(held, mask, modulus))).public

    outcome = run(job)
    sent = [np.frombuffer(outcome.frames[role][0].payload, np.uint8) for role in (OWNER, CLIENT)]
    for seen in (*sent, outcome.results[OWNER].numpy()):
        counts = np.bincount(seen, minlength=256)
        assert not counts[modulus:].any() and surprise(counts[:modulus]) < 5


# Lifting.


def lifted(integers, size, bits, seed=0):
    """What each party's share of the lifted integers is, and the dealer's view; in integers modulo 2^bits."""

    def job(runtime):
        secret = share(runtime, integers, width=64, bits=0)
        secret.width, secret.bits = size, size - 2
        wire = play(runtime, opened(to_lift(runtime, secret)))
        made = lift(runtime, wire, bits)
        return made, runtime.share(integers.shape, lambda: lifted_share(runtime, made))

    return run(job, seed=seed)


def signed_sum(outcome, bits):
    (_, mine), (_, theirs), _ = outcome.results
    sums = [(a + b) % 2**bits for a, b in zip(numbers(mine), numbers(theirs), strict=True)]
    return [x - 2**bits if x >> bits - 1 else x for x in sums]


def ends(size):
    """What can be lifted, to both ends, the smallest and random."""
    quarter = 2 ** (size - 2)
    near = {x for end in (quarter, -quarter, 0) for x in (end - 1, end, end + 1) if abs(x) <= quarter}
    draw = random.Random(size)
    return torch.tensor([*sorted(near), *(draw.randint(-quarter, quarter) for _ in range(20))])


@pytest.mark.parametrize("size", [3, 4, 18, 35, 43, 62, 63])
@pytest.mark.parametrize("bits", [65, 88, 103, 127, 128, 139, 170])
def test_lifting_is_exact(size, bits):
    """Where more than a word is gained, and where less is."""
    assert signed_sum(lifted(ends(size), size, bits), bits) == ends(size).tolist()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(3, 63), st.integers(65, 256), st.integers(0, 3), st.data())
def test_lifting_any_size(size, bits, seed, data):
    number = st.integers(-(2 ** (size - 2)), 2 ** (size - 2))
    integers = data.draw(st.lists(number, min_size=1, max_size=9))
    assert signed_sum(lifted(torch.tensor(integers), size, bits, seed), bits) == integers


@pytest.mark.parametrize("size", [5, 35])
def test_what_leaves_the_range_stays_large(size):
    """Up to three times the range: whoever looks at sizes will see it."""
    quarter = 2 ** (size - 2)
    beyond = torch.randint(quarter + 1, 3 * quarter, (200,), generator=torch.Generator().manual_seed(0))
    found = signed_sum(lifted(torch.cat([beyond, -beyond]), size, 88), 88)
    assert all(abs(x) >= quarter for x in found)


def test_what_cannot_be_lifted_is_refused():
    def job(runtime):
        secret = share(runtime, torch.ones(3, dtype=torch.int64), width=20, bits=19)
        to_lift(runtime, secret)

    with pytest.raises(Overflow, match=r"\|x\| < 2\^19 at scale 2\^0 needs 21 bits, but the opening has 20"):
        run(job)


@pytest.mark.parametrize(("size", "bits"), [(35, 65), (35, 88), (35, 99), (35, 100), (43, 139), (3, 170)])
@pytest.mark.parametrize("count", [1, 7])
def test_lifting_costs_what_is_gained_twice(size, bits, count):
    outcome = lifted(torch.zeros(count, dtype=torch.int64), size, bits)
    sent = packed_size(count, size)
    assert outcome.cost() == (1, sent, sent, 0, packed_size(2 * count, bits - size))


def test_what_lifting_is_dealt_is_uniform_and_used_once():
    """64 bits are gained, in words that are not to come twice."""
    count = 4096
    outcome = lifted(torch.arange(count) - 2000, 30, 94)
    sent = b"".join(frame.payload for frame in outcome.frames[DEALER] if frame.target == CLIENT)
    assert_uniform(sent, 64, "carry and bit")
    assert len(np.unique(np.frombuffer(sent, np.uint64))) == 2 * count
