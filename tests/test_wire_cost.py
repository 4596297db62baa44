"""Rounds, bytes each way and dealer bytes of every protocol: measured against what each docstring declares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import CLIENT, OWNER, check_cost, open_wires, play, plus, run, share

from crypten_llm.kernels.ring import packed_size
from crypten_llm.links.frames import HEADER
from crypten_llm.protocols import fits, products, smooth
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import as_secret

N = 60


def integers(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 7


def opening(size, **options):
    def job(runtime):
        return open_wires(runtime, [Opening(share(runtime, integers(N), width=size, bits=3), **options)])

    return job


LIFTED = 37  # bits of the ring that a lifted wire is opened in
SHORT = 29  # and of a narrow one whose products are valid in fewer than 64


def wire(runtime, *shape, lifted=0, ring=64):
    """Opened before: its cost is added in the table to what is due (``openings``)."""
    size = LIFTED if lifted else ring
    return open_wires(runtime, [Opening(share(runtime, integers(*shape), width=size, bits=3), lifted=lifted)])[0]


def openings(*counts, lifted=(), rings=()):
    """(rounds, owner's bytes, client's bytes, dealer's to the owner, dealer's to the client) of ``wire`` calls."""
    lifted = lifted or [0] * len(counts)
    rings = [LIFTED if wide else ring for wide, ring in zip(lifted, rings or [64] * len(counts), strict=True)]
    sent = sum(packed_size(n, ring) for n, ring in zip(counts, rings, strict=True))
    wraps = [lifting(n, LIFTED, wide) for n, wide in zip(counts, lifted, strict=True) if wide]
    return plus((len(counts), sent, sent, 0, 0), *wraps)


def dealt(count, bits=64):
    """Of the dealer's, to the client."""
    return 0, 0, 0, 0, packed_size(count, bits)


def lifting(count, size, lifted):
    """Of numbers of ``size`` bits modulo 2^lifted: for each the carry of a mask's parts and its top bit."""
    return dealt(2 * count, lifted - size)


def multiply(*lifted, shapes=((N,), (N,)), rings=(64, 64), dropped=0):
    def job(runtime):
        parts = zip(shapes, lifted, rings, strict=True)
        wires = [wire(runtime, *s, lifted=wide, ring=ring) for s, wide, ring in parts]
        products.multiply(runtime, *wires, dropped=dropped)

    return job


def products_of(*lifted, ring=64, dropped=0):
    """What is dealt for a product of wires that are lifted to these widths, of 0 opened in ``ring``: the product of
    masks, and those with a wrap bit that the result's width has room for; of each but 4 of the bits that are dropped.
    """
    width = min(wide or ring for wide in lifted)
    ups = [0, *(LIFTED for wide in lifted if wide), *([2 * LIFTED] if all(lifted) else [])]
    return plus(*(dealt(N, width - max(up, dropped - 4)) for up in ups if up < width))


def unary(function, *shape, lifted=0, ring=64, **options):
    return lambda runtime: function(runtime, wire(runtime, *shape, lifted=lifted, ring=ring), **options)


def matmul(transposed, rings=(64, 64), **options):
    shapes = (2, 3, 5), (2, 4, 5) if transposed else (2, 5, 4)

    def job(runtime):
        wires = [wire(runtime, *shape, ring=ring) for shape, ring in zip(shapes, rings, strict=True)]
        products.matmul(runtime, *wires, transposed, bits=10, **options)

    return job


def matrix(runtime, *shape, bits=64):
    value = integers(*shape).double() if runtime.role == OWNER else None
    return play(runtime, products.own(runtime, value, shape, 0, bits))


def linear(ring, **options):
    return lambda runtime: products.linear(
        runtime, wire(runtime, 3, 5, ring=ring), matrix(runtime, 4, 5), bits=10, **options
    )


def times_owned(runtime):
    products.times_owned(runtime, wire(runtime, 4, 5, ring=SHORT), matrix(runtime, 5), bits=10)


def evaluate(fit):
    def job(runtime):
        secret = share(runtime, integers(N), scale=14)
        (opened,) = open_wires(runtime, [Opening(secret, ring=14 + fit.period, function=True)])
        smooth.evaluate(runtime, opened, fit, 22, bits=1)

    return job


HANDED = 8 * 20  # W - R for a matrix of 4 x 5

COSTS = {  # name: (job, (rounds, bytes owner to client, client to owner, dealer to owner, dealer to client))
    "whole opening": (opening(64), openings(N)),
    "truncated opening": (opening(33, truncate=4), openings(N, rings=[33 - 4])),
    "truncated whole opening": (opening(64, truncate=4), openings(N, rings=[60])),
    "opening of a narrow share": (opening(41), openings(N, rings=[41])),
    "lifted opening": (opening(47, lifted=64), plus(openings(N, rings=[47]), lifting(N, 47, 64))),
    "opening lifted by one bit": (opening(8, lifted=9), plus(openings(N, rings=[8]), dealt(2 * N, 1))),
    "truncated and lifted opening": (
        opening(47, truncate=4, lifted=58),
        plus(openings(N, rings=[43]), lifting(N, 43, 58)),
    ),
    "truncated opening in a part of its ring": (
        opening(64, ring=40, truncate=9, lifted=33),
        plus(openings(N, rings=[31]), lifting(N, 31, 33)),
    ),
    "opening lifted to its own ring": (opening(47, truncate=4, lifted=43), openings(N, rings=[43])),
    "opening lifted to less": (opening(47, lifted=30), openings(N, rings=[47])),
    "opening for a function": (opening(17, function=True), openings(N, rings=[17])),
    "truncated opening for a function": (opening(20, truncate=3, function=True), openings(N, rings=[17])),
    "opening of bits": (opening(1, function=True), openings(N, rings=[1])),
    "as_secret": (lambda runtime: as_secret(runtime, wire(runtime, N, lifted=64)), openings(N, lifted=[64])),
    "multiply": (multiply(0, 0), plus(openings(N, N), dealt(N))),
    "multiply in the narrower ring": (
        multiply(0, 0, rings=(SHORT, 33)),
        plus(openings(N, N, rings=[SHORT, 33]), dealt(N, SHORT)),
    ),
    "multiply by a broadcast factor": (multiply(0, 0, shapes=((6, 10), (6, 1))), plus(openings(60, 6), dealt(60))),
    "square": (unary(products.square, N, ring=SHORT), plus(openings(N, rings=[SHORT]), dealt(N, SHORT))),
    "sum of squares": (
        unary(products.sum_of_squares, 6, 10, ring=SHORT, bits=20),
        plus(openings(60, rings=[SHORT]), dealt(6, SHORT)),
    ),
    "matmul": (matmul(False), plus(openings(30, 40), dealt(24))),
    "matmul transposed": (matmul(True), plus(openings(30, 40), dealt(24))),
    "matmul in the narrower ring": (
        matmul(True, rings=(33, SHORT)),
        plus(openings(30, 40, rings=[33, SHORT]), dealt(24, SHORT)),
    ),
    "matmul of entries that are read": (
        matmul(True, visible=torch.arange(24).view(2, 3, 4) % 3 > 0),
        plus(openings(30, 40), dealt(16)),
    ),
    "matmul without low bits": (
        matmul(True, rings=(33, SHORT), dropped=20),
        plus(openings(30, 40, rings=[33, SHORT]), dealt(24, SHORT - 20 + 4)),
    ),
    "owned matrix of few bits": (lambda runtime: matrix(runtime, 4, 5, bits=33), (1, packed_size(20, 33), 0, 0, 0)),
    "linear without low bits": (
        linear(SHORT, dropped=9),
        plus(openings(15, rings=[SHORT]), (1, HANDED, 0, 0, 0), dealt(12, SHORT - 5)),
    ),
    "owned matrix": (lambda runtime: matrix(runtime, 4, 5), (1, HANDED, 0, 0, 0)),
    "linear": (linear(64), plus(openings(15), (1, HANDED, 0, 0, 0), dealt(12))),
    "linear in a narrow ring": (
        linear(SHORT),
        plus(openings(15, rings=[SHORT]), (1, HANDED, 0, 0, 0), dealt(12, SHORT)),
    ),
    "times owned": (times_owned, plus(openings(20, rings=[SHORT]), (1, 8 * 5, 0, 0, 0), dealt(20, SHORT))),
}
COSTS |= {
    f"multiply {left or 'exact'} by {right or 'exact'}": (
        multiply(left, right),
        plus(openings(N, N, lifted=[left, right]), products_of(left, right)),
    )
    for left, right in [(0, 64), (64, 64), (64, 0), (50, 0), (50, 64), (64, LIFTED + 1)]
}
COSTS |= {
    f"multiply exact by {wide} in {ring} bits": (
        multiply(0, wide, rings=(ring, 64)),
        plus(openings(N, N, lifted=[0, wide], rings=[ring, 64]), products_of(0, wide, ring=ring)),
    )
    for wide in (LIFTED + 1, 64)
    for ring in (SHORT, LIFTED, LIFTED + 1, 44)  # at most LIFTED bits: what a wrap adds is a multiple of the ring
}
COSTS |= {
    f"multiply {left or 'exact'} by {right or 'exact'} without {dropped} bits": (
        multiply(left, right, dropped=dropped),
        plus(openings(N, N, lifted=[left, right]), products_of(left, right, dropped=dropped)),
    )
    for left, right in [(0, 0), (0, 64), (64, 64)]
    for dropped in (1, 5, LIFTED + 4, LIFTED + 5, 60)  # both sides of what a wrap adds
}
COSTS |= {
    f"square lifted to {wide}": (
        unary(products.square, N, lifted=wide),
        plus(openings(N, lifted=[wide]), dealt(N, wide), dealt(N, wide - LIFTED - 1)),
    )
    for wide in (LIFTED + 1, LIFTED + 2, 50, 64)
}
COSTS |= {
    f"sum of squares lifted to {wide}": (
        unary(products.sum_of_squares, 6, 10, lifted=wide, bits=20),
        plus(openings(60, lifted=[wide]), dealt(6, wide), dealt(60, wide - LIFTED - 1)),
    )
    for wide in (LIFTED + 1, LIFTED + 2, 50, 64)
}
COSTS |= {
    fit.name: (evaluate(fit), plus(openings(N, rings=[14 + fit.period]), dealt(2 * fit.modes * N)))
    for fit in (fits.stored("sigmoid"), fits.stored("reciprocal"))
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_is_the_declared_one(name):
    check_cost(*COSTS[name])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_openings_of_any_size_together(data):
    """Each is packed by itself, so the bits that fill up its last byte are its own."""
    asked = []
    for _ in range(data.draw(st.integers(1, 4), "openings")):
        size = data.draw(st.integers(5, 64), "ring")
        truncate = data.draw(st.integers(0, size - 5), "bits dropped")
        lifted = data.draw(st.sampled_from([0, *range(size - truncate - 1, 65)]), "lifted")
        asked.append((data.draw(st.integers(1, 19), "count"), size, truncate, lifted))

    def job(runtime):
        secrets = [share(runtime, torch.zeros(n, dtype=torch.int64), width=size, bits=3) for n, size, _, _ in asked]
        cuts = [dict(truncate=truncate, lifted=lifted) for *_, truncate, lifted in asked]
        return open_wires(runtime, [Opening(x, **cut) for x, cut in zip(secrets, cuts, strict=True)])

    sent = sum(packed_size(n, size - truncate) for n, size, truncate, _ in asked)
    wraps = [lifting(n, size - cut, lifted) for n, size, cut, lifted in asked if lifted > size - cut]
    check_cost(job, plus((1, sent, sent, 0, 0), *wraps))


def test_headers_are_the_only_overhead():
    outcome = run(COSTS["multiply"][0])
    for role in (OWNER, CLIENT):
        assert outcome.traffic[role].online.bytes_sent == 16 * N + 2 * HEADER.size
