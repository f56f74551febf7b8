"""`crab cache compact`: what small and half-dead packs hold, put together."""

from __future__ import annotations

from dataclasses import asdict

from crab_platform.cache import FeatureCache
from crab_platform.compaction import compact
from crab_platform.garbage import DAY_S, Collector
from jobs.output import line


def run_compact(
    cache: FeatureCache, place: str, *, apply: bool, grace_days: float
) -> dict[str, object]:
    """Compacts a cache, or says what would be; returns the figures."""
    collector = Collector(cache.store, trust=cache.trust, grace_s=grace_days * DAY_S)
    found = compact(cache, collector, apply=apply)
    what = f"{found.entries} entries ({found.bytes / 1e6:.1f} MB) of {found.packs} small or half-dead packs"
    if found.missing_manifests:
        line(
            f"{place}: manifest {found.missing_manifests[0][:12]} is leased or pinned, but not there; nothing is put "
            f"together until that is settled: `crab cache gc {place}` says how"
        )
    elif not found.packs:
        line(
            f"{place}: nothing to put together: no needed packs older than the grace are small or half dead"
        )
    elif apply:
        line(
            f"{place}: copied {what}; `crab cache gc {place} --apply` deletes the old ones in a few days"
        )
    else:
        line(f"{place}: would copy {what}; --apply does it")
    return asdict(found)
