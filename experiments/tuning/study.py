"""The search itself, by Optuna: a study in a journal file that outlives a kill at any moment.

Owns Optuna. The sampler learns from policies that have met a prompt, and from no others: what a cost rules out says
nothing of how the values of its settings would do in an affordable policy.
A trial that a killed run left unfinished is failed, and its point is asked for again before any other.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, Trial, TrialState

from crypten_llm.errors import UsageError
from experiments.tools.journal import cut_torn_line
from experiments.tuning.space import Space

RULED_OUT = "ruled out"


class _Held(JournalFileSymlinkLock):
    """The journal's own lock, which would outlive a kill: ``locked`` keeps other processes out already."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; a process that ends, however it does, lets go. Raises UsageError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another search is at work in {folder}; wait for it or give another --out") from None
        yield


class Pruner(optuna.pruners.BasePruner):
    """Stops the trials of whose policy ``is_hopeless`` says so."""

    def __init__(self, is_hopeless: Callable[[str, int], bool]):
        self._is_hopeless = is_hopeless

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        return trial.last_step is not None and self._is_hopeless(trial.user_attrs["policy"], trial.last_step)


class Study:
    """A study of ``space`` called ``name`` in a locked folder. setup: what a run that goes on must have in common.

    Raises UsageError where the study has another setup.
    """

    def __init__(self, folder: Path, name: str, setup: dict, space: Space, direction: str, pruner: Pruner, seed: int):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = folder / "study.journal"
        cut_torn_line(path)
        storage = JournalStorage(JournalFileBackend(str(path), lock_obj=_Held(str(path))))
        self._study = optuna.create_study(
            storage=storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True
        )
        self.space = space
        before = len(self._study.get_trials(deepcopy=False))
        self.seed = (1_000_003 * seed + before) % 2**32  # a run that goes on draws anew
        self._study.sampler = TPESampler(seed=self.seed, n_startup_trials=1, multivariate=True)
        self._distributions = {axis: _distribution(space, axis) for axis in space.axes}
        setup = json.loads(json.dumps(setup))
        begun = self._study.user_attrs.get("setup")
        if begun is None:
            self._study.set_user_attr("setup", setup)
        elif begun != setup:
            changed = ", ".join(key for key in setup if begun.get(key) != setup[key])
            raise UsageError(
                f"the search {name!r} in {folder} was begun with another {changed}; go on as it was begun, or give "
                "another --out"
            )
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.enqueue_trial(trial.params)
            self._study.tell(trial.number, state=TrialState.FAIL)

    def trials(self) -> list[FrozenTrial]:
        """Those of policies that went to their end, were stopped or ruled out, in order."""
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        found = self._study.get_trials(deepcopy=False)
        return [trial for trial in found if trial.state in ended or RULED_OUT in trial.user_attrs]

    def ask(self, point: dict[str, int] | None = None) -> Trial:
        """What was left unfinished, else the given point, else what the sampler proposes."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if point is not None and not waiting:
            self._study.enqueue_trial(point)
        return self._study.ask(self._distributions)

    def end(self, trial: Trial, objective: float | None) -> None:
        """With what it came to; ``None`` for one that was stopped."""
        self._study.tell(trial, objective, state=TrialState.PRUNED if objective is None else TrialState.COMPLETE)

    def rule_out(self, trial: Trial) -> None:
        """Keeps a trial's policy in mind, and the trial away from the sampler."""
        trial.set_user_attr(RULED_OUT, True)
        self.drop(trial)

    def drop(self, trial: Trial) -> None:
        """Leaves a trial out, as if it had not been asked for."""
        self._study.tell(trial, state=TrialState.FAIL)


def _distribution(space: Space, axis: str) -> BaseDistribution:
    places = range(len(space.axes[axis]))
    return IntDistribution(0, places[-1]) if space.is_ordered(axis) else CategoricalDistribution(places)
