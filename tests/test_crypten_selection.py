"""Selection with CrypTen's protocols: every operation against the plaintext engine's, and a model under a policy."""

import pytest
import selection_jobs
import torch
from parties import run

import eviction
from crypten_llm.engines.crypten.engine import CryptenEngine
from crypten_llm.engines.crypten.selection import DIRECT, PAIRS, TREE
from crypten_llm.engines.plain.engine import PlainEngine

PLAIN = PlainEngine()
COMPARISON = 216  # bytes sent
ENDS = torch.tensor([-1.49, -1.0, 0.0, 1.0, 1.43])


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def grid(*size, seed=0, limit=20_000):
    """Numbers of both signs in steps that the fixed point holds, a fifth of them equal to another."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-limit, limit + 1, size, generator=generator)
    return torch.where(torch.rand(size, generator=generator) < 0.2, x.flatten()[0], x) * 2.0**-10


def check(*cases, **options):
    """Cases (name, secrets, public, tolerance) on real parties against ``plain``; returns their rounds and bytes."""
    outcomes = run(selection_jobs.cases, [case[:3] for case in cases], **options)[1]
    for (name, secrets, public, tolerance), (values, *_) in zip(cases, outcomes, strict=True):
        expected = selection_jobs.compute(PLAIN, name, secrets, public)
        for value, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(value, wanted.float(), atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    return [(rounds, sent) for _, rounds, sent in outcomes]


def test_top_and_its_picks():
    """All sizes of count, ties, negatives; every protocol that sizes can lead to."""
    sizes = [(1, 0), (1, 1), (2, 1), (5, 2), (7, 7), (16, 15), (31, 8), (TREE, 1), (TREE + 1, 1), (60, DIRECT)]
    sizes += [(60, DIRECT + 1), (60, 59), (PAIRS + 1, 1), (PAIRS + 1, PAIRS), (PAIRS + 44, 40)]
    check(*(("top_picks", [grid(*((2, 3) if n < 40 else (2,)), n, seed=n)], (k,), 0) for n, k in sizes))


@pytest.mark.parametrize("n", [9, PAIRS + 10])
def test_equal_values_are_taken_from_the_lowest_index_on(n):
    check(*(("top", [torch.full((1, n), level)], (k,), 0) for level, k in ((0.0, 1), (-900.0, n // 2))))


def test_three_parties():
    check(("top_picks", [grid(2, 20)], (18,), 0), ("best", [grid(2, 20)], (3,), 0), parties=3)


def test_best():
    """In any order on shares; here by rank, as on plaintext, up to where all pairs are compared."""
    check(*(("best", [grid(2, n, seed=n)], (k,), 0) for n, k in [(1, 1), (6, 1), (15, 7), (15, 15), (40, DIRECT + 9)]))


def test_best_where_pairs_are_not_compared():
    check(*(("best", [grid(1, n, seed=n)], (1,), 0) for n in (TREE, TREE + 1)))
    check(*(("chosen", [grid(1, n, seed=n)], (k,), 0) for n in (PAIRS, PAIRS + 1) for k in (3, DIRECT + 1)))


@pytest.mark.parametrize("parties", [2, 3])
def test_costs_are_as_declared(parties):
    if parties == 3:  # every party sends to two
        (_, sent), *_ = check(("above", [grid(100)], (0.5,), 0), parties=3)
        assert sent > 2 * 100 * COMPARISON
        return
    n, k = 40, 20
    counts = check(
        ("above", [grid(100)], (0.5,), 0),
        ("top", [grid(1, n)], (k,), 0),
        ("best", [grid(1, n)], (4,), 0),
        ("largest", [grid(1, 8)], (1,), 0),
        ("top", [grid(1, 100)], (1,), 0),
        ("top", [grid(1, 500)], (k,), 0),
    )
    rounds = [rounds for rounds, _ in counts]
    steps = -(-(16 + 15 + 9) // 3)
    assert rounds == [8, 16, 16, 27, 9 * 7 + 8, 16 * steps + 8]
    comparisons = [100, n * (n - 1) // 2 + n, n * (n - 1) // 2 + 4 * n, None, None, steps * (7 * 500 + 7) + 500]
    for (taken, sent), count in zip(counts, comparisons, strict=True):
        assert count is None or 0 <= sent - COMPARISON * count < 100 * taken


def test_attention_over_a_choice():
    scores, values = 3 * normal(2, 3, 30), normal(2, 30, 8, seed=1)
    for_all, each = grid(1, 6), grid(2, 6)
    rows = [0, 1, 26, 27, 28, 29]
    cases = [([each, scores, values], (4, 2, rows, 3)), ([for_all, scores, values], (4, 2, rows, 3))]
    cases += [([each, scores, values], (1, 3, rows, 6)), ([each, scores, values], (4, 2, rows, 0))]
    check(*(("attend", *case, 2e-2) for case in cases))


def test_rows_kept_taken_and_dropped():
    cases = [([normal(2, 20, 8), grid(heads, 20)], (7, [0, 5])) for heads in (1, 2)]
    cases += [([normal(2, 2, 4), torch.tensor([[1.0, 2.0], [2.0, 1.0]])], (1, [1]))]
    check(*(("evicted", *case, 2**-16) for case in cases))


def test_gather_largest_above_and_arithmetic():
    x, y, bits = grid(2, 12, 5), grid(2, 1, 5, seed=1), (grid(2, 12, 1) > 0).float()
    wide = torch.cat([torch.linspace(-1, 1, 61) * 1.03, ENDS]).reshape(1, 66, 1)
    check(
        ("composed", [x, grid(2, 12), grid(2, 6)], (), 2**-12),
        ("mixed_precision", [grid(3, 4)], (-2.0,), 1e-3),
        *(("largest", [x], (dim,), 0) for dim in (0, 1, -1)),
        *(("above", [torch.cat([x.flatten(), torch.tensor([t])])], (t,), 0) for t in (0.0, -3.0, 19.0, -100.0)),
        ("multiply", [x, y], (), 2e-3),
        ("choose", [bits, x, y], (), 0),
        ("total", [x], (1,), 0),
        (
            "transform",
            [
                x,
            ],
            (torch.tensor([[1.0, 0.5], [0, 0.3], [-1, 0], [0, 0.1], [0.2, 0.1]]),),
            2e-3,
        ),
        *(
            ("scale", [x], (factor,), 1e-3)
            for factor in (2, -1, 0.25, 0.6, 0.0, torch.tensor([[1.0, 0.5, -0.3, 2, 0]]))
        ),
        ("mass", [normal(2, 6, 20).softmax(-1)], (torch.tensor([0, 0, 0.25, 0.25, 1 / 3, 1]),), 1e-4),
        *(("coarse", [wide], (bits,), 2**-15) for bits in (2, 3, 4, 8)),
        ("sigmoid", [torch.linspace(-12, 12, 49)], (), 2e-3),
        ("reciprocal", [torch.linspace(1 / 16, 16, 40)], (1 / 16, 16.0), 2e-2),
        ("reciprocal", [torch.linspace(2, 250, 100)], (2.0, 250.0), 1e-3),
        ("reciprocal", [torch.linspace(10, 900, 40)], (10.0, 900.0), 1e-3),
    )


@pytest.mark.parametrize(
    ("name", "public", "message"),
    [
        ("top", (4,), "top: the 4 largest of 3 values; give 0 to 3"),
        ("best", (4,), "best: the 4 largest of 3 values; give 0 to 3"),
        ("reciprocal", (0.0, 1.0), "reciprocal: from 0 to 1; give 0 < low <= high <= 2048 low"),
    ],
)
def test_mistakes(name, public, message):
    with pytest.raises(AssertionError, match=message):
        check((name, [grid(1, 3)], public, 0))


def test_every_policy_has_its_operations():
    missing = {op for policy in eviction.POLICIES.values() for op in policy.uses if not hasattr(CryptenEngine, op)}
    assert not missing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "layers"),
    [
        ("mpcache(static=0.8,share_from=0,alone=0,least=0)", 2),
        ("h2o(heavy=6,recent=6)", 1),
        ("quest(page=4,budget=16,dense=0)", 1),
    ],
)
def test_logits_under_a_policy_are_close_to_plain(policy, layers):
    """And closer to plaintext's under the same policy than those without one."""
    expected = selection_jobs.logits(PLAIN, policy, layers, 60, 2)
    full = selection_jobs.logits(PLAIN, "full", layers, 60, 2)
    value = run(selection_jobs.logits, policy, layers, 60, 2)[1]
    error = (value - expected).abs().max()
    assert error < 0.1 and error < (full - expected).abs().max() / 2
