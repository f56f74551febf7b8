"""`crab doctor --profile`: whether a profile's cluster can take a job, one line a part, each with the way out."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from kubernetes.client import ApiClient, AuthorizationV1Api, CustomObjectsApi, VersionApi

from crab_platform import cluster
from crab_platform.cluster_errors import ClusterRefused
from crab_platform.cluster_profile import ClusterProfile, load_cluster
from crab_platform.kube_api import KubeApi, connect_to
from crab_platform.rayjob import GroupNeed, JobRequest, Kind, ray_job
from jobs.doctor import Check, check, usable_store

USED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("ray.io", "rayjobs", ("create", "delete", "get", "list", "watch")),
    ("", "pods", ("list",)),
    ("", "events", ("list",)),
    ("kueue.x-k8s.io", "workloads", ("list",)),
)
"""(API group, resource, verbs) of all that crab asks for; k8s/base has the Role."""


def check_cluster(profile: str, context: str | None) -> list[Check]:
    """Runs every check; one that fails does not stop the others. Raises ProfileError."""
    _, found, _ = load_cluster(profile)
    api = KubeApi(connect=connect_to(context), namespace=found.namespace)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Kubernetes", lambda: _server(api)),
        ("KubeRay", lambda: _kuberay(api)),
        ("rights", lambda: _rights(api, found)),
        ("a job", lambda: _job(api, found)),
        ("Ray", lambda: _ray(found)),
        ("image", lambda: f"{found.image}; whether nodes can pull it, the first job shows"),
        ("bucket", lambda: usable_store(found.bucket)),
        ("MLflow", lambda: _mlflow(found.mlflow.uri)),
    ]
    if found.queue is not None:
        checks.insert(3, ("queue", lambda: _queue(api, found)))
    return [check(name, run) for name, run in checks]


def _server(api: KubeApi) -> str:
    said: Any = api.ask(
        "get the version", lambda client, **limits: VersionApi(client).get_code(**limits)
    )
    return f"{said.git_version}, namespace {api.namespace}"


def _kuberay(api: KubeApi) -> str:
    try:
        found = _resources(api, "ray.io", "v1")
    except ClusterRefused as refused:
        if refused.status != 404:
            raise
        found = set()
    if "rayjobs" not in found:
        raise RuntimeError(
            "there is no ray.io/v1 RayJob; install the operator, docs/cluster-setup.md says how"
        )
    return "ray.io/v1 has RayJobs"


def _rights(api: KubeApi, profile: ClusterProfile) -> str:
    """Asks the server itself, by SelfSubjectAccessReview, which everybody may."""
    missing = []
    for group, resource, verbs in USED:
        if group.startswith("kueue") and profile.queue is None:
            continue
        missing += [f"{verb} {resource}" for verb in verbs if not _may(api, verb, group, resource)]
    if missing:
        raise RuntimeError(
            f"not allowed in namespace {api.namespace}: {', '.join(missing)}; ask for crab-submitter"
        )
    return "all that crab asks for is allowed"


def _may(api: KubeApi, verb: str, group: str, resource: str) -> bool:
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {
            "resourceAttributes": {
                "namespace": api.namespace,
                "verb": verb,
                "group": group,
                "resource": resource,
            }
        },
    }

    def send(client: ApiClient, **limits: Any) -> Any:
        untyped: Any = AuthorizationV1Api(client)
        answer = untyped.create_self_subject_access_review(body, _preload_content=False, **limits)
        return json.loads(answer.data)

    return bool(api.ask(f"ask whether we may {verb} {resource}", send)["status"]["allowed"])


def _queue(api: KubeApi, profile: ClusterProfile) -> str:
    assert profile.queue is not None
    name = profile.queue.name
    if "localqueues" not in _kueue_resources(api):
        raise RuntimeError("there is no Kueue; install it, or leave queue out of the profile")
    return f"Kueue is there; that its queue {name} is, a job's status shows: crab status says why it waits"


def _kueue_resources(api: KubeApi) -> set[str]:
    for version_ in ("v1beta2", "v1beta1"):
        try:
            return _resources(api, "kueue.x-k8s.io", version_)
        except ClusterRefused as refused:
            if refused.status != 404:
                raise
    return set()


def _resources(api: KubeApi, group: str, version_: str) -> set[str]:
    def send(client: ApiClient, **limits: Any) -> Any:
        untyped: Any = CustomObjectsApi(client)
        return json.loads(
            untyped.get_api_resources(group, version_, _preload_content=False, **limits).data
        )

    found = api.ask(f"look at {group}/{version_}", send)
    return {resource["name"] for resource in found["resources"]}


def _job(api: KubeApi, profile: ClusterProfile) -> str:
    """A job that is checked by the server as if it were made, with all of its admission."""
    group: Kind = "cpu" if profile.node_groups.cpu else "gpu"
    request = JobRequest(
        name="doctor",
        kind="doctor",
        spec="{}",
        needs=[GroupNeed(group=group, pods=1)],
        version=version("crab-platform"),
    )
    cluster.check(api, ray_job(request, profile))
    return "the server would take a job as this profile makes it (dry run, strict)"


def _ray(profile: ClusterProfile) -> str:
    here = version("ray")
    if profile.ray_version.split(".")[:2] != here.split(".")[:2]:
        raise RuntimeError(
            f"the profile says {profile.ray_version}, here is {here}; build the image from this lock file, or say its "
            "version in ray_version"
        )
    return f"{profile.ray_version} in the profile, {here} here"


def _mlflow(uri: str) -> str:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10) as answer:
            return f"{uri} answers {answer.status}"
    except (urllib.error.URLError, OSError) as error:
        raise RuntimeError(
            f"{uri} is not reached from here ({error}); pods may reach it all the same, see crab logs of a job"
        ) from error
