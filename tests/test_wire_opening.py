"""Masked openings: every ring, truncation, lifting, and the declared bounds at their edges."""

import pytest
import torch
from wire_parties import joined, open_wires, reconstruct, run, share, signed, value

from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import Overflow, Secret, as_secret


def edges(size: int, count: int = 60) -> torch.Tensor:
    """Integers below 2^(size - 2) in magnitude: the extremes, those next to zero, and random ones."""
    top = 2 ** (size - 2) - 1
    generator = torch.Generator().manual_seed(size)
    inside = torch.randint(-top, top + 1, (count,), generator=generator)
    return torch.cat([torch.tensor([0, 1, -1, top, -top, top // 2, -(top // 2)]), inside])


def opened(runtime, integers, size, *openings):
    """The shares behind each wire that one round of openings makes of the same integers."""
    secrets = [share(runtime, integers, width=size) for _ in openings]
    wires = open_wires(runtime, [Opening(s, **options) for s, options in zip(secrets, openings, strict=True)])
    return [as_secret(runtime, wire) for wire in wires]


def cuts(size):
    return sorted({0, 1, (size - 2) // 2, size - 2})


@pytest.mark.parametrize("size", range(8, 65))
def test_every_ring_and_truncation(size):
    integers = edges(size)
    openings = [dict(truncate=cut, lifted=lifted) for cut in cuts(size) for lifted in (0, 33, 64)]
    owner, client, _ = run(opened, integers, size, *openings).results
    for mine, theirs, options in zip(owner, client, openings, strict=True):
        cut = options["truncate"]
        assert mine.width == max(options["lifted"], size - cut)
        error = joined(mine, theirs).double() - integers.double() / 2**cut
        # A whole unit up or down never happens; without truncation nothing does. Floats hold 53 bits of a word.
        slack = 2.0 ** max(0, size - 2 - cut - 53)
        assert (error.abs() < 1 + slack).all() if cut else torch.equal(joined(mine, theirs), integers)


def test_a_truncation_is_exact_or_one_unit_off_and_unbiased():
    """1,000 units and 1/4, 40,000 times: rounded down to 1,000 three times of four, else up to 1,001."""
    integers = torch.full((40_000,), 1000 * 2**16 + 2**14)
    outcome = run(opened, integers, 48, dict(truncate=16), dict(truncate=16, lifted=64))
    for mine, theirs in zip(*outcome.results[:2], strict=True):
        rounded = joined(mine, theirs)
        up = (rounded == 1001).double().mean().item()
        assert ((rounded == 1000) | (rounded == 1001)).all()
        assert abs(up - 0.25) < 5 * (0.25 * 0.75 / 40_000) ** 0.5


def test_whole_multiples_are_truncated_exactly():
    integers = torch.arange(-50, 50) * 2**10
    mine, theirs = (r[0] for r in run(opened, integers, 40, dict(truncate=10, lifted=64)).results[:2])
    assert torch.equal(joined(mine, theirs), torch.arange(-50, 50))


def test_a_share_opens_in_a_narrower_ring():
    """Only the low bits of a wide share are sent, and lifting restores the rest."""

    def job(runtime):
        secret = share(runtime, edges(20), width=64)
        (wire,) = open_wires(runtime, [Opening(secret, ring=20, lifted=64)])
        return as_secret(runtime, wire)

    outcome = run(job)
    assert torch.equal(joined(*outcome.results[:2]), edges(20))
    assert outcome.sent(0, 1) == outcome.sent(1, 0) == -(-20 * len(edges(20)) // 8)


def test_scale_width_and_bound_follow_a_truncation():
    def job(runtime):
        secret = share(runtime, torch.tensor([5 << 20]), scale=20, width=40, bits=4)
        return as_secret(runtime, open_wires(runtime, [Opening(secret, truncate=8)])[0])

    outcome = run(job)
    secret = outcome.results[0]
    assert (secret.scale, secret.width, secret.bits) == (12, 32, 4)
    assert value(outcome).item() == 5


def test_one_round_opens_any_shapes_together():
    def job(runtime):
        first, second = share(runtime, torch.ones(2, 3, dtype=torch.int64)), share(runtime, torch.tensor(7), width=30)
        wires = open_wires(runtime, [Opening(first), Opening(second, truncate=1), Opening(first[:0])])
        return [as_secret(runtime, wire) for wire in wires]

    outcome = run(job)
    shapes = [tuple(secret.shape) for secret in outcome.results[0]]
    assert shapes == [(2, 3), (), (0, 3)] and outcome.cost()[0] == 1


def refused(secret_options: dict, message: str, **opening):
    def job(runtime):
        secret = share(runtime, torch.ones(1, dtype=torch.int64), **secret_options)
        open_wires(runtime, [Opening(secret, **opening)])

    with pytest.raises(Overflow, match=message):
        run(job)


def test_openings_that_could_wrap_are_refused_before_anything_is_sent():
    refused(dict(bits=39, scale=0, width=40), r"\|x\| < 2\^39 at scale 2\^0 needs 41 bits, but the opening has 40")
    refused(dict(bits=20, scale=20, width=64), "needs 42 bits, but the opening has 41", ring=41)
    refused(dict(bits=4, width=32), r"valid modulo 2\^32 cannot be opened modulo 2\^33", ring=33)
    refused(dict(bits=4, width=32), "cannot drop 31 bits of an opening of 32", truncate=31)
    refused(dict(bits=4, width=32), "cannot drop -1 bits", truncate=-1)
    refused(dict(bits=4, width=32), "an opening for a function is not lifted", lifted=64, function=True)


def test_the_largest_declared_value_is_not_refused():
    def job(runtime):
        secret = share(runtime, torch.tensor([2**38 - 1, -(2**38 - 1)]), bits=38, width=40)
        return as_secret(runtime, open_wires(runtime, [Opening(secret, lifted=64)])[0])

    assert joined(*run(job).results[:2]).tolist() == [2**38 - 1, 1 - 2**38]


@pytest.mark.parametrize("size", [1, 2, 9, 63, 64])
def test_an_opening_for_a_function_fills_its_ring(size):
    integers = torch.randint(-(2**62), 2**62, (50,)) * 3

    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, integers, width=64), ring=size, function=True)])
        return as_secret(runtime, wire)

    owner, client, _ = run(job).results
    assert torch.equal(signed(owner.share + client.share - integers, size), torch.zeros_like(integers))


@pytest.mark.parametrize(("size", "lifted"), [(2, 64), (20, 34), (35, 64), (63, 64), (40, 40), (40, 30)])
def test_what_lifting_is_dealt(size, lifted):
    """Two numbers modulo as many bits as are gained; nothing where none are."""

    def job(runtime):
        open_wires(runtime, [Opening(share(runtime, torch.zeros(11, dtype=torch.int64), width=size), lifted=lifted)])

    rounds, *sent = run(job).cost()
    packed = -(-22 * max(0, lifted - size) // 8)
    assert (rounds, sent) == (1, [-(-11 * size // 8)] * 2 + [0, packed])


@pytest.mark.parametrize("size", [5, 6, 7, 35])
def test_what_leaves_the_lifted_range_stays_large(size):
    """Up to three times the range, a lifted number is never a small wrong one: whoever checks sizes will see it."""
    quarter = 2 ** (size - 2)
    beyond = torch.arange(quarter + 1, 3 * quarter) if size < 9 else torch.randint(quarter + 1, 3 * quarter, (300,))
    integers = torch.cat([beyond, -beyond, torch.tensor([quarter, -quarter])]).repeat(40)

    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, integers, width=size, bits=size - 2), lifted=64)])
        return as_secret(runtime, wire)

    assert (reconstruct(run(job)).abs() >= quarter).all()


def test_views_of_secrets_and_wires():
    """Reshape, permute, transpose, index and negate are local and commute with opening."""
    x = torch.arange(24).reshape(2, 3, 4)

    def job(runtime):
        secret = share(runtime, x, width=32)
        views = [secret.permute(2, 0, 1), secret.transpose(0, 1), secret.reshape(6, 4), secret[1:], -secret]
        wires = open_wires(runtime, [Opening(secret, lifted=64), Opening(secret)])
        turned = [view for wire in wires for view in (wire.transpose(1, 2), wire.reshape(6, 4))]
        return views + [as_secret(runtime, wire) for wire in turned]

    owner, client, dealer = run(job).results
    found = [signed(a.share + b.share, 32) for a, b in zip(owner, client, strict=True)]
    local = [x.permute(2, 0, 1), x.transpose(0, 1), x.reshape(6, 4), x[1:], -x]
    for result, expected in zip(found, local + 2 * [x.transpose(1, 2), x.reshape(6, 4)], strict=True):
        assert torch.equal(result, expected)
    assert [secret.shape for secret in dealer] == [secret.shape for secret in owner]
    assert all(isinstance(secret, Secret) and secret.share.is_meta for secret in dealer)
