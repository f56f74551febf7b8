"""F6 and F8 of reference/reliability.md: a job is stopped at any point of its life, and submitted again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import CustomObjectsApi
from servers.kube_api_server import KubeServer, kube_api_server
from support.kube import NAMESPACE, api_of, job

from crab_platform import cluster
from crab_platform.cluster_errors import ClusterRefused

KINDS = "rayjobs", "rayclusters", "pods", "secrets", "configmaps", "workloads"
LIFE: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ()),
    ({"jobDeploymentStatus": "Suspended"}, ("workloads",)),
    ({"jobDeploymentStatus": "Initializing"}, ("workloads", "rayclusters")),
    ({"jobDeploymentStatus": "Initializing"}, ("workloads", "rayclusters", "pods")),
    ({"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}, ("rayclusters", "pods", "secrets")),
    ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, ("rayclusters", "pods", "configmaps")),
    ({"jobDeploymentStatus": "Retrying"}, ("rayclusters",)),
    ({"jobDeploymentStatus": "Running", "jobStatus": "SUCCEEDED"}, ("rayclusters", "pods")),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, ()),
    ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed"}, ("rayclusters",)),
]  # fmt: skip
"""Ten points: the status, and what there is besides the RayJob."""


@pytest.fixture
def server(shared_dir: Path) -> Iterator[KubeServer]:
    with kube_api_server(KubeServer(schemas=shared_dir / "kuberay")) as found:
        yield found


def at(server: KubeServer, status: dict[str, Any], kinds: tuple[str, ...]) -> str:
    """A job at a point of its life, with all that it owns; its name."""
    body = job()
    name = str(body["metadata"]["name"])
    cluster.submit(api_of(server), body)
    owner = server.get("rayjobs", NAMESPACE, name)["metadata"]["uid"]
    for kind in kinds:
        api, singular = server.kinds[kind]
        metadata = {"name": f"{name}-{kind}", "ownerReferences": [{"uid": owner}]}
        spec = body["spec"]["rayClusterSpec"] if kind == "rayclusters" else {}
        made = {"apiVersion": api, "kind": singular, "metadata": metadata, "spec": spec}
        owner = server.create(kind, NAMESPACE, made)["metadata"]["uid"]  # each owns the next
    server.set_status("rayjobs", NAMESPACE, name, **status)
    return name


def left(server: KubeServer) -> list[str]:
    return [found["kind"] for kind in KINDS for found in server.all(kind)]


@pytest.mark.parametrize(("status", "kinds"), LIFE)
def test_a_job_is_stopped_with_all_that_it_owns(
    server: KubeServer, status: dict[str, Any], kinds: tuple[str, ...]
) -> None:
    name = at(server, status, kinds)
    assert len(left(server)) == 1 + len(kinds)
    assert cluster.stop(api_of(server), name) is True
    assert left(server) == []


def test_who_waits_for_it_hears_of_it(server: KubeServer) -> None:
    name = at(server, {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, ("pods",))
    states = cluster.follow(api_of(server), name)
    assert next(states).phase == "running"
    stopper = threading.Timer(0.2, cluster.stop, (api_of(server), name))
    stopper.start()
    with pytest.raises(ClusterRefused, match="somebody has deleted it"):
        list(states)
    stopper.join()


def test_what_is_left_behind_is_found(server: KubeServer) -> None:
    """Teeth: deleted without its dependents (planted), a job leaves them."""
    name = at(server, *LIFE[3])
    api = api_of(server)
    untyped: Any = CustomObjectsApi(api.client)
    untyped.delete_namespaced_custom_object(
        *("ray.io", "v1", NAMESPACE, "rayjobs", name), propagation_policy="Orphan"
    )
    assert left(server) == ["RayCluster", "Pod", "Workload"]


def test_submitting_again_changes_no_field(server: KubeServer) -> None:
    """F8. Teeth: any change of ours would make another version."""
    body = job()
    name = body["metadata"]["name"]
    cluster.submit(api_of(server), body)
    before = server.get("rayjobs", NAMESPACE, name)
    for _ in range(3):
        assert cluster.submit(api_of(server), job()) is False
    after = server.get("rayjobs", NAMESPACE, name)
    assert after == before
    assert [entry["manager"] for entry in after["metadata"]["managedFields"]] == ["crab"]
    server.set_status("rayjobs", NAMESPACE, name, message="x")
    changed = server.get("rayjobs", NAMESPACE, name)["metadata"]["resourceVersion"]
    assert changed != before["metadata"]["resourceVersion"]
