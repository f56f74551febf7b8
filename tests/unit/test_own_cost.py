"""What a job on a cluster tells of its own cost, in MLflow and on the dashboard."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from crab_platform import tracking
from crab_platform.cluster_profile import load_cluster
from crab_platform.job_cost import job_cost
from crab_platform.own_cost import CURRENCY_VARIABLE, HOUR_VARIABLE
from jobs.submit import manifest_of


def test_pods_know_what_an_hour_of_all_of_them_costs() -> None:
    job = manifest_of("jobs/specs/train-shapes.yaml", [], "eks-example")
    _, _, prices = load_cluster("eks-example")
    (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    env = {one["name"]: one.get("value") for one in head["env"]}
    assert float(env[HOUR_VARIABLE]) == pytest.approx(job_cost(job, prices).hourly, rel=1e-5)
    assert env[CURRENCY_VARIABLE] == "USD"


@pytest.mark.parametrize("trial", [False, True])
def test_a_run_tells_what_it_cost(
    trial: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of a trial, whose pods are the sweep's."""
    monkeypatch.setenv(HOUR_VARIABLE, "3600")
    monkeypatch.setenv(CURRENCY_VARIABLE, "EUR")
    url = f"sqlite:///{tmp_path}/mlflow.db"
    tags = {"mlflow.parentRunId": "a"} if trial else {}
    began = time.monotonic()
    with tracking.start_run(url, "e", "n", spec={}, tags=tags) as run:
        time.sleep(0.2)
    most = time.monotonic() - began
    found = MlflowClient(url).get_run(run.run_id).data
    if trial:
        assert "cost" not in found.metrics
        return
    assert 0.2 <= found.metrics["cost"] <= most
    assert found.tags["cost.currency"] == "EUR"


def test_a_run_on_a_machine_of_ones_own_tells_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/mlflow.db"
    with tracking.start_run(url, "e", "n", spec={}) as run:
        pass
    assert "cost" not in MlflowClient(url).get_run(run.run_id).data.metrics
