"""Follows the trials of a sweep while Ray Tune runs them: how they end, what they fail of, when all has to stop."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.stopper import Stopper

from crab_platform.bad_nodes import BadNodes
from crab_platform.budget import Budget
from crab_platform.capacity import living_nodes
from crab_platform.reaper import Reaper
from crab_platform.storage import Store
from crab_platform.trial import FATAL, LAST, NUMBER
from crab_platform.trial_journal import TrialJournal, TrialRecord, read_trial, read_trials

_LOG = logging.getLogger(__name__)
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)(:|$)")
"""The line of a traceback that says what was raised."""
HOPELESS = 3
"""So many trials that have failed for good, and not one result, say that all would fail."""


class Observer(Protocol):
    """Hears what happens to trials, in the driver's process. It must not take long: Ray Tune waits for it."""

    def started(self, record: TrialRecord) -> None:
        """A trial begins, or goes on."""

    def shown(self, number: int, step: int, metrics: dict[str, float]) -> None:
        """A trial has shown a result; again, when the sweep was started again."""

    def ended(self, record: TrialRecord) -> None:
        """A trial has ended for good."""


class Watch(tune.Callback):
    """Ray Tune's callbacks. Files say what has happened; this object knows why the sweep stops."""

    def __init__(
        self,
        store: Store,
        *,
        metric: str,
        scheduler: str,
        max_failures: int = 3,
        observers: Sequence[Observer] = (),
        budget: Budget | None = None,
        bad_nodes: BadNodes | None = None,
        reaper: Reaper | None = None,
        unneeded: Callable[[Sequence[TrialRecord]], Sequence[int]] | None = None,
    ) -> None:
        """
        Args:
            unneeded: of all trials, those whose checkpoints nobody goes on from any more. Left out: all that
                have ended.
        """
        self._store, self._metric, self._scheduler = store, metric, scheduler
        self._unneeded = unneeded
        self._max_failures = max_failures
        self._observers, self._budget = observers, budget
        self._bad_nodes = bad_nodes or BadNodes()
        self._reaper = reaper or Reaper()
        self.fatal: str | None = None
        """Why the sweep is worth nothing."""
        self.stopped_because: str | None = None
        """Why it ends early."""
        self._worst: list[str] = []
        records = read_trials(store)
        self._steps_seen = {record.number: record.steps for record in records}
        self._has_result = any(record.results for record in records)
        if budget is not None:
            for record in records:
                budget.take(record.seconds)
            self.stopped_because = budget.spent()

    @property
    def is_over(self) -> bool:
        return self.fatal is not None or self.stopped_because is not None

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        record = read_trial(self._store, trial.config[NUMBER])
        for observer in self._observers:
            observer.started(record)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        if FATAL in result:
            self.fatal = str(result[FATAL])
            return
        number, step = trial.config[NUMBER], int(result["step"])
        if step > self._steps_seen.get(number, 0):
            self._steps_seen[number] = step
            self._made(number)
        metrics = {name: value for name, value in result["metrics"].items() if math.isfinite(value)}
        for observer in self._observers:
            observer.shown(number, step, metrics)

    def _made(self, number: int) -> None:
        """A result that was not there before."""
        self._has_result = True
        made = read_trial(self._store, number).results[-1]
        self._bad_nodes.worked(made.node)
        if self._budget is not None:
            self._budget.take(made.seconds)
            self.stopped_because = self.stopped_because or self._budget.spent()

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        result = trial.last_result
        self._reaper.watch(TrialJournal(self._store, trial.config[NUMBER]).groups())
        if result.get(LAST):
            self._end(trial, "completed", f"all {int(result['step'])} steps")
        elif not self.is_over and "step" in result:
            self._end(
                trial,
                "stopped",
                f"by {self._scheduler} after step {int(result['step'])}: {self._metric} was "
                f"{result[self._metric]:.4g}, others were better by then",
            )

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        number, reason = trial.config[NUMBER], last_words(trial)
        journal = TrialJournal(self._store, number)
        journal.fail(reason)
        self._reaper.watch(journal.groups())
        record = read_trial(self._store, number)
        if record.starts:
            alive = [node["NodeID"] for node in living_nodes()]
            self._bad_nodes.failed(record.starts[-1].node, number, alive)
        if len(record.failures) <= self._max_failures:
            return  # search.py asks it again
        self._end(trial, "failed", reason)
        self._worst.append(reason)
        if not self._has_result and len(self._worst) >= HOPELESS:
            self.fatal = (
                f"{len(self._worst)} trials have failed for good and none has shown a result. The last one: {reason}. "
                "Try its settings in a train job first"
            )

    def _end(self, trial: Trial, status: Any, reason: str) -> None:
        journal = TrialJournal(self._store, trial.config[NUMBER])
        journal.finish(status, reason)
        if self._unneeded is None:
            journal.clear_state()
        else:
            for number in self._unneeded(read_trials(self._store)):
                TrialJournal(self._store, number).clear_state()
        for observer in self._observers:
            observer.ended(read_trial(self._store, journal.number))

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        """Ray Tune writes its callbacks into a snapshot that nobody reads."""
        return _Nothing, ()


class _Nothing(tune.Callback):
    """What is left of a Watch in a snapshot."""


class SweepStopper(Stopper):
    """Stops all trials when the watch says so."""

    def __init__(self, watch: Watch, told: Event) -> None:
        """`told` is set when somebody wants the sweep to stop."""
        self._watch, self._told = watch, told

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._told.is_set():
            self._watch.stopped_because = "it was told to stop"
        return self._watch.is_over

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        return _Nothing, ()


def last_words(trial: Trial) -> str:
    """What a trial failed of last: the last line of what it raised, or what Ray says of its process."""
    if trial.error_file is None:
        return "no reason is known"
    *_, said = Path(trial.error_file).read_text().split("\nFailure # ")
    lines = [line.strip() for line in said.splitlines()[1:] if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines[:1] or ["no reason is known"])[-1]
