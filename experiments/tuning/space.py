"""Which settings of a policy a search tries: a few values each, from what the settings say of themselves.

Owns the values; which settings are left alone, and which have no effect beside others, the policy says. A point of a
space is a position in the values of each of its settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import Field, dataclass, fields, replace
from functools import cached_property
from itertools import product
from math import prod

from crypten_llm.errors import UsageError, did_you_mean
from crypten_llm.session.plan import parse_policy
from eviction import Policy, PolicyError

SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
STEPS = 6  # even steps through the range of a number
ENUMERABLE = 20_000  # points of a space that are gone through one by one


def values(setting: Field) -> tuple:
    """Values to try, least first; none for text.

    Shares and budgets: ``SHARES``. Whole numbers: the default, halved and doubled twice, and 0 where it is allowed.
    Numbers: ``STEPS`` even steps. Words and switches: all. The default is always among them, unless it counts tokens.
    """
    kind, default = setting.metadata["kind"], setting.default
    low, high = setting.metadata.get("low"), setting.metadata.get("high")
    if kind == "word":
        return setting.metadata["options"]
    if kind == "share":
        return tuple(sorted({*SHARES, default})) if default <= 1 else SHARES
    if kind == "whole":
        near = {default // 4, default // 2, default, 2 * default, 4 * default} | ({0} if low == 0 else set())
        return tuple(sorted(n for n in near if n >= low and (high is None or n <= high)))
    if kind == "number":
        even = (low + (high - low) * step / (STEPS - 1) for step in range(STEPS))
        return tuple(sorted({*(round(value, 12) for value in even), default}))
    return ()


@dataclass(frozen=True)
class Space:
    """kind: the policy's class. axes: settings and their values. held: settings that have one value."""

    kind: type[Policy]
    axes: dict[str, tuple]
    held: dict

    @property
    def size(self) -> int:
        """Combinations of values, refused ones and those that come to the same among them."""
        return prod(map(len, self.axes.values()))

    def is_ordered(self, name: str) -> bool:
        """Whether neighbours among a setting's values are alike."""
        return not isinstance(self.axes[name][0], bool | str)

    def policy(self, point: dict[str, int]) -> str:
        """The policy's text. Raises PolicyError where settings do not fit together."""
        chosen = {name: self.axes[name][place] for name, place in point.items()}
        return str(self.kind(**self.held, **chosen).without_idle())

    @property
    def untuned(self) -> str:
        """The policy's text with every searched setting at its default."""
        return str(self.kind(**self.held))

    def default(self) -> dict[str, int] | None:
        """The point of ``untuned``, if it is there."""
        default = {setting.name: setting.default for setting in fields(self.kind)}
        if any(default[name] not in found for name, found in self.axes.items()):
            return None
        return {name: found.index(default[name]) for name, found in self.axes.items()}

    @cached_property
    def points(self) -> dict[str, dict[str, int]] | None:
        """A point of each policy that there is, by the policy's text; ``None`` for a space too large to go through."""
        if self.size > ENUMERABLE:
            return None
        places = product(*(range(len(found)) for found in self.axes.values()))
        return self.policies(dict(zip(self.axes, chosen, strict=True)) for chosen in places)

    def policies(self, points: Iterable[dict[str, int]]) -> dict[str, dict[str, int]]:
        """The first point of each policy among these, by the policy's text; refused combinations are left out."""
        found = {}
        for point in points:
            with suppress(PolicyError):
                found.setdefault(self.policy(point), point)
        return found

    def describe(self) -> dict:
        """As JSON."""
        return {"policy": self.kind.name, "axes": {k: list(v) for k, v in self.axes.items()}, "held": self.held}


def space(policy: str, search: Sequence[str] = (), held: Sequence[str] = ()) -> Space:
    """The space of a policy.

    search: settings to search, each as ``name`` or ``name=value,value``; without any, all that have values to try.
    held: ``name=value`` of settings that keep that value, beside those written in ``policy``.

    Raises UsageError for names that there are not, values that do not fit, and where nothing is left to search.
    """
    base = parse_policy(policy, *held)
    kind, known = type(base), {setting.name: setting for setting in fields(base)}
    axes = dict(_axis(base.name, known, text) for text in search)
    fixed = {text.partition("=")[0].strip() for text in held}
    fixed |= {name for name, setting in known.items() if getattr(base, name) != setting.default}
    for name, value in kind.held.items():
        if name not in fixed and name not in axes:
            base = replace(base, **({} if value is None else {name: value}))
            fixed.add(name)
    if both := sorted(fixed & axes.keys()):
        raise UsageError(f"{', '.join(both)}: held at a value and to be searched; leave one of the two out")
    if not search:
        axes = {name: values(setting) for name, setting in known.items() if name not in fixed}
        axes = {name: found for name, found in axes.items() if len(found) > 1}
    if not axes:
        raise UsageError(f"policy {base.name} has no setting to search; tune another one, or name values with --search")
    return Space(kind, axes, {name: getattr(base, name) for name in known if name not in axes})


def _axis(policy: str, known: dict[str, Field], text: str) -> tuple[str, tuple]:
    name, equals, given = text.partition("=")
    if name not in known:
        near = did_you_mean(name, known)
        raise UsageError(f"policy {policy} has no setting {name!r} to search; {near}it has {', '.join(known)}")
    setting = known[name]
    if not equals:
        found = values(setting)
        if not found:
            raise UsageError(f"--search {name}: there are no values to try by themselves; write {name}=value,value")
        return name, found
    try:
        return name, tuple(sorted({setting.metadata["read"](value.strip()) for value in given.split(",")}))
    except (ValueError, TypeError, OverflowError):
        raise UsageError(f"--search {text}: each value must be {setting.metadata['what']}") from None
