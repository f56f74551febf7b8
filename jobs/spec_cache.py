"""The `cache:` of a spec: a URL, or a mapping that says with whom it is shared."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from crab_platform.trust import Trust, check_zone
from jobs.spec_base import Place, Record

SIGNING_KEY_VARIABLE = "CRAB_CACHE_SIGNING_KEY"
"""Names a file that holds the private key of the zone; keys never stand in a spec."""


class LocalDisk(Record):
    """A fast disk of the worker, that keeps what was read and may forget it."""

    folder: Place
    max_gb: float = Field(default=50, gt=0)


class Cache(Record):
    """Where features lie. Everything but the URL may be left out."""

    url: Place
    """A folder or s3://bucket/prefix. Credentials and endpoint come from AWS_* environment variables."""
    team: str = ""
    """Stands in what is written, for `crab cache stat`."""
    read_through: list[Place] = Field(default_factory=list)
    """Caches of other teams: read when this one lacks a feature, never written but for leases and pins."""
    zone: str = ""
    """Sign what is written as this zone, with the private key in the file that CRAB_CACHE_SIGNING_KEY names."""
    trust: dict[str, str] = Field(default_factory=dict)
    """Zones whose commits are taken: name -> public key. None at all: every commit is taken."""
    local: LocalDisk | None = None
    keep_days: float = Field(default=14, gt=0)
    """How long garbage collection keeps a manifest that nobody pinned."""

    def model_post_init(self, context: Any) -> None:
        """Raises ValueError for zones and keys that are none."""
        if self.zone:
            check_zone(self.zone)
        Trust(self.trust)


def _from_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


CachePlace = Annotated[Cache, BeforeValidator(_from_url)]


class DecodedWindows(Record):
    """The first level of the cache: frames and sound as decoded, before any encoder."""

    max_clip_mb: float = Field(default=16, gt=0)
    """A stream of a clip that is larger decoded is not kept."""
