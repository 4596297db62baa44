"""Rounds, bytes each way and dealer bytes of every protocol: measured against what each docstring declares."""

import pytest
import torch
from wire_parties import CLIENT, OWNER, check_cost, run, share

from crypten_llm.links.transport import HEADER
from crypten_llm.protocols import fourier, products
from crypten_llm.protocols.normalize import normalize
from crypten_llm.protocols.opening import Opening, as_secret, open_wires

N = 60


def integers(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 7


def opening(size, **options):
    def job(runtime):
        return open_wires(runtime, [Opening(share(runtime, integers(N), width=size, bits=3), **options)])

    return job


def wire(runtime, *shape, lifted=False):
    """Opened before: its cost is subtracted in the table by adding ``OPENED`` to what is due."""
    size = 40 if lifted else 64
    return open_wires(runtime, [Opening(share(runtime, integers(*shape), width=size, bits=3), lifted=lifted)])[0]


def openings(*counts, lifted=()):
    """(rounds, owner's bytes, client's bytes, dealer's to the owner, dealer's to the client) of ``wire`` calls."""
    lifted = lifted or [False] * len(counts)
    sent = sum(n * (5 if wide else 8) for n, wide in zip(counts, lifted, strict=True))
    return len(counts), sent, sent, 0, sum(16 * n for n, wide in zip(counts, lifted, strict=True) if wide)


def plus(first, *others):
    return tuple(map(sum, zip(first, *others, strict=True)))


def multiply(*lifted, shapes=((N,), (N,))):
    def job(runtime):
        products.multiply(runtime, *(wire(runtime, *s, lifted=wide) for s, wide in zip(shapes, lifted, strict=True)))

    return job


def unary(function, *shape, lifted=False, **options):
    return lambda runtime: function(runtime, wire(runtime, *shape, lifted=lifted), **options)


def matmul(transposed):
    shapes = (2, 3, 5), (2, 4, 5) if transposed else (2, 5, 4)
    return lambda runtime: products.matmul(runtime, *(wire(runtime, *s) for s in shapes), transposed, bits=10)


def matrix(runtime, *shape):
    value = integers(*shape).double() if runtime.role == OWNER else None
    return products.OwnedMatrix(runtime, value, shape, 0)


def evaluate(fit):
    def job(runtime):
        secret = share(runtime, integers(N), scale=14)
        (opened,) = open_wires(runtime, [Opening(secret, ring=14 + fit.period, function=True)])
        fourier.evaluate(runtime, opened, fit, 22, bits=1)

    return job


def normalized(runtime):
    (opened,) = open_wires(runtime, [Opening(share(runtime, integers(N) + 1), ring=59, function=True)])
    normalize(runtime, opened, 58, 20, list(range(20)))


LEVELS = 59 - (58 - 2 * 20 - 6) - 1  # size - drop - 1
KEYS = N * (16 * LEVELS + 16 * (LEVELS + 1) + LEVELS)
HANDED = 8 * 20  # W - R for a matrix of 4 x 5

COSTS = {  # name: (job, (rounds, bytes owner to client, client to owner, dealer to owner, dealer to client))
    "whole opening": (opening(64), (1, 8 * N, 8 * N, 0, 0)),
    "narrow opening": (opening(33, truncate=4), (1, 5 * N, 5 * N, 0, 8 * N)),
    "opening of a narrow share": (opening(40), (1, 5 * N, 5 * N, 0, 0)),
    "lifted opening": (opening(48, truncate=4, lifted=True), (1, 6 * N, 6 * N, 0, 16 * N)),
    "truncated whole opening": (opening(64, truncate=4), (1, 8 * N, 8 * N, 0, 8 * N)),
    "opening for a function": (opening(17, function=True), (1, 3 * N, 3 * N, 0, 0)),
    "as_secret": (lambda runtime: as_secret(runtime, wire(runtime, N, lifted=True)), openings(N, lifted=[True])),
    "multiply": (multiply(False, False), plus(openings(N, N), (0, 0, 0, 0, 8 * N))),
    "multiply narrow by lifted": (
        multiply(False, True),
        plus(openings(N, N, lifted=[False, True]), (0, 0, 0, 0, 16 * N)),
    ),
    "multiply lifted by lifted": (
        multiply(True, True),
        plus(openings(N, N, lifted=[True, True]), (0, 0, 0, 0, 32 * N)),
    ),
    "multiply by a broadcast factor": (
        multiply(False, False, shapes=((6, 10), (6, 1))),
        plus(openings(60, 6), (0, 0, 0, 0, 8 * 60)),
    ),
    "square": (unary(products.square, N), plus(openings(N), (0, 0, 0, 0, 8 * N))),
    "square of a lifted wire": (
        unary(products.square, N, lifted=True),
        plus(openings(N, lifted=[True]), (0, 0, 0, 0, 16 * N)),
    ),
    "sum of squares": (
        unary(products.sum_of_squares, 6, 10, bits=20),
        plus(openings(60), (0, 0, 0, 0, 8 * 6)),
    ),
    "sum of squares of a lifted wire": (
        unary(products.sum_of_squares, 6, 10, lifted=True, bits=20),
        plus(openings(60, lifted=[True]), (0, 0, 0, 0, 8 * 6 + 8 * 60)),
    ),
    "matmul": (matmul(False), plus(openings(30, 40), (0, 0, 0, 0, 8 * 24))),
    "matmul transposed": (matmul(True), plus(openings(30, 40), (0, 0, 0, 0, 8 * 24))),
    "owned matrix": (lambda runtime: matrix(runtime, 4, 5), (1, HANDED, 0, 0, 0)),
    "linear": (
        lambda runtime: products.linear(runtime, wire(runtime, 3, 5), matrix(runtime, 4, 5), bits=10),
        plus(openings(15), (1, HANDED, 0, 0, 8 * 12)),
    ),
    "lookup": (
        lambda runtime: products.lookup(
            runtime, torch.tensor([1, 2, 3]) if runtime.role == CLIENT else None, 3, matrix(runtime, 4, 5), bits=10
        ),
        (1, HANDED, 4 * 3 * 4, 0, 8 * 15),  # the matrix is a round for the client, the rows are one for the owner
    ),
    "normalize": (normalized, (1, 8 * N, 8 * N, KEYS, KEYS + 8 * 2 * N + 8 * N)),
}
COSTS |= {
    fit.name: (evaluate(fit), (1, *2 * [-(-(14 + fit.period) // 8) * N], 0, 16 * fit.modes * N))
    for fit in (fourier.exponential(), fourier.silu_even())
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
