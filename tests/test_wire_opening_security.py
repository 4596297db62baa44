"""What an opening gives away: nothing, neither by the rounding of what was dropped nor by what lifting is dealt."""

import numpy as np
import pytest
import torch
from test_wire_security import cut, numbers, surprise
from wire_parties import CLIENT, DEALER, OWNER, open_wires, run, share

from crypten_llm.kernels import ring
from crypten_llm.protocols import products
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Secret

COUNT = 1 << 15


def dropped(shares, count, role):
    """In integers: the owner's share rounded up, the client's down."""
    return [-(-x >> count) if role == OWNER else x >> count for x in shares.tolist()]


@pytest.mark.parametrize("lifted", [0, 64])
@pytest.mark.parametrize(("size", "drop"), [(64, 0), (64, 1), (64, 61), (37, 9), (37, 35), (20, 5), (2, 0)])
def test_a_message_is_the_dropped_share_behind_its_mask(size, drop, lifted):
    """Of as many bits as are left: not one of those that are dropped travels."""
    bits, x = size - drop, torch.randint(-(2**62), 2**62, (99,)) * 3

    def job(runtime):
        secret = share(runtime, x, width=size, bits=0)
        masks, draw = [], runtime.mask
        runtime.mask = lambda *given: masks.append(draw(*given)) or masks[-1]
        open_wires(runtime, [Opening(secret, truncate=drop, lifted=lifted)])
        (mask,) = masks
        return secret.share, mask.held

    outcome = run(job)
    for role in (OWNER, CLIENT):
        (message,), (held, mask) = [frame.payload for frame in outcome.frames[role]], outcome.results[role]
        offset = (1 << bits) // 4 if role == OWNER and lifted > bits else 0
        left = dropped(held, drop, role)
        expected = [(a + r + offset) % 2**bits for a, r in zip(left, mask.tolist(), strict=True)]
        assert len(message) == ring.packed_size(99, bits)
        assert np.unpackbits(np.frombuffer(message, np.uint8), bitorder="little")[99 * bits :].sum() == 0
        assert ring.on("cpu").unpack(torch.frombuffer(bytearray(message), dtype=torch.uint8), bits, (99,)).tolist() == [
            value - (2**64 if bits == 64 and value >= 2**63 else 0) for value in expected
        ]


def with_low_bits(lows, drop):
    """What each role sends for shares whose upper bits are the same, and whose low ones are these."""
    high = [torch.randint(-(2**62), 2**62, (200,), generator=torch.Generator().manual_seed(role)) for role in (0, 1)]
    owner, client = ((part >> drop << drop) + low for part, low in zip(high, lows, strict=True))

    def job(runtime):
        secret = Secret(runtime.share((200,), lambda: owner, lambda: client), 0, 64, 0)
        for lifted in (0, 64):
            open_wires(runtime, [Opening(secret, drop, lifted, ring=60)])

    return run(job).frames


@pytest.mark.parametrize("drop", [1, 9, 40])
def test_messages_are_the_same_whatever_the_dropped_bits_are(drop):
    """x differs, and with it by how much it is rounded; bit by bit, nobody sends anything else."""
    lows = [[torch.randint(0, 2**drop, (200,)) for _ in range(2)] for _ in range(4)]
    lows[:2] = [[torch.full((200,), low)] * 2 for low in (0, 2**drop - 1)]
    transcripts = [with_low_bits((owner + 1, client), drop) for owner, client in lows]  # 1 to 2^drop is rounded up
    assert all(frames == transcripts[0] for frames in transcripts)


def halfway(runtime):
    """Numbers half a unit above 3, opened in 8 bits: the wire, and what it stands for at the parties."""
    x = torch.full((COUNT,), 3 * 2**9 + 2**8)
    (wire,) = open_wires(runtime, [Opening(share(runtime, x, width=17, bits=11), truncate=9)])
    return wire


def test_what_both_see_does_not_tell_how_a_number_was_rounded():
    outcome = run(halfway)
    owner, client, dealer = outcome.results
    assert torch.equal(owner.public, client.public) and dealer.public is None
    rounded = (owner.public - dealer.mask.held) % 2**8
    up = rounded == 4
    assert torch.equal(rounded, 3 + up.long()) and abs(up.double().mean() - 0.5) < 5 * 0.5 / COUNT**0.5
    sent = [numbers(outcome.frames[role][0].payload, 8) for role in (OWNER, CLIENT)]
    for seen in (owner.public.numpy(), *sent):
        for which in (up, ~up):
            assert surprise(np.bincount(seen[which.numpy()].astype(np.int64), minlength=2**8)) < 5


def test_the_rounding_would_show_under_a_mask_that_is_too_short():
    """The check above can fail: with seven bits of mask for eight, the opened number is likelier up where x was."""
    x, mask = 3 + np.arange(COUNT) % 2, np.random.default_rng(0).integers(0, 2**7, COUNT)
    assert surprise(np.bincount((x + mask)[x == 4], minlength=2**8)) > 100


def lifted_twice(runtime, size, wide):
    """The wires of one secret, opened twice."""
    secret = share(runtime, torch.arange(COUNT) % 5 - 2, width=size, bits=2)
    opening = Opening(secret, lifted=wide)
    return [*open_wires(runtime, [opening]), *open_wires(runtime, [opening])]


def test_carry_and_wrap_bit_are_those_of_the_mask():
    """What the parties are dealt makes of the mask's two parts the integer that it is, and of its top bit a secret."""
    owner, client, dealer = run(lifted_twice, 20, 50).results
    for mine, theirs, whole in zip(owner, client, dealer, strict=True):
        assert torch.equal((mine.mask.held + theirs.mask.held) % 2**50, whole.mask.held)
        assert whole.mask.held.min() >= 0 and whole.mask.held.max() < 2**20
        bit = (mine.wrap.bit.held + theirs.wrap.bit.held) % 2**30
        assert torch.equal(bit, whole.wrap.bit.held) and torch.equal(bit, whole.mask.held >> 19)
        unwrapped = (mine.public + 2**18) >> 19 == 0
        assert torch.equal(mine.wrap.coefficient, unwrapped * 2**20)


def test_carry_and_wrap_bit_are_dealt_afresh_for_every_opening():
    """Of one secret, in words so long that none comes twice: what the client is sent, and what the owner expands."""
    outcome = run(lifted_twice, 20, 64)
    sent = b"".join(frame.payload for frame in outcome.frames[DEALER] if frame.target == CLIENT)
    words = np.concatenate([numbers(part, 44) for part in cut(sent, [(2 * COUNT, 44)] * 2)])
    assert len(words) == 4 * COUNT == len(np.unique(words))
    first, second = (wire.wrap.bit.held for wire in outcome.results[OWNER])
    assert len(torch.cat([first, second]).unique()) == 2 * COUNT


def test_a_wire_in_two_products_is_dealt_for_twice():
    """Products of wrap bits with masks too, for which lifting has dealt before."""

    def job(runtime):
        first, second = lifted_twice(runtime, 20, 64)
        for _ in range(2):
            products.multiply(runtime, first, second)
            products.square(runtime, first)

    outcome = run(job)
    sent = b"".join(frame.payload for frame in outcome.frames[DEALER] if frame.target == CLIENT)
    product = [(COUNT, bits) for bits in (64, 44, 44, 24, 64, 43)]
    parts = [(2 * COUNT, 44)] * 2 + product * 2
    long = [numbers(part, bits) for part, (_, bits) in zip(cut(sent, parts), parts, strict=True) if bits > 24]
    words = np.concatenate(long)
    assert len(words) == (4 + 2 * 5) * COUNT == len(np.unique(words))


def test_nothing_that_lifting_is_dealt_tells_whether_a_mask_wrapped():
    """In each of the four cases of carry and bit, each party's words are uniform."""
    outcome = run(lifted_twice, 20, 28)
    sent = b"".join(frame.payload for frame in outcome.frames[DEALER] if frame.target == CLIENT)
    dealt = [numbers(part, 8).reshape(2, COUNT).astype(np.int64) for part in cut(sent, [(2 * COUNT, 8)] * 2)]
    for mine, theirs, whole, (carries, bits) in zip(*outcome.results, dealt, strict=True):
        assert np.array_equal(bits, theirs.wrap.bit.held.numpy())
        own = mine.wrap.bit.held.numpy() % 2**8
        bit = whole.wrap.bit.held.numpy()
        carry = ((theirs.mask.held.numpy() + (carries << 20)) > whole.mask.held.numpy()).astype(np.int64)
        for case in range(4):
            which = (carry == case // 2) & (bit == case % 2)
            assert COUNT / 9 < which.sum() < COUNT / 2  # carry and top bit hang together
            for words in (carries, bits, own):
                assert surprise(np.bincount(words[which], minlength=2**8)) < 5
