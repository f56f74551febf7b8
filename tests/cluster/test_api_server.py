"""What an API server with KubeRay's schemas makes of our requests: ours of tests, or a real one.

    KUBECONFIG=... pytest -m cluster tests/cluster/test_api_server.py

runs the same tests against the cluster that KUBECONFIG points to, in namespaces that they make and remove; it needs
KubeRay's CRDs and no operator. Without `-m cluster` KUBECONFIG is never looked at.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client
from servers.kube_api_server import KubeServer, kube_api_server
from support.kube import NAMESPACE, write_kubeconfig

from crab_platform import cluster
from crab_platform.cluster_errors import ClusterRefused
from crab_platform.kube_api import KubeApi, Patience, connect_to
from jobs.doctor_cluster import check_cluster
from jobs.submit import manifest_of

pytestmark = pytest.mark.cluster

SPECS = sorted(path.stem for path in Path("jobs/specs").glob("*.yaml"))
PROFILES = sorted(
    path.stem for path in Path("k8s/profiles").glob("*.yaml") if "namespace" in path.read_text()
)
PATIENCE = Patience(connect_s=5, read_s=10, pause_s=0.05, longest_pause_s=1, watch_s=5)


@dataclass(frozen=True)
class Place:
    """Where jobs go, and profiles that say so."""

    api: KubeApi
    folder: Path

    def profile(self, name: str = "eks-example", **changes: Any) -> str:
        values = yaml.safe_load(Path(f"k8s/profiles/{name}.yaml").read_text())
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values | {"namespace": self.api.namespace} | changes))
        return str(file)

    def job(self, *changes: str) -> dict[str, Any]:
        return manifest_of("jobs/specs/train-shapes.yaml", changes, self.profile())

    def set_status(self, name: str, **status: str) -> None:
        """As the operator does, by the subresource."""
        self.api.ask(
            "set a status",
            lambda to, **limits: client.CustomObjectsApi(to).patch_namespaced_custom_object_status(
                *("ray.io", "v1", self.api.namespace, "rayjobs", name, {"status": status}),
                _content_type="application/merge-patch+json",
                **limits,
            ),
        )


@pytest.fixture
def place(
    request: pytest.FixtureRequest,
    shared_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Place]:
    if "cluster" in request.config.getoption("markexpr") and os.environ.get("KUBECONFIG"):
        connect = connect_to(None)
        namespace = f"crab-test-{secrets.token_hex(4)}"
        core = client.CoreV1Api(connect())
        core.create_namespace({"metadata": {"name": namespace}})
        try:
            yield Place(KubeApi(connect=connect, namespace=namespace, patience=PATIENCE), tmp_path)
        finally:
            core.delete_namespace(namespace)
        return
    with kube_api_server(KubeServer(schemas=shared_dir / "kuberay")) as server:
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(server, tmp_path / "kubeconfig")))
        api = KubeApi(connect=connect_to(None), namespace=NAMESPACE, patience=PATIENCE)
        yield Place(api, tmp_path)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_spec_is_taken_in_strict_mode(place: Place, profile: str) -> None:
    for spec in SPECS:
        cluster.check(place.api, manifest_of(f"jobs/specs/{spec}.yaml", [], place.profile(profile)))
    assert cluster.jobs(place.api) == [], "they were dry runs"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec", ("entrypiont", "a")),
        ("spec.rayClusterSpec.headGroupSpec.template.spec", ("restartPolicie", "Never")),
        ("spec.rayClusterSpec.authOptions", ("mode", "tocken")),
        ("spec", ("backoffLimit", "two")),
    ],
)
def test_what_no_schema_knows_is_refused(place: Place, path: str, value: tuple[str, str]) -> None:
    """Teeth of strict mode: none of these may be dropped without a word."""
    body = place.job()
    at = body
    for name in path.split("."):
        at = at[name]
    at[value[0]] = value[1]
    with pytest.raises(ClusterRefused) as refused:
        cluster.submit(place.api, body)
    assert value[0] in str(refused.value)
    assert cluster.jobs(place.api) == []


def test_the_same_submission_twice_is_one_job(place: Place) -> None:
    body = place.job()
    assert cluster.submit(place.api, body)
    assert not cluster.submit(place.api, body)
    (found,) = cluster.jobs(place.api)
    assert found["metadata"]["name"] == body["metadata"]["name"]
    another = place.job("optimisation.steps=7")
    assert cluster.submit(place.api, another)
    assert len(cluster.jobs(place.api)) == 2
    posing = place.job("optimisation.steps=8")
    posing["metadata"]["name"] = body["metadata"]["name"]
    with pytest.raises(cluster.AnotherJob):
        cluster.submit(place.api, posing)


def test_eight_submitters_at_once_make_one_job(place: Place) -> None:
    body = place.job()
    made: list[bool] = []
    threads = [
        threading.Thread(target=lambda: made.append(cluster.submit(place.api, body)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 7 + [True]
    assert len(cluster.jobs(place.api)) == 1


def test_a_job_is_followed_to_its_end(place: Place) -> None:
    body = place.job()
    name = body["metadata"]["name"]
    cluster.submit(place.api, body)
    phases = []
    for state in cluster.follow(place.api, name):
        if not phases:
            place.set_status(name, jobDeploymentStatus="Running", jobStatus="RUNNING")
        elif state.phase == "running" and "succeeded" not in phases:
            place.set_status(name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
        phases.append(state.phase)
    assert phases[0] == "waiting"
    assert "running" in phases
    assert phases[-1] == "succeeded"


def test_a_job_that_is_stopped_is_gone_for_who_follows_it(place: Place) -> None:
    body = place.job()
    name = body["metadata"]["name"]
    cluster.submit(place.api, body)
    states = cluster.follow(place.api, name)
    next(states)
    assert cluster.stop(place.api, name)
    with pytest.raises(ClusterRefused, match="gone"):
        list(states)
    assert not cluster.stop(place.api, name)
    assert cluster.jobs(place.api) == []


def test_the_doctor_finds_what_is_there(place: Place) -> None:
    bucket = {"bucket": "s3://no-such-bucket/crab", "mlflow": {"uri": "http://127.0.0.1:1"}}
    found = {one.name: one for one in check_cluster(place.profile(queue=None, **bucket), None)}
    well = {name for name, one in found.items() if one.ok}
    assert {"Kubernetes", "KubeRay", "rights", "a job", "Ray"} <= well, found
    assert not found["MLflow"].ok
