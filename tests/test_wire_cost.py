"""Rounds, bytes each way and dealer bytes of every protocol: measured against what each docstring declares."""

import pytest
import torch
from wire_parties import CLIENT, OWNER, check_cost, open_wires, play, plus, run, share

from crypten_llm.kernels.ring import packed_size
from crypten_llm.links.frames import HEADER
from crypten_llm.protocols import fits, products, smooth
from crypten_llm.protocols.opening import Opening
from crypten_llm.protocols.secret import as_secret
from crypten_llm.protocols.smooth import normalize

N = 60


def integers(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 7


def opening(size, **options):
    def job(runtime):
        return open_wires(runtime, [Opening(share(runtime, integers(N), width=size, bits=3), **options)])

    return job


LIFTED = 37  # bits of the ring that a lifted wire is opened in
SHORT = 29  # and of a narrow one whose products are valid in fewer than 64


def wire(runtime, *shape, lifted=False, ring=64):
    """Opened before: its cost is added in the table to what is due (``openings``)."""
    size = LIFTED if lifted else ring
    return open_wires(runtime, [Opening(share(runtime, integers(*shape), width=size, bits=3), lifted=lifted)])[0]


def openings(*counts, lifted=(), rings=()):
    """(rounds, owner's bytes, client's bytes, dealer's to the owner, dealer's to the client) of ``wire`` calls."""
    lifted = lifted or [False] * len(counts)
    rings = [LIFTED if wide else ring for wide, ring in zip(lifted, rings or [64] * len(counts), strict=True)]
    sent = sum(packed_size(n, ring) for n, ring in zip(counts, rings, strict=True))
    return len(counts), sent, sent, 0, sum(16 * n for n, wide in zip(counts, lifted, strict=True) if wide)


def dealt(count, bits=64):
    """Of the dealer's, to the client."""
    return 0, 0, 0, 0, packed_size(count, bits)


def multiply(*lifted, shapes=((N,), (N,)), rings=(64, 64)):
    def job(runtime):
        parts = zip(shapes, lifted, rings, strict=True)
        products.multiply(runtime, *(wire(runtime, *s, lifted=wide, ring=ring) for s, wide, ring in parts))

    return job


def unary(function, *shape, lifted=False, ring=64, **options):
    return lambda runtime: function(runtime, wire(runtime, *shape, lifted=lifted, ring=ring), **options)


def matmul(transposed, rings=(64, 64)):
    shapes = (2, 3, 5), (2, 4, 5) if transposed else (2, 5, 4)

    def job(runtime):
        wires = [wire(runtime, *shape, ring=ring) for shape, ring in zip(shapes, rings, strict=True)]
        products.matmul(runtime, *wires, transposed, bits=10)

    return job


def matrix(runtime, *shape):
    value = integers(*shape).double() if runtime.role == OWNER else None
    return play(runtime, products.own(runtime, value, shape, 0))


def linear(ring):
    return lambda runtime: products.linear(runtime, wire(runtime, 3, 5, ring=ring), matrix(runtime, 4, 5), bits=10)


def times_owned(runtime):
    products.times_owned(runtime, wire(runtime, 4, 5, ring=SHORT), matrix(runtime, 5), bits=10)


def look_up(runtime):
    ids = torch.tensor([1, 2, 3]) if runtime.role == CLIENT else None
    play(runtime, products.lookup(runtime, ids, 3, matrix(runtime, 4, 5), bits=10))


def evaluate(fit):
    def job(runtime):
        secret = share(runtime, integers(N), scale=14)
        (opened,) = open_wires(runtime, [Opening(secret, ring=14 + fit.period, function=True)])
        smooth.evaluate(runtime, opened, fit, 22, bits=1)

    return job


def normalized(runtime):
    (opened,) = open_wires(runtime, [Opening(share(runtime, integers(N) + 1), ring=59, function=True)])
    normalize(runtime, opened, 58, 20, list(range(20)))


LEVELS = 59 - (58 - 2 * 20 - 6) - 1  # size - drop - 1
KEYS = N * (16 * LEVELS + 16 * (LEVELS + 1) + LEVELS)
HANDED = 8 * 20  # W - R for a matrix of 4 x 5

COSTS = {  # name: (job, (rounds, bytes owner to client, client to owner, dealer to owner, dealer to client))
    "whole opening": (opening(64), openings(N)),
    "narrow opening": (opening(33, truncate=4), plus(openings(N, rings=[33]), dealt(N, 33 - 4))),
    "opening of a narrow share": (opening(41), openings(N, rings=[41])),
    "lifted opening": (opening(47, truncate=4, lifted=64), plus(openings(N, rings=[47]), dealt(N), dealt(N))),
    "truncated whole opening": (opening(64, truncate=4), plus(openings(N), dealt(N, 60))),
    "opening for a function": (opening(17, function=True), openings(N, rings=[17])),
    "opening of bits": (opening(1, function=True), openings(N, rings=[1])),
    "as_secret": (lambda runtime: as_secret(runtime, wire(runtime, N, lifted=64)), openings(N, lifted=[True])),
    "multiply": (multiply(False, False), plus(openings(N, N), dealt(N))),
    "multiply in the narrower ring": (
        multiply(False, False, rings=(SHORT, 33)),
        plus(openings(N, N, rings=[SHORT, 33]), dealt(N, SHORT)),
    ),
    "multiply narrow by lifted": (
        multiply(False, True, rings=(SHORT, 64)),
        plus(openings(N, N, lifted=[False, True], rings=[SHORT, 64]), *[dealt(N, SHORT)] * 2),
    ),
    "multiply lifted by lifted": (
        multiply(True, True),
        plus(openings(N, N, lifted=[True, True]), *[dealt(N)] * 4),
    ),
    "multiply by a broadcast factor": (
        multiply(False, False, shapes=((6, 10), (6, 1))),
        plus(openings(60, 6), dealt(60)),
    ),
    "square": (unary(products.square, N, ring=SHORT), plus(openings(N, rings=[SHORT]), dealt(N, SHORT))),
    "square of a lifted wire": (
        unary(products.square, N, lifted=64),
        plus(openings(N, lifted=[True]), *[dealt(N)] * 2),
    ),
    "sum of squares": (
        unary(products.sum_of_squares, 6, 10, ring=SHORT, bits=20),
        plus(openings(60, rings=[SHORT]), dealt(6, SHORT)),
    ),
    "sum of squares of a lifted wire": (
        unary(products.sum_of_squares, 6, 10, lifted=64, bits=20),
        plus(openings(60, lifted=[True]), dealt(6), dealt(60)),
    ),
    "matmul": (matmul(False), plus(openings(30, 40), dealt(24))),
    "matmul transposed": (matmul(True), plus(openings(30, 40), dealt(24))),
    "matmul in the narrower ring": (
        matmul(True, rings=(33, SHORT)),
        plus(openings(30, 40, rings=[33, SHORT]), dealt(24, SHORT)),
    ),
    "owned matrix": (lambda runtime: matrix(runtime, 4, 5), (1, HANDED, 0, 0, 0)),
    "linear": (linear(64), plus(openings(15), (1, HANDED, 0, 0, 0), dealt(12))),
    "linear in a narrow ring": (
        linear(SHORT),
        plus(openings(15, rings=[SHORT]), (1, HANDED, 0, 0, 0), dealt(12, SHORT)),
    ),
    "times owned": (times_owned, plus(openings(20, rings=[SHORT]), (1, 8 * 5, 0, 0, 0), dealt(20, SHORT))),
    # The matrix is a round for the client, the rows are one for the owner.
    "lookup": (look_up, plus((1, HANDED, 4 * 3 * 4, 0, 0), dealt(15, 32))),
    "normalize": (normalized, plus(openings(N, rings=[59]), (0, 0, 0, KEYS, KEYS), dealt(2 * N), dealt(N))),
}
COSTS |= {
    fit.name: (evaluate(fit), plus(openings(N, rings=[14 + fit.period]), dealt(2 * fit.modes * N)))
    for fit in (fits.stored("exp"), fits.stored("silu"))
}


@pytest.mark.parametrize("name", COSTS)
def test_cost_is_the_declared_one(name):
    check_cost(*COSTS[name])


def test_normalize_costs_what_its_docstring_says():
    """About 33 bytes a bit of the comparison, and 24 bytes for the bit's shares and the mask's."""
    assert LEVELS == 46 and KEYS / N == 33 * 46 + 16


def test_headers_are_the_only_overhead():
    outcome = run(COSTS["multiply"][0])
    for role in (OWNER, CLIENT):
        assert outcome.traffic[role].online.bytes_sent == 16 * N + 2 * HEADER.size
