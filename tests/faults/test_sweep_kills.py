"""C1, C2 and C6 of reference/reliability.md: sweeps whose driver is killed, and whose trials crash.

Trials are curves, known from the sample alone, so what a trial has to show is known as well. With the driver go all
processes of its Ray, as when a pod is deleted.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import RunStatus
from servers.mlflow_server import MlflowServer
from support.crab_runs import CrabRun, kill, ray_home, wait_for
from support.curve_trials import METRIC, loss
from support.sweep_driver import Settings, proposals

from crab_platform.storage import open_store
from crab_platform.trial_journal import TrialRecord, read_trials

pytestmark = [pytest.mark.ray, pytest.mark.faults]

CODE = "import runpy; runpy.run_module('support.sweep_driver', run_name='__main__')"
WITHOUT_DASHBOARD = f"""
import ray
init = ray.init
ray.init = lambda **settings: init(**(settings | {{"include_dashboard": False}}))
{CODE}
"""
TRIALS, STEPS = 8, 15
KILLS = 3


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    with ray_home() as variables:
        yield variables


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


def start(settings: Settings, env: dict[str, str], code: str = CODE) -> CrabRun:
    return CrabRun([json.dumps(asdict(settings))], env, Path(settings.folder), code)


def shown(settings: Settings) -> int:
    """Results that are there."""
    return len(list(Path(settings.url).glob("trials/*/results/*.json")))


def worked(settings: Settings) -> int:
    """Iterations that were made, some of them again."""
    return sum(len(p.read_text().split()) for p in Path(settings.folder).glob("worked-*"))


def end(run: CrabRun) -> None:
    """All at once, as far as that can be."""
    run.kill()
    run.end_all()
    for process in run.processes():
        kill(process)


def finished(settings: Settings, env: dict[str, str], code: str = CODE) -> list[TrialRecord]:
    run = start(settings, env, code)
    try:
        assert run.wait() == 0, run.stderr()[-3000:]
        assert wait_for(lambda: not run.processes(), "the processes of the sweep to end")
    finally:
        run.end_all()
    return read_trials(open_store(settings.url))


def check_curves(trials: list[TrialRecord]) -> None:
    """Every trial has shown what its sample says, each step once."""
    propose, known = proposals(), []
    for number, trial in enumerate(trials):
        assert trial.number == number
        assert trial.config == propose(number, known), "another sample than without faults"
        assert [(r.step, r.metrics[METRIC]) for r in trial.results] == [
            (step, loss(trial.config, step)) for step in range(1, trial.steps + 1)
        ]


def check_runs(settings: Settings, statuses: dict[int, str]) -> None:
    """One run for the sweep, one below it for each trial, each step once, none RUNNING."""
    client = MlflowClient(settings.mlflow)
    experiment = client.get_experiment_by_name("sweeps")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == RunStatus.to_string(RunStatus.FINISHED)
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert Counter(int(run.data.tags["trial"]) for run in children) == Counter(statuses.keys())
    for run in children:
        expected = statuses[int(run.data.tags["trial"])]
        assert run.data.tags["status"] == expected
        assert run.info.status == ("FAILED" if expected == "failed" else "FINISHED")
        if expected == "completed":
            history = client.get_metric_history(run.info.run_id, METRIC)
            assert [m.step for m in sorted(history, key=lambda m: m.step)] == list(
                range(1, STEPS + 1)
            )


def test_a_driver_that_is_killed_three_times_loses_and_repeats_nothing(
    tmp_path: Path, env: dict[str, str], server: MlflowServer
) -> None:
    settings = Settings(
        folder=str(tmp_path),
        mlflow=server.url,
        num_samples=TRIALS,
        num_steps=STEPS,
        faults={"step_s": 0.2},
    )
    moments = sorted(random.Random(4).sample(range(10, TRIALS * STEPS - 10), KILLS))
    for moment in moments:
        run = start(settings, env)
        try:
            wait_for(lambda m=moment, r=run: shown(settings) >= m or not r.is_running(), "results")
        finally:
            end(run)
    trials = finished(settings, env)

    assert Counter(trial.status for trial in trials) == {"completed": TRIALS}
    check_curves(trials)
    repeated = worked(settings) - TRIALS * STEPS
    print(
        f"\nC1: killed after {moments} results of {TRIALS * STEPS}, {repeated} iterations made again"
    )
    assert repeated <= KILLS * 2 * 2, "more than two for each trial that was under way at a kill"
    check_runs(settings, dict.fromkeys(range(TRIALS), "completed"))


def test_a_sweep_that_forgets_its_results_repeats_them(tmp_path: Path, env: dict[str, str]) -> None:
    """The planted bug of C1: what was shown is not looked for."""
    settings = Settings(
        folder=str(tmp_path), mlflow=f"sqlite:///{tmp_path}/m.db", num_samples=4, num_steps=6,
    )  # fmt: skip
    finished(settings, env)
    before = worked(settings)
    finished(replace(settings, forgets=True), env)
    assert worked(settings) > before


def test_a_third_of_the_trials_crash_once_and_one_for_ever(
    tmp_path: Path, env: dict[str, str]
) -> None:
    settings = Settings(
        folder=str(tmp_path),
        mlflow=f"sqlite:///{tmp_path}/m.db",
        num_samples=10,
        num_steps=STEPS,
        faults={"crashes_once": [1, 4], "dies_once": [7], "crashes_always": [5]},
    )
    trials = finished(settings, env)
    check_curves(trials)
    statuses = {trial.number: trial.status for trial in trials}
    assert statuses == {n: "failed" if n == 5 else "completed" for n in range(10)}
    assert [len(trial.failures) for trial in trials] == [0, 1, 0, 0, 1, 4, 0, 1, 0, 0]
    assert trials[5].end is not None
    assert "trial 5 is hopeless" in trials[5].end.reason
    check_runs(settings, {n: str(status) for n, status in statuses.items()})


@pytest.mark.parametrize("code", [CODE, WITHOUT_DASHBOARD], ids=["dashboard", "no dashboard"])
def test_early_stopping_ends_with_and_without_the_dashboard(
    tmp_path: Path, env: dict[str, str], code: str
) -> None:
    settings = Settings(
        folder=str(tmp_path),
        mlflow=f"sqlite:///{tmp_path}/m.db",
        num_samples=12,
        num_steps=9,
        scheduler="asha",
    )
    statuses = Counter(trial.status for trial in finished(settings, env, code))
    assert statuses["stopped"] >= 3
    assert statuses["stopped"] + statuses["completed"] == 12


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_sweep_that_is_told_to_stop_leaves_no_run_running_and_goes_on(
    tmp_path: Path, env: dict[str, str], name: str
) -> None:
    settings = Settings(
        folder=str(tmp_path),
        mlflow=f"sqlite:///{tmp_path}/m.db",
        num_samples=4,
        num_steps=STEPS,
        faults={"step_s": 0.2},
    )
    run = start(settings, env)
    try:
        wait_for(lambda: shown(settings) >= 4 or not run.is_running(), "results")
        os.kill(run.pid, getattr(signal, name))
        assert run.wait() != 0
        wait_for(lambda: not run.processes(), "the processes of the sweep to end")
    finally:
        run.end_all()
    assert shown(settings) < 4 * STEPS, "it went on to its end"
    client = MlflowClient(settings.mlflow)
    experiment = client.get_experiment_by_name("sweeps")
    stopped = client.search_runs([experiment.experiment_id])
    assert "RUNNING" not in {run.info.status for run in stopped}

    check_curves(finished(settings, env))
    assert worked(settings) <= 4 * STEPS + 4, "more than the steps in flight were made again"
    check_runs(settings, dict.fromkeys(range(4), "completed"))
