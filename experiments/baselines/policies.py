"""Policies at one budget: which settings make each of them read the same share of the prompt.

Owns the table. A budget is R rows, a share of the prompt, that a decode step reads in each layer and head: what the
papers call the cache size (policies that drop rows) or the retrieval budget (policies that keep all rows and choose
among them). Where a policy rounds to pages or clusters, R is met on average over the steps, as near as they allow;
``pyramidkv`` and ``mpcache_spread`` give some layers more and others less, and meet R on average over layers.
Three do not fit: the published ``quest`` leaves its first two layers whole (``quest_every_layer`` does not), ``mikv``
reads all rows and keeps R of them in full precision, and ``full`` has no budget. What was really kept and read is
measured (``quality.Decoder.shares``) and stands beside each result.

Published sizes suit contexts of many thousand tokens. They are kept while they leave half of R to be chosen, and halved
until they do where R is small; what is split in the paper (sinks, window, retrieved) is split alike.
"""

from __future__ import annotations

from collections.abc import Callable

from crypten_llm.errors import UsageError, did_you_mean
from crypten_llm.session.generation import parse_policy
from eviction import POLICIES
from eviction.mpcache import MPCache

LEAST = 8  # rows; fewer cannot be split into sinks, window and choice


def _fitting(size: int, most: float) -> int:
    """``size``, halved until it is at most ``most``; never below 1."""
    while size > max(most, 1):
        size //= 2
    return size


def _streaming_llm(rows, prompt, heads):
    return {"start": 4, "recent": rows - 4}


def _h2o(rows, prompt, heads):
    return {"heavy": rows // 2, "recent": rows - rows // 2}  # as in the paper, half and half


def _snapkv(rows, prompt, heads):
    return {"budget": rows, "window": _fitting(32, rows / 2)}


def _pyramidkv(rows, prompt, heads):
    return {"budget": rows, "window": _fitting(8, rows / 2)}


def _quest(rows, prompt, heads):
    return {"budget": rows, "page": _fitting(16, rows / 4)}


def _infllm(rows, prompt, heads):
    """Of 6,272 rows read in the authors' configuration, 2 % are sinks, 33 % retrieved and the rest the window. Their 16
    blocks stay 16, as near as blocks of a power of two allow: few long ones would be represented by too little."""
    block, initial = _fitting(128, rows / 48), max(1, rows // 50)
    blocks = max(1, round(rows / 3 / block))
    spare = block // 2  # rows between the last whole block and the window, on average
    local = max(1, rows - initial - blocks * block - spare)
    return {"block": block, "blocks": blocks, "representatives": min(4, block), "initial": initial, "local": local}


def _longcache(rows, prompt, heads):
    """Each head may ask for one span; together they get half of the rows."""
    span, sinks = max(1, _fitting(32, rows / 2 / heads)), max(1, min(4, rows // 8))
    return {"top": 1, "span": span, "sinks": sinks, "local": max(1, rows - sinks - heads * span - span // 2)}


def _mpcache_spread(rows, prompt, heads):
    return {"budget": rows, "block": _fitting(16, rows / 8)}


def _lazyeviction(rows, prompt, heads):
    return {"budget": rows, "window": _fitting(175, rows / 4)}


def _mikv(rows, prompt, heads):
    return {"important": rows, "recent": max(2, 2 * rows // 5)}


def _locret(rows, prompt, heads):
    return {"budget": rows, "recent": _fitting(100, rows / 4)}


def _clusters(rows: int) -> dict:
    coarse = _fitting(MPCache.coarse, rows / 2)
    return {"coarse": coarse, "fine": max(1, coarse * MPCache.fine // MPCache.coarse)}


def mpcache_settings(rows: int, prompt: int, static: float | None = None, **changed) -> dict:
    """MPCache that reads ``rows`` rows: it keeps half of the prompt, or the root of the budget where that is more, and
    chooses clusters among them. static: share kept instead. changed: other settings, sizes of clusters among them.

    The first cluster and the newest one, half full on average, are always read, and count.
    """
    static = round(max(0.5, (rows / prompt) ** 0.5), 4) if static is None else static
    if "coarse" not in changed:
        changed |= _clusters(rows)
    coarse, fine = changed["coarse"], changed["fine"]
    count = max(1, round((rows - fine - (coarse + 1) / 2) / fine))
    # Half a cluster more, so that the policy's rounding down gives this count while the cache grows.
    second = min(1.0, round((count + 0.5) * fine / (static * prompt), 4))
    return {"static": static, "second": second, "least": 0, **changed}


TABLE: dict[str, Callable[[int, int, int], dict]] = {
    "streaming_llm": _streaming_llm,
    "h2o": _h2o,
    "tova": lambda rows, prompt, heads: {"size": rows},
    "snapkv": _snapkv,
    "pyramidkv": _pyramidkv,
    "quest": _quest,
    "quest_every_layer": lambda rows, prompt, heads: {**_quest(rows, prompt, heads), "dense": 0},
    "infllm": _infllm,
    "longcache": _longcache,
    "mpcache": lambda rows, prompt, heads: mpcache_settings(rows, prompt),
    "mpcache_spread": _mpcache_spread,
    "lazyeviction": _lazyeviction,
    "mikv": _mikv,
    "locret": _locret,
    "attention_gate": lambda rows, prompt, heads: {"budget": rows},
    "random": lambda rows, prompt, heads: {"budget": rows},
}
"""Settings by (rows, prompt tokens, query heads), by name. ``full`` has none; a name may be a variant of a policy."""

_MPCACHE: dict[str, Callable[[int, int, int], dict]] = {
    "mean summary": lambda rows, prompt, heads: mpcache_settings(rows, prompt, summary="mean"),
    "bound score": lambda rows, prompt, heads: mpcache_settings(rows, prompt, summary="bound"),
    "one level": lambda rows, prompt, heads: mpcache_settings(
        rows, prompt, coarse=_clusters(rows)["fine"], fine=_clusters(rows)["fine"]
    ),
    "half clusters": lambda rows, prompt, heads: mpcache_settings(
        rows, prompt, **{name: max(2, size // 2) for name, size in _clusters(rows).items()}
    ),
    "no sharing": lambda rows, prompt, heads: mpcache_settings(rows, prompt, share=False),
    "static only": lambda rows, prompt, heads: {"static": rows / prompt, "second": 1},
    "dynamic only": lambda rows, prompt, heads: mpcache_settings(rows, prompt, static=1.0),
}
_SPREAD: dict[str, Callable[[int, int, int], dict]] = {
    "no width": lambda *sizes: {**_mpcache_spread(*sizes), "width": False},
    "every layer searches": lambda *sizes: {**_mpcache_spread(*sizes), "lower": 0, "upper": 0},
    "a choice per head": lambda *sizes: {**_mpcache_spread(*sizes), "per_head": True},
    "long blocks": lambda *sizes: {**_mpcache_spread(*sizes), "block": 2 * _mpcache_spread(*sizes)["block"]},
}
PARTS = {"mpcache": _MPCACHE, "mpcache_spread": _SPREAD}
"""By policy: it with one part changed or taken away, at the same budget. ``half clusters``: as long as the paper's."""

ABLATION = {row: (policy, settings) for policy, rows in PARTS.items() for row, settings in rows.items()}
"""By row: the policy whose part it is, and the settings."""


def names() -> list[str]:
    return ["full", *TABLE]


def check_name(name: str) -> str:
    """``name`` if it is in the table, or a policy with its own settings; raises UsageError otherwise."""
    if "(" not in name and name not in names():
        raise UsageError(f"unknown policy {name!r}: {did_you_mean(name, names())}choose from {', '.join(names())}")
    if "(" in name:
        parse_policy(name)
    return name


def has_budget(name: str) -> bool:
    """Whether settings follow from a budget; ``full`` and a policy that is given with its settings have their own."""
    return name in TABLE or name in ABLATION


def at_budget(name: str, budget: float | None, prompt: int, heads: int) -> str:
    """The policy called ``name`` that reads ``budget``, a share, of a prompt of so many tokens, as text.

    name: of ``TABLE``, of ``ABLATION``, or a policy's text, which is taken as it is.
    Raises UsageError for a budget of fewer rows than can be split.
    """
    if not has_budget(name):
        return str(parse_policy(name))
    rows = round(budget * prompt)
    if rows < LEAST:
        raise UsageError(f"a budget of {budget:g} of {prompt} tokens is {rows} rows; give one of at least {LEAST} rows")
    kind, settings = ABLATION[name] if name in ABLATION else (_kind(name), TABLE[name])
    return str(POLICIES[kind](**settings(rows, prompt, heads)))


def _kind(name: str) -> str:
    """The policy of which ``name`` is a variant."""
    return max((kind for kind in POLICIES if name.startswith(kind)), key=len)
