"""Sweeps on a real local Ray: trials cost nothing, what is around them is the real thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group_table
from support.crab_runs import wait_for
from support.curve_trials import METRIC, CurveTrial, Faults, loss, plan
from support.sweep_driver import SPACE, proposals

from crab_platform import ray_cluster
from crab_platform.budget import Budget, Limits
from crab_platform.capacity import Need, NoRoom
from crab_platform.population import PopulationProposals, generations, unneeded
from crab_platform.search import OptunaProposals
from crab_platform.trial_journal import TrialRecord
from crab_platform.tuning import Sweep, SweepConfig, SweepFailed, run_trials

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster.connected(2):
        yield


def sweep(
    folder: Path, faults: Faults, *, num_steps: int = 9, metric: str = METRIC, **changes: Any
) -> Sweep:
    more = {name: changes.pop(name) for name in ("examine", "budget") if name in changes}
    config = SweepConfig(**({"mode": "min", "num_samples": 9} | changes))
    return run_trials(
        CurveTrial,
        plan(str(folder), faults, num_steps=num_steps, metric=metric),
        config,
        proposals(),
        **more,
    )


def worked(folder: Path) -> int:
    """Steps that were really made."""
    return sum(len(path.read_text().split()) for path in folder.glob("worked-*"))


def groups_left() -> list[str]:
    return [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]


def curve(trial: TrialRecord) -> list[float]:
    return [result.metrics[METRIC] for result in trial.results]


def test_a_sweep_stops_early_reuses_processes_and_gives_all_back(tmp_path: Path) -> None:
    found = sweep(tmp_path, Faults(folder=str(tmp_path)))

    statuses = Counter(trial.status for trial in found.trials)
    assert statuses["completed"] + statuses["stopped"] == 9
    assert statuses["stopped"] >= 3, "ASHA with a factor of three stops more than that"
    assert [trial.number for trial in found.trials] == list(range(9))
    for trial in found.trials:
        assert curve(trial) == [loss(trial.config, step) for step in range(1, trial.steps + 1)]
        if trial.status == "stopped":
            assert trial.end is not None
            assert f"asha after step {trial.steps}" in trial.end.reason
    best = min(found.trials, key=lambda trial: trial.best(METRIC, "min") or 9)
    assert best.status == "completed"
    assert worked(tmp_path) == sum(trial.steps for trial in found.trials)
    pids = {pid for path in tmp_path.glob("pid-*") for pid in path.read_text().split()}
    assert len(pids) <= 2, "a process for each trial"
    assert groups_left() == []
    # Ray tells what is free a little later.
    wait_for(lambda: ray.available_resources().get("CPU") == 2.0, "all CPUs to be free")

    again = sweep(tmp_path, Faults(folder=str(tmp_path)))
    assert again.trials == found.trials
    assert worked(tmp_path) == sum(trial.steps for trial in found.trials), "trained twice"


def test_hyperband_stops_trials_in_some_brackets_and_lets_others_go_on(tmp_path: Path) -> None:
    found = sweep(tmp_path, Faults(), num_samples=24, scheduler="hyperband", reduction_factor=3)
    stopped = [trial for trial in found.trials if trial.status == "stopped"]
    assert {trial.steps for trial in stopped} >= {1, 3}, "all brackets have the same first rung"
    assert Counter(trial.status for trial in found.trials)["completed"] >= 3


def test_a_population_goes_on_from_its_best_and_again_costs_nothing(tmp_path: Path) -> None:
    def run() -> Sweep:
        space = {"x": SPACE["x"], "y": SPACE["y"]}
        draw = OptunaProposals(space=space, searcher="random", metric=METRIC, mode="min", seed=1)
        return run_trials(
            CurveTrial,
            plan(str(tmp_path), Faults(folder=str(tmp_path), dies_once=(5,)), piece_steps=3),
            SweepConfig(mode="min", num_samples=3 * 4, scheduler="fifo"),
            PopulationProposals(
                draw=draw, size=4, space=space, kept=frozenset(), metric=METRIC, mode="min", seed=1
            ),
            unneeded=unneeded(4),
        )

    found = run()
    assert found.stopped_because is None
    for number, generation in enumerate(generations(found.trials)):
        assert len(generation) == 4
        for trial in generation:
            assert trial.status == "completed"
            steps = range(3 * number + 1, 3 * number + 4)
            assert [result.step for result in trial.results] == list(steps)
            assert curve(trial) == [loss(trial.config, step) for step in steps]
    assert run().trials == found.trials
    assert worked(tmp_path) <= 9 * 4 + 1, "only the step in which a process died is made again"
    assert groups_left() == []


def test_a_larger_sweep_goes_on_from_a_smaller_one(tmp_path: Path) -> None:
    few = sweep(tmp_path, Faults(), num_samples=3, scheduler="fifo")
    more = sweep(tmp_path, Faults(), num_samples=5, scheduler="fifo")
    assert more.trials[:3] == few.trials
    assert [trial.steps for trial in more.trials] == [9] * 5


def test_crashes_are_retried_and_the_hopeless_trial_says_why(tmp_path: Path) -> None:
    """A small C2 of reference/reliability.md; the whole is among the faults."""
    faults = Faults(folder=str(tmp_path), crashes_once=(1,), dies_once=(2,), crashes_always=(3,))
    found = sweep(tmp_path, faults, num_samples=5, scheduler="fifo", max_failures=2)
    one, died, hopeless = found.trials[1:4]
    assert [trial.status for trial in found.trials] == [
        *("completed", "completed", "completed", "failed", "completed")
    ]
    for trial in (t for t in found.trials if t is not hopeless):
        assert curve(trial) == [loss(trial.config, step) for step in range(1, 10)]
    assert [f.reason.startswith("OSError: trial 1 crashed") for f in one.failures] == [True]
    assert len(died.failures) == 1
    assert "died" in died.failures[0].reason
    assert hopeless.end is not None
    assert hopeless.end.reason == "ZeroDivisionError: trial 3 is hopeless"
    assert len(hopeless.failures) == 3, "one start and two more"


def test_a_space_of_impossible_samples_ends(tmp_path: Path) -> None:
    with pytest.raises(SweepFailed, match=r"impossible.*no such head"):
        sweep(tmp_path, Faults(), examine=lambda _: "no such head")


def test_a_metric_that_is_never_reported_ends_and_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(SweepFailed, match=r"'val/accuracy'; reported are val/loss.*search\.metric"):
        sweep(tmp_path, Faults(), metric="val/accuracy")
    assert groups_left() == []


def test_trials_that_all_crash_end_with_their_reason(tmp_path: Path) -> None:
    faults = Faults(crashes_always=tuple(range(100)))
    with pytest.raises(SweepFailed, match="is hopeless"):
        sweep(tmp_path, faults, num_samples=50, max_failures=0)
    assert groups_left() == []


def test_a_cluster_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match="a node of 2 CPUs"):
        sweep(tmp_path, Faults(), need=Need(workers=1, cpus=3))
    with pytest.raises(NoRoom, match="GPUs"):
        sweep(tmp_path, Faults(), need=Need(workers=1, cpus=1, gpus=1))


def test_a_budget_stops_all_and_more_of_it_goes_on(tmp_path: Path) -> None:
    need = Need(workers=1, cpus=1)
    slow = Faults(folder=str(tmp_path), step_s=0.05)
    budget = Budget(need=need, limits=Limits(cpu_hours=1 / 3600))
    found = sweep(tmp_path, slow, num_samples=20, scheduler="fifo", budget=budget)
    assert found.stopped_because is not None
    assert "CPU-hours" in found.stopped_because
    assert 1 <= sum(trial.seconds for trial in found.trials) < 3
    unfinished = [trial for trial in found.trials if trial.status == "unfinished"]
    assert len(found.trials) < 20

    before = worked(tmp_path)
    same = sweep(
        tmp_path,
        slow,
        num_samples=20,
        scheduler="fifo",
        budget=Budget(need=need, limits=Limits(cpu_hours=1 / 3600)),
    )
    assert worked(tmp_path) == before, "what was spent before does not count"
    assert same.stopped_because is not None
    rest = sweep(
        tmp_path, Faults(folder=str(tmp_path)), num_samples=len(found.trials), scheduler="fifo"
    )
    assert [trial.status for trial in rest.trials] == ["completed"] * len(found.trials)
    assert unfinished, "nothing was under way when the budget was spent"
    assert worked(tmp_path) <= 9 * len(found.trials) + 2, "at most the step in flight is made again"
