"""What policies compute on shares stays within the error that is declared for it; what does not is named."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from eviction_runs import weights
from hf_models import CASES, tiny
from policy_table import ROWS
from wire_parties import CLIENT, OWNER, run

import eviction
from crypten_llm.commands import debug_compare
from crypten_llm.engines.wire.arithmetic import scale
from crypten_llm.engines.wire.operations import OPERATIONS
from crypten_llm.insecure.tracked import TrackedEngine

IDS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(40)).tolist()
# On bits and whole numbers, and choices that agree: they have no error.
EXACT = {"picks", "transform", "top", "best", "above", "public"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """compared(name): a run of a policy, three steps."""
    folder, _ = tiny(tmp_path_factory.mktemp("model"), **CASES["gqa"])

    @cache
    def compare(name: str):
        text = ROWS[name].small
        text = text.replace("WEIGHTS", weights(name, 4, 2, 2)) if "WEIGHTS" in text else text
        return debug_compare.compare(folder, IDS, 3, chunk=17, policy=f"{name}({text})")

    return compare


@pytest.mark.parametrize("name", ROWS)
def test_every_operation_of_a_policy_stays_within_its_bound(name, compared):
    found = compared(name)
    assert found.first_beyond is None, found.describe_first()
    assert set(eviction.POLICIES[name].uses) <= {finding.operation for finding in found.findings}


def test_bounds_of_policies_are_no_formality(compared):
    """Roundings show: were an operation not held, or its bound a hundred times too large, this fails."""
    used: dict[str, float] = {}
    for name in ("mpcache", "h2o", "mikv", "locret", "lazyeviction", "quest"):
        for finding in compared(name).findings:
            used[finding.operation] = max(used.get(finding.operation, 0.0), finding.used)
    assert {operation for operation, share in used.items() if share < 0.01} <= EXACT | {"residual"}, used


@pytest.mark.parametrize(
    "operation, policy", [("mass", "snapkv"), ("keep", "snapkv"), ("scatter_weights", "quest"), ("sigmoid", "locret")]
)
def test_an_operation_of_a_policy_that_errs_is_named(operation, policy, compared, monkeypatch):
    """A slip of 2^-5 at the owner's share alone."""
    real = OPERATIONS[operation]

    def slip(engine, *arguments):
        out = real.protocol(engine, *arguments)
        out = out if real.is_local else (yield from out)
        handle = getattr(out, "pending", None) or getattr(out, "flat", out)
        if engine.rank == OWNER:
            handle.share = handle.share + (1 << (handle.scale - 5))
        return out

    monkeypatch.setitem(OPERATIONS, operation, replace(real, protocol=slip))
    assert compared.__wrapped__(policy).first_beyond.operation == operation


def test_a_wrong_choice_is_named(compared, monkeypatch):
    """The least likely pages instead of the likeliest."""
    real = OPERATIONS["best"]

    def worst(engine, x, count):
        return (yield from real.protocol(engine, (yield from scale(engine, x, -1)), count))

    monkeypatch.setitem(OPERATIONS, "best", replace(real, protocol=worst))
    first = compared.__wrapped__("quest").first_beyond
    assert first.operation == "best" and first.where.startswith("decode: layer")


def test_numbers_that_are_larger_than_declared_are_named():
    """What an opening or a comparison goes by; a product modulo its ring asks for nothing."""
    values = torch.full((1, 3, 4), 300.0)

    def job(engine):
        secret = engine.secret(values if engine.rank == OWNER else None, values.shape, OWNER)
        secret.bits = engine.config.key_bits
        engine.total(secret, 1)
        engine.scale(secret, 0.5)
        engine.scores(secret, engine.rows(secret))
        return engine.findings

    findings = run(job, engine=TrackedEngine).results[CLIENT]
    left = {finding.operation: finding.outside for finding in findings}
    words = "numbers up to 300, of which no more than 2^8 was declared"
    assert left == {"total": words, "scale": words, "rows": "", "scores": ""}


def test_a_policy_that_reads_what_is_too_large_for_it_is_named(tmp_path):
    """Softmax reads scores modulo their ring; a policy compares them."""
    folder, model = tiny(tmp_path, **CASES["gqa"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 120 if "k_proj" in name else 0.02 if "q_proj" in name else 1
    model.save_pretrained(folder)
    found = debug_compare.compare(folder, IDS, 1, chunk=17, policy=f"quest({ROWS['quest'].small})")
    assert "of which no more than 2^8 was declared" in found.first_beyond.outside
    assert debug_compare.compare(folder, IDS, 1, chunk=17).first_beyond is None


def chosen(values, count: int, error: float, units: int = 0):
    """The choice of the ``count`` largest numbers; shares are off by as many 2^-14, up and down in turn, and any error
    up to ``error`` is declared."""

    def job(engine):
        secret = engine.secret(values if engine.rank == OWNER else None, values.shape, OWNER)
        x = engine.given(engine.within(secret, 1.0).secret)
        if engine.is_shown:
            x.value, x.error = values.double(), torch.full_like(values, error, dtype=torch.float64)
        if engine.rank == OWNER:
            x.secret.share = x.secret.share + (units << (secret.scale - 14)) * (2 * (torch.arange(len(values)) % 2) - 1)
        engine.top(x, count)
        return engine.chosen

    return run(job, engine=TrackedEngine).results[CLIENT][0]


def test_ties_and_mistakes():
    values = torch.tensor([0.5, -1.0, 0.25, 0.25 - 2.0**-13])
    same, tie = chosen(values, 2, 0.0), chosen(values, 2, 2.0**-13, units=4)
    assert (same.taken, same.agreed, same.ties, same.beyond, same.margin) == (2, 2, 0, 0, 0.0)
    assert (tie.agreed, tie.ties, tie.beyond, tie.margin) == (1, 1, 0, pytest.approx(0.5, rel=1e-6))
    mistake = chosen(values, 2, 2.0**-16, units=4)
    assert (mistake.agreed, mistake.ties, mistake.beyond, mistake.margin) == (1, 0, 1, pytest.approx(4, rel=1e-6))
