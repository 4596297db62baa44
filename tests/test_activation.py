"""Activations of any size against their plaintext twins: every interval, its boundaries, the ends of the domain."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_parties import CLIENT, OWNER, check_cost, joined, play, run, share

from crypten_llm.kernels.ring import packed_size
from crypten_llm.protocols import activation as activations
from crypten_llm.protocols.activation import FRACTION, GELU, GELU_TANH, SCALE, SILU, WIDTH, activate
from crypten_llm.protocols.secret import Overflow

ALL = pytest.mark.parametrize("activation", [SILU, GELU, GELU_TANH], ids=lambda activation: activation.name)
ONE = 1 << FRACTION


def activated(integers, activation, positions=256, scale=FRACTION, seed=0):
    """(f(x), flags) of x' = integers / 2^scale."""

    def job(runtime):
        x = share(runtime, integers, scale, width=2 * FRACTION + scale - FRACTION, bits=14)
        return play(runtime, activate(runtime, x, activation, positions))

    owner, client, dealer = run(job, seed=seed).results
    assert [secret.shape for secret in dealer] == [secret.shape for secret in owner] == 2 * [integers.shape]
    value, flag = (joined(mine, theirs) for mine, theirs in zip(owner, client, strict=True))
    assert (owner[0].scale, owner[0].width, owner[1].width) == (SCALE, WIDTH, 1)
    return value, flag & 1


def check(integers, activation, positions=256, seed=0):
    """Right to ``error`` near zero, and to the last bit of x or 0 beyond; no flags. Returns the errors near zero."""
    value, flags = activated(integers, activation, positions, seed=seed)
    x = integers.double() / ONE * activation.unit
    error = value.double() / 2.0**SCALE - activation.function(x)
    assert error.abs().max() <= activation.error
    far = integers.abs() >= (activation.last + 1) * ONE
    exact = integers.clamp(min=0) * activation.times << SCALE - FRACTION - activation.halvings
    assert torch.equal(value[far], exact[far])
    assert not flags.any()
    return error[~far]


def bound(activation, positions):
    return round(activation.bound(positions) / activation.unit * ONE)


@ALL
@pytest.mark.parametrize("positions", [32, 128, 256, 1024, 2048])
def test_the_whole_domain(activation, positions):
    """Dense near zero, and everything up to both ends."""
    end = bound(activation, positions)
    near = min(end, 16 * ONE)
    integers = torch.cat([torch.arange(-near, near, 37), torch.arange(-end, end, 1 + end // 6000), torch.tensor([end])])
    check(integers, activation, positions)


@ALL
@pytest.mark.parametrize("positions", [32, 256])
def test_every_boundary_between_positions(activation, positions):
    """On it and up to 2^-13 beside it, with many masks: both forms of the function hold where they meet."""
    last = positions // 2 - 3
    offsets = torch.tensor([-2, -1, 0, 1, 2])
    integers = (torch.arange(-last, last + 1)[:, None] * ONE + offsets).clamp(-last * ONE, last * ONE)
    for seed in range(8):
        check(integers, activation, positions, seed=seed)


@pytest.mark.parametrize(("activation", "largest", "mean"), [(SILU, 4.8e-4, 1.2e-4), (GELU, 3e-4, 7e-5)])
def test_errors_of_gates_like_real_ones(activation, largest, mean):
    """Normal ones of several widths, the tails of which fill the domain; what the docstring measured."""
    generator = torch.Generator().manual_seed(7)
    widths = torch.tensor([0.3, 1.0, 3.0, 10.0, 40.0], dtype=torch.float64)[:, None]
    x = torch.randn(5, 12_000, generator=generator, dtype=torch.float64) * widths
    integers = (x.clamp(-activation.bound(), activation.bound()) / activation.unit * ONE).round().long()
    error = check(integers, activation)
    assert error.abs().max() < largest and error.square().mean().sqrt() < mean and error.mean().abs() < 4e-5


def test_declared_errors():
    """The numbers of the docstring."""
    assert 8.5e-4 < SILU.error < 9e-4 and 4e-4 < GELU.error < 4.4e-4 and GELU_TANH.error < 4.4e-4
    assert (SILU.bound(), SILU.bound(128), GELU.bound()) == (250, 122, 125)


@ALL
def test_what_is_opened_holds_the_function_wherever_it_counts(activation):
    """Up to the far end of the last position inside, where the fit ends too."""
    end = (activation.last + 1) * activation.unit
    x = torch.linspace(-end, end, 10_001, dtype=torch.float64)
    assert activation.fit.high * activation.unit == end
    assert (activation.function(x) - activation.middle).abs().max() + activation.error < 2**activation.bits


@ALL
@pytest.mark.parametrize("positions", [32, 256])
def test_both_ends_of_what_is_right(activation, positions):
    """From -P/2 to P/2 - 1; beyond, x is read modulo P."""
    half = positions // 2
    integers = torch.tensor([-half * ONE, 1 - half * ONE, (half - 1) * ONE, (half - 1) * ONE - 1]).repeat(50)
    value, _ = activated(integers, activation, positions)
    times = activation.times << SCALE - FRACTION - activation.halvings
    assert torch.equal(value, integers.clamp(min=0) * times)
    wrong, _ = activated(torch.tensor([-half - 1, half]).repeat(50) * ONE, activation, positions)
    assert torch.equal(wrong[::2], (torch.full((50,), -half - 1) * ONE) * times)  # read as P / 2 - 1 positions: right
    assert not wrong[1::2].any()


@ALL
@pytest.mark.parametrize("positions", [32, 128])
def test_the_flag(activation, positions):
    """Never up to P/2 - 3 positions, always from P/2 - 2 to P/2 + 2, and nowhere a jump has led past those."""
    half = positions // 2
    calm = torch.arange((half - 5) * ONE, (half - 3) * ONE + 1, 97)
    loud = torch.cat([torch.arange((half - 2) * ONE, (half + 2) * ONE, 97), torch.tensor([(half + 2) * ONE])])
    for sign in (1, -1):
        assert not activated(sign * calm, activation, positions)[1].any()
        assert activated(sign * loud, activation, positions)[1].all()
        assert not activated(sign * torch.full((9,), (positions - 5) * ONE), activation, positions)[1].any()


def test_the_sum_is_garbage_where_it_is_multiplied_by_zero():
    """Far out what is opened beside the bits is not what it is declared to be: zeros hide it, and not its size."""
    fit = SILU.fit
    far = torch.arange(20, 125, dtype=torch.float64)
    assert ((fit(far) + far * SILU.unit / 2 - SILU.middle).abs() >= 2**SILU.bits).any()
    check((far * ONE).long(), SILU)
    check(-(far * ONE).long(), SILU)


@ALL
def test_more_elements_than_one_block(activation):
    count = activations.BLOCK + 77
    check(torch.arange(count) * 101 - 101 * count // 2, activation)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from([SILU, GELU, GELU_TANH]),
    st.sampled_from([32, 64, 128, 256, 512]),
    st.data(),
)
def test_any_shape(shape, activation, positions, data):
    end = bound(activation, positions)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    integers = torch.randint(-end, end + 1, shape, generator=generator)
    if integers.numel():
        check(integers, activation, positions)
    else:
        value, flags = activated(integers, activation, positions)
        assert value.shape == flags.shape == shape


@pytest.mark.parametrize("scale", [15, 20, 36])
def test_more_fractional_bits_are_dropped(scale):
    """x' is rounded by less than a unit, and no f here is steeper than 1.13."""
    integers = torch.arange(-12 << scale, 12 << scale, (24 << scale) // 5001)
    value, _ = activated(integers, SILU, scale=scale)
    error = value.double() / 2.0**SCALE - SILU.function(integers.double() / 2.0**scale * SILU.unit)
    assert error.abs().max() <= SILU.error + 1.13 * SILU.unit / ONE


COUNT = 64
SILU_WORDS = [33, 31, 29, 27, 25, 23, 21]  # bits of each cosine's words
GELU_WORDS = [32, 30, 27, 23]


@pytest.mark.parametrize("positions", [32, 128, 256, 1024])
@pytest.mark.parametrize(
    ("activation", "words", "opened", "whole"), [(SILU, SILU_WORDS, 19, 26), (GELU, GELU_WORDS, 18, 26)]
)
def test_cost(activation, words, opened, whole, positions):
    """The opened bits, and of the dealer's: two words a cosine, P bits, the lift of what is opened, products."""
    dealt = 2 * sum(words) + positions + 2 * (26 - opened) + (26 + 26 + 26 - opened) + 2 * whole
    assert dealt == positions + {"silu": 503, "gelu": 352}[activation.name]
    integers = torch.arange(COUNT) * ONE // 10
    sent = packed_size(COUNT, 28 + opened + 2)

    def job(runtime):
        play(runtime, activate(runtime, share(runtime, integers, FRACTION, width=28, bits=14), activation, positions))

    check_cost(job, (2, sent, sent, 0, packed_size(COUNT, dealt)))


def refused(message, positions=256, **options):
    def job(runtime):
        secret = share(runtime, torch.zeros(3, dtype=torch.int64), **{"scale": FRACTION, "width": 28, **options})
        play(runtime, activate(runtime, secret, SILU, positions))

    with pytest.raises(Overflow, match=message):
        run(job)


def test_what_is_refused():
    refused("silu: 100 positions; give a power of two from 32 on", 100)
    refused("silu: 16 positions; give a power of two from 32 on", 16)
    refused(r"silu: \|x\| < 2\^12, which 4096 positions reach, at scale 2\^16 does not fit .* 2\^28", 4096)
    refused(r"valid modulo 2\^27 cannot be opened modulo 2\^28", width=27)
    refused("cannot drop -1 bits", scale=13, width=64)


def test_as_many_positions_as_the_result_holds():
    activated(torch.zeros(1, dtype=torch.int64), SILU, 2048)
    activated(torch.zeros(1, dtype=torch.int64), GELU, 4096)


def test_the_fewest_positions_for_a_bound():
    """Both sides of each step; and what no number of them holds."""
    for activation in (SILU, GELU):
        for positions in (32, 64, 256, 2048):
            assert activation.positions(activation.bound(positions)) == positions
            assert activation.positions(activation.bound(positions // 2) + 0.01) == positions
    assert SILU.positions(188) == 256 and SILU.positions(0) == 32
    for largest in (2100, 1e9, float("inf"), float("nan")):
        with pytest.raises(Overflow, match="which 4096 positions reach"):
            SILU.positions(largest)


def test_nothing_is_revealed_by_the_flags():
    """They are shares as they come: a party's alone are as often 1 as 0, whether x is near the end or not."""
    for place in (0, 127):
        job = functools.partial(_flags, integers=torch.full((4096,), place * ONE))
        outcome = run(job)
        for role in (OWNER, CLIENT):
            assert abs(outcome.results[role].double().mean().item() - 0.5) < 0.05


def _flags(runtime, integers):
    secret = share(runtime, integers, FRACTION, width=28, bits=14)
    return play(runtime, activate(runtime, secret, SILU))[1].share
