"""`crab submit`, `jobs`, `status` and `stop` as a person types them, against an API server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers.kube_api_server import KubeServer, kube_api_server
from servers.seaweedfs import S3Server
from support.crab_runs import CLI, wait_for
from support.kube import NAMESPACE, write_kubeconfig

from crab_platform.attempts import claim
from crab_platform.storage import open_store

SPEC = "jobs/specs/train-shapes.yaml"


@pytest.fixture
def server(shared_dir: Path) -> Iterator[KubeServer]:
    with kube_api_server(KubeServer(schemas=shared_dir / "kuberay")) as found:
        yield found


@pytest.fixture
def env(server: KubeServer, tmp_path: Path) -> dict[str, str]:
    """With a KUBECONFIG for the server."""
    file = write_kubeconfig(server, tmp_path / "kubeconfig")
    return {**os.environ, "KUBECONFIG": str(file), "CRAB_PROFILE": "eks-example"}


def crab(env: dict[str, str], *arguments: str) -> tuple[int, Any, str]:
    """(exit code, JSON of standard output, standard error)."""
    done = subprocess.run(
        [sys.executable, "-c", CLI, *arguments, "--json"], env=env, capture_output=True, text=True
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def only(server: KubeServer) -> str:
    """The name of the one job, when there is one."""
    wait_for(lambda: server.all("rayjobs"), "the job to be there")
    (found,) = server.all("rayjobs")
    return str(found["metadata"]["name"])


@pytest.mark.parametrize(("end", "code"), [("SUCCEEDED", 0), ("FAILED", 1)])
def test_submit_waits_and_its_exit_code_is_the_jobs(
    server: KubeServer, env: dict[str, str], end: str, code: int
) -> None:
    def operate() -> None:
        name = only(server)
        for status in (
            {"jobDeploymentStatus": "Initializing"},
            {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
            {"jobDeploymentStatus": "Complete", "jobStatus": end, "message": "of its own"},
        ):
            server.set_status("rayjobs", NAMESPACE, name, **status)

    operator = threading.Thread(target=operate)
    operator.start()
    status, result, said = crab(env, "submit", SPEC)
    operator.join()
    assert status == code, said
    assert f"{only(server)}: submitted" in said
    if code == 0:
        assert result["phase"] == "succeeded"
    else:
        assert "failed: of its own" in said


def test_a_job_is_submitted_once_listed_and_stopped(
    server: KubeServer, env: dict[str, str]
) -> None:
    _, first, _ = crab(env, "submit", SPEC, "--detach")
    _, second, said = crab(env, "submit", SPEC, "--detach")
    assert (first["submitted"], second["submitted"]) == (True, False)
    assert "is there already" in said
    name = only(server)
    assert crab(env, "jobs")[1]["jobs"][0]["name"] == name
    status, found, said = crab(env, "status", name)
    assert (status, found["phase"], found["exit_code"]) == (0, "waiting", None)
    assert "KubeRay has not looked at it yet" in said
    assert crab(env, "stop", name)[1]["stopped"]
    assert server.all("rayjobs") == []
    assert crab(env, "status", name)[0] == 1


def test_logs_come_from_the_bucket_while_a_job_runs_and_after_its_cluster_is_gone(
    server: KubeServer, env: dict[str, str], s3: S3Server, tmp_path: Path
) -> None:
    profile = yaml.safe_load(Path("k8s/profiles/eks-example.yaml").read_text())
    profile["bucket"] = s3.url(f"logs-{tmp_path.name}")
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(profile))
    env |= {"CRAB_PROFILE": str(tmp_path / "here.yaml"), **s3.env()}
    crab(env, "submit", SPEC, "--detach")
    name = only(server)
    assert "has not begun: submitted" in logs(env, name)[1]

    mine = claim(open_store(profile["bucket"]), name, {"cluster": "c1", "at": "now"})
    mine.write_piece(1, b"one\n")
    following = subprocess.Popen(
        [sys.executable, "-c", CLI, "logs", name, "-f"], env=env, stdout=subprocess.PIPE
    )
    assert following.stdout is not None
    assert following.stdout.readline() == b"one\n"
    mine.write_piece(2, b"two\n")
    assert following.stdout.readline() == b"two\n"
    server.delete(("rayjobs", NAMESPACE, name))
    mine.write_piece(3, b"three\n")
    assert following.communicate()[0] == b"three\n"
    assert following.returncode == 0

    mine.end({"exit_code": 0})
    assert logs(env, name)[0] == "one\ntwo\nthree\n"
    (record,) = crab(env, "logs", name)[1]["attempts"]
    assert (record["log"], record["ended"]) == ("one\ntwo\nthree\n", {"exit_code": 0})
    status, _, said = crab(env, "logs", "another")
    assert (status, "crab jobs" in said) == (1, True), said


def logs(env: dict[str, str], name: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", CLI, "logs", name], env=env, capture_output=True, text=True
    )
    return done.stdout, done.stderr


def test_what_is_wrong_has_an_exit_code_and_a_way_out(
    server: KubeServer, env: dict[str, str], tmp_path: Path
) -> None:
    status, _, said = crab(env, "submit", SPEC, "--profile", "laptop")
    assert (status, "describes no cluster" in said) == (2, True), said
    status, _, said = crab({**env, "KUBECONFIG": str(tmp_path / "none")}, "jobs")
    assert (status, "kubectl config get-contexts" in said) == (3, True), said
    server.tokens = {"another"}
    status, _, said = crab(env, "jobs")
    assert (status, "log in again" in said) == (1, True), said
    assert "Traceback" not in said
