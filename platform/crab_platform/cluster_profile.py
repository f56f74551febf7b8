"""A profile's description of a cluster (`k8s/profiles/*.yaml`): where jobs run, on which nodes, from which image.

Specs say what to do and profiles where, so neither has to change for the other. Prices are read by cost.py; this file
reads all the rest. A secret is named, never written: what looks like one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from crab_platform.cost import Prices, ProfileError, hint, read_profile

_DNS_1123 = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
_SECRET_NAME = re.compile(
    r"(password|passwd|secret|token|credential|private|(access|api)_?key)", re.I
)
_SECRET_VALUE = re.compile(
    r"://[^/\s:@]+:[^/\s@]+@|\bAKIA[0-9A-Z]{16}\b|-----BEGIN |\beyJ[\w-]{8,}\."
    r"|[?&](?i:X-Amz-(Signature|Credential|Security-Token)|sig|signature|token)="
)
"""A URL with a password or a signature, an AWS access key, a PEM file, a JSON web token."""


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable of this name and value had better be a reference to a Secret."""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


def _by_digest(image: str) -> str:
    if not re.fullmatch(r"[\w.:/-]+@sha256:[0-9a-f]{64}", image):
        shown = "this" if looks_secret("", image) else repr(image)
        raise ValueError(
            f"{shown} is no image by digest: a tag may be another image tomorrow. Take what "
            "`docker buildx imagetools inspect IMAGE --format '{{.Manifest.Digest}}'` prints: IMAGE@sha256:..."
        )
    return image


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SecretKey(_Record):
    """A value that lies in a Secret of the namespace."""

    secret: str = Field(pattern=_DNS_1123)
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$")


class Toleration(_Record):
    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class NodeGroup(_Record):
    """One kind of node, and what a Ray pod takes of it."""

    cpus: int = Field(ge=1)
    memory_gib: int = Field(ge=1)
    gpus: int = Field(default=0, ge=0)
    gpu_resource: str = "nvidia.com/gpu"
    max_pods: int = Field(default=1, ge=1)
    """No job gets more of them."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    spot: bool = False
    """Nodes that may be taken away at any time. Never the head's."""


class NodeGroups(_Record):
    head: NodeGroup
    cpu: NodeGroup | None = None
    gpu: NodeGroup | None = None

    @model_validator(mode="after")
    def _fit(self) -> NodeGroups:
        if self.head.spot:
            raise ValueError("head: spot is for workers; a job does not survive its head")
        if self.cpu is None and self.gpu is None:
            raise ValueError("give cpu or gpu: work is not done on the head")
        if self.cpu is not None and self.cpu.gpus:
            raise ValueError("cpu: gpus must be 0; a group with GPUs is gpu")
        if self.gpu is not None and not self.gpu.gpus:
            raise ValueError("gpu: gpus must be 1 or more")
        return self


class Queue(_Record):
    """Kueue."""

    name: str = Field(pattern=_DNS_1123)
    """Of a LocalQueue in the namespace."""
    priority_class: str | None = Field(default=None, pattern=_DNS_1123)
    elastic: bool = False
    """Whether Kueue's gate ElasticJobsViaWorkloadSlices is on: without it nothing that it queues may autoscale."""


class Mlflow(_Record):
    uri: str = Field(pattern=r"^https?://")
    user: SecretKey | None = None
    password: SecretKey | None = None


class Limits(_Record):
    """How long what may take, and what is kept."""

    start_minutes: int = Field(default=30, ge=1)
    """A job that does not run by then fails (`preRunningDeadlineSeconds`): no node, no image, no quota."""
    hours: int = Field(default=24, ge=1)
    retries: int = Field(default=2, ge=0)
    """A job whose cluster is lost is started again so often, each time on a new cluster."""
    keep_minutes: int = Field(default=60, ge=1)
    """A finished job's object is kept so long; its workers and cluster go at once."""


class ClusterProfile(_Record):
    """All of a profile but its prices."""

    namespace: str = Field(pattern=_DNS_1123)
    image: Annotated[str, AfterValidator(_by_digest)]
    image_pull_secret: str | None = Field(default=None, pattern=_DNS_1123)
    ray_version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    """Of the image. Clusters with a token need 2.52 or newer."""
    service_account: str = Field(default="crab-job", pattern=_DNS_1123)
    """Its cloud role reads and writes the bucket; there are no keys."""
    auth_secret: str = Field(default="crab-ray-token", pattern=_DNS_1123)
    """Secret whose key auth_token is the token of every Ray cluster in the namespace."""
    node_groups: NodeGroups
    queue: Queue | None = None
    workspace: str = Field(default="crab-work", pattern=_DNS_1123)
    """PersistentVolumeClaim (ReadWriteMany) on which runs and data lie; mounted as work/ of the job's folder."""
    bucket: str = Field(pattern=r"^s3://[a-z0-9][-.a-z0-9]{1,61}[a-z0-9](/.*)?$")
    mlflow: Mlflow
    environment: dict[str, str] = Field(default_factory=dict)
    secrets: dict[str, SecretKey] = Field(default_factory=dict)
    """Variables whose values lie in Secrets."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _no_secret(self) -> ClusterProfile:
        for name, value in self.environment.items():
            if looks_secret(name, value):
                raise ValueError(
                    f"environment.{name} looks like a secret; put it into a Secret and name that under secrets: "
                    f"{name}: {{secret: NAME, key: KEY}}"
                )
        if twice := sorted(self.environment.keys() & self.secrets.keys()):
            raise ValueError(f"{', '.join(twice)}: both in environment and in secrets")
        if _SECRET_VALUE.search(self.mlflow.uri):
            raise ValueError(
                "mlflow.uri has a password; name Secrets under mlflow.user and mlflow.password"
            )
        if tuple(map(int, self.ray_version.split("."))) < (2, 52, 0):
            raise ValueError(f"ray_version {self.ray_version}: a token needs 2.52.0 or newer")
        return self


def load_cluster(name_or_path: str | Path) -> tuple[str, ClusterProfile, Prices]:
    """The profile's name, its cluster and its prices.

    Raises ProfileError where it is absent or wrong, or describes no cluster.
    """
    path, values, prices = read_profile(name_or_path)
    values = {name: value for name, value in values.items() if name != "prices"}
    if not values:
        raise ProfileError(
            f"{path} has prices only, and describes no cluster; docs/cluster.md says what else a profile holds"
        )
    try:
        return path.stem, ClusterProfile.model_validate(values), prices
    except ValidationError as error:
        raise ProfileError(f"{path}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(map(str, problem["loc"]))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key; {hint(str(problem['loc'][-1]), _keys(problem['loc'][:-1]))}"
        lines.append(f"{place}: {message}" if place else message)
    return "; ".join(lines)


def _keys(place: tuple[int | str, ...]) -> Mapping[str, Any]:
    """The keys that there may be."""
    model: Any = ClusterProfile
    for name in place:
        field = getattr(model, "model_fields", {}).get(name)
        kinds = (
            () if field is None else (field.annotation, *getattr(field.annotation, "__args__", ()))
        )
        model = next((kind for kind in kinds if hasattr(kind, "model_fields")), _Record)
    return dict(model.model_fields)
