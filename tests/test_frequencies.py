"""Fits by cosines at free frequencies: what they declare, and the search that finds them."""

import math

import pytest
import torch

from crypten_llm.protocols import fits
from crypten_llm.protocols.frequencies import PERIOD, search

LIMITS = {"silu": 1.0e-4, "gelu": 3.5e-5, "gelu tanh": 4.1e-5}
FUNCTIONS = {
    "silu": lambda x: torch.nn.functional.silu(2 * x) - x,
    "gelu": lambda x: torch.nn.functional.gelu(x) - x / 2,
    "gelu tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh") - x / 2,
}


def line(high: float, count: int) -> torch.Tensor:
    return torch.linspace(-high, high, count, dtype=torch.float64)


@pytest.mark.parametrize("name", LIMITS)
def test_stored_fits_keep_their_declared_error(name):
    """On a grid other than the one they were fitted on, on both sides."""
    fit = fits.stored_even(name)
    x = line(fit.high, 40_009)
    assert (fit(x) - FUNCTIONS[name](x)).abs().max() <= 1.02 * fit.error
    assert fit.error <= LIMITS[name]


@pytest.mark.parametrize("name", LIMITS)
def test_stored_fits_are_whole_units_that_floats_hold(name):
    """So that every machine reads the same numbers; and the largest coefficient comes first."""
    fit, target = fits.stored_even(name), fits.EVEN_TARGETS[name]
    units = torch.cat([torch.tensor([fit.constant], dtype=torch.float64), fit.coefficients]) * 2.0**36
    assert torch.equal(units, units.round()) and units.abs().max() < 2**53
    sizes = fit.coefficients.abs()
    assert torch.equal(sizes.sort(descending=True).values, sizes) and sizes.norm() < 3.5
    assert (fit.modes, fit.high) == (target.modes, target.high)
    assert fit.frequencies.dtype == torch.int64 and 0 < fit.frequencies.min() <= fit.frequencies.max() < 2**PERIOD


@pytest.mark.slow
def test_the_search_finds_the_stored_fit_again():
    """Frequencies are found by size of error, so another processor's may differ, but not be worse."""
    found, stored = fits.EVEN_TARGETS["gelu"].fit("gelu"), fits.stored_even("gelu")
    assert found.error <= 1.05 * stored.error, "run python -m crypten_llm.protocols.fits"


def test_free_frequencies_do_better_than_multiples_of_one():
    """As many cosines, least squares with every period that is a twentieth of the domain longer."""
    found = search("gelu", FUNCTIONS["gelu"], 5.0, 3)
    x = line(5.0, 2001)
    assert (found(x) - FUNCTIONS["gelu"](x)).abs().max() <= 1.02 * found.error < 1e-3
    best = math.inf
    for period in torch.arange(10.5, 40, 0.5).tolist():
        angle = x[:, None] * torch.arange(4) * 2 * math.pi / period
        solution = torch.linalg.lstsq(angle.cos(), FUNCTIONS["gelu"](x)[:, None], driver="gelsd").solution
        best = min(best, (angle.cos() @ solution - FUNCTIONS["gelu"](x)[:, None]).abs().max().item())
    assert best > 4 * found.error


def test_a_search_is_repeatable():
    first, again = (search("tent", lambda x: (1 + x * x).sqrt(), 3.0, 2) for _ in range(2))
    assert torch.equal(first.frequencies, again.frequencies) and torch.equal(first.coefficients, again.coefficients)
    assert (first.constant, first.error) == (again.constant, again.error)
