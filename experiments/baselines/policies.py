"""Policies at one budget: which settings make each of them read the same share of the prompt.

Owns the meaning of a budget, and the way from a name to a policy's text. A budget is R rows, a share of the prompt,
that a decode step reads in each layer and head: what the papers call the cache size (policies that drop rows) or the
retrieval budget (policies that keep all rows and choose among them). Which settings give that each policy says itself
(``Policy.at_budget``), and what a budget is where it is not that (``Policy.budget_means``). What was really kept and
read is measured (``quality.Decoder.shares``) and stands beside each result.

Published sizes suit contexts of many thousand tokens. They are kept while they leave half of R to be chosen, and halved
until they do where R is small; what is split in the paper (sinks, window, retrieved) is split alike.
"""

from __future__ import annotations

from crypten_llm.errors import UsageError, did_you_mean
from crypten_llm.session.plan import parse_policy
from eviction import POLICIES
from experiments.baselines.variants import ABLATION, COMPARED, Variant

LEAST = 8  # rows; fewer cannot be split into sinks, window and choice

VARIANTS = {**COMPARED, **ABLATION}

PARTS: dict[str, list[str]] = {}
"""By policy: the rows of the ablation that are it with something changed."""
for _row, _variant in ABLATION.items():
    PARTS.setdefault(_variant.policy, []).append(_row)


def names() -> list[str]:
    """All policies, each before its variants."""
    return [name for kind in POLICIES for name in (kind, *(row for row in COMPARED if COMPARED[row].policy == kind))]


def check_name(name: str) -> str:
    """``name`` if it is a policy's or a variant's, or a policy with its own settings; raises UsageError otherwise."""
    if "(" not in name and name not in names():
        raise UsageError(f"unknown policy {name!r}: {did_you_mean(name, names())}choose from {', '.join(names())}")
    if "(" in name:
        parse_policy(name)
    return name


def has_budget(name: str) -> bool:
    """Whether settings follow from a budget; one that keeps all or is given with its settings has its own."""
    return name in VARIANTS or (name in POLICIES and POLICIES[name].acts)


def at_budget(name: str, budget: float | None, prompt: int, heads: int) -> str:
    """The policy called ``name`` that reads ``budget``, a share, of a prompt of so many tokens, as text.

    name: of a policy or a variant, or a policy's text, which is taken as it is.
    Raises UsageError for a budget of fewer rows than can be split.
    """
    if not has_budget(name):
        return str(parse_policy(name))
    rows = round(budget * prompt)
    if rows < LEAST:
        raise UsageError(f"a budget of {budget:g} of {prompt} tokens is {rows} rows; give one of at least {LEAST} rows")
    variant = _variant_of(name)
    kind, sizes = POLICIES[variant.policy], (rows, prompt, heads)
    scaled = {}
    if variant.scaled:
        own = kind.at_budget(*sizes)
        scaled = {setting: max(2, int(own[setting] * times)) for setting, times in variant.scaled.items()}
    return str(kind(**kind.at_budget(*sizes, **variant.changed, **scaled)))


def style(name: str) -> tuple[str, str, str] | None:
    """Colour, marker and line of a policy or a variant; ``None`` where the policy says nothing."""
    variant = _variant_of(name)
    found = POLICIES[variant.policy].style
    return found and (*found[:2], variant.line or found[2])


def _variant_of(name: str) -> Variant:
    return VARIANTS.get(name, Variant(name))
