"""Trials of two workers each: early stopped runs of Ray Train give all back, with Ray's dashboard and without it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.crab_runs import CLI, CrabRun, ray_home, wait_for
from support.random_features import write_job

from jobs.spec import spec_record

pytestmark = [pytest.mark.ray, pytest.mark.faults]

STEPS = 4
WITHOUT_DASHBOARD = f"""
import ray
init = ray.init
ray.init = lambda **settings: init(**(settings | {{"include_dashboard": False}}))
{CLI}
"""


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    with ray_home() as variables:
        yield variables


def spec_of(folder: Path) -> dict[str, Any]:
    workers = {"count": 2, "micro_batches": 1, "zero_stage": 3}
    job = write_job(folder, str(folder / "cache"), count=60, steps=STEPS, workers=workers)
    train = spec_record(job.spec)
    for name in ("job", "name", "runs", "tracking"):
        del train[name]
    train |= {"tasks": ["avqa", "s4"], "validation": {"samples_per_task": 2, "every": 1}}
    bad = [{"num_heads": 8, "router_temperature": t} for t in (9.0, 9.5, 10.0)]
    return {
        "job": "tune",
        "name": "workers",
        "runs": str(folder / "runs"),
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "space": ["heads_and_temperature"],
        "train": train,
        "search": {
            "samples": 4,
            "first": [{"num_heads": 1, "router_temperature": 1.0}, *bad],
            "grace_steps": 1,
            "reduction_factor": 2,
        },
        "confirm": {"seeds": 1},
    }


def result_of(
    spec: dict[str, Any], folder: Path, env: dict[str, str], code: str = CLI
) -> dict[str, Any]:
    """Of a job that runs to its end and leaves no process."""
    file = folder / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    run = CrabRun(["run", str(file), "--json"], env, folder, code)
    try:
        wait_for(lambda: not run.is_running(), "the job to end", 1500)
        result = run.finish()
        wait_for(lambda: not run.processes(), "its processes to end")
    finally:
        run.end_all()
    return result


@pytest.mark.parametrize("code", [CLI, WITHOUT_DASHBOARD], ids=["dashboard", "no dashboard"])
def test_stopped_trials_of_two_workers_give_all_back(
    tmp_path: Path, env: dict[str, str], code: str
) -> None:
    # Two CPUs: the next trial starts only when the one before has given back what it had.
    result = result_of(spec_of(tmp_path), tmp_path, env, code)
    trials = json.loads(Path(result["sweep"]).read_text())["trials"]
    statuses = Counter(trial["status"] for trial in trials)
    assert sum(statuses.values()) == 4
    assert statuses["stopped"] >= 1, trials
    assert statuses["stopped"] + statuses["completed"] == 4, trials
    assert Path(result["adapter"]).is_dir()


def test_members_of_two_workers_go_on_from_each_other(tmp_path: Path, env: dict[str, str]) -> None:
    """Its rival, trained again in two pieces, has the loss of a train job of one piece."""
    spec = spec_of(tmp_path) | {
        "space": ["heads_and_temperature", "optim"],
        "search": {"samples": 2, "scheduler": "pbt", "interval": 2},
        "confirm": {"seeds": 1, "compare": {"plain": {"num_heads": 1}}},
    }
    result = result_of(spec, tmp_path, env)
    trials = json.loads(Path(result["sweep"]).read_text())["trials"]
    assert [trial["steps"] for trial in trials] == [2, 2, 4, 4]
    assert len({trial["parent"] for trial in trials[2:]}) == 1, "the worse one of two was left"
    rival = result["confirmed"][1]

    train = {name: spec[name] for name in ("runs", "tracking")} | spec["train"]
    train |= {"job": "train", "name": "alone"}
    train["optimisation"]["seed"] = rival["seeds"][0]
    train["model"]["set"] = {"adapter": {"num_heads": 1}}
    alone = result_of(train, tmp_path, env)
    assert alone["metrics"]["val/loss"] == rival["values"][0]
