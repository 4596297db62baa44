"""What a party sees of a softmax row and of a norm's row, all of it together, is alike for any numbers in it.

A party's view: its share of the numbers, its masks, what it was dealt and what was opened. Each alone is uniform
(``test_wire_softmax``, ``test_wire_norm``); here every two of them are compared, for rows that differ as much as they
can. More than two together is what ``docs/wire.md`` argues.
"""

import itertools

import numpy as np
import pytest
import torch
import wire_parties
from test_wire_security import assert_uniform, cut
from wire_parties import CLIENT, DEALER, OWNER, play, run, share

from crypten_llm.insecure.audit import MaskReused
from crypten_llm.kernels.ring import packed_size
from crypten_llm.protocols.dealer.runtime import Parts
from crypten_llm.protocols.norm import ROOT, unit_rows
from crypten_llm.protocols.secret import Secret
from crypten_llm.protocols.softmax import OPENED, Exponents, weigh
from crypten_llm.protocols.wide import ResidueOpening

ROWS = 9_973  # a prime, so that it is not another dimension
SIZE = 2  # numbers of a row
Q = 104
PROJECTED = 3  # bits of a word that are looked at


def columns(words: torch.Tensor, bits: int) -> list[np.ndarray]:
    """Low bits and high bits of some of the words that a row has, [ROWS] each."""
    if words.numel() % ROWS:
        return []
    shape = list(words.shape)
    if ROWS in shape:
        words = words.movedim(shape.index(ROWS), 0)
    rows = words.reshape(ROWS, -1).numpy()
    top = (bits - 1) % 64 + 1
    chosen = sorted({0, rows.shape[1] // 2, rows.shape[1] - 1})
    low = [rows[:, place] & (2**PROJECTED - 1) for place in chosen]
    return [*low, rows[:, chosen[-1]] >> max(0, top - PROJECTED) & (2**PROJECTED - 1)]


def watch(runtime, own: torch.Tensor) -> list[np.ndarray]:
    """What this party sees from now on, as columns."""
    seen = columns(own, 64)

    def watched(name, bits_of):
        method = getattr(runtime, name)

        def call(*arguments):
            made = method(*arguments)
            seen.extend(columns(made.held, bits_of(*arguments)))
            return made

        setattr(runtime, name, call)

    watched("mask", lambda shape, bits=64: bits)
    watched("mask_ones", lambda shape, bits: bits)
    watched("mask_below", lambda shape, modulus: (modulus - 1).bit_length())
    watched("deal", lambda shape, value, bits=64: bits)
    watched("deal_ones", lambda shape, bits, turned: bits)
    exchange = runtime.exchange

    def opened(pieces):
        found = exchange(pieces)
        for piece, public in zip(pieces, found, strict=True):
            if public is not None:
                seen.extend(columns(public, piece.bits))
        return found

    runtime.exchange = opened
    return seen


def softmax_row(runtime, row, fixed=False):
    exponents = Exponents(Q)
    scores = torch.tensor([round(y * 2**OPENED / Q) for y in row] * ROWS)
    secret = share(runtime, scores, width=OPENED, bits=0)
    seen = [] if runtime.role == DEALER else watch(runtime, secret.share)
    if fixed:
        runtime.mask_below = lambda shape, modulus: Parts(torch.zeros(shape).long(), torch.zeros(shape).long())
    counts = torch.full((ROWS,), len(row))
    play(runtime, weigh(runtime, secret.share, 0, counts, exponents, 18, 40))
    return seen


def norm_row(runtime, row, fixed=False):
    held = share(runtime, torch.tensor([round(x * 2**16) for x in row] * ROWS).view(ROWS, -1), bits=0).share
    seen = [] if runtime.role == DEALER else watch(runtime, held & (2**35 - 1))
    play(runtime, unit_rows(runtime, Secret(held, 16, 35, 17), 1e-5, 17, 18, 46))
    return seen


def apart(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Of every two columns together, how many standard deviations the two views' counts differ by at most."""
    cells, worst = 4**PROJECTED, 0.0
    for i, j in itertools.combinations(range(len(first)), 2):
        counts = [np.bincount(view[i] * 2**PROJECTED + view[j], minlength=cells) for view in (first, second)]
        both = counts[0] + counts[1]
        used = both > 0
        chi, freedom = (((counts[0] - counts[1]) ** 2)[used] / both[used]).sum(), max(1, used.sum() - 1)
        cube = ((chi / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / (2 / (9 * freedom)) ** 0.5
        worst = max(worst, float(cube))
    return worst


VIEWS = {
    "softmax": (softmax_row, [(0.0, 0.0), (5.0, -7.0), (-20.0, 2.0)]),
    "norm": (norm_row, [(0.0, 0.0), (60_000.0, -60_000.0), (2.0**-16, 1.0)]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_of_different_rows_are_alike(name):
    job, rows = VIEWS[name]
    outcomes = [run(job, row, seed=place) for place, row in enumerate(rows)]
    for party in (OWNER, CLIENT):
        views = [outcome.results[party] for outcome in outcomes]
        assert len({len(view) for view in views}) == 1 and len(views[0]) > 30
        for first, second in itertools.combinations(views, 2):
            assert apart(first, second) < 5.5


def test_views_of_a_row_that_is_not_rotated_differ(monkeypatch):
    """The comparison above can fail: with rho always 0, what is opened shows where a row's sum lies."""
    monkeypatch.setattr(wire_parties, "audited", lambda role: role)  # which would refuse it
    first, second = (run(softmax_row, row, True, seed=9).results[CLIENT] for row in VIEWS["softmax"][1][:2])
    assert apart(first, second) > 20


def test_a_rotation_serves_one_row():
    """rho is the mask of one opening: a second one under it is refused."""

    def job(runtime):
        rho = runtime.mask_below((3,), 256)
        zeros = runtime.share((3,), lambda: torch.zeros(3).long())
        for _ in range(2):
            play(runtime, opened(ResidueOpening(zeros, rho, 256)))

    with pytest.raises(MaskReused, match="has hidden something before"):
        run(job)


def opened(request):
    return (yield [request])[0]


@pytest.mark.parametrize("name", VIEWS)
def test_every_mask_hides_one_opening(name):
    """None is left over, rho among them."""

    def job(runtime):
        row = VIEWS[name][1][1]
        if name == "softmax":
            scores = share(runtime, torch.zeros(30).long(), width=OPENED, bits=0).share
            play(runtime, weigh(runtime, scores, 0, torch.full((10,), 3), Exponents(), 18, 40))
        else:
            held = share(runtime, torch.tensor([row]).long(), bits=0).share
            play(runtime, unit_rows(runtime, Secret(held, 16, 35, 17), 1e-5, 17, 18, 46))
        return runtime.audit

    for role in (OWNER, CLIENT):
        audit = run(job).results[role]
        assert not audit.waiting and audit.messages == 4


# What is dealt.

COUNT = 4096


def test_what_a_softmax_row_is_dealt_is_uniform():
    def job(runtime):
        scores = share(runtime, torch.arange(COUNT), width=OPENED, bits=0).share
        play(runtime, weigh(runtime, scores, 0, torch.full((COUNT // 2,), 2), Exponents(), 18, 40))

    sent = b"".join(frame.payload for frame in run(job).frames[DEALER] if frame.target == CLIENT)
    elements, rows = 32 * COUNT, 64 * (COUNT // 2)
    assert_uniform(sent[:elements], 64, "powers of two, turned")
    assert_uniform(sent[elements : elements + rows], 64, "what turns a row's sum back")


@pytest.mark.parametrize("width", [46, 63])
def test_what_a_norms_row_is_dealt_is_uniform(width):
    def job(runtime):
        held = share(runtime, torch.arange(COUNT).view(-1, 2), bits=0).share
        play(runtime, unit_rows(runtime, Secret(held, 16, 35, 17), 1e-5, 17, 18, width))

    frames = run(job).frames[DEALER]
    sent = b"".join(frame.payload for frame in frames if frame.target == CLIENT)
    key = sum(len(frame.payload) for frame in frames if frame.target == OWNER)
    rows, squares, wide = COUNT // 2, 2 * 33 + 4 + 1 + 1, width + 33 + ROOT - 18
    full, power = wide + 2 * 26 - ROOT, 24 + 3  # the least sum is 2^16 squares of a unit: 2^k up to 2^24
    before = [(2 * COUNT, max(wide, squares) - 35), (COUNT, squares - 35 - 1), (rows, squares)]
    after = [
        *[(2 * rows, full - power), (20 * rows, full), (20 * rows, full), (20 * rows, full - power)],
        *[(COUNT, width + 4), (COUNT, wide - 35)],
    ]
    sizes = [packed_size(*part) for part in before]
    start, rest = sent[: sum(sizes)], sent[sum(sizes) + key :]
    for part, (count, bits) in zip(cut(start, before) + cut(rest, after), before + after, strict=True):
        if bits <= 64:
            assert_uniform(part, bits, f"{count} numbers of {bits} bits")
        else:  # by bytes, of which a number of any size has some across its ends
            assert_uniform(part[: len(part) // 8 * 8], 64, f"{count} numbers of {bits} bits")
