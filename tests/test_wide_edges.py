"""Softmax rows and norms' rows behind masks at the ends of their rings, of sizes on both sides of every switch."""

import math

import pytest
import torch
import wire_parties
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire_norm import check as check_norm
from test_wire_norm import normed
from test_wire_norm import rows as rows_of
from test_wire_softmax import check as check_softmax
from test_wire_softmax import weighed
from wire_parties import OWNER

from crypten_llm.protocols.dealer import runtime
from crypten_llm.protocols.dealer.randomness import Stream
from crypten_llm.protocols.secret import Overflow
from crypten_llm.protocols.softmax import Exponents

PATTERNS = [0, -1, 1, 2**63 - 1, -(2**63), 0x5555555555555555]


@pytest.fixture(params=[(a, b) for a in PATTERNS[:4] for b in PATTERNS], ids=str)
def edges(request, monkeypatch):
    """Every word of a party's stream is one number, so masks, shares and seeds are at an edge, or the same twice."""
    monkeypatch.setattr(wire_parties, "audited", lambda role: role)  # it would refuse them
    start, derive, patterns = Stream.__init__, runtime.derive_key, {}

    def derived(key, label):
        found = derive(key, label)
        patterns[found] = request.param[key != wire_parties.key(0, OWNER)]
        return found

    def started(stream, key, *others):
        start(stream, key, *others)
        stream.pattern = patterns.get(key, 0)

    def words(stream, count):
        stream.position += 8 * count
        return torch.full((count,), stream.pattern)

    monkeypatch.setattr(runtime, "derive_key", derived)
    monkeypatch.setattr(Stream, "__init__", started)
    monkeypatch.setattr(Stream, "words", words)


def test_norms_behind_masks_at_the_edges(edges):
    spike = torch.zeros(2, 40, dtype=torch.int64)
    spike[0, 3], spike[1, 7] = 2**32, -(2**32)
    for width in (46, 63):
        check_norm(torch.cat([rows_of([-8.0, 0.0, 1.0, 20.3, 29.0, 32.9], 40), spike]), width=width)


@pytest.mark.parametrize("size", [104, 256])
def test_softmax_behind_masks_at_the_edges(edges, size):
    exponents = Exponents(size)
    low, high = exponents.scores[0], exponents.sums[1]
    check_softmax([[0.0], [1.5, -3.25, 2.0], [low, 0.0], [high - 1.5, low, 3.0], [0.5] * 30], exponents)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 576, 4096])
@pytest.mark.parametrize("width", [20, 30, 46, 63])
def test_norms_of_any_size(size, width):
    """Rings of the sum and of the product have two limbs; lifting gains more than a word, or less. The smallest ring
    just holds a unit row, at 18 bits.
    """
    powers = [-8.0, 3.5, 24.0, 32.9]
    made = rows_of(powers if size < 4096 else powers[1:3], size)
    check_norm(made, width=width)
    check_norm(made[:1], width=width)


@pytest.mark.parametrize(("scale", "limit"), [(16, 4), (16, 17), (10, 8), (16, 24)])
@pytest.mark.parametrize("fraction", [12, 18])
def test_norms_of_other_rings(scale, limit, fraction):
    """Where squares need 45 bits more than one limb, or just above two."""
    x = torch.randint(-(2**10), 2**10, (3, 9), generator=torch.Generator().manual_seed(scale + limit))
    found, lifted, flags, _ = normed(x << scale - 8, limit=limit, scale=scale, fraction=fraction)
    assert torch.equal(lifted, x << scale - 8) and not flags.any()
    real = x.double() / 2**8
    exact = real / (real.square().sum(-1, keepdim=True) + 9e-5).sqrt()
    assert (found - exact * 2**fraction).abs().max() < 1.3


@pytest.mark.parametrize("eps", [1e-12, 1e-30, 1.0, 1e4])
def test_any_eps(eps):
    """Next to nothing, where the sum alone must be two squares of a unit, and more than the row."""
    x = torch.tensor([[2, 0, 0], [0, -3, 1], [2**10, 5, 2**20], [-(2**24), 2**30, 1]])
    found, *_ = normed(x, eps=eps)
    real, more = x.double() / 2**16, round(eps * 3 * 2**32) / 2**32
    exact = real / (real.square().sum(-1, keepdim=True) + more).sqrt()
    assert (found - exact * 2**18).abs().max() < 1.2


@pytest.mark.parametrize("row", [1, 32_768])
@pytest.mark.parametrize("size", [68, 104, 208, 256, 512])
def test_rows_of_one_entry_and_of_many(row, size):
    exponents = Exponents(size)
    many = math.log2(row)
    (least, most), low = exponents.sums, exponents.scores[0]
    level = max(low, least - many + 0.01)
    if level < most - many:
        check_softmax([[y] * row for y in (level, most - many - 0.01)], exponents)
    if row > 1:
        check_softmax([[low] * (row - 1) + [max(least + 0.1, 0.0)], [low] * row + [most - 1.0]], exponents)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from([104, 208, 256, 512]), st.booleans(), st.integers(0, 10**6))
def test_scores_beyond_the_domain_are_flagged(size, above, seed):
    """Many or one, from the domain's upper end to 16 bits below where the ring ends, and 50 bits below its lower end:
    every row that came out wrong.
    """
    exponents, draw = Exponents(size), torch.Generator().manual_seed(seed)
    low, most = -exponents.low, exponents.sums[1]
    ends = (most, size + low - 17) if above else (low - 49.0, low + 0.0)
    rows = []
    for count in (1, 1, 1, 2, 9, 40):
        out = torch.rand(count, generator=draw, dtype=torch.float64) * (ends[1] - ends[0]) + ends[0]
        rows.append([*out.tolist(), *(torch.randn(10, generator=draw).double() * 3).tolist()])
    found, flags, _ = weighed(rows, exponents)
    for row, weights, flag in zip(rows, found, flags, strict=True):
        exact = torch.tensor(row, dtype=torch.float64).sub(max(row)).exp2()
        total = weights.sum().item()
        off = (weights / total - exact / exact.sum()).abs().max().item() if total > 0 else 1.0
        assert flag != [0, 0] or (0.24 <= total <= 1.02 and off < 3e-3), row[:3]


def test_other_rings_are_refused():
    for size in (64, 66, 130, 516):
        with pytest.raises(Overflow, match=f"a multiple of 4 bits from 68 to 512, not {size}"):
            Exponents(size)
