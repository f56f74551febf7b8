"""From specs to results on a cluster: an API server and an operator on loopback, Ray, S3 and MLflow real processes.

Module-scoped: one workspace in which preprocess, train, tune and evaluate follow each other, as a person submits them.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from servers.seaweedfs import S3Server
from support.cluster_here import SPECS, Cluster, cluster_here
from support.crab_runs import CLI, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(shared_dir: Path, s3: S3Server) -> Iterator[Cluster]:
    with cluster_here(shared_dir / "kuberay", s3) as found:
        status, _, said = found.crab("synth", "work/shapes", "--clips", "10", "--seed", "1")
        assert status == 0, said
        yield found


TRAIN = (
    "optimisation.steps=3",
    "optimisation.batch_size=4",
    "workers.micro_batches=1",
    "workers.checkpoint_every=2",
    "parse_rate_samples=1",
)


def test_specs_become_results(cluster: Cluster) -> None:
    features = f"features.cache={cluster.cache}"
    status, result, said = cluster.submit("preprocess-shapes", f"cache={cluster.cache}")
    assert status == 0, said
    assert result["phase"] == "succeeded"
    assert "--- attempt 1, on preprocess-shapes-" in said
    assert cluster.result_of("preprocess-shapes")["encoded"] == 20

    status, _, said = cluster.submit("train-shapes", features, *TRAIN)
    assert status == 0, said
    assert Path(
        cluster.operator.workspace.parent, cluster.result_of("train-shapes")["adapter"]
    ).is_dir()

    status, _, said = cluster.submit(
        "tune-heads",
        f"train.{features}",
        "train.optimisation.steps=2",
        "train.optimisation.batch_size=4",
        "train.validation.samples_per_task=1",
        "train.validation.every=1",
        "search.samples=2",
        "search.grace_steps=1",
        "confirm.seeds=1",
        "confirm.compare={}",
        "preprocess=null",
    )
    assert status == 0, said
    assert cluster.result_of("tune-heads")["winner"]

    status, _, said = cluster.submit(
        "evaluate-shapes", features, "samples_per_task=1", "max_new_tokens=8", "workers=1"
    )
    assert status == 0, said
    assert cluster.result_of("evaluate-shapes")["scores"]

    client = MlflowClient(cluster.mlflow)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = {run.info.run_name: run.data for run in client.search_runs(experiments)}
    for name in ("preprocess-shapes", "train-shapes", "tune-heads", "evaluate-shapes"):
        assert runs[name].metrics["cost"] > 0
        assert runs[name].tags["cost.currency"] == "USD"

    models = client.search_logged_models(experiments)
    assert {model.name for model in models} == {"train-shapes", "tune-heads"}
    assert {model.status for model in models} == {LoggedModelStatus.READY}

    listed = cluster.crab("jobs")[1]["jobs"]
    assert {(job["phase"], job["exit_code"]) for job in listed} == {("succeeded", 0)}
    assert len(listed) == 4
    assert all(job["cost"]["hours"] > 0 for job in listed)
    wait_for(lambda: not cluster.server.all("pods"), "all pods to go")


def test_a_job_that_fails_is_tried_again_and_its_exit_code_is_1(cluster: Cluster) -> None:
    status, _, said = cluster.submit(
        "train-shapes", "name=wrong", "features.manifest=no-such-run", *TRAIN
    )
    assert status == 1, said
    assert "no-such-run" in said
    assert "--- attempt 2" in said
    name = next(job["name"] for job in cluster.crab("jobs")[1]["jobs"] if "wrong" in job["name"])
    one, two = cluster.crab("logs", name)[1]["attempts"]
    assert one["cluster"] != two["cluster"]
    assert one["ended"]["exit_code"] == two["ended"]["exit_code"] != 0
    assert "no-such-run" in one["log"]


def test_a_live_job_is_followed_and_stopped(cluster: Cluster) -> None:
    long = ["optimisation.steps=5000", *TRAIN[1:]]
    sets = [
        part
        for change in ["name=long", f"features.cache={cluster.cache}", *long]
        for part in ("--set", change)
    ]
    status, result, said = cluster.crab(
        "submit", str(SPECS / "train-shapes.yaml"), *sets, "--detach"
    )
    assert status == 0, said
    name = result["name"]
    following = subprocess.Popen(
        [sys.executable, "-c", CLI, "logs", name, "-f"],
        env=cluster.env,
        stdout=subprocess.PIPE,
        cwd=cluster.operator.workspace,
    )
    assert following.stdout is not None
    assert following.stdout.readline()
    wait_for(lambda: cluster.crab("status", name)[1]["phase"] == "running", "the job to run")
    assert cluster.crab("stop", name)[1]["stopped"]
    following.communicate()
    assert following.returncode == 0
    for kind in ("rayclusters", "pods"):
        wait_for(lambda kind=kind: not cluster.server.all(kind), f"{kind} to go")  # type: ignore[misc]  # bound now
    folder = str(cluster.operator.workspace.parent)
    wait_for(lambda: not processes_of(folder), "Ray's processes to end")


def processes_of(folder: str) -> list[str]:
    """Of Ray, with files under a folder."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if folder in line and "ray" in line and "mlflow" not in line:
            found.append(line)
    return found
