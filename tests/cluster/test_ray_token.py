"""E1 of reference/reliability.md: a Ray cluster as our RayJob asks for it answers nobody without its token."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from servers.kube_api_server import KubeServer
from servers.kuberay_operator import RayPods, bare_environment
from support.kube import NAMESPACE, job

pytestmark = [pytest.mark.ray, pytest.mark.faults]

TOKEN = "the-token-of-this-cluster"
ENDPOINTS = [
    "/api/version",
    "/api/jobs/",
    "/nodes?view=summary",
    "/api/cluster_status",
    "/api/v0/nodes",
    "/api/v0/actors",
    "/api/v0/tasks",
]


@contextmanager
def started(folder: Path, *, with_token: bool = True) -> Iterator[RayPods]:
    """The Ray pods of a job of ours, its head alone."""
    server = KubeServer()
    body = job()
    cluster = body["spec"]["rayClusterSpec"]
    cluster["workerGroupSpecs"] = []
    if not with_token:
        cluster["authOptions"]["mode"] = "disabled"
    secrets = {
        "crab-ray-token": {"auth_token": TOKEN},
        "crab-mlflow": {"user": "u", "password": "p"},
    }
    for name, values in secrets.items():
        metadata = {"name": name, "namespace": NAMESPACE}
        made = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values}
        server.create("secrets", NAMESPACE, made)
    with RayPods(
        server, server.create("rayjobs", NAMESPACE, body), folder, bare_environment()
    ) as pods:
        pods.start()
        yield pods


@pytest.fixture
def folder() -> Iterator[Path]:
    # Short: Ray's sockets lie in it, and their paths have 107 characters at the most.
    path = Path(tempfile.mkdtemp(prefix="kr"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def ask(pods: RayPods, path: str, token: str | None, body: dict[str, Any] | None = None) -> int:
    """The status."""
    headers = {"Content-Type": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(pods.dashboard + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_nobody_gets_in_without_the_token(folder: Path) -> None:
    canary = folder / "canary"
    with started(folder) as pods:
        attack = {"entrypoint": f"touch {canary}"}
        for token in (None, "a-wrong-token", ""):
            answers = {path: ask(pods, path, token) for path in ENDPOINTS}
            assert set(answers.values()) <= {401, 403}, answers
            assert ask(pods, "/api/jobs/", token, attack) in (401, 403)
        assert {ask(pods, path, TOKEN) for path in ENDPOINTS} == {200}
        time.sleep(2)  # a job would run by now
        assert not canary.exists()
        told = [path for path in files_of(folder) if TOKEN.encode() in path.read_bytes()]
        assert told == []


def test_an_open_cluster_is_found(folder: Path) -> None:
    """Teeth: with authentication off (planted) all endpoints answer, and the job of a stranger runs."""
    canary = folder / "canary"
    with started(folder, with_token=False) as pods:
        assert {ask(pods, path, None) for path in ENDPOINTS} == {200}
        assert ask(pods, "/api/jobs/", None, {"entrypoint": f"touch {canary}"}) == 200
        deadline = time.monotonic() + 120
        while not canary.exists():
            assert time.monotonic() < deadline, "the stranger's job did not run"
            time.sleep(0.2)


def files_of(folder: Path) -> list[Path]:
    """Sessions and logs."""
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
