"""Why a job does not run: what Kueue, KubeRay, the scheduler and the nodes say of it, each with the way out.

KubeRay leaves that to the reader of `kubectl describe` (its #1990 is "out of scope"); here four requests gather it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from kubernetes.client import ApiClient, CoreV1Api, CustomObjectsApi

from crab_platform.cluster_errors import ClusterRefused
from crab_platform.kube_api import KubeApi
from crab_platform.rayjob_rules import QUEUE

Object = Mapping[str, Any]
OPERATOR_S = 60.0
"""An operator that is there looks at a new job within seconds; after so long its silence is worth a word."""
_KUEUE_VERSIONS = "v1beta2", "v1beta1"
"""Of Kueue's Workload, the newest first (reference/platforms.md 3.6)."""
_BY_MESSAGE = (
    ("exceeded quota", "see kubectl describe resourcequota -n {namespace}; take fewer workers, or ask for more quota"),
    ("untolerated taint", "give the profile's node group the toleration of that taint"),
    ("node affinity/selector", "compare node_selector in the profile with kubectl get nodes --show-labels"),
    ("unbound", "see kubectl get pvc -n {namespace}; the profile's workspace needs a bound claim"),
    ("persistentvolumeclaim", "see kubectl get pvc -n {namespace}; the profile's workspace names the claim"),
    ("secret", "see kubectl get secrets -n {namespace}; auth_secret and secrets of the profile name them"),
    ("Insufficient", "compare node_groups in the profile with kubectl describe nodes; nodes may still be started"),
)  # fmt: skip
_BY_REASON = {
    "ErrImagePull": "check image and image_pull_secret in the profile, and that nodes reach the registry",
    "ImagePullBackOff": "check image and image_pull_secret in the profile, and that nodes reach the registry",
    "InvalidImageName": "check image in the profile",
    "CreateContainerConfigError": "a Secret or a key that the profile names is not there: kubectl get secrets -n "
    "{namespace}",
    "OOMKilled": "give the node group more memory_gib in the profile, or take smaller batches",
    "CrashLoopBackOff": "see kubectl logs -n {namespace} {pod} --previous",
    "Error": "see kubectl logs -n {namespace} {pod}",
    "Evicted": "the node had no room left; give the node group more memory_gib, or other nodes",
}
_QUIET = {"ContainerCreating", "PodInitializing"}
"""What every pod goes through."""
_SAID_BY_PODS = {"FailedScheduling", "BackOff", "Failed"}
"""Events that repeat what the pod's own status says."""


def causes(api: KubeApi, job: Object) -> tuple[str, ...]:
    """What keeps a job from running, in the order in which it would be met; empty where nothing does.

    Who may not look at pods, events or Workloads gets that as the only cause.

    Args:
        job: the RayJob as the API has it.

    Raises ClusterUnreachable.
    """
    try:
        return tuple(dict.fromkeys(_causes(api, job)))
    except ClusterRefused as refused:
        return (f"why cannot be said: {refused}",)


def _causes(api: KubeApi, job: Object) -> list[str]:
    found = [*_operator(job)]
    if job["metadata"].get("labels", {}).get(QUEUE):
        found += _queue(api, job)
    status = job.get("status", {})
    found += _cluster(status.get("rayClusterStatus", {}), api.namespace)
    name = status.get("rayClusterName", "")
    pods = _core(api, "pods", label_selector=f"ray.io/cluster={name}") if name else []
    of_pods = _pods(pods, api.namespace)
    found += of_pods
    owners = {job["metadata"]["name"], name, *(pod["metadata"]["name"] for pod in pods)} - {""}
    events = _core(api, "events", field_selector="type=Warning")
    found += _events(
        [event for event in events if event["involvedObject"].get("name") in owners],
        api.namespace,
        told_by_pods=bool(of_pods),
    )
    return found


def _operator(job: Object) -> Iterator[str]:
    if job.get("status", {}).get("jobDeploymentStatus") or job["spec"].get("suspend"):
        return
    made = datetime.fromisoformat(job["metadata"]["creationTimestamp"])
    waited_s = (datetime.now(UTC) - made).total_seconds()
    if waited_s > OPERATOR_S:
        yield (
            "KubeRay has not looked at it for more than a minute; see that its operator runs and watches this "
            "namespace: kubectl get pods -A -l app.kubernetes.io/name=kuberay-operator"
        )


def _queue(api: KubeApi, job: Object) -> Iterator[str]:
    queue = job["metadata"]["labels"][QUEUE]
    workloads = _workloads(api, job["metadata"]["uid"])
    if not workloads:
        if job["spec"].get("suspend") or not job.get("status", {}).get("jobDeploymentStatus"):
            yield (
                f"Kueue has made no Workload for it; see that the queue is there: kubectl get localqueue {queue} -n "
                f"{api.namespace}"
            )
        return
    for workload in workloads:
        status = workload.get("status", {})
        by_type = {condition["type"]: condition for condition in status.get("conditions", ())}
        evicted, quota = by_type.get("Evicted", {}), by_type.get("QuotaReserved", {})
        if workload["spec"].get("active") is False:
            name, by = workload["metadata"]["name"], evicted.get("message", "by somebody")
            yield f"its Workload is inactive ({by}); see kubectl describe workload {name} -n {api.namespace}"
        elif quota.get("status") != "True":
            said = quota.get("message") or "it was not looked at yet"
            before = (
                f" (it ran before: {evicted['message']})" if evicted.get("status") == "True" else ""
            )
            yield (
                f"waits in queue {queue}: {said}{before}; see kubectl describe localqueue {queue} -n {api.namespace}"
            )
        for check in status.get("admissionChecks", ()):
            if check["state"] != "Ready":
                said = check.get("message") or check["state"]
                yield f"waits for the admission check {check['name']} of Kueue: {said}"


def _workloads(api: KubeApi, uid: str) -> list[dict[str, Any]]:
    """Of a job, by whichever version of the API there is; none where there is no Kueue."""
    for version in _KUEUE_VERSIONS:

        def send(client: ApiClient, version: str = version, **limits: Any) -> Any:
            untyped: Any = CustomObjectsApi(client)
            return untyped.list_namespaced_custom_object(
                *("kueue.x-k8s.io", version, api.namespace, "workloads"),
                label_selector=f"kueue.x-k8s.io/job-uid={uid}",
                **limits,
            )

        try:
            return list(api.ask("list Workloads", send)["items"])
        except ClusterRefused as refused:
            if refused.status != 404:
                raise
    return []


def _cluster(status: Object, namespace: str) -> Iterator[str]:
    for condition in status.get("conditions", ()):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            said = condition.get("message") or condition.get("reason", "")
            yield f"KubeRay cannot make its pods: {said}{_way_out(said, namespace=namespace)}"


def _pods(pods: Sequence[Object], namespace: str) -> list[str]:
    """One sentence for all pods of a kind with the same trouble."""
    kinds: Counter[tuple[str, str, str]] = Counter()
    one: dict[tuple[str, str, str], str] = {}
    for pod in pods:
        labels = pod["metadata"].get("labels", {})
        kind = (
            "head"
            if labels.get("ray.io/node-type") == "head"
            else f"worker of group {labels.get('ray.io/group', '?')}"
        )
        for reason, said in _troubles(pod):
            key = kind, reason, said
            kinds[key] += 1
            one.setdefault(key, pod["metadata"]["name"])
    return [
        f"{number} x {kind}: {reason}{': ' + said if said else ''}"
        + _way_out(said, reason, namespace=namespace, pod=one[kind, reason, said])
        for (kind, reason, said), number in kinds.items()
    ]


def _troubles(pod: Object) -> Iterator[tuple[str, str]]:
    """(reason, message) of what is wrong with a pod."""
    status = pod.get("status", {})
    for condition in status.get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield condition.get("reason", "Unschedulable"), condition.get("message", "")
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            yield f"taken away ({condition.get('reason', '?')})", condition.get("message", "")
    if status.get("phase") == "Failed" and status.get("reason"):
        yield status["reason"], status.get("message", "")
    for container in (
        *status.get("initContainerStatuses", ()),
        *status.get("containerStatuses", ()),
    ):
        state = container.get("state", {})
        waiting, ended = state.get("waiting", {}), state.get("terminated", {})
        before = container.get("lastState", {}).get("terminated", {})
        if before.get("reason") == "OOMKilled":
            yield "OOMKilled", f"container {container['name']}"
        elif waiting and waiting.get("reason") not in _QUIET:
            yield waiting.get("reason", "waiting"), waiting.get("message", "")
        elif ended and ended.get("exitCode"):
            yield (
                ended.get("reason", "Error"),
                f"container {container['name']}, exit code {ended['exitCode']}",
            )


def _events(events: Sequence[Object], namespace: str, *, told_by_pods: bool) -> list[str]:
    """The newest of each kind."""
    newest: dict[tuple[str, str], Object] = {}
    for event in sorted(events, key=_when):
        newest[event["involvedObject"].get("kind", ""), event.get("reason", "")] = event
    return [
        f"{kind} {event['involvedObject']['name']}: {reason}: {event.get('message', '')}"
        + _way_out(
            event.get("message", ""),
            reason,
            namespace=namespace,
            pod=event["involvedObject"]["name"],
        )
        for (kind, reason), event in newest.items()
        if not (kind == "Pod" and told_by_pods and reason in _SAID_BY_PODS)
    ]


def _when(event: Object) -> str:
    series = event.get("series") or {}
    return str(
        event.get("lastTimestamp")
        or series.get("lastObservedTime")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp", "")
    )


def _way_out(said: str, reason: str = "", *, namespace: str, pod: str = "POD") -> str:
    hint = next((hint for word, hint in _BY_MESSAGE if word in said), None)
    # What the message names is nearer than what the reason says of all of its kind.
    found = hint if hint is not None and reason != "OOMKilled" else _BY_REASON.get(reason, hint)
    return f"; {found.format(namespace=namespace, pod=pod)}" if found else ""


def _core(api: KubeApi, plural: str, **selector: str) -> list[dict[str, Any]]:
    """Objects of the core API, as JSON values."""
    calls: dict[str, Callable[[Any], Any]] = {
        "pods": lambda core: core.list_namespaced_pod,
        "events": lambda core: core.list_namespaced_event,
    }

    def send(client: ApiClient, **limits: Any) -> Any:
        answer = calls[plural](CoreV1Api(client))(
            api.namespace, _preload_content=False, **selector, **limits
        )
        return json.loads(answer.data)

    return list(api.ask(f"list {plural}", send)["items"])
