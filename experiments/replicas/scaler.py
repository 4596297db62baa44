"""How many groups: the rule of Kubernetes' horizontal autoscaler, with the numbers of this project's own file.

Owns the rule (autoscaling/v2): of each metric the sum over groups by its target, the largest counts; within a tenth of
the present number nothing changes; ``behavior`` bounds how fast it grows and how long it waits before it shrinks.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).parents[2] / "deploy" / "kubernetes" / "client" / "base" / "scaling.yaml"
PERIOD = 15.0  # seconds between two looks
TOLERANCE = 0.1
WAITING, RUNNING = "crypten_llm_waiting_requests", "crypten_llm_running_requests"
REFUSALS = "crypten_llm_refusals"  # a second, over so many seconds
OVER = 120.0


@dataclass(frozen=True)
class Rule:
    """targets: of a group, by metric. grow: (share, groups, seconds), the larger of both in that time. shrink: (groups,
    seconds). settle: seconds that a smaller number must have been enough.
    """

    targets: dict[str, float]
    grow: tuple[float, int, float]
    shrink: tuple[int, float]
    settle: float
    least: int


def read(path: Path = FILE) -> Rule:
    """Of a manifest whose policies are of the kinds that this file's are."""
    spec = yaml.safe_load(path.read_text("utf-8"))["spec"]
    metrics = [metric["pods"] for metric in spec["metrics"]]
    targets = {metric["metric"]["name"]: _number(metric["target"]["averageValue"]) for metric in metrics}
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    share, pods = (next(p for p in up["policies"] if p["type"] == kind) for kind in ("Percent", "Pods"))
    (less,) = down["policies"]
    assert up["selectPolicy"] == "Max" and share["periodSeconds"] == pods["periodSeconds"], "the rule below is of these"
    return Rule(
        targets,
        (share["value"] / 100, pods["value"], float(pods["periodSeconds"])),
        (less["value"], float(less["periodSeconds"])),
        float(down["stabilizationWindowSeconds"]),
        spec["minReplicas"],
    )


def _number(text: str) -> float:
    """Of Kubernetes' quantities, those that a target here has: 3, and 50m for 0.05."""
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


class Scaler:
    """most: groups that there can be."""

    def __init__(self, rule: Rule, most: int) -> None:
        self._rule, self._most = rule, most
        self._changes: deque[tuple[float, int]] = deque()  # when, and by how many
        self._wanted: deque[tuple[float, int]] = deque()

    def look(self, now: float, groups: int, sums: dict[str, float]) -> int:
        """How many there should be from now on. sums: of each metric over all groups that are ready."""
        wanted = max(self._by(sums[name], target, groups) for name, target in self._rule.targets.items())
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - self._rule.settle:
            self._wanted.popleft()
        if wanted > groups:
            share, pods, seconds = self._rule.grow
            base = groups - sum(by for when, by in self._changes if by > 0 and when > now - seconds)
            wanted = max(groups, min(wanted, max(math.ceil(base * (1 + share)), base + pods)))
        elif wanted < groups:
            wanted = min(groups, max(each for _, each in self._wanted))
            pods, seconds = self._rule.shrink
            gone = -sum(by for when, by in self._changes if by < 0 and when > now - seconds)
            wanted = max(wanted, groups - max(0, pods - gone))
        wanted = max(self._rule.least, min(wanted, self._most))
        if wanted != groups:
            self._changes.append((now, wanted - groups))
        while self._changes and self._changes[0][0] < now - self._rule.settle:
            self._changes.popleft()
        return wanted

    def _by(self, total: float, target: float, groups: int) -> int:
        if abs(total / (groups * target) - 1) <= TOLERANCE:
            return groups
        return math.ceil(total / target)
