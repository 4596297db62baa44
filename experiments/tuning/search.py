"""The search: batches of policies go through the prompts rung by rung, and those without hope are stopped on the way.

Owns the order of events. Policies of a batch share each prompt's prefill. What a policy costs is counted before its
first prompt, so one that its cost rules out takes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from optuna.trial import Trial
from tqdm import tqdm

from experiments.tuning.goal import Goal, Tried, is_hopeless
from experiments.tuning.measure import FULL, Bench, Prompt, Prompts
from experiments.tuning.space import Space
from experiments.tuning.spread import Spread
from experiments.tuning.study import Pruner, Study

STARTUP = 10  # policies spread over the space before the sampler has enough to go by
PROPOSALS = 5  # of the sampler in a row, all known or ruled out, after which one is drawn elsewhere


@dataclass(frozen=True)
class Outcome:
    """What became of a policy. prompts: how many it was tried on; none if its cost ruled it out.

    accuracy: on those, ``None`` without any. finished: whether they are all prompts of the search.
    """

    policy: str
    prompts: int
    accuracy: float | None
    finished: bool
    cost: dict[str, float]

    @property
    def tried(self) -> Tried:
        return Tried(self.policy, self.accuracy, self.cost)


class Search:
    """A search in a locked folder, or with ``exhaustive`` the whole grid.

    confidence: with which a policy must fall short to be stopped. batch: policies that are tried together. setup: see
    ``Study``.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        setup: dict,
        space: Space,
        goal: Goal,
        bench: Bench,
        prompts: Prompts,
        confidence: float,
        batch: int,
        seed: int,
        exhaustive: bool = False,
    ):
        self.space, self.goal, self.bench, self.prompts = space, goal, bench, prompts
        self.confidence, self.batch, self.exhaustive = confidence, batch, exhaustive
        self.study = Study(folder, name, setup, space, goal.direction, Pruner(self._is_hopeless), seed)
        self._spread = Spread(space, self.study.seed)
        self._names = [prompt.name for prompt in prompts.searched]
        self._at_work: tuple[str, ...] = ()

    def run(self, policies: int) -> None:
        """Goes on until so many policies have met a prompt, or there is none left to try."""
        with tqdm(total=policies, unit="policy", initial=len(self._met()), disable=None) as progress:
            while (done := len(self._met())) < policies:
                chosen = self._next(min(self.batch, policies - done))
                if not chosen:
                    break
                self._try(chosen)
                progress.update(len(chosen))
                if best := self.best():
                    progress.set_postfix_str(best.policy)

    def outcomes(self) -> list[Outcome]:
        """All policies that have been looked at, in order."""
        found = []
        for trial in self.study.trials():
            if (policy := trial.user_attrs.get("policy")) is not None:
                seen = trial.last_step or 0
                accuracy = trial.intermediate_values.get(seen)
                found.append(Outcome(policy, seen, accuracy, seen == len(self._names), self.bench.cost(policy)))
        return found

    def ranked(self) -> list[Tried]:
        """Policies that have met all prompts and fulfil the goal's constraint, best first."""
        found = [outcome.tried for outcome in self.outcomes() if outcome.finished]
        full = self.on(FULL, self.prompts.searched).accuracy if found else 0.0
        return sorted((tried for tried in found if self.goal.is_met(tried, full)), key=self.goal.order)

    def best(self) -> Tried | None:
        return next(iter(self.ranked()), None)

    def on(self, policy: str, prompts: Sequence[Prompt]) -> Tried:
        """A policy on these prompts."""
        self.bench.scores(prompts, [policy])
        scores = self.bench.store.scores(policy, [prompt.name for prompt in prompts])
        return Tried(policy, mean(scores), self.bench.cost(policy))

    def _met(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes() if outcome.prompts]

    def _is_hopeless(self, policy: str, step: int) -> bool:
        store, names = self.bench.store, self._names[:step]
        others = {*self._at_work, *(outcome.policy for outcome in self._met())}
        known = [scores for other in sorted(others) if (scores := store.scores(other, names)) is not None]
        rival = self.goal.rival(store.scores(FULL, names), known)
        return is_hopeless(store.scores(policy, names), rival, self.confidence)

    def _next(self, size: int) -> dict[str, Trial]:
        """Up to ``size`` policies that have not been tried, with their trials."""
        outcomes, best, chosen = self.outcomes(), self.best(), {}
        known = {outcome.policy for outcome in outcomes}
        met = [outcome.policy for outcome in outcomes if outcome.prompts]
        while len(chosen) < size and (trial := self._affordable(known, [*met, *chosen], best)):
            chosen[trial.user_attrs["policy"]] = trial
        return chosen

    def _affordable(self, known: set[str], tried: list[str], best: Tried | None) -> Trial | None:
        """The trial of a policy that is not ``known`` and that its cost does not rule out; ``None`` if none is left.

        All that are looked at become known.
        """
        for point in self._proposals(known, tried):
            trial = self.study.ask(point)
            policy = next(iter(self.space.policies([trial.params])), None)
            if policy is None or policy in known:
                self.study.drop(trial)
                continue
            known.add(policy)
            trial.set_user_attr("policy", policy)
            if self.exhaustive or not self.goal.rules_out(self.bench.cost(policy), best):
                return trial
            self.study.rule_out(trial)
        return None

    def _proposals(self, known: set[str], tried: list[str]) -> Iterator[dict[str, int] | None]:
        """Points to look at, one after the other; ``None`` for what the sampler proposes."""
        if self.exhaustive:
            yield from (point for policy, point in self.space.points.items() if policy not in known)
            return
        if (default := self.space.default()) is not None and self.space.policy(default) not in known:
            yield default
        if len(tried) >= STARTUP:
            yield from [None] * PROPOSALS
        yield from self._spread.points(known, tried)

    def _try(self, chosen: dict[str, Trial]) -> None:
        self._at_work, alive, seen = tuple(chosen), dict(chosen), 0
        for rung in self.prompts.rungs:
            self.bench.scores(rung, [FULL, *alive])
            seen += len(rung)
            prompts = self.prompts.searched[:seen]
            full = self.on(FULL, prompts).accuracy
            for policy, trial in tuple(alive.items()):
                tried = self.on(policy, prompts)
                trial.report(tried.accuracy, seen)
                ends = seen == len(self._names)
                if not ends and (self.exhaustive or not trial.should_prune()):
                    continue
                trial.set_constraint("goal", self.goal.excess(tried, full))
                self.study.end(trial, self.goal.objective(tried) if ends else None)
                del alive[policy]
        self._at_work = ()
