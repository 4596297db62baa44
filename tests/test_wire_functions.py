"""Functions of one opening: trigonometric sums against their plaintext twins."""

import math
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch
from wire_parties import open_wires, run, share, value

from crypten_llm.kernels import trigonometry
from crypten_llm.protocols import fits, smooth
from crypten_llm.protocols.opening import Opening

TARGETS = {
    "reciprocal": lambda x: 1 / x,
    "inverse root": lambda x: x**-0.5,
    "sigmoid": torch.sigmoid,
}
FITS = pytest.mark.parametrize("name", TARGETS)


# Trigonometric sums.


def grid(*stretches) -> torch.Tensor:
    """All points of stretches (low, high, count), one behind the other."""
    return torch.cat([torch.linspace(*stretch, dtype=torch.float64) for stretch in stretches])


def evaluated(fit, x: torch.Tensor, scale: int, fraction: int = 22) -> torch.Tensor:
    integers = (x * 2.0**scale).round().long()

    def job(runtime):
        (wire,) = open_wires(
            runtime, [Opening(share(runtime, integers, scale), ring=scale + fit.period, function=True)]
        )
        return smooth.evaluate(runtime, wire, fit, fraction, bits=5)

    outcome = run(job)
    assert (outcome.results[0].scale, outcome.results[0].width) == (2 * fraction, 64)
    return value(outcome)


@FITS
def test_fits_keep_their_declared_error(name):
    """On a grid other than the one they were fitted on."""
    fit = fits.stored(name)
    x = grid((fit.low, fit.high, 20_011))
    error = (fit(x) - TARGETS[name](x)).abs().max()
    assert error <= 1.05 * fit.error
    # The bound of each is what the engine's error budget is made of.
    assert fit.error < {"inverse root": 2e-6}.get(fit.name, 1e-4)


@pytest.mark.parametrize("name", fits.TARGETS)
def test_stored_fits_are_those_of_their_targets(name):
    """Not to the last bit, which depends on the processor, and is why they are stored: over the domain."""
    target, found = fits.TARGETS[name], fits.stored(name)
    again = target.fit(name)
    x = grid((target.low, target.high, 5001))
    assert (found(x) - again(x)).abs().max() < 0.2 * found.error + 1e-8, "run python -m crypten_llm.protocols.fits"
    assert (found.period, found.modes, bool(found.sine.any())) == (target.period, target.modes, True)


def test_stored_fits_are_whole_units_that_floats_hold():
    """So that every machine reads the same numbers."""
    for name in fits.TARGETS:
        fit = fits.stored(name)
        units = torch.cat([torch.tensor([fit.constant], dtype=torch.float64), fit.cosine, fit.sine]) * 2.0**36
        assert torch.equal(units, units.round()) and units.abs().max() < 2**53


def test_storing_writes_every_fit_again(tmp_path, monkeypatch):
    monkeypatch.setattr(fits, "_STORED", tmp_path / "fits.json")
    monkeypatch.setattr(fits, "TARGETS", {"inverse root": fits.TARGETS["inverse root"]})
    monkeypatch.setattr(fits, "EVEN_TARGETS", {"gelu": replace(fits.EVEN_TARGETS["gelu"], modes=2)})
    fits.store()
    even = fits.stored_even.__wrapped__("gelu")
    assert (even.modes, even.high) == (2, 5.0) and even.error < 0.013
    again, x = fits.stored.__wrapped__("inverse root"), grid((0.25, 1, 100))
    assert (again(x) - x**-0.5).abs().max() < 2e-6


@FITS
@pytest.mark.parametrize(("scale", "fraction"), [(14, 22), (30, 26), (56, 22), (30, 16)])
def test_evaluation_keeps_its_declared_bound_over_the_domain(name, scale, fraction):
    fit = fits.stored(name)
    x = grid((fit.low, fit.high, 2), (fit.low, fit.high, 400))
    x = ((x * 2.0**scale).round() / 2.0**scale).clip(fit.low, fit.high)
    found = evaluated(fit, x, scale, fraction)
    rounded = (x * 2.0**scale).round() / 2.0**scale
    assert (found - fit(rounded)).abs().max() <= fits.rounding(fit, fraction)
    assert (found - TARGETS[name](rounded)).abs().max() <= 1.05 * fit.error + fits.rounding(fit, fraction)


@FITS
def test_outside_the_domain_the_sum_goes_on_periodically_and_bounded(name):
    fit, period = fits.stored(name), 2.0 ** fits.stored(name).period
    outside = grid((fit.high, fit.low + period, 50), (fit.low - period, fit.high - period, 20))
    found = evaluated(fit, outside, 30)
    assert (found - fit(outside)).abs().max() <= fits.rounding(fit, 22)
    assert found.abs().max() <= abs(fit.constant) + math.sqrt(2 * fit.modes) * fit.norm + fits.rounding(fit, 22)


def test_angles_are_computed_to_the_last_bits():
    """Against Python's own, at every eighth of a turn and at random; the ring's top bit is no sign."""
    generator = np.random.default_rng(0)
    eighths = [(k << 61) + d for k in range(8) for d in (-1, 0, 1)]
    for turn in [e % 2**64 for e in eighths] + [int(v) for v in generator.integers(0, 2**64, 2000, np.uint64)]:
        angle = 2 * math.pi * (turn / 2**64)
        for m, shift in ((np.uint64(turn).astype(np.int64), 0), (np.int64(turn >> 4), 4)):
            if shift and turn % 16:
                continue
            cosine, sine = trigonometry._cos_sin(m, shift)
            assert abs(cosine - math.cos(angle)) < 1e-15 and abs(sine - math.sin(angle)) < 1e-15


@pytest.mark.parametrize(
    ("kernel", "types"),
    [
        ("_cos_sin", "(int64, int64)"),
        ("_coefficients", "(i8[::1], int64, float64, f8[::1], f8[::1], i8[:, ::1])"),
        ("_combine", "(i8[::1], int64, float64, f8[::1], f8[::1], i8[:, ::1], i8[::1])"),
        ("_add_cosines", "(i8[::1], int64, i8[::1], f8[::1], i8[::1], i8[:, :, ::1], i8[::1])"),
    ],
)
def test_public_factors_do_not_depend_on_the_machine(kernel, types):
    """Both parties must agree on them to the last bit: no call of a mathematical library, nothing contracted."""
    compiled = numba.njit(types, boundscheck=False)(getattr(trigonometry, kernel).py_func)  # a cached one shows no code
    (code,) = compiled.inspect_llvm().values()
    assert "fmul double" in code
    for word in ("llvm.cos", "llvm.sin", "@cos", "@sin", "llvm.fma", "llvm.fmuladd", "fmul fast", "contract"):
        assert word not in code


def test_more_elements_than_one_block():
    x = grid((-1, 1, smooth.BLOCK + 77))
    fit = fits.stored("sigmoid")
    assert (evaluated(fit, x, 20) - fit((x * 2**20).round() / 2**20)).abs().max() <= fits.rounding(fit, 22)


def test_a_function_wants_its_own_period():
    def job(runtime):
        (wire,) = open_wires(runtime, [Opening(share(runtime, torch.tensor([1]), 14), ring=20, function=True)])
        smooth.evaluate(runtime, wire, fits.stored("sigmoid"), 22, bits=1)

    with pytest.raises(AssertionError, match=r"open sigmoid modulo 2\^19"):
        run(job)
