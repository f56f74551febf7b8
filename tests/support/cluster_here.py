"""A whole cluster on this machine: API server, operator, S3 and MLflow on loopback, Ray as real processes.

`crab` is run as a person runs it, in a folder whose work/ is what the pods of jobs have as their workspace.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from servers.kube_api_server import KubeServer, kube_api_server
from servers.kuberay_operator import Operator, operator
from servers.mlflow_server import mlflow_server
from servers.seaweedfs import S3Server
from support.crab_runs import CLI
from support.kube import NAMESPACE, write_kubeconfig

SPECS = Path(__file__).parents[2] / "jobs" / "specs"
PROFILE = Path(__file__).parents[2] / "k8s" / "profiles" / "eks-example.yaml"
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


@contextmanager
def cluster_here(schemas: Path | None, s3: S3Server) -> Iterator[Cluster]:
    """With `schemas`, KubeRay's CRDs, what is sent is validated."""
    # Short: Ray's sockets lie in it, and their paths have 107 characters at the most.
    folder = Path(tempfile.mkdtemp(prefix="kr"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mlflow = stack.enter_context(mlflow_server(folder / "mlflow")).url
        server = stack.enter_context(kube_api_server(KubeServer(schemas=schemas)))
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
            "prices": yaml.safe_load(PROFILE.read_text())["prices"],
            "limits": {"retries": 1, "start_minutes": 5, "hours": 1},
        }
        (folder / "here.yaml").write_text(yaml.safe_dump(profile))
        write_kubeconfig(server, folder / "kubeconfig")
        env = {
            **os.environ,
            **s3.env(),
            "KUBECONFIG": str(folder / "kubeconfig"),
            "CRAB_PROFILE": str(folder / "here.yaml"),
        }
        works = stack.enter_context(operator(server, folder))
        found = Cluster(server, works, env, mlflow, s3.url("features"))
        yield found


def secret(server: KubeServer, name: str, **values: str) -> None:
    metadata = {"name": name, "namespace": NAMESPACE}
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}
    server.create("secrets", NAMESPACE, body)
