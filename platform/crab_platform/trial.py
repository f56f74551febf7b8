"""What Ray Tune runs: a trial that shows its results one by one, those that it has shown before without any work.

Results, checkpoints and ends are files (trial_journal.py); Ray Tune's own checkpoints are not used. A trial that is
started again, in another process, after a crash or after all was killed, shows what is there and goes on from its own
checkpoint. The two are written in this order: checkpoint, result. After a kill between them the checkpoint has the
result's metrics.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from crab_platform import checkpoint
from crab_platform.session import Build, Session
from crab_platform.storage import Store, open_store
from crab_platform.training_config import TrainingConfig
from crab_platform.trial_journal import Result, TrialJournal, now

NUMBER = "trial"
"""In a trial's configuration, beside its sample: which trial of the sweep it is."""
AVOID = "avoid"
"""Likewise: nodes that it must not be put on."""
PARENT = "parent"
"""In a sample: the trial from whose last checkpoint this one goes on (population.py)."""
FATAL = "fatal"
"""In a result: why the whole sweep is of no use."""
AGAIN = "again"
"""In a result: whether another one is known to follow it, so that it was judged before, and the trial went on."""
LAST = "last"
"""In a result: whether the trial says by itself that it has ended. Ray Tune's own `done` it sets where it stops one."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """What is the same for all trials. Sent to every actor."""

    url: str
    """Of the sweep's folder."""
    build: Build
    training: TrainingConfig
    metric: str
    num_steps: int
    report_every: int
    """Steps from one result to the next."""
    exports: bool = False
    """Whether a trial that has come to its end writes its adapter."""
    piece_steps: int | None = None
    """A trial ends after so many steps and others may go on from it (population.py); None: it goes to the last step."""


class JournaledTrial(tune.Trainable):
    """Shows results from the journal while there are any, then makes them."""

    def setup(self, config: dict[str, Any], plan: TrialPlan) -> None:  # type: ignore[override]  # by with_parameters
        self._plan = plan
        self._open(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The same process for another trial."""
        self._open(new_config)
        return True

    def _open(self, config: dict[str, Any]) -> None:
        sample = dict(config)
        sample.pop(AVOID, None)
        self._journal = TrialJournal(open_store(self._plan.url), sample.pop(NUMBER))
        self._sample = sample
        self._shown = 0
        self._known = self._journal.results()
        parent = sample.get(PARENT)
        self._parent = None if parent is None else TrialJournal(self._journal.store, parent)
        self._begins_at = self._parent.results()[-1].step if self._parent else 0
        self._ends_at = self._plan.num_steps
        if self._plan.piece_steps is not None:
            self._ends_at = min(self._ends_at, self._begins_at + self._plan.piece_steps)
        end = self._journal.end()
        self._stops_at = self._known[-1].step if self._known and end is not None else None
        self._is_ready = False

    def step(self) -> dict[str, Any]:
        """The next result: `step`, the metrics, and whether it is the last one."""
        if self._shown < len(self._known):
            result = self._known[self._shown]
        else:
            result = self._make()
        self._shown += 1
        done = result.step >= self._ends_at or result.step == self._stops_at
        shown = {
            "step": result.step,
            "metrics": result.metrics,
            AGAIN: self._shown < len(self._known),
            LAST: done,
            "done": done,
        }
        if self._plan.metric not in result.metrics:
            return shown | {"done": True, FATAL: unreported(self._plan.metric, result.metrics)}
        return shown | {self._plan.metric: result.metrics[self._plan.metric]}

    def _make(self) -> Result:
        began = time.monotonic()
        if not self._is_ready:
            self._journal.start(self._node())
            self._prepare(self._sample, self._known)
            self._is_ready = True
        before = self._known[-1].step if self._known else self._begins_at
        step = min(before + self._plan.report_every, self._ends_at)
        metrics = self._train_to(step)
        result = Result(
            step=step,
            metrics={name: float(value) for name, value in metrics.items() if name != "step"},
            seconds=time.monotonic() - began,
            node=self._node(),
            at=now(),
        )
        kept = self._journal.append(len(self._known), result)
        self._known.append(kept)
        return kept

    def _own_state(self) -> Store:
        """Where its checkpoints lie; before the first of its own, with a copy of the one that it goes on from."""
        store = open_store(self._journal.state_url)
        if self._parent is not None:
            checkpoint.take_over(open_store(self._parent.state_url), self._begins_at, store)
        return store

    def _node(self) -> str:
        """Ray's id of the node that does the work; "" where there may be several."""
        return str(ray.get_runtime_context().get_node_id())

    @abstractmethod
    def _prepare(self, sample: Mapping[str, Any], known: Sequence[Result]) -> None:
        """Gets ready to go on after the last of the known results."""

    @abstractmethod
    def _train_to(self, step: int) -> dict[str, float]:
        """Trains to the end of this step and returns its metrics."""


class SessionTrial(JournaledTrial):
    """A trial of one worker, in this process, which is used again for the next trial."""

    def setup(self, config: dict[str, Any], plan: TrialPlan) -> None:  # type: ignore[override]  # by with_parameters
        self._session: Session | None = None
        super().setup(config, plan)

    def _prepare(self, sample: Mapping[str, Any], known: Sequence[Result]) -> None:
        if self._session is None:
            self._session = Session(self._plan.build, self._plan.training)
        self._store = self._own_state()
        self._learner = self._session.begin({NUMBER: self._journal.number, **sample}, self._store)

    def _train_to(self, step: int) -> dict[str, float]:
        assert self._session is not None
        learner = self._learner
        if learner.step == step:  # a checkpoint of it is there, and its result is not
            return learner.metrics
        if learner.step > step:
            raise RuntimeError(
                f"{self._store.url} has a checkpoint of step {learner.step}, but the result of step {step} is gone; "
                "remove the checkpoint to train for it again"
            )
        metrics: dict[str, float] = {}
        while learner.step < step:
            metrics = learner.learn()
        metrics |= learner.validate()
        if self._plan.exports and step == self._plan.num_steps:
            self._session.export()
        self._session.save(self._store)
        return metrics


def unreported(metric: str, metrics: Mapping[str, float]) -> str:
    """Why a sweep for this metric cannot be."""
    known = ", ".join(sorted(metrics))
    return f"no trial reports the metric {metric!r}; reported are {known}. Set search.metric to one of them"
