"""E3 of reference/reliability.md: twenty canaries on all ways by which a secret could come in; none may come out.

Looked at are what is printed (also when something breaks), what is sent, and what the server then has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers.kube_api_server import KubeServer, kube_api_server
from support.crab_runs import CLI
from support.kube import write_kubeconfig

CANARY = "c4n4ry-0f-s3cr3t"
SPEC = "jobs/specs/train-shapes.yaml"
IN_PROFILE: list[dict[str, Any]] = [
    {"environment": {"DB_PASSWORD": CANARY}},
    {"environment": {"AWS_SECRET_ACCESS_KEY": CANARY}},
    {"environment": {"HF_TOKEN": CANARY}},
    {"environment": {"ENDPOINT": f"https://me:{CANARY}@host"}},
    {"environment": {"LINK": f"https://host/x?X-Amz-Signature={CANARY}"}},
    {"mlflow": {"uri": f"https://me:{CANARY}@mlflow"}},
    {"bucket": f"s3://me:{CANARY}@bucket/x"},
    {"image": f"https://me:{CANARY}@registry/crab:1"},
    {"secrets": {"HF": CANARY}},
]
IN_SPEC = [
    f"features.cache=https://me:{CANARY}@host/cache",
    f"features.cache=https://host/cache?X-Amz-Signature={CANARY}",
    f"tracking.uri=https://me:{CANARY}@mlflow",
    f"data[0].samples=https://me:{CANARY}@host/samples.jsonl",
]
IN_ENVIRONMENT = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "HF_TOKEN",
    "RAY_AUTH_TOKEN",
]
IN_KUBECONFIG = ["token", "broken"]


@pytest.fixture
def server(shared_dir: Path) -> Iterator[KubeServer]:
    with kube_api_server(KubeServer(schemas=shared_dir / "kuberay")) as found:
        found.tokens.add(CANARY)
        yield found


def run(server: KubeServer, tmp_path: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """(exit code, all that is printed) of a command of crab."""
    kubeconfig = tmp_path / "kubeconfig"
    if not kubeconfig.exists():
        write_kubeconfig(server, kubeconfig)
    done = subprocess.run(
        [sys.executable, "-c", CLI, *arguments],
        env={**os.environ, "KUBECONFIG": str(kubeconfig), "CRAB_PROFILE": "eks-example", **env},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def held(server: KubeServer) -> str:
    """All that the server has and was asked for."""
    objects = [found for kind in server.kinds for found in server.all(kind)]
    return json.dumps(objects) + repr(server.requests)


def test_there_are_twenty() -> None:
    assert len(IN_PROFILE) + len(IN_SPEC) + len(IN_ENVIRONMENT) + len(IN_KUBECONFIG) == 20


def test_secrets_around_a_job_do_not_travel_with_it(server: KubeServer, tmp_path: Path) -> None:
    file = write_kubeconfig(server, tmp_path / "kubeconfig")
    file.write_text(file.read_text().replace("token: token", f"token: {CANARY}"))
    env = dict.fromkeys(IN_ENVIRONMENT, CANARY)
    for arguments in (("submit", SPEC, "--dry-run"), ("submit", SPEC, "--detach"), ("jobs",)):
        status, said = run(server, tmp_path, *arguments, **env)
        assert status == 0, said
        assert CANARY not in said
    assert len(server.all("rayjobs")) == 1
    assert CANARY not in held(server)
    server.tokens = {"another"}
    status, said = run(server, tmp_path, "jobs", **env)
    assert (status, CANARY in said) == (1, False), said


@pytest.mark.parametrize(
    "text", [f"users: [{{user: {{token: {CANARY}", f"a: b: token: {CANARY}", CANARY]
)
def test_a_broken_kubeconfig_is_not_printed(server: KubeServer, tmp_path: Path, text: str) -> None:
    (tmp_path / "kubeconfig").write_text(text)
    status, said = run(server, tmp_path, "jobs")
    assert status == 3, said
    assert "kubectl config" in said
    assert "Traceback" not in said
    assert CANARY not in said


@pytest.mark.parametrize("changes", IN_PROFILE)
def test_a_secret_in_a_profile_is_refused_and_not_repeated(
    server: KubeServer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = yaml.safe_load(Path("k8s/profiles/eks-example.yaml").read_text()) | changes
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(values))
    status, said = run(
        server, tmp_path, "submit", SPEC, "--detach", "--profile", str(tmp_path / "mine.yaml")
    )
    assert status == 2, said
    assert CANARY not in said
    assert server.requests == []


@pytest.mark.parametrize("change", IN_SPEC)
def test_a_secret_in_a_spec_is_refused_and_not_repeated(
    server: KubeServer, tmp_path: Path, change: str
) -> None:
    status, said = run(server, tmp_path, "submit", SPEC, "--detach", "--set", change)
    assert status == 2, said
    assert CANARY not in said
    assert server.requests == []


def test_a_secret_that_is_let_through_is_found(server: KubeServer, tmp_path: Path) -> None:
    """Teeth: what is in a spec and does not look like a secret is in the object, where anybody can read it."""
    status, said = run(server, tmp_path, "submit", SPEC, "--detach", "--set", f"name={CANARY}")
    assert status == 0, said
    assert CANARY in held(server)
