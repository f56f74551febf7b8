"""Jobs on a cluster, for the command line: submit, list, look at, stop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from crab_platform import cluster
from crab_platform.cluster import JobState, state_of
from crab_platform.cluster_profile import load_cluster
from crab_platform.kube_api import KubeApi, connect_to
from crab_platform.storage import Store, StoreUnreachable, open_store
from jobs.cluster_logs import shown_meanwhile
from jobs.output import line, table
from jobs.run import JobFailed


def api_of(profile: str, context: str | None) -> KubeApi:
    """A connection to the profile's namespace. Raises ProfileError, ClusterUnreachable when it is used."""
    _, found, _ = load_cluster(profile)
    return KubeApi(connect=connect_to(context), namespace=found.namespace)


def bucket_of(profile: str) -> Store:
    """Where a profile's jobs leave their logs. Raises ProfileError, StoreUnreachable where there are no credentials."""
    _, found, _ = load_cluster(profile)
    return open_store(found.bucket)


def submit(api: KubeApi, job: Mapping[str, Any], profile: str, *, detach: bool) -> dict[str, Any]:
    """Sends a job, and waits for its end, showing its log meanwhile where the bucket can be read.

    Raises JobFailed where it fails.
    """
    name = job["metadata"]["name"]
    made = cluster.submit(api, job)
    line(
        f"{name}: {'submitted' if made else 'is there already, with the same content; nothing was sent'}"
    )
    if detach:
        line(f"look at it with crab status {name}, and read it with crab logs {name}")
        return {"name": name, "submitted": made}
    last = None
    with _log_of(name, profile):
        for last in cluster.follow(api, name):
            _say(last)
    if last is None or last.phase != "succeeded":
        raise JobFailed(f"{name} {last.sentence if last else 'has no state'}")
    return {"name": name, "submitted": made, "phase": last.phase}


def show_jobs(api: KubeApi) -> list[dict[str, Any]]:
    """All jobs of the namespace."""
    states = [state_of(job) for job in cluster.jobs(api)]
    table(
        f"jobs in {api.namespace}",
        ("job", "state", "started", "ended", "what is going on"),
        [(s.name, s.phase, s.started or "", s.ended or "", s.sentence) for s in states],
    )
    return [_values(state) for state in states]


def show_status(api: KubeApi, name: str) -> dict[str, Any]:
    """One job."""
    state = cluster.explained(api, cluster.get(api, name))
    _say(state)
    return _values(state)


def stop(api: KubeApi, name: str) -> dict[str, Any]:
    """Deletes one job with its cluster."""
    stopped = cluster.stop(api, name)
    line(
        f"{name}: {'stopped and removed, with its cluster' if stopped else 'there is no such job'}"
    )
    return {"name": name, "stopped": stopped}


def _log_of(name: str, profile: str) -> AbstractContextManager[None]:
    try:
        return shown_meanwhile(bucket_of(profile), name, to_stderr)
    except StoreUnreachable as error:
        line(f"the log is not shown here: {error}")
        return nullcontext()


def to_stderr(data: bytes) -> None:
    """Standard output is for results."""
    sys.stderr.buffer.write(data)
    sys.stderr.flush()


def _say(state: JobState) -> None:
    line(f"{state.name}: {state.phase}. {state.sentence}")
    for cause in state.causes:
        line(f"  - {cause}")


def _values(state: JobState) -> dict[str, Any]:
    return {
        "name": state.name,
        "phase": state.phase,
        "sentence": state.sentence,
        "causes": list(state.causes),
        "cluster": state.cluster,
        "started": state.started,
        "ended": state.ended,
        "exit_code": state.exit_code,
    }
