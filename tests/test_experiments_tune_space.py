"""What tuning searches: the values of each setting, the points of a space, and which come first."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import islice

import pytest

from crypten_llm.errors import UsageError
from eviction import POLICIES, Policy, parse, settings
from experiments.tuning.space import space, values
from experiments.tuning.spread import POOL, Spread


@dataclass(frozen=True)
class Kinds(Policy):
    part: float = settings.share(0.25)
    rows: float = settings.budget(2048)
    block: int = settings.whole(32, 2)
    layers: int = settings.whole(2, 0)
    bits: int = settings.whole(4, 2, 8)
    weight: float = settings.number(0.6, 0.0, 1.0)
    key: str = settings.one_of("mean", "most", "mean", "least")
    pairs: bool = settings.switch(True)
    file: str = settings.text("shipped")

    name = "kinds"


def test_values_follow_from_the_settings():
    assert {setting.name: values(setting) for setting in fields(Kinds)} == {
        "part": (0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0),
        "rows": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),  # the default counts tokens
        "block": (8, 16, 32, 64, 128),
        "layers": (0, 1, 2, 4, 8),
        "bits": (2, 4, 8),
        "weight": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        "key": ("most", "mean", "least"),
        "pairs": (False, True),
        "file": (),
    }


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"full"}))
def test_every_policy_can_be_tuned(name):
    found = space(name)
    assert set(found.axes) | set(found.held) == {setting.name for setting in fields(POLICIES[name])}
    text = found.policy({axis: len(found.axes[axis]) - 1 for axis in found.axes if axis != "kernel"} | _odd(found))
    assert str(parse(text)) == text and parse(text).name == name
    assert parse(found.untuned).name == name


def _odd(found):
    return {"kernel": found.axes["kernel"].index(5)} if "kernel" in found.axes else {}


def test_what_is_held_and_what_is_named():
    whole = space("mpcache")
    assert {"static", "window", "alpha", "coarse", "fine", "second", "summary", "share", "alone"} <= set(whole.axes)
    assert set(POLICIES["mpcache"].held) == set(whole.held) and whole.held["least"] == 0
    assert whole.policy(whole.default()) == whole.untuned == "mpcache(least=0)"
    part = space("mpcache(summary=mean)", ["static=0.6,0.25", "share_from"], ["coarse=128"])
    assert part.axes == {"static": (0.25, 0.6), "share_from": (0, 1, 2, 4, 8)}
    text = part.policy({"static": 0, "share_from": 3})
    assert text == "mpcache(static=0.25,coarse=128,least=0,summary=mean,share_from=4)"
    assert space("mpcache", held=["least=384"]).held["least"] == 384


def test_points_without_a_difference_are_one():
    """Fine clusters above coarse ones are refused; alpha is nothing to the mean key, the window to a whole cache."""
    found = space("mpcache", ["coarse=8,32", "fine=8,16", "alpha=0.2,0.8", "summary=minmax,mean"])
    assert found.size == 16 and len(found.points) == 3 * 3
    assert all(found.policy(point) == text for text, point in found.points.items())
    mean_key = found.policy({"coarse": 0, "fine": 0, "alpha": 0, "summary": found.axes["summary"].index("mean")})
    assert mean_key == "mpcache(coarse=8,fine=8,least=0,summary=mean)"
    static = space("mpcache", ["static=0.5,1", "second=0.5,1", "window=0.1,0.2", "share=false,true", "alpha=0.1,0.5"])
    assert len(static.points) == 2 * 2 * 2 + 2 * 2 + 2 + 1  # by (static, second): both, static, second, neither at 1
    assert space("mpcache").points is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("full",), "policy full has no setting to search; tune another one"),
        (("mpcache", ["statc"]), "no setting 'statc' to search; did you mean 'static'?"),
        (("mpcache", ["static=0.1,2.5"]), "each value must be tokens (a whole number above 1) or a share"),
        (("mpcache", ["static"], ["static=0.1"]), "static: held at a value and to be searched"),
        (("locret", ["weights"]), "no values to try by themselves; write weights=value,value"),
        (("mpcash",), "unknown policy 'mpcash'; did you mean 'mpcache'?"),
    ],
)
def test_spaces_that_there_are_not(arguments, message):
    with pytest.raises(UsageError) as error:
        space(*arguments)
    assert message in str(error.value)


def test_what_is_unlike_the_policies_tried_comes_first():
    found = space("mpcache", ["static=0.3,0.5", "fine=8,16", "summary=minmax,mean"])
    tried = [text for text in found.points if "summary=mean" not in text and "static=0.3" not in text]
    first, *rest = [found.policy(point) for point in Spread(found, 0).points(set(tried), tried)][:6]
    assert "static=0.3" in first and "summary=mean" in first and {first, *rest} == found.points.keys() - set(tried)
    assert list(Spread(found, 0).points(found.points.keys(), tried)) == []
    alone = space("mpcache", ["static=0.3,0.5,1"])
    assert len(list(islice(Spread(alone, 0).points({alone.untuned}, [alone.untuned]), 2))) == 2
    large = space("mpcache")
    points = list(islice(Spread(large, 0).points(set(), []), 2 * POOL // 3))
    assert len({large.policy(point) for point in points}) == len(points)
