"""A spec becomes the RayJob that runs it on a profile's cluster: `crab submit`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from crab_platform.cluster_profile import load_cluster, looks_secret
from crab_platform.job_cost import job_cost
from crab_platform.rayjob import JobRequest, ray_job
from crab_platform.rayjob_rules import objections
from jobs.code_zip import CodeZip
from jobs.placement import needs_of
from jobs.spec import SpecError, parse_spec
from jobs.spec_yaml import read_yaml


def manifest_of(
    path: str | Path,
    changes: Sequence[str],
    profile: str,
    *,
    misses: int | None = None,
    code: CodeZip | None = None,
) -> dict[str, Any]:
    """The RayJob of a spec.

    Args:
        changes: as of `crab run --set`.
        profile: name or path of a profile that describes a cluster.
        misses: see placement.needs_of.
        code: to take along; the image's when left out. It is not uploaded here.

    Raises:
        SpecError: the spec, or what it asks of this cluster, cannot be.
        ProfileError: the profile is wrong.
    """
    _, cluster, prices = load_cluster(profile)
    values = read_yaml(path, changes)
    parse_spec(values, str(path))
    _refuse_secrets(values, "")
    _move_to_cluster(values, {}, cluster.mlflow.uri)
    spec = parse_spec(values, str(path))
    request = JobRequest(
        name=spec.name,
        kind=spec.job,
        spec=json.dumps(values, sort_keys=True),
        needs=needs_of(spec, cluster, misses),
        version=version("crab-platform"),
        code=code.path if code else None,
        commit=code.commit if code else None,
    )
    cost = job_cost(ray_job(request, cluster), prices)
    job = ray_job(replace(request, hourly=(cost.hourly, cost.currency)), cluster)
    if found := objections(job):
        raise SpecError("the cluster would refuse this job:\n" + "\n".join(found))
    return job


def as_yaml(job: Mapping[str, Any]) -> str:
    """For kubectl and for people."""
    return yaml.safe_dump(dict(job), sort_keys=False, width=120)


def _move_to_cluster(values: dict[str, Any], outer: Mapping[str, Any], mlflow: str) -> None:
    """Where runs are tracked is the cluster's matter, and pods do not have the specs of this machine."""
    tracking = {**outer, **values.get("tracking", {}), "uri": mlflow}
    values["tracking"] = tracking
    for step in values.get("steps", ()):
        _move_to_cluster(step, tracking, mlflow)
    first = values.get("preprocess")
    if isinstance(first, str):
        values["preprocess"] = first = read_yaml(first)
    if isinstance(first, dict):
        _move_to_cluster(first, tracking, mlflow)


def _refuse_secrets(values: Any, where: str) -> None:
    """Whoever may read RayJobs reads specs."""
    if isinstance(values, Mapping):
        for name, inner in values.items():
            _refuse_secrets(inner, f"{where}.{name}" if where else str(name))
    elif isinstance(values, list):
        for number, inner in enumerate(values):
            _refuse_secrets(inner, f"{where}[{number}]")
    elif isinstance(values, str) and looks_secret("", values):
        raise SpecError(
            f"{where} holds a secret, which everybody could read in the RayJob; leave it out, and name a Secret in the "
            "profile under secrets:"
        )
