"""E7 of reference/reliability.md: the Role has what crab asks for, no less and no more."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers.kube_api_server import KubeServer, kube_api_server
from support.kube import NAMESPACE, api_of, job
from support.kustomize import OVERLAYS, of_kind

from crab_platform.cost import read_profile
from jobs import cluster_jobs
from jobs.doctor_cluster import USED


def rights(overlay: str, name: str = "crab-submitter") -> set[tuple[str, str]]:
    (role,) = [found for found in of_kind(overlay, "Role") if found["metadata"]["name"] == name]
    return {
        (verb, resource)
        for rule in role["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nobody_has_rights_by_a_star_or_reads_secrets(overlay: str) -> None:
    assert of_kind(overlay, "ClusterRole") == []
    assert of_kind(overlay, "ClusterRoleBinding") == []
    for role in of_kind(overlay, "Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert not {"secrets", "configmaps", "pods/exec"} & set(rule["resources"])
    bound = {
        (binding["roleRef"]["name"], subject["name"])
        for binding in of_kind(overlay, "RoleBinding")
        for subject in binding["subjects"]
    }
    assert bound <= {("crab-submitter", "crab-submitter"), ("crab-submitter", "crab-users")}


@pytest.fixture
def server() -> Iterator[KubeServer]:
    with kube_api_server(KubeServer()) as found:
        yield found


def asked(server: KubeServer, bucket: Path) -> set[tuple[str, str]]:
    """(verb, resource) of all that the commands ask for, a job that waits in a queue among them."""
    _, _, prices = read_profile("eks-example")
    target = cluster_jobs.Target(api=api_of(server), prices=prices, bucket_url=str(bucket))
    body = job()
    name = body["metadata"]["name"]
    ended = threading.Timer(
        1,
        lambda: server.set_status(
            "rayjobs", NAMESPACE, name, jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"
        ),
    )
    ended.start()
    cluster_jobs.submit(target, body, detach=False)
    ended.join()
    cluster_jobs.submit(target, body, detach=True)
    cluster_jobs.show_jobs(target)
    server.set_status("rayjobs", NAMESPACE, name, jobDeploymentStatus="Suspended", jobStatus="")
    cluster_jobs.show_status(target, name)
    starting = {"jobDeploymentStatus": "Initializing", "rayClusterName": "a-cluster"}
    server.set_status("rayjobs", NAMESPACE, name, **starting)
    cluster_jobs.show_status(target, name)
    cluster_jobs.stop(target, name)
    return {(request.verb, request.resource) for request in server.requests}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_role_is_what_is_asked_for(overlay: str, server: KubeServer, tmp_path: Path) -> None:
    used = asked(server, tmp_path)
    assert used <= rights(overlay), "crab would be refused"
    assert rights(overlay) <= used, "rights that nobody needs"
    assert {(verb, resource) for _, resource, verbs in USED for verb in verbs} == used, (
        "crab doctor asks for others"
    )
