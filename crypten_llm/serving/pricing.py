"""What a request costs before it is sent: counted, and its seconds as this machine has needed them so far.

Owns the price and the ratio between predicted and measured seconds. Rounds, bytes and material are those of the command
``cost``, and exact for an answer of the greatest length; an answer that ends earlier costs less.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from crypten_llm.serving.refusals import Refusal

if TYPE_CHECKING:
    from crypten_llm.models.config import LlamaConfig
    from crypten_llm.serving.job import Job
    from crypten_llm.session.plan import Course
    from crypten_llm.session.request import Result

KEPT = 256  # requests whose price is remembered
MEASURED = 9  # requests whose median ratio holds: the first one compiles kernels, and takes many times as long
PHASES = ("prefill", "decode")


class Pricer:
    """predict: of a model's configuration and requests that run side by side, a ``commands.cost.Prediction``; None
    where nothing is counted."""

    def __init__(self, predict: Callable[[LlamaConfig, tuple[Course, ...]], Any] | None, engine: str) -> None:
        self._predict, self._engine = predict, engine
        self._known: OrderedDict[tuple[Course, ...], Any] = OrderedDict()
        self._ratios: dict[str, deque[float]] = {
            phase: deque(maxlen=MEASURED) for phase in PHASES
        }  # measured by predicted
        self._counting = threading.Lock()

    def price(self, config: LlamaConfig, courses: Sequence[Course], ahead: Sequence[Job] = ()) -> dict[str, Any]:
        """Of these side by side, and nobody else. ahead: requests that may come first. New ones take seconds.

        rounds; bytes_sent: by compute party; dealer_bytes: material, of both; seconds: without ``queue_seconds``, which
        is the longest that those ahead may take. basis: "measured" once a priced request has been answered here.

        Raises Refusal where this engine is not counted, UsageError for a plan that cannot be run.
        """
        if self._predict is None:
            raise Refusal(400, f"engine {self._engine!r} is not counted beforehand; prices are of engine 'wire'")
        found = [self._prediction(config, tuple(courses))]
        before = [tuple(each.course for each in job.asked) for job in ahead]
        plans = [course.plan for course in courses]
        phases = {phase: self._sum(phase, found) for phase in PHASES}
        return {
            "object": "price",
            "engine": self._engine,
            "prompt_tokens": sum(plan.prompt_tokens for plan in plans),
            "public_tokens": sum(len(plan.public_prefix) for plan in plans),
            "cached_tokens": sum(course.cached_tokens for course in courses),
            "max_new_tokens": sum(plan.max_new_tokens for plan in plans),
            "rounds": sum(phase["rounds"] for phase in phases.values()),
            "bytes_sent": [sum(sent) for sent in zip(*(p["bytes_sent"] for p in phases.values()), strict=True)],
            "dealer_bytes": sum(phase["dealer_bytes"] for phase in phases.values()),
            "seconds": sum(phase["seconds"] for phase in phases.values()),
            "queue_seconds": sum(self._seconds(self._prediction(config, each)) for each in before),
            "basis": "measured" if all(self._ratios.values()) else "estimated",
            **phases,
        }

    def check(self, price: dict[str, Any], deadline: float) -> None:
        """Raises Refusal, with the price, for a request that would not be answered within ``deadline`` seconds."""
        needed = price["seconds"] + price["queue_seconds"]
        if needed > deadline:
            raise Refusal(
                412,
                f"the answer may take {needed:.1f} s, {price['queue_seconds']:.1f} s of them for requests ahead of it, "
                f"and the deadline is {deadline:g} s; ask for fewer tokens, or wait longer",
                "deadline",
                price=price,
            )

    def learn(self, course: Course, result: Result) -> None:
        """From what an answer has taken, where it was priced."""
        prediction, plan = self._known.get((course,)), course.plan
        if prediction is None:
            return
        run = plan.max_new_tokens if plan.hide_length else len(result.token_ids)
        steps = {"prefill": (1, 1), "decode": (run - 1, prediction.decode_steps)}
        for phase, (measured_steps, predicted_steps) in steps.items():
            if measured_steps > 0 and (predicted := prediction.phase(phase)["seconds"]) > 0:
                measured = result.cost.seconds(phase) / measured_steps
                self._ratios[phase].append(measured * predicted_steps / predicted)

    def _prediction(self, config: LlamaConfig, courses: tuple[Course, ...]) -> Any:
        with self._counting:
            if courses not in self._known:
                assert self._predict is not None, "who asks has checked that there is one"
                self._known[courses] = self._predict(config, courses)
            self._known.move_to_end(courses)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            return self._known[courses]

    def _ratio(self, phase: str) -> float:
        return median(self._ratios[phase]) if self._ratios[phase] else 1.0

    def _seconds(self, prediction: Any) -> float:
        return sum(self._sum(phase, [prediction])["seconds"] for phase in PHASES)

    def _sum(self, phase: str, predictions: Sequence[Any]) -> dict[str, Any]:
        found = [prediction.phase(phase) for prediction in predictions]
        return {
            "rounds": sum(each["rounds"] for each in found),
            "bytes_sent": [sum(sent) for sent in zip(*(each["bytes_sent"] for each in found), strict=True)],
            "dealer_bytes": sum(each["dealer_bytes"] for each in found),
            "seconds": sum(each["seconds"] for each in found) * self._ratio(phase),
        }
