"""Why a job waits: what Kubernetes, KubeRay and Kueue write into their objects, read from an API server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers.kube_api_server import KubeServer, kube_api_server
from support.kube import NAMESPACE, api_of, job

from crab_platform import cluster
from crab_platform.cluster_errors import ClusterUnreachable
from crab_platform.pending import causes

CLUSTER = "train-raycluster-x"
NO_NODE = (
    "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available"
)


@pytest.fixture
def server(shared_dir: Path) -> Iterator[KubeServer]:
    with kube_api_server(KubeServer(schemas=shared_dir / "kuberay")) as found:
        yield found


def submitted(server: KubeServer, **status: Any) -> dict[str, Any]:
    body = server.create("rayjobs", NAMESPACE, job())
    if status:
        server.set_status("rayjobs", NAMESPACE, body["metadata"]["name"], **status)
    return server.get("rayjobs", NAMESPACE, body["metadata"]["name"])


def started(server: KubeServer) -> dict[str, Any]:
    """With a Ray cluster and a Workload that is admitted."""
    found = submitted(server, jobDeploymentStatus="Initializing", rayClusterName=CLUSTER)
    workload(
        server, found, [{"type": "QuotaReserved", "status": "True", "reason": "QuotaReserved"}]
    )
    return found


def pod(server: KubeServer, name: str, *, group: str = "gpu", **status: Any) -> None:
    kind = (
        {"ray.io/node-type": "head"}
        if group == "head"
        else {"ray.io/node-type": "worker", "ray.io/group": group}
    )
    metadata = {"name": name, "namespace": NAMESPACE, "labels": {"ray.io/cluster": CLUSTER, **kind}}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}}
    server.create("pods", NAMESPACE, body)
    server.set_status("pods", NAMESPACE, name, **{"phase": "Pending", **status})


def event(server: KubeServer, kind: str, name: str, reason: str, message: str) -> None:
    number = len(server.all("events"))
    server.create(
        "events",
        NAMESPACE,
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"e{number}", "namespace": NAMESPACE},
            "type": "Warning",
            "reason": reason,
            "message": message,
            "lastTimestamp": f"2026-12-01T00:00:{number:02}Z",
            "involvedObject": {"kind": kind, "name": name, "namespace": NAMESPACE},
        },
    )


def workload(
    server: KubeServer, of: dict[str, Any], conditions: list[dict[str, str]], **more: Any
) -> None:
    labels = {"kueue.x-k8s.io/job-uid": of["metadata"]["uid"]}
    spec = more.pop("spec", {})
    server.create(
        "workloads",
        NAMESPACE,
        {
            "apiVersion": server.kinds["workloads"][0],
            "kind": "Workload",
            "metadata": {"name": "rayjob-w", "namespace": NAMESPACE, "labels": labels},
            "spec": spec,
        },
    )
    server.set_status("workloads", NAMESPACE, "rayjob-w", conditions=conditions, **more)


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"containerStatuses": [{"name": "ray-worker", "state": state}]}


def unschedulable(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    return {"conditions": [condition | {"message": message}]}


def test_nothing_is_said_where_nothing_is_wrong(server: KubeServer) -> None:
    found = started(server)
    pod(
        server,
        "w0",
        phase="Running",
        containerStatuses=[{"name": "ray-worker", "state": {"running": {}}}],
    )
    pod(server, "w1", **waiting("ContainerCreating"))
    event(server, "Pod", "of-somebody-else", "BackOff", "not ours")
    assert causes(api_of(server), found) == ()


@pytest.mark.parametrize(
    ("status", "said", "way_out"),
    [
        (unschedulable(NO_NODE), "Unschedulable: 0/3 nodes", "node_groups"),
        (unschedulable("0/3 nodes are available: 3 node(s) had untolerated taint {a: b}"), "taint", "toleration"),
        (unschedulable("3 node(s) didn't match Pod's node affinity/selector"), "selector", "node_selector"),
        (unschedulable('persistentvolumeclaim "crab-work" not found'), "crab-work", "workspace"),
        (waiting("ImagePullBackOff", 'Back-off pulling image "x"'), "ImagePullBackOff", "image_pull_secret"),
        (waiting("ErrImagePull", "403 Forbidden"), "403 Forbidden", "image_pull_secret"),
        (waiting("CreateContainerConfigError", 'secret "crab-ray-token" not found'), "crab-ray-token", "auth_secret"),
        (waiting("CrashLoopBackOff", "back-off 10s"), "CrashLoopBackOff", "--previous"),
        (
            {"containerStatuses": [{"name": "ray-worker", "state": waiting("CrashLoopBackOff"),
                                    "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}]},
            "OOMKilled", "memory_gib",
        ),
        (
            {"containerStatuses": [{"name": "ray-worker", "state": {"terminated": {"exitCode": 3}}}]},
            "exit code 3", "kubectl logs -n crab w",
        ),
        (
            {"phase": "Running", "conditions": [{"type": "DisruptionTarget", "status": "True",
                                                 "reason": "DeletionByTaintManager", "message": "node lost"}]},
            "DeletionByTaintManager", "node lost",
        ),
        ({"phase": "Failed", "reason": "Evicted", "message": "low on memory"}, "low on memory", "memory_gib"),
    ],
)  # fmt: skip
def test_trouble_of_a_pod_is_said_once_with_the_way_out(
    server: KubeServer, status: dict[str, Any], said: str, way_out: str
) -> None:
    found = started(server)
    pod(server, "h", group="head", phase="Running")
    for number in range(3):
        pod(server, f"w{number}", **status)
    (cause,) = causes(api_of(server), found)
    assert cause.startswith("3 x worker of group gpu: ")
    assert said in cause
    assert way_out in cause


@pytest.mark.parametrize(
    ("conditions", "more", "said"),
    [
        (
            [{"type": "QuotaReserved", "status": "False", "reason": "Pending",
              "message": "couldn't assign flavors to pod set worker: insufficient unused quota for nvidia.com/gpu"}],
            {}, ["insufficient unused quota for nvidia.com/gpu", "kubectl describe localqueue"],
        ),
        ([], {}, ["it was not looked at yet"]),
        (
            [{"type": "QuotaReserved", "status": "False", "message": "waits"},
             {"type": "Evicted", "status": "True", "reason": "Preempted", "message": "Preempted to make room"}],
            {}, ["it ran before: Preempted to make room"],
        ),
        (
            [{"type": "Evicted", "status": "True", "message": "exceeded its re-queuing limit"}],
            {"spec": {"active": False}}, ["inactive", "re-queuing limit", "kubectl describe workload rayjob-w"],
        ),
        (
            [{"type": "QuotaReserved", "status": "True"}],
            {"admissionChecks": [{"name": "nodes", "state": "Pending", "message": "ETA 5 min"}]},
            ["admission check nodes", "ETA 5 min"],
        ),
    ],
)  # fmt: skip
def test_what_kueue_waits_for(
    server: KubeServer, conditions: list[dict[str, str]], more: dict[str, Any], said: list[str]
) -> None:
    found = submitted(server, jobDeploymentStatus="Suspended")
    workload(server, found, conditions, **more)
    (cause,) = causes(api_of(server), found)
    for words in said:
        assert words in cause


def test_a_queue_that_nobody_serves_is_said(server: KubeServer) -> None:
    (cause,) = causes(api_of(server), submitted(server))
    assert "Kueue has made no Workload" in cause
    assert "kubectl get localqueue" in cause


def test_an_operator_that_never_looks_is_said(server: KubeServer) -> None:
    found = submitted(server)
    del found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert causes(api_of(server), found) == (), "it was made a moment ago"
    found["metadata"]["creationTimestamp"] = "2026-11-30T00:00:00Z"
    (cause,) = causes(api_of(server), found)
    assert "KubeRay has not looked at it for more than a minute" in cause
    assert "kubectl get pods -A" in cause


def test_pods_that_cannot_even_be_made_are_said(server: KubeServer) -> None:
    found = started(server)
    refused = (
        'pods "w" is forbidden: exceeded quota: team, requested: cpu=8, used: cpu=4, limited: cpu=8'
    )
    event(server, "RayCluster", CLUSTER, "FailedToCreateWorkerPod", "an older one")
    event(server, "RayCluster", CLUSTER, "FailedToCreateWorkerPod", refused)
    (cause,) = causes(api_of(server), found)
    assert "exceeded quota: team" in cause
    assert "kubectl describe resourcequota -n crab" in cause

    failure = {
        "type": "ReplicaFailure",
        "status": "True",
        "reason": "FailedCreate",
        "message": refused,
    }
    server.set_status(
        "rayjobs", NAMESPACE, found["metadata"]["name"], rayClusterStatus={"conditions": [failure]}
    )
    found = server.get("rayjobs", NAMESPACE, found["metadata"]["name"])
    assert "KubeRay cannot make its pods" in causes(api_of(server), found)[0]


def test_an_event_that_a_pod_tells_itself_is_not_told_twice(server: KubeServer) -> None:
    found = started(server)
    pod(server, "w0", **unschedulable(NO_NODE))
    event(server, "Pod", "w0", "FailedScheduling", NO_NODE)
    event(server, "Pod", "w0", "FailedMount", "MountVolume.SetUp failed: stale NFS handle")
    assert [cause.split(":")[0] for cause in causes(api_of(server), found)] == [
        "1 x worker of group gpu",
        "Pod w0",
    ]


def test_who_may_not_look_is_told_so(server: KubeServer) -> None:
    found = started(server)
    server.spoil = lambda _verb, path: 403 if "/pods" in path else "pass"
    (cause,) = causes(api_of(server), found)
    assert cause.startswith("why cannot be said: cannot list pods: 403")
    server.spoil = lambda _verb, path: "reset" if "/pods" in path else "pass"
    with pytest.raises(ClusterUnreachable):
        causes(api_of(server), found)


def test_an_older_kueue_is_asked_in_its_own_words(server: KubeServer) -> None:
    server.kinds["workloads"] = "kueue.x-k8s.io/v1beta1", "Workload"
    found = submitted(server, jobDeploymentStatus="Suspended")
    workload(server, found, [{"type": "QuotaReserved", "status": "False", "message": "no room"}])
    (cause,) = causes(api_of(server), found)
    assert "no room" in cause


def test_who_waits_for_a_job_hears_why_it_waits(server: KubeServer) -> None:
    found = started(server)
    name = found["metadata"]["name"]
    states = cluster.follow(api_of(server), name)
    assert next(states).causes == ()
    pod(server, "w0", **unschedulable(NO_NODE))
    stuck = next(states)
    assert stuck.phase == "waiting"
    assert "Insufficient nvidia.com/gpu" in stuck.causes[0]
    server.set_status(
        "rayjobs", NAMESPACE, name, jobDeploymentStatus="Running", jobStatus="RUNNING"
    )
    running = next(states)
    assert (running.phase, running.causes) == ("running", ())
