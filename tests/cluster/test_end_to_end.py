"""From specs to results on a cluster: an API server and an operator on loopback, Ray, S3 and MLflow real processes.

Module-scoped: one workspace in which preprocess, train, tune and evaluate follow each other, as a person submits them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from servers.kube_api_server import KubeServer, kube_api_server
from servers.kuberay_operator import Operator, operator
from servers.mlflow_server import mlflow_server
from servers.seaweedfs import S3Server
from support.crab_runs import CLI, wait_for
from support.kube import NAMESPACE

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPECS = Path(__file__).parents[2] / "jobs" / "specs"
IMAGE = "registry.example.com/crab@sha256:" + "0" * 64


@dataclass(frozen=True)
class Cluster:
    server: KubeServer
    operator: Operator
    env: dict[str, str]
    mlflow: str
    cache: str

    def crab(self, *arguments: str) -> tuple[int, Any, str]:
        """(exit code, JSON of standard output, standard error)."""
        done = subprocess.run(
            [sys.executable, "-c", CLI, *arguments, "--json"],
            env=self.env,
            cwd=self.operator.workspace.parent,
            capture_output=True,
            text=True,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr

    def submit(self, spec: str, *changes: str) -> tuple[int, Any, str]:
        sets = [part for change in changes for part in ("--set", change)]
        return self.crab("submit", str(SPECS / f"{spec}.yaml"), *sets)

    def result_of(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            (self.operator.workspace / "runs" / run / "result.json").read_text()
        )
        return found


@pytest.fixture(scope="module")
def cluster(shared_dir: Path, s3: S3Server) -> Iterator[Cluster]:
    # Short: Ray's sockets lie in it, and their paths have 107 characters at the most.
    folder = Path(tempfile.mkdtemp(prefix="kr"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mlflow = stack.enter_context(mlflow_server(folder / "mlflow")).url
        server = stack.enter_context(kube_api_server(KubeServer(schemas=shared_dir / "kuberay")))
        secret(server, "crab-ray-token", auth_token="a-token-for-ray")
        credentials = {n: v for n, v in s3.env().items() if n.startswith("AWS_")}
        plain = {n: credentials.pop(n) for n in list(credentials) if "KEY" not in n}
        secret(server, "crab-s3", **credentials)
        profile = {
            "namespace": NAMESPACE,
            "image": IMAGE,
            "ray_version": "2.60.0",
            "node_groups": {
                "head": {"cpus": 1, "memory_gib": 4},
                "cpu": {"cpus": 1, "memory_gib": 4, "max_pods": 2},
            },
            "bucket": s3.url("cluster"),
            "mlflow": {"uri": mlflow},
            "environment": plain | {"RAY_worker_niceness": "0"},
            "secrets": {name: {"secret": "crab-s3", "key": name} for name in credentials},
            "prices": yaml.safe_load(Path("k8s/profiles/eks-example.yaml").read_text())["prices"],
            "limits": {"retries": 1, "start_minutes": 5, "hours": 1},
        }
        (folder / "here.yaml").write_text(yaml.safe_dump(profile))
        (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig(server)))
        env = {
            **os.environ,
            **s3.env(),
            "KUBECONFIG": str(folder / "kubeconfig"),
            "CRAB_PROFILE": str(folder / "here.yaml"),
        }
        works = stack.enter_context(operator(server, folder))
        found = Cluster(server, works, env, mlflow, s3.url("features"))
        status, _, said = found.crab("synth", "work/shapes", "--clips", "10", "--seed", "1")
        assert status == 0, said
        yield found


def secret(server: KubeServer, name: str, **values: str) -> None:
    metadata = {"name": name, "namespace": NAMESPACE}
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}
    server.create("secrets", NAMESPACE, body)


def kubeconfig(server: KubeServer) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server.endpoint}}],
        "users": [{"name": "u", "user": {"token": "token"}}],
    }


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
    names = {run.info.run_name for run in client.search_runs(experiments)}
    assert {"preprocess-shapes", "train-shapes", "evaluate-shapes"} <= names

    listed = cluster.crab("jobs")[1]["jobs"]
    assert {(job["phase"], job["exit_code"]) for job in listed} == {("succeeded", 0)}
    assert len(listed) == 4
    assert cluster.server.all("pods") == []


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
