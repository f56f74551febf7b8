"""What KubeRay and Kueue refuse, said before anything is sent: the rules that no schema holds.

From KubeRay's validation.go (1.7) and Kueue's webhook (0.19); reference/platforms.md 3.5 numbers them. The last two of
its thirteen are about reading a job's status and have nothing to say about an object that is sent, but one: with
`K8sJobMode` the job's exit code is that of a pod that follows a log, so it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

Object = Mapping[str, Any]
MAX_NAMES = {"RayJob": 47, "RayCluster": 53, "RayCronJob": 36}
MAX_GROUPS_OF_KUEUE = 17
QUEUE = "kueue.x-k8s.io/queue-name"
ELASTIC = "kueue.x-k8s.io/elastic-job"
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_START_RESOURCES = {"num-cpus": "cpu", "num-gpus": "gpu", "memory": "memory", "resources": "*"}


def objections(job: Object) -> list[str]:
    """Why KubeRay or Kueue would refuse a RayJob, each with its field and the way out; empty where they would not."""
    return [said for rule in _RULES for said in rule(job)]


def _name(job: Object) -> Iterator[str]:
    name, limit = job["metadata"].get("name", ""), MAX_NAMES[job["kind"]]
    if len(name) > limit:
        yield f"metadata.name: {name!r} has {len(name)} characters, {limit} are allowed; shorten it"
    if not _DNS_1035.fullmatch(name):
        yield f"metadata.name: {name!r} must be of a-z, 0-9 and -, begin with a letter and not end with -"


def _time_to_live(job: Object) -> Iterator[str]:
    spec = job["spec"]
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "spec.ttlSecondsAfterFinished: needs spec.shutdownAfterJobFinishes: true"


def _deletion(job: Object) -> Iterator[str]:
    spec = job["spec"]
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    for legacy in ("onSuccess", "onFailure"):
        if legacy in strategy:
            yield f"spec.deletionStrategy.{legacy}: is deprecated; write deletionRules"
    for other in ("shutdownAfterJobFinishes", "ttlSecondsAfterFinished"):
        if spec.get(other):
            yield f"spec.{other}: excludes spec.deletionStrategy; leave one of them out"
    times: dict[tuple[str, str], dict[str, int]] = {}
    for number, rule in enumerate(strategy.get("deletionRules", ())):
        where, policy, condition = (
            f"spec.deletionStrategy.deletionRules[{number}]",
            rule["policy"],
            rule["condition"],
        )
        if policy == "DeleteWorkers" and _cluster(job).get("enableInTreeAutoscaling"):
            yield f"{where}.policy: DeleteWorkers excludes autoscaling; take DeleteCluster"
        if policy in ("DeleteWorkers", "DeleteCluster") and spec.get("clusterSelector"):
            yield f"{where}.policy: {policy} excludes spec.clusterSelector: the cluster is another's"
        kinds = [kind for kind in ("jobStatus", "jobDeploymentStatus") if kind in condition]
        if len(kinds) != 1:
            yield f"{where}.condition: give jobStatus or jobDeploymentStatus, and not both"
            continue
        found = times.setdefault((kinds[0], condition[kinds[0]]), {})
        if policy in found:
            yield f"{where}: there is another {policy} for {condition[kinds[0]]}; leave one of them out"
        found[policy] = condition.get("ttlSeconds", 0)
    for (kind, value), found in times.items():
        order = [policy for policy in _ORDER if policy in found]
        for before, after in pairwise(order):
            if found[after] < found[before]:
                yield (
                    f"spec.deletionStrategy.deletionRules: for {kind} {value} {after} comes after {found[after]} s, "
                    f"before {before} ({found[before]} s); give it as many seconds or more"
                )


def _kueue(job: Object) -> Iterator[str]:
    labels = job["metadata"].get("labels", {})
    if QUEUE not in labels:
        return
    spec, cluster = job["spec"], _cluster(job)
    if not spec.get("shutdownAfterJobFinishes"):
        yield (
            f"spec.shutdownAfterJobFinishes: Kueue (label {QUEUE}) needs it to be true, and so no deletionStrategy; "
            "leave the queue out, or the deletion rules"
        )
    if spec.get("clusterSelector") and spec.get("rayClusterSpec"):
        yield "spec.clusterSelector: Kueue does not take it together with spec.rayClusterSpec"
    groups = cluster.get("workerGroupSpecs", ())
    if len(groups) > MAX_GROUPS_OF_KUEUE:
        yield (
            f"spec.rayClusterSpec.workerGroupSpecs: {len(groups)} groups, Kueue takes {MAX_GROUPS_OF_KUEUE}; merge some"
        )
    if (
        cluster.get("enableInTreeAutoscaling")
        and job["metadata"].get("annotations", {}).get(ELASTIC) != "true"
    ):
        yield (
            f"spec.rayClusterSpec.enableInTreeAutoscaling: Kueue wants the annotation {ELASTIC}: 'true', and its gate "
            "ElasticJobsViaWorkloadSlices; without them set queue.elastic: false in the profile"
        )
    if "suspend" in spec:
        yield "spec.suspend: Kueue sets it; leave it out, or without Kueue the job waits for ever"


def _suspend(job: Object) -> Iterator[str]:
    spec = job["spec"]
    if not spec.get("suspend"):
        return
    if not spec.get("shutdownAfterJobFinishes"):
        yield "spec.suspend: needs spec.shutdownAfterJobFinishes: true"
    if spec.get("clusterSelector"):
        yield "spec.suspend: excludes spec.clusterSelector"


def _retries(job: Object) -> Iterator[str]:
    spec = job["spec"]
    if spec.get("backoffLimit", 0) <= 0:
        return
    if spec.get("clusterSelector"):
        yield "spec.backoffLimit: excludes spec.clusterSelector: a retry makes a new cluster"
    if spec.get("submissionMode") == "InteractiveMode":
        yield "spec.backoffLimit: excludes submissionMode InteractiveMode"


def _submission(job: Object) -> Iterator[str]:
    spec = job["spec"]
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in _MODES:  # the schema takes any text
        yield f"spec.submissionMode: {mode!r}; known are {', '.join(_MODES)}"
    if mode == "K8sJobMode":
        yield (
            "spec.submissionMode: with K8sJobMode, the default, the submitter's exit code is that of a log; "
            "take HTTPMode"
        )
    if mode == "SidecarMode":
        for other in ("clusterSelector", "submitterPodTemplate", "submitterConfig"):
            if spec.get(other):
                yield f"spec.{other}: excludes submissionMode SidecarMode"
        if _restart_policy(_cluster(job).get("headGroupSpec", {})) not in (None, "Never"):
            yield "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy: SidecarMode wants Never"


def _replicas(job: Object) -> Iterator[str]:
    cluster = _cluster(job)
    scales = cluster.get("enableInTreeAutoscaling")
    if scales and cluster.get("autoscalerOptions", {}).get("version", "v2") == "v2":
        for where, group in _groups(cluster):
            if _restart_policy(group) not in (None, "Never"):
                yield f"{where}.template.spec.restartPolicy: the autoscaler v2 wants Never"
    names: set[str] = set()
    for where, group in _groups(cluster):
        if "groupName" not in group:  # the head's
            continue
        if group["groupName"] in names:
            yield f"{where}.groupName: there is another {group['groupName']!r}"
        names.add(group["groupName"])
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        if low is None or high is None:
            yield f"{where}: give both minReplicas and maxReplicas"
        elif not 0 <= low <= high:
            yield f"{where}: minReplicas {low} and maxReplicas {high}; expected 0 <= minReplicas <= maxReplicas"
        elif not low <= group.get("replicas", low) <= high:
            yield f"{where}.replicas: {group['replicas']} is not between {low} and {high}"


def _resources(job: Object) -> Iterator[str]:
    for where, group in _groups(_cluster(job)):
        given = group.get("resources", {})
        parameters = group.get("rayStartParams", {})
        if "labels" in parameters:
            yield f"{where}.rayStartParams.labels: is deprecated; write {where}.labels"
        if not given:
            continue
        for parameter in sorted(parameters.keys() & _START_RESOURCES.keys()):
            yield f"{where}.rayStartParams.{parameter}: excludes {where}.resources; leave one of them out"


def _token(job: Object) -> Iterator[str]:
    cluster = _cluster(job)
    if not cluster:
        return
    options = cluster.get("authOptions", {})
    if options.get("mode") != "token":
        yield "spec.rayClusterSpec.authOptions.mode: write token; without it anybody in the network can run code"
    if options.get("enableK8sTokenAuth"):
        yield "spec.rayClusterSpec.authOptions.enableK8sTokenAuth: is not for RayJobs; leave it out"
    version = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", cluster.get("rayVersion", ""))
    if version is None or tuple(map(int, version.groups())) < (2, 52, 0):
        yield f"spec.rayClusterSpec.rayVersion: {cluster.get('rayVersion')!r}; a token needs 2.52.0 or newer, as x.y.z"


def _deadlines(job: Object) -> Iterator[str]:
    for name in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if job["spec"].get(name, 1) <= 0:
            yield f"spec.{name}: {job['spec'][name]}; expected seconds, 1 or more"
    if job["spec"].get("clusterSelector") and job["spec"].get("rayClusterSpec"):
        yield "spec: give clusterSelector or rayClusterSpec, and not both"


_RULES: tuple[Callable[[Object], Iterator[str]], ...] = (
    *(_name, _time_to_live, _deletion, _kueue, _suspend, _retries, _submission, _replicas),
    *(_resources, _token, _deadlines),
)


def _cluster(job: Object) -> Object:
    found: Object = job["spec"].get("rayClusterSpec") or {}
    return found


def _groups(cluster: Object) -> Iterator[tuple[str, Object]]:
    """(where it stands, group), the head's first."""
    if "headGroupSpec" in cluster:
        yield "spec.rayClusterSpec.headGroupSpec", cluster["headGroupSpec"]
    for number, group in enumerate(cluster.get("workerGroupSpecs", ())):
        yield f"spec.rayClusterSpec.workerGroupSpecs[{number}]", group


def _restart_policy(group: Object) -> str | None:
    found: str | None = group.get("template", {}).get("spec", {}).get("restartPolicy")
    return found
