"""Jobs on a cluster: submitted once, looked at, stopped. What a job's state is the API says, never a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from kubernetes.client import ApiClient, CustomObjectsApi

from crab_platform.cluster_errors import ClusterRefused, ClusterUnreachable
from crab_platform.kube_api import KubeApi, WatchExpired
from crab_platform.pending import causes
from crab_platform.rayjob import DIGEST_ANNOTATION, JOB_LABEL

GROUP = "ray.io", "v1"
MANAGER = "crab"
SILENCE_S = 600.0
"""So long a server may be silent before nobody waits for it any more."""
Phase = Literal["waiting", "running", "succeeded", "failed", "suspended", "unknown"]


class AnotherJob(ClusterRefused):
    """There is a job of this name that is not this one."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What the API says of a job."""

    name: str
    phase: Phase
    sentence: str
    """For people: what is going on, and why."""
    cluster: str
    """Of Ray; "" before there is one."""
    started: str | None
    ended: str | None
    causes: tuple[str, ...] = ()
    """What keeps it from running (pending.py)."""

    @property
    def is_over(self) -> bool:
        return self.phase in ("succeeded", "failed")

    @property
    def is_stuck(self) -> bool:
        """Whether it should run and does not."""
        return self.phase in ("waiting", "suspended")

    @property
    def exit_code(self) -> int | None:
        """0 or 1, None before its end."""
        return {"succeeded": 0, "failed": 1}.get(self.phase)


def submit(api: KubeApi, job: Mapping[str, Any]) -> bool:
    """Creates a RayJob, after the server has checked it; False where this very job is there already.

    May be called again after any failure: the name decides, and a lost answer is found out by asking.

    Raises:
        AnotherJob: a job of this name is there, with another digest.
        ClusterRefused, ClusterUnreachable: see kube_api.py.
    """
    name, digest = job["metadata"]["name"], job["metadata"]["annotations"][DIGEST_ANNOTATION]
    try:
        check(api, job)
        _create(api, job, "create")
    except ClusterRefused as refused:
        if refused.status != 409:
            raise
        there = get(api, name)["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION)
        if there != digest:
            raise AnotherJob(
                f"there is a job {name} that is not this one; stop it with crab stop {name}, or give this one another "
                "name (--set name=...)",
                409,
            ) from refused
        return False
    return True


def check(api: KubeApi, job: Mapping[str, Any]) -> None:
    """Asks the server to check a RayJob as if it made it: schema in strict mode, admission. Raises ClusterRefused."""
    _create(api, job, "check", dry_run="All")


def _create(api: KubeApi, job: Mapping[str, Any], what: str, **more: Any) -> None:
    api.ask(
        f"{what} RayJob {job['metadata']['name']}",
        lambda client, **limits: _custom(client).create_namespaced_custom_object(
            *(*GROUP, api.namespace, "rayjobs", dict(job)),
            field_manager=MANAGER,
            field_validation="Strict",
            **more,
            **limits,
        ),
    )


def get(api: KubeApi, name: str) -> dict[str, Any]:
    """The RayJob. Raises ClusterRefused (404) where there is none."""
    found: dict[str, Any] = api.ask(
        f"get RayJob {name}",
        lambda client, **limits: _custom(client).get_namespaced_custom_object(
            *GROUP, api.namespace, "rayjobs", name, **limits
        ),
    )
    return found


def jobs(api: KubeApi) -> list[dict[str, Any]]:
    """All RayJobs that were submitted by us."""
    return list(_list(api, label_selector=JOB_LABEL)["items"])


def stop(api: KubeApi, name: str) -> bool:
    """Deletes a job with its cluster; False where there is none."""
    try:
        api.ask(
            f"delete RayJob {name}",
            lambda client, **limits: _custom(client).delete_namespaced_custom_object(
                *GROUP, api.namespace, "rayjobs", name, propagation_policy="Background", **limits
            ),
        )
    except ClusterRefused as refused:
        if refused.status == 404:
            return False
        raise
    return True


def follow(api: KubeApi, name: str, silence_s: float = SILENCE_S) -> Iterator[JobState]:
    """A job's state whenever it changes, to its end.

    Events are hints: after each time that the server has forgotten the past the job is looked at anew. While the server
    does not answer, the state is `unknown`.

    Raises:
        ClusterRefused (404): the job is gone.
        ClusterUnreachable: no answer for `silence_s`.
    """
    last: JobState | None = None
    heard = time.time()
    while last is None or not last.is_over:
        try:
            for state in _until_forgotten(api, name):
                heard = time.time()
                if state != last:
                    last = state
                    yield state
        except ClusterUnreachable as error:
            if time.time() - heard > silence_s:
                raise
            since = datetime.fromtimestamp(heard, UTC).isoformat(timespec="seconds")
            unknown = JobState(
                name=name,
                phase="unknown",
                sentence=f"unknown since {since}: the cluster does not answer ({error})",
                cluster=last.cluster if last else "",
                started=last.started if last else None,
                ended=None,
            )
            if last is None or last.phase != "unknown":
                last = unknown
                yield unknown


def _until_forgotten(api: KubeApi, name: str) -> Iterator[JobState]:
    """States of a job, some more than once, until its end or until it has to be listed again."""
    selector = {"field_selector": f"metadata.name={name}"}
    listed = _list(api, **selector)
    if not listed["items"]:
        raise _gone(name)
    job = listed["items"][0]
    state = explained(api, job)
    yield state
    version = listed["metadata"]["resourceVersion"]
    while not state.is_over:
        began = time.monotonic()
        try:
            for kind, seen in api.watch(
                f"watch RayJob {name}",
                lambda client, **more: _custom(client).list_namespaced_custom_object(
                    *GROUP, api.namespace, "rayjobs", **selector, **more
                ),
                version,
            ):
                version = seen["metadata"]["resourceVersion"]
                if kind == "DELETED":
                    raise _gone(name)
                if kind != "BOOKMARK":
                    job, state = seen, replace(state_of(seen), causes=state.causes)
                    state = state if state.is_stuck else replace(state, causes=())
                yield state
                if state.is_over:
                    return
        except WatchExpired:
            return
        if (
            state.is_stuck
        ):  # pods, events and queues have watches of their own; once a round is enough
            state = explained(api, job)
            yield state
        if time.monotonic() - began < api.patience.pause_s:  # it hangs up at once: no hammering
            time.sleep(api.patience.pause_s)


def _gone(name: str) -> ClusterRefused:
    return ClusterRefused(f"the job {name} is gone: somebody has deleted it", 404)


def explained(api: KubeApi, job: Mapping[str, Any]) -> JobState:
    """A RayJob's state, and what stands in its way; after a failure too, while its pods are there.

    Raises ClusterUnreachable.
    """
    state = state_of(job)
    return state if state.phase == "succeeded" else replace(state, causes=causes(api, job))


def state_of(job: Mapping[str, Any]) -> JobState:
    """What a RayJob's status means. `jobStatus` is Ray's word on one attempt, `jobDeploymentStatus` KubeRay's on all.

    An attempt that failed is the end only where KubeRay says so: until then there may be another one.
    """
    status = job.get("status", {})
    ray, deployment = status.get("jobStatus", ""), status.get("jobDeploymentStatus", "")
    told = ": ".join(part for part in (status.get("reason"), status.get("message")) if part)
    phase: Phase
    has_failed = ray in ("FAILED", "STOPPED")
    if deployment in ("Failed", "ValidationFailed") or (has_failed and deployment == "Complete"):
        phase, sentence = "failed", f"failed: {told or ray or deployment}"
    elif deployment == "Retrying":
        phase = "waiting"
        sentence = f"starts again on a new cluster: {told or 'the one before was lost'}"
    elif has_failed:
        phase = "running"
        sentence = f"{told or ray}; KubeRay decides whether it starts again"
    elif ray == "SUCCEEDED":
        phase, sentence = "succeeded", "done"
    elif ray == "RUNNING":
        phase, sentence = "running", "running"
    elif deployment in ("Suspended", "Suspending") or job["spec"].get("suspend"):
        phase, sentence = "suspended", "waits for its turn in the queue"
    elif deployment == "":
        phase, sentence = "waiting", "submitted; KubeRay has not looked at it yet"
    else:
        phase, sentence = "waiting", "its Ray cluster is started"
    times = status.get("rayJobInfo", {})
    return JobState(
        name=job["metadata"]["name"],
        phase=phase,
        sentence=sentence,
        cluster=status.get("rayClusterName", ""),
        started=times.get("startTime"),
        ended=times.get("endTime"),
    )


def _list(api: KubeApi, **selector: str) -> dict[str, Any]:
    found: dict[str, Any] = api.ask(
        "list RayJobs",
        lambda client, **limits: _custom(client).list_namespaced_custom_object(
            *GROUP, api.namespace, "rayjobs", **selector, **limits
        ),
    )
    return found


def _custom(client: ApiClient) -> Any:
    """Without types: ours are mappings of JSON, and the client's have 20 arguments a function."""
    return CustomObjectsApi(client)
