"""Kernels modulo 2^q - 1: each is its readable twin to the last bit; and what they are for: shares of an exponential,
and windows of shares.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_twins import both, called, layouts, wide_layouts, wide_pairs, wide_words, words

from crypten_llm.kernels import cpu, exponents, reference, reference_wide, ring
from crypten_llm.kernels.integers import numbers, wide

EXPONENTS = [64, 65, 79, 80, 104, 127, 128, 129, 208, 255, 256, 257, 512]  # q


@pytest.mark.parametrize("q", EXPONENTS)
def test_arithmetic_modulo_ones_at_every_pair_of_edges(q):
    a, b = wide_pairs(q)
    results = {
        "+": both("add_ones", a, b, q),
        "-": both("subtract_ones", a, b, q),
        "*": both("multiply_ones", a, b, q),
    }
    modulus = 2**q - 1
    for x, y, *found in zip(numbers(a), numbers(b), *map(numbers, results.values()), strict=True):
        assert [value % modulus for value in found] == [(x + y) % modulus, (x - y) % modulus, x * y % modulus]


@pytest.mark.parametrize("q", EXPONENTS)
def test_powers_and_rotations_modulo_ones(q):
    turns = torch.tensor([0, 1, -1, q - 1, q, q + 1, -q, 63, 64, 65, q - 64, q // 2, 2**62, -(2**63), 2**63 - 1])
    powers = both("power_ones", turns, q)
    assert numbers(powers) == [2 ** (turn % q) for turn in turns.tolist()]
    for seed in range(4):
        x = wide_words(q, len(turns), seed=seed)
        rotated = both("rotate_ones", x, turns, q)
        multiplied = both("multiply_ones", x, powers, q)
        assert [v % (2**q - 1) for v in numbers(rotated)] == [v % (2**q - 1) for v in numbers(multiplied)]
    every = torch.arange(q)
    both("power_ones", every, q)
    both("rotate_ones", wide_words(q, q), every, q)
    for layout in wide_layouts(q, 3, 5):
        for turned in layouts(words, 3, 5):
            both("rotate_ones", layout, turned, q)
            both("power_ones", turned, q)
    both("rotate_ones", wide_words(q, 0), words(0), q)
    both("power_ones", words(0), q)


STRETCHES = [[0], [0, 0], [0, 1], [0, 7], [0, 0, 3, 3, 3, 11, 12, 12], [0, 40, 41]]


@pytest.mark.parametrize("q", EXPONENTS)
@pytest.mark.parametrize("starts", STRETCHES)
def test_sums_of_stretches_modulo_ones(q, starts):
    places = torch.tensor(starts)
    x = wide_words(q, starts[-1])
    found = numbers(both("sum_ones", x, places, q))
    values = numbers(x)
    for total, start, stop in zip(found, starts, starts[1:], strict=False):
        assert (total - sum(values[start:stop])) % (2**q - 1) == 0
    zeros = wide([2**q - 1, 0] * 20, q, (40,))
    both("sum_ones", zeros, torch.tensor([0, 1, 2, 20, 40]), q)


@pytest.mark.parametrize("q", EXPONENTS)
@pytest.mark.parametrize("bits", [1, 2, 31, 40, 63, 64])
@pytest.mark.parametrize("up", [False, True])
def test_windows(q, bits, up):
    """At every rotation; zeros, and numbers that have a single bit outside of the window, or in it."""
    for turn in {0, 1, q - bits, q - bits + 1, q - 1, *range(0, q, 7)}:
        turns = torch.tensor([turn, turn - q, turn + 5 * q])
        both("window_ones", wide_words(q, 12, seed=turn), turns, torch.tensor([0, 4, 4, 12]), q, bits, up)
    single = power = wide((2**place for place in range(q)), q, (q,))
    for turn in (0, q // 2, q - 1):
        both("window_ones", single, torch.tensor([turn]), torch.tensor([0, q]), q, bits, up)
        full = cpu.subtract_ones(wide([2**q - 1], q, (1,)).expand(q, -1), power, q)
        both("window_ones", full, torch.tensor([turn]), torch.tensor([0, q]), q, bits, up)


def test_stretches_of_any_layout():
    for x in wide_layouts(104, 12):
        for starts in (torch.tensor([0, 5, 12]), torch.tensor([[0, 9], [5, 9], [12, 9]])[:, 0]):
            both("sum_ones", x, starts, 104)
            for turns in layouts(words, 2):
                both("window_ones", x, turns, starts, 104, 40, True)


@pytest.mark.parametrize(("q", "bits"), [(6, 2), (8, 3), (8, 5), (7, 6), (5, 1)])
def test_windows_of_shares_of_every_number(q, bits):
    """The stated bound, in rings so small that every pair of shares can be tried, by the twin. Both ends occur."""
    modulus, unit = 2**q - 1, 2 ** (q - bits)
    errors = set()
    every = wide(range(2**q), q, (2**q,))
    for turn in (0, 3):
        starts = torch.tensor([0, 2**q])
        turns = torch.tensor([turn])
        up, down = (reference.window_ones(every, turns, starts, q, bits, rounded).tolist() for rounded in (True, False))
        for first, second in itertools.product(range(2**q), repeat=2):
            value = (first + second << turn) % modulus
            off = ((up[first] + down[second]) * unit - value + 2 ** (q - 1)) % 2**q - 2 ** (q - 1)
            errors.add(off)
    assert min(errors) == -unit and max(errors) == unit - 1


# Exponents.


@pytest.mark.parametrize("e", [0, 1, 2, 7, 14])
def test_mantissas_are_rounded_powers(e):
    rising, falling = exponents.mantissas(e)
    places = range(2**e) if e < 10 else [0, 1, 2**e - 1, *random.Random(e).sample(range(2**e), 500)]
    assert rising.size == falling.size == 2**e
    for f in places:
        assert rising[f] == reference_wide._mantissa(f, e) and falling[f] == reference_wide._mantissa(-f, e)


def test_the_largest_table_of_mantissas_and_that_no_rounding_is_close():
    """All of them beside floats, which are off by less than 2^-35, as the table's integers are by 2^-42: no power is
    nearer than 2^-30 to where rounding turns. Smaller tables are parts of it.
    """
    e = exponents.LARGEST_TABLE
    scaled = 2.0**ring.MANTISSA * np.exp2(np.arange(1, 2**e) / 2.0**e)
    halves = scaled * 2
    assert np.abs(halves - np.rint(halves)).min() > 2.0**-30
    rising, falling = exponents.mantissas(e)
    assert rising[0] == falling[0] == 2**ring.MANTISSA
    assert np.array_equal(rising[1:], np.rint(scaled)) and np.array_equal(falling[:0:-1], np.rint(scaled / 2))
    for smaller in range(e):
        for part, whole in zip(exponents.mantissas(smaller), (rising, falling), strict=True):
            assert np.array_equal(part, whole[:: 2 ** (e - smaller)])


def test_a_table_that_is_too_large():
    with pytest.raises(AssertionError, match="a table of 2\\^22 mantissas is too large"):
        cpu.read_exponents(wide_words(127, 1), words(1), 0, 22, 127)


SHARED = [(256, 22, 125), (208, 22, 118), (104, 22, 30), (512, 23, 250), (79, 14, 4)]
RINGS = [
    (64, 6),
    (64, 22),
    (79, 15),
    (80, 22),
    (104, 22),
    (208, 22),
    (255, 16),
    (256, 22),
    (256, 7),
    (257, 3),
    (512, 23),
]


@pytest.mark.parametrize(("q", "bits"), RINGS)
def test_exponents(q, bits):
    turns = torch.tensor([0, 1, q - 1, q - 2, q - 14, q - 15, q - 16, q - 17, q // 2, 63])
    ends = torch.tensor([0, 1, -1, 2**bits - 1, 2**bits, 2 ** (bits - 1)])
    for count in (0, 1, 60, 250):
        x = wide_words(q, count, seed=count)
        mask, rotation = words(count, seed=q), words(count, seed=1) % q
        mask[: len(ends)], rotation[-len(turns) :] = ends[:count], turns[: len(rotation[-len(turns) :])]
        turned = both("turned_exponents", mask, rotation, bits, q, x)
        for low in (0, 126, q - 1, -1, 10**30):
            both("read_exponents", turned, mask, low, bits, q)
            both("read_exponents", x, mask, low, bits, q)


@pytest.mark.parametrize("q", [64, 80, 208, 256])
def test_every_rotation_of_exponents(q):
    rotation = torch.arange(q)
    zeros, full = (wide([value], q, (1,)).repeat(q, 1) for value in (0, 2**q - 1))
    for mask in (torch.zeros(q, dtype=torch.int64), words(q)):
        for x in (zeros, full, wide_words(q, q)):
            both("turned_exponents", mask, rotation, 8, q, x)
            both("read_exponents", x, rotation << 8, 3, 8, q)


def test_exponents_of_any_layout():
    for x in wide_layouts(104, 6)[:4]:
        for mask in layouts(words, 6):
            for rotation in layouts(lambda *shape: words(*shape) % 104, 6):
                both("turned_exponents", mask, rotation, 20, 104, x)
            both("read_exponents", x, mask, 9, 20, 104)


@pytest.mark.parametrize(("q", "bits", "low"), SHARED)
def test_shares_of_an_exponential(q, bits, low):
    """From shares of y to shares of 2^y: masks, dealt shares, what is opened, and each party's part of it."""
    generator = random.Random(q)
    modulus, count = 2**q - 1, 300
    y = [generator.getrandbits(bits) for _ in range(count)]
    y[:3] = [0, 2**bits - 1, 2 ** (bits - 1)]
    masks = [generator.getrandbits(bits) for _ in y]
    rotation = [generator.randrange(q) for _ in y]
    owner = wide([generator.getrandbits(q) for _ in y], q, (count,))
    client = cpu.turned_exponents(torch.tensor(masks), torch.tensor(rotation), bits, q, owner.clone())
    opened = torch.tensor([(a + r) % 2**bits for a, r in zip(y, masks, strict=True)])
    first, second = (cpu.read_exponents(share, opened, low, bits, q) for share in (owner, client))
    worst = 0.0
    for a, b, exponent, rho in zip(numbers(first), numbers(second), y, rotation, strict=True):
        whole, rest = divmod(q * exponent, 2**bits)
        place = (2 * ring.MANTISSA + whole + low + rho) % q
        back = (a + b << -place % q) % modulus  # 2^(rest / 2^bits) times 1 + d, if 28 bits below are there
        back = (back << 40) % modulus / 2**40
        worst = max(worst, abs(back / 2 ** (rest / 2**bits) - 1))
    assert 2.0**-20 < worst < 2.0 ** (1 - ring.MANTISSA)


def test_a_row_of_softmax():
    """The sum, a product by a power, and windows of both parties' shares give the weights of a row, to a unit."""
    q, bits, low, window, scale = 256, 22, 125, 40, 18
    generator = random.Random(5)
    modulus, count = 2**q - 1, 200
    scores = [generator.uniform(-60, 20) for _ in range(count)]
    y = [round(score * 2 ** (bits - 8)) for score in scores]
    rho = generator.randrange(q)
    masks = [generator.getrandbits(bits) for _ in y]
    owner = wide([generator.getrandbits(q) for _ in y], q, (count,))
    rotation = torch.full((count,), rho)
    client = cpu.turned_exponents(torch.tensor(masks), rotation, bits, q, owner.clone())
    opened = torch.tensor([(a + r) % 2**bits for a, r in zip(y, masks, strict=True)])
    shares = [cpu.read_exponents(share, opened, low, bits, q) for share in (owner, client)]
    starts = torch.tensor([0, count])
    total = cpu.add_ones(*(cpu.sum_ones(share, starts, q) for share in shares), q)
    public = cpu.multiply_ones(total, cpu.power_ones(torch.tensor([-rho]), q), q)
    exact = sum(2.0**score for score in scores)
    assert numbers(public)[0] % modulus / 2.0 ** (low + 2 * ring.MANTISSA) == pytest.approx(exact, rel=2**-12)
    largest = numbers(public)[0].bit_length() - 1
    turns = torch.tensor([q - window + scale - 2 - largest - rho])
    weights = sum(
        cpu.window_ones(share, turns, starts, q, window, up) for share, up in zip(shares, (True, False), strict=True)
    )
    unit = 2.0 ** (2 * ring.MANTISSA + low - largest - 2 + scale)
    for found, score in zip(weights.tolist(), scores, strict=True):
        found = (found + 2 ** (window - 1)) % 2**window - 2 ** (window - 1)
        assert abs(found - unit * 2.0**score) < 1.01 + unit * 2.0**score * 2.0**-12


# Any q, and how numbers are folded.


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(64, 512), st.integers(0, 40), st.integers(0, 999), st.booleans())
def test_any_q(q, count, seed, up):
    bits = min(22, 14 + (q & -q).bit_length() - 1) - seed % 8
    a, b = (wide_words(q, count, seed=seed + part) for part in (0, 1))
    mask, rotation = words(count, seed=seed), words(count, seed=seed + 1) % q
    starts = torch.tensor([0, count // 3, count // 3, count])
    for name in ("add_ones", "subtract_ones", "multiply_ones"):
        both(name, a, b, q)
    both("power_ones", mask, q)
    both("rotate_ones", a, mask, q)
    both("sum_ones", a, starts, q)
    both("window_ones", a, words(3, seed=seed), starts, q, min(64, 1 + seed % (q - 1)), up)
    both("read_exponents", both("turned_exponents", mask, rotation, bits, q, a), mask, seed, bits, q)


def test_nothing_but_zero_becomes_zero():
    for q in EXPONENTS:
        zero, full = (wide([value], q, (1,)) for value in (0, 2**q - 1))
        starts, turn = torch.tensor([0, 1]), torch.tensor([5])
        for x, expected in ((zero, 0), (full, 2**q - 1)):
            results = [
                called(cpu, "add_ones", [x, zero, q]),
                called(cpu, "subtract_ones", [x, full, q]),
                called(cpu, "multiply_ones", [x, full, q]),
                called(cpu, "sum_ones", [x, starts, q]),
                called(cpu, "rotate_ones", [x, turn, q]),
                called(cpu, "read_exponents", [x, turn, 3, 8, q]),
            ]
            assert [numbers(result) for result in results] == [[expected]] * len(results)
