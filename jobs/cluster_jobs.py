"""Jobs on a cluster, for the command line: submit, list, look at, stop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from crab_platform import cluster
from crab_platform.attempts import attempts
from crab_platform.cluster import JobState, state_of
from crab_platform.cluster_profile import load_cluster
from crab_platform.cost import Prices
from crab_platform.job_cost import JobCost, job_cost
from crab_platform.kube_api import KubeApi, connect_to
from crab_platform.storage import Store, StoreError, StoreUnreachable, open_store
from jobs.cluster_logs import shown_meanwhile
from jobs.output import line, table
from jobs.run import JobFailed


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where jobs are sent, and what it costs there."""

    api: KubeApi
    prices: Prices
    bucket_url: str

    def bucket(self) -> Store:
        """Where jobs leave their logs. Raises StoreUnreachable where there are no credentials."""
        return open_store(self.bucket_url)


def target_of(profile: str, context: str | None) -> Target:
    """A profile's namespace. Nothing is sent yet. Raises ProfileError."""
    _, found, prices = load_cluster(profile)
    api = KubeApi(connect=connect_to(context), namespace=found.namespace)
    return Target(api=api, prices=prices, bucket_url=found.bucket)


def submit(target: Target, job: Mapping[str, Any], *, detach: bool) -> dict[str, Any]:
    """Sends a job, and waits for its end, showing its log meanwhile where the bucket can be read.

    Raises JobFailed where it fails.
    """
    name = job["metadata"]["name"]
    made = cluster.submit(target.api, job)
    line(
        f"{name}: {'submitted' if made else 'is there already, with the same content; nothing was sent'}"
    )
    line(f"{name}: {rate(job, target.prices)}")
    if detach:
        line(f"look at it with crab status {name}, and read it with crab logs {name}")
        return {"name": name, "submitted": made}
    last = None
    with _log_of(name, target):
        for last in cluster.follow(target.api, name):
            _say(last)
    if last is None or last.phase != "succeeded":
        raise JobFailed(f"{name} {last.sentence if last else 'has no state'}")
    cost = _cost(cluster.get(target.api, name), target)
    line(f"{name}: cost {cost}, for {cost.hours:.2f} h")
    return {"name": name, "submitted": made, "phase": last.phase, "cost": asdict(cost)}


def rate(job: Mapping[str, Any], prices: Prices) -> str:
    """What a job will cost an hour, and at the most, for people."""
    cost = job_cost(job, prices)
    hours = job["spec"]["activeDeadlineSeconds"] / 3600
    least = "" if cost.hourly == cost.hourly_least else f"{cost.hourly_least:.2f} to "
    return (
        f"costs {least}{cost.hourly:.2f} {cost.currency} an hour while its pods are there, "
        f"{cost.hourly * hours:.2f} at the most (limits.hours: {hours:g})"
    )


def show_jobs(target: Target) -> list[dict[str, Any]]:
    """All jobs of the namespace."""
    found = [(state_of(job), job_cost(job, target.prices)) for job in cluster.jobs(target.api)]
    table(
        f"jobs in {target.api.namespace}",
        ("job", "state", "started (UTC)", "ended", "cost", "what is going on"),
        [
            (s.name, s.phase, _day_and_time(s.started), _day_and_time(s.ended), cost, s.sentence)
            for s, cost in found
        ],
    )
    return [_values(state, cost) for state, cost in found]


def show_status(target: Target, name: str) -> dict[str, Any]:
    """One job."""
    job = cluster.get(target.api, name)
    state, cost = cluster.explained(target.api, job), _cost(job, target)
    _say(state)
    line(f"  cost so far: {cost}" if not state.is_over else f"  cost: {cost}")
    return _values(state, cost)


def stop(target: Target, name: str) -> dict[str, Any]:
    """Deletes one job with its cluster."""
    stopped = cluster.stop(target.api, name)
    line(
        f"{name}: {'stopped and removed, with its cluster' if stopped else 'there is no such job'}"
    )
    return {"name": name, "stopped": stopped}


def to_stderr(data: bytes) -> None:
    """Standard output is for results."""
    sys.stderr.buffer.write(data)
    sys.stderr.flush()


def _day_and_time(iso: str | None) -> str:
    return "" if iso is None else iso[:16].replace("T", " ")


def _log_of(name: str, target: Target) -> AbstractContextManager[None]:
    try:
        return shown_meanwhile(target.bucket(), name, to_stderr)
    except StoreUnreachable as error:
        line(f"the log is not shown here: {error}")
        return nullcontext()


def _cost(job: Mapping[str, Any], target: Target) -> JobCost:
    """Of all attempts."""
    first = None
    if job.get("status", {}).get("failed", 0):
        try:
            first = attempts(target.bucket(), job["metadata"]["name"])[0].began()["at"]
        except (StoreError, IndexError) as error:
            line(f"what the attempts before the last one cost is not known: {error}")
    return job_cost(job, target.prices, first)


def _say(state: JobState) -> None:
    line(f"{state.name}: {state.phase}. {state.sentence}")
    for cause in state.causes:
        line(f"  - {cause}")


def _values(state: JobState, cost: JobCost) -> dict[str, Any]:
    return {
        "name": state.name,
        "phase": state.phase,
        "sentence": state.sentence,
        "causes": list(state.causes),
        "cluster": state.cluster,
        "started": state.started,
        "ended": state.ended,
        "exit_code": state.exit_code,
        "cost": asdict(cost) | {"at_most": cost.at_most},
    }
