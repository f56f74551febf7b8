"""Sweeps: Ray Tune runs the trials, the journal keeps what they show (trial_journal.py).

Ray Tune's own state (its snapshots, checkpoints, searcher and scheduler) is thrown away with the process. A sweep that
was killed is run again over its journal: finished trials show their results again, which costs milliseconds each, and
the scheduler comes to the same state; the others go on from their own checkpoints. `Tuner.restore` knows only what its
last snapshot knew, and in a sweep that was killed three times trained a third of all iterations twice
(reference/reliability.md, section 3).
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Any, Literal

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter

from crab_platform.asha import JournaledAsha, JournaledHyperBand
from crab_platform.bad_nodes import BadNodes, resources
from crab_platform.budget import Budget
from crab_platform.capacity import Capacity, Need, capacity, living_nodes
from crab_platform.notice import Stopped
from crab_platform.reaper import Reaper
from crab_platform.search import JournaledSearch, Mode, Propose, Sample
from crab_platform.storage import open_store
from crab_platform.sweep_watch import Observer, SweepStopper, Watch
from crab_platform.trial import AVOID, NUMBER, JournaledTrial, TrialPlan
from crab_platform.trial_journal import TrialJournal, TrialRecord, read_trials


class SweepFailed(Exception):  # noqa: N818 (the condition)
    """The sweep cannot come to anything; says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How trials are searched and judged."""

    mode: Mode
    num_samples: int
    scheduler: Literal["asha", "hyperband", "fifo"] = "asha"
    grace_steps: int = 1
    """The first rung: no trial is stopped before it."""
    reduction_factor: float = 3
    """Of all trials that come to a rung about one in so many goes on."""
    max_failures: int = 3
    """So often a trial is started again."""
    max_concurrent: int | None = None
    """None: as many as the cluster has room for."""
    need: Need = field(default_factory=lambda: Need(workers=1, cpus=1))
    """What a trial takes of the cluster."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """How it went."""

    trials: list[TrialRecord]
    capacity: Capacity
    stopped_because: str | None
    """Why it ended before all samples were tried."""


def run_trials(
    trainable: type[JournaledTrial],
    plan: TrialPlan,
    config: SweepConfig,
    propose: Propose,
    *,
    examine: Callable[[Sample], str | None] = lambda _sample: None,
    observers: Sequence[Observer] = (),
    budget: Budget | None = None,
    unneeded: Callable[[Sequence[TrialRecord]], Sequence[int]] | None = None,
) -> Sweep:
    """Runs a sweep to its end, inside a connection to Ray; goes on with what plan.url holds.

    Args:
        propose: the sample of a number (search.py).
        examine: why a sample cannot be tried, or None.
        unneeded: of all trials, those whose checkpoints are of no use any more (population.py). Left out: all that have
            ended.

    Raises:
        NoRoom: the cluster has no room for a single trial.
        SweepFailed: impossible samples only, a metric that is not reported, trials that all fail.
        Stopped: SIGTERM came.
    """
    room = capacity(
        config.need, [node["Resources"] for node in living_nodes()], config.max_concurrent
    )
    store = open_store(plan.url)
    bad_nodes, reaper = BadNodes(), Reaper()
    watch = Watch(
        store,
        metric=plan.metric,
        scheduler=config.scheduler,
        max_failures=config.max_failures,
        observers=observers,
        budget=budget,
        bad_nodes=bad_nodes,
        reaper=reaper,
        unneeded=unneeded,
    )
    search = JournaledSearch(
        store,
        propose,
        num_samples=config.num_samples,
        examine=examine,
        metric=plan.metric,
        mode=config.mode,
        max_failures=config.max_failures,
        avoid=lambda: bad_nodes.names,
    )
    if not watch.is_over:
        with _sigterm() as told:
            _fit(trainable, plan, config, search, watch, SweepStopper(watch, told), room)
        reaper.close()
        if told.is_set():
            raise Stopped(
                f"stopped by SIGTERM; {plan.url} has what trials have shown, start the same command again to go on"
            )
    trials = read_trials(store)
    if unneeded is not None and not watch.is_over:
        for record in trials:  # nothing comes after them
            TrialJournal(store, record.number).clear_state()
    has_result = any(record.results for record in trials)
    if watch.fatal is not None or (search.refusal is not None and not has_result):
        raise SweepFailed(str(watch.fatal or search.refusal))
    return Sweep(
        trials=trials, capacity=room, stopped_because=watch.stopped_because or search.refusal
    )


_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # we say it better
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # its snapshots are of no use here
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would end the search as if all had been tried
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they are in the journal
    "RAY_AIR_NEW_OUTPUT": "0",
}


def _fit(
    trainable: type[JournaledTrial],
    plan: TrialPlan,
    config: SweepConfig,
    search: JournaledSearch,
    watch: Watch,
    stopper: SweepStopper,
    room: Capacity,
) -> None:
    os.environ |= _SETTINGS
    scratch = tempfile.mkdtemp(prefix="crab-tune-")
    with_plan: Any = tune.with_parameters(trainable, plan=plan)  # types know functions only
    try:
        tune.Tuner(
            tune.with_resources(with_plan, lambda sample: resources(config.need, sample[AVOID])),
            tune_config=tune.TuneConfig(
                search_alg=ConcurrencyLimiter(search, room.max_concurrent),
                scheduler=_scheduler(plan, config),
                num_samples=-1,  # the search says when there are enough
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                stop=stopper,
                callbacks=[watch],
                checkpoint_config=tune.CheckpointConfig(
                    checkpoint_frequency=0, checkpoint_at_end=False
                ),
                failure_config=tune.FailureConfig(max_failures=0),  # search.py asks them again
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _sigterm() -> Iterator[Event]:
    """An event that SIGTERM sets (a pod is deleted) while the block lasts; signals only get to the main thread."""
    told = Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def _scheduler(plan: TrialPlan, config: SweepConfig) -> TrialScheduler:
    if config.scheduler == "fifo":
        return FIFOScheduler()  # type: ignore[no-untyped-call]  # Ray's has no types
    kind = JournaledAsha if config.scheduler == "asha" else JournaledHyperBand
    return kind(
        time_attr="step",
        metric=plan.metric,
        mode=config.mode,
        max_t=plan.num_steps,
        grace_period=config.grace_steps,
        reduction_factor=config.reduction_factor,
    )


def _name(trial: Trial) -> str:
    return f"trial-{trial.config[NUMBER]:05d}-{trial.trial_id}"
