"""Team B trains on features that lie in team A's cache: folders a and b, and a manifest in both that names a."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cache_samples import entry, key, rows

from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest
from crab_platform.clock import SYSTEM, Clock
from crab_platform.holding import hold_job, publish_manifest
from crab_platform.storage import open_store

CLIPS = 3
PAIRS = [(f"clip-{number}", "video") for number in range(CLIPS)]


def team_a(folder: Path) -> FeatureCache:
    """Every clip in a pack of its own, so that each can be lost alone."""
    cache = FeatureCache(open_store(folder / "a"), pack_bytes=1)
    cache.commit([entry(number) for number in range(CLIPS)])
    return cache


def team_b(
    folder: Path, layers: Iterable[str] = ("a",), *, url: str = "b", clock: Clock = SYSTEM
) -> FeatureCache:
    stores = [open_store(folder / layer) for layer in layers]
    return FeatureCache(open_store(folder / url), layers=stores, clock=clock)


def publish(cache: FeatureCache) -> Manifest:
    """What a preprocess job of the cache writes when all clips are there."""
    hold = hold_job(cache, "preprocess")
    found = cache.index(hold.exclude).lookup([key(number).digest for number in range(CLIPS)])
    return publish_manifest(hold, rows(found.values()), keep_s=60)
