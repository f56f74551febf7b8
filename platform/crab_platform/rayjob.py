"""A job and a profile become a RayJob (`ray.io/v1`): a pure function, the same bytes for the same input.

The name holds a digest of all that is in the object, so the same submission twice is one job. The spec travels in the
object itself, as a variable that `crab attempt env:CRAB_SPEC` reads: what is submitted can be read, kept and applied
with kubectl. Pods meet the Pod Security standard *restricted*.

KubeRay submits by HTTP (`submissionMode: HTTPMode`): there is no submitter pod whose log, or exit code, could be taken
for the job's (KubeRay #4921, #3675), and none that needs a node, an image and a quota of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crab_platform.cluster_profile import ClusterProfile, NodeGroup, SecretKey
from crab_platform.cost import ProfileError
from crab_platform.own_cost import CURRENCY_VARIABLE, HOUR_VARIABLE

MAX_NAME = 47
"""Characters of a RayJob's name: KubeRay appends to it, and Kubernetes has 63 for all."""
SPEC_VARIABLE = "CRAB_SPEC"
BUCKET_VARIABLE, JOB_VARIABLE, CLUSTER_VARIABLE = "CRAB_BUCKET", "CRAB_JOB", "CRAB_CLUSTER"
"""Where an attempt leaves its log, and as whose (attempts.py)."""
CODE_VARIABLE, VERSION_VARIABLE = "CRAB_CODE", "CRAB_CLIENT_VERSION"
"""Code to take instead of the image's, and the version of who submitted."""
JOB_LABEL = "crab/job"
DIGEST_ANNOTATION = "crab/digest"
FOLDER = "/home/crab/job"
"""Where jobs run in the image; the workspace is its work/."""
_USER = 10001
_DIGITS = 8
_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
Kind = Literal["cpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class GroupNeed:
    """Ray pods of one kind of node."""

    group: Kind
    pods: int
    """As many at the most."""
    scales: bool = False
    """Whether they may come and go with the work; otherwise all are there from the start."""


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What is submitted."""

    name: str
    kind: str
    """preprocess, train and so on."""
    spec: str
    """The spec as JSON."""
    needs: Sequence[GroupNeed]
    version: str
    """Of the client."""
    code: str | None = None
    """Path in the bucket of a zip with code that is newer than the image's (jobs/code_zip.py)."""
    commit: str | None = None
    """Of that code."""
    hourly: tuple[float, str] | None = None
    """What all of its pods cost an hour, and the currency: what the job itself tells of its cost (own_cost.py)."""


def ray_job(request: JobRequest, profile: ClusterProfile) -> dict[str, Any]:
    """The object, as JSON values.

    Raises ProfileError where the profile has no room for what is needed.
    """
    scales = any(need.scales for need in request.needs) and (
        profile.queue is None or profile.queue.elastic
    )
    labels = {
        "app.kubernetes.io/name": "crab",
        "app.kubernetes.io/component": request.kind,
        "app.kubernetes.io/managed-by": "crab",
    }
    body: dict[str, Any] = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "namespace": profile.namespace,
            "labels": dict(labels),
            "annotations": {"crab/name": request.name, "crab/version": request.version},
        },
        "spec": {
            "entrypoint": f"crab attempt env:{SPEC_VARIABLE}",
            "submissionMode": "HTTPMode",
            "backoffLimit": profile.limits.retries,
            "activeDeadlineSeconds": profile.limits.hours * 3600,
            "preRunningDeadlineSeconds": profile.limits.start_minutes * 60,
            **_clean_up(profile, scales),
            "rayClusterSpec": {
                "rayVersion": profile.ray_version,
                # Written out: the operator compares it, and its documented default is not applied.
                "authOptions": {"mode": "token", "secretName": profile.auth_secret},
                **(_autoscaling() if scales else {}),
                "headGroupSpec": {
                    # Work is not put on the head: the job's own process is there, and Ray's.
                    "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                    "template": _pod(
                        request,
                        profile,
                        profile.node_groups.head,
                        head=True,
                        labels=labels,
                        scales=scales,
                    ),
                },
                "workerGroupSpecs": [
                    _workers(request, profile, need, labels, scales) for need in request.needs
                ],
            },
        },
    }
    if request.commit is not None:
        body["metadata"]["annotations"]["crab/commit"] = request.commit
    if profile.queue is not None:
        body["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = profile.queue.name
        if profile.queue.priority_class is not None:
            body["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] = (
                profile.queue.priority_class
            )
        if scales:
            body["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] = "true"
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    name = job_name(request.name, digest)
    body["metadata"]["name"] = name
    body["metadata"]["labels"][JOB_LABEL] = name
    body["metadata"]["annotations"][DIGEST_ANNOTATION] = digest
    for pod in _pods(body):
        pod["metadata"]["labels"][JOB_LABEL] = name
        pod["spec"]["containers"][0]["env"].append({"name": JOB_VARIABLE, "value": name})
    return body


def _pods(body: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = body["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


def job_name(name: str, digest: str) -> str:
    """A DNS-1035 label of at most MAX_NAME characters: as much of the name as fits, and the digest's first digits."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug[:1].isalpha():
        slug = f"crab-{slug}"
    return f"{slug[: MAX_NAME - 1 - _DIGITS].strip('-')}-{digest[:_DIGITS]}"


def _clean_up(profile: ClusterProfile, scales: bool) -> dict[str, Any]:
    """Workers go at once, so that nobody pays for idle ones. Kueue wants `shutdownAfterJobFinishes`, which deletion
    rules exclude."""
    if profile.queue is not None:
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": 0}
    keep_s = profile.limits.keep_minutes * 60
    # The autoscaler would start workers again; KubeRay refuses the two together.
    times = {"DeleteCluster": 0} if scales else {"DeleteWorkers": 0, "DeleteCluster": 60}
    ends = (("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed"))
    rules = [
        {"policy": policy, "condition": {kind: value, "ttlSeconds": seconds}}
        for kind, value in ends
        for policy, seconds in (times | {"DeleteSelf": max(keep_s, *times.values())}).items()
    ]
    return {"deletionStrategy": {"deletionRules": rules}}


def _autoscaling() -> dict[str, Any]:
    return {
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "idleTimeoutSeconds": 60,
            "resources": {
                name: {"cpu": "500m", "memory": "512Mi"} for name in ("requests", "limits")
            },
            "securityContext": _restricted(read_only=False),
        },
    }


def _workers(
    request: JobRequest,
    profile: ClusterProfile,
    need: GroupNeed,
    labels: dict[str, str],
    scales: bool,
) -> dict[str, Any]:
    group: NodeGroup | None = getattr(profile.node_groups, need.group)
    if group is None:
        raise ProfileError(
            f"{request.name} needs the node group {need.group}, which the profile does not have"
        )
    if need.pods > group.max_pods and not need.scales:
        raise ProfileError(
            f"{request.name} needs {need.pods} pods of node group {need.group}, and the profile allows "
            f"{group.max_pods} (max_pods); take fewer workers"
        )
    pods = min(need.pods, group.max_pods)
    scales = scales and need.scales
    return {
        "groupName": need.group,
        "replicas": 0 if scales else pods,
        "minReplicas": 0 if scales else pods,
        "maxReplicas": pods,
        "rayStartParams": {},
        "template": _pod(request, profile, group, head=False, labels=labels, scales=scales),
    }


def _pod(
    request: JobRequest,
    profile: ClusterProfile,
    group: NodeGroup,
    *,
    head: bool,
    labels: dict[str, str],
    scales: bool,
) -> dict[str, Any]:
    resources = {"cpu": str(group.cpus), "memory": f"{group.memory_gib}Gi"}
    if group.gpus:
        resources[group.gpu_resource] = str(group.gpus)
    container = {
        "name": "ray-head" if head else "ray-worker",
        "image": profile.image,
        "imagePullPolicy": "IfNotPresent",
        "workingDir": FOLDER,
        "env": _environment(request, profile),
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": _restricted(read_only=True),
        "volumeMounts": [
            {"name": "home", "mountPath": "/home/crab"},
            {"name": "workspace", "mountPath": f"{FOLDER}/work"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if head:
        container["ports"] = [
            {"name": name, "containerPort": port}
            for name, port in (("gcs", 6379), ("dashboard", 8265), ("client", 10001))
        ]
    spec: dict[str, Any] = {
        # The autoscaler of Ray refuses any other; a pod that failed is made anew.
        "restartPolicy": "Never",
        "serviceAccountName": profile.service_account,
        # Only the autoscaler, on the head, talks to Kubernetes. The bucket's role has a token of its own.
        "automountServiceAccountToken": head and scales,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "home", "emptyDir": {}},
            {"name": "workspace", "persistentVolumeClaim": {"claimName": profile.workspace}},
            {"name": "tmp", "emptyDir": {}},
            {
                "name": "shm",
                "emptyDir": {
                    "medium": "Memory",
                    "sizeLimit": f"{group.memory_gib * 1024 * 3 // 10}Mi",
                },
            },
        ],
    }
    if group.node_selector:
        spec["nodeSelector"] = dict(group.node_selector)
    if group.tolerations:
        spec["tolerations"] = [t.model_dump(exclude_none=True) for t in group.tolerations]
    if profile.image_pull_secret:
        spec["imagePullSecrets"] = [{"name": profile.image_pull_secret}]
    return {"metadata": {"labels": dict(labels)}, "spec": spec}


def _environment(request: JobRequest, profile: ClusterProfile) -> list[dict[str, Any]]:
    plain = {
        **profile.environment,
        "HOME": "/home/crab",
        SPEC_VARIABLE: request.spec,
        BUCKET_VARIABLE: profile.bucket,
        VERSION_VARIABLE: request.version,
        **({} if request.code is None else {CODE_VARIABLE: request.code}),
        **_cost(request),
        "MLFLOW_TRACKING_URI": profile.mlflow.uri,
    }
    cluster = {"fieldRef": {"fieldPath": "metadata.labels['ray.io/cluster']"}}
    secrets = dict(profile.secrets)
    if profile.mlflow.user is not None:
        secrets["MLFLOW_TRACKING_USERNAME"] = profile.mlflow.user
    if profile.mlflow.password is not None:
        secrets["MLFLOW_TRACKING_PASSWORD"] = profile.mlflow.password
    return [
        *({"name": name, "value": value} for name, value in sorted(plain.items())),
        *({"name": name, "valueFrom": _reference(of)} for name, of in sorted(secrets.items())),
        {"name": CLUSTER_VARIABLE, "valueFrom": cluster},
    ]


def _cost(request: JobRequest) -> dict[str, str]:
    if request.hourly is None:
        return {}
    price, currency = request.hourly
    return {HOUR_VARIABLE: f"{price:.6g}", CURRENCY_VARIABLE: currency}


def _reference(secret: SecretKey) -> dict[str, Any]:
    return {"secretKeyRef": {"name": secret.secret, "key": secret.key}}


def _restricted(*, read_only: bool) -> dict[str, Any]:
    """What Pod Security *restricted* wants of a container."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": read_only,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
