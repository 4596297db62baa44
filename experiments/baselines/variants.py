"""Variants of policies that are compared beside them: configuration, as data.

Owns their names and what each changes. Settings follow from the policy's own at the same budget (``Policy.at_budget``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """changed: settings that have these values. scaled: sizes that are so many times those of the policy at the budget,
    2 rows at least. line: in charts, where it is not the policy's.
    """

    policy: str
    changed: Mapping[str, object] = field(default_factory=dict)
    scaled: Mapping[str, float] = field(default_factory=dict)
    line: str | None = None


COMPARED = {"quest_every_layer": Variant("quest", {"dense": 0}, line="-")}
"""By name: variants that stand in the tables as policies of their own. Published Quest leaves two layers whole."""

ABLATION = {
    "mean summary": Variant("mpcache", {"summary": "mean"}),
    "bound score": Variant("mpcache", {"summary": "bound"}),
    "one level": Variant("mpcache", scaled={"coarse": 0.5}),
    "half clusters": Variant("mpcache", scaled={"coarse": 0.5, "fine": 0.5}),
    "no sharing": Variant("mpcache", {"share": False}),
    "static only": Variant("mpcache", {"second": 1}),
    "dynamic only": Variant("mpcache", {"static": 1.0}),
    "no width": Variant("mpcache_spread", {"width": False}),
    "every layer searches": Variant("mpcache_spread", {"lower": 0, "upper": 0}),
    "a choice per head": Variant("mpcache_spread", {"per_head": True}),
    "long blocks": Variant("mpcache_spread", scaled={"block": 2}),
}
"""By row: a policy with one part changed or taken away. ``half clusters``: as long as the paper's."""
