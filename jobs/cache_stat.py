"""`crab cache stat`: what is in a cache, and what it has saved."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from crab_platform import commits, condemned, quarantine, snapshots
from crab_platform.cache import FeatureCache
from crab_platform.catalog import MANIFESTS
from crab_platform.census import WAYS as WAYS
from crab_platform.census import Census, Group, take_census
from crab_platform.cost import Prices, load_profile, money
from crab_platform.explain import time_of
from crab_platform.leases import LEASES, TTL_S
from crab_platform.pins import PINS
from crab_platform.storage import Store
from crab_platform.trust import DISTRUST, parse_path
from crab_platform.usage import USAGE
from jobs.output import console, line, table
from jobs.plan_show import size, span
from jobs.spec import SpecError

_DAY_NS = 86400 * 10**9
_SHOWN_COMMITS = 10
_FOLDERS = (
    commits.COMMITS,
    commits.PACKS,
    MANIFESTS,
    USAGE,
    LEASES,
    PINS,
    snapshots.SNAPSHOTS,
    condemned.CONDEMNED,
    quarantine.QUARANTINE,
)


@dataclass(frozen=True, kw_only=True)
class NotUsed:
    """Commits of one cache that are passed over for one reason."""

    cache: str
    """URL: the cache's own, or that of a layer below."""
    reason: str
    count: int
    first: tuple[dict[str, str], ...]
    """The newest of them, `_SHOWN_COMMITS` at most: path, identifier, zone and time."""


def stat(
    cache: FeatureCache, by: str, since_days: float | None = None, profile: str | None = None
) -> dict[str, Any]:
    """Counts, shows, and returns what `--json` prints.

    Raises SpecError for another `by` than WAYS, and for a place that holds other things than a cache.
    """
    if by not in WAYS:
        raise SpecError(f"--by {by}: expected one of {', '.join(WAYS)}")
    prices = load_profile(profile).prices if profile else None
    since_ns = time.time_ns() - int(since_days * _DAY_NS) if since_days is not None else 0
    census = take_census(cache, by=by, since_ns=since_ns)  # type: ignore[arg-type]  # checked above
    not_used = _not_used(cache, census)
    if _is_empty(cache.store, census):
        line(f"{cache.store.url}: empty, nothing was committed yet")
    else:
        _show(cache.store.url, census, prices, since_days)
    _show_alarms(census, not_used, cache.store.url)
    return _record(cache.store.url, census, prices, not_used)


def _is_empty(store: Store, census: Census) -> bool:
    """Whether nothing lies there. Raises SpecError where something lies that is no part of a cache."""
    if census.keys or census.commits or census.skipped or census.jobs or census.unreadable_usage:
        return False
    if any(store.list(folder) for folder in _FOLDERS):
        return False
    names = os.listdir(store.url) if "://" not in store.url else store.list()
    if any(not name.startswith(".") and name not in _FOLDERS for name in names):
        raise SpecError(
            f"{store.url} holds no cache, but other things; give the place that `cache:` of a spec names"
        )
    return True


def _not_used(cache: FeatureCache, census: Census) -> list[NotUsed]:
    """By cache and reason, the layers below included."""
    if not cache.layers and not census.skipped:
        return []
    index = cache.index()
    found = []
    for one in (index, *index.below):
        for reason in sorted(one.skipped):
            paths = [path for path, why in one.skipped_commits.items() if why == reason]
            found.append(
                NotUsed(
                    cache=one.layer or cache.store.url,
                    reason=reason,
                    count=len(paths),
                    first=tuple(map(_named, sorted(paths, reverse=True)[:_SHOWN_COMMITS])),
                )
            )
    return found


def _named(path: str) -> dict[str, str]:
    name = parse_path(path)
    if name is None:
        return {"path": path, "identifier": "", "zone": "", "at": ""}
    identifier = name.identifier
    return {"path": path, "identifier": identifier, "zone": name.zone, "at": time_of(identifier)}


def _show(url: str, census: Census, prices: Prices | None, since_days: float | None) -> None:
    when = "" if since_days is None else f", of the last {since_days:g} days"
    head = [census.by, "entries", "size", "hits", "hit ratio", "CPU time saved", "GPU time saved"]
    named = sorted(census.groups.items(), key=lambda item: (-item[1].bytes, item[0]))
    table(
        f"{url}{when}",
        head + (["money saved"] if prices else []),
        [_row(name, group, prices) for name, group in [*named, ("all", census.total)]],
    )
    rows: list[tuple[str, object]] = [
        ("commits", census.commits),
        (
            "packs",
            f"{census.packs}, {size(census.mean_pack_bytes)} of features on average",
        ),
        ("packs without a commit", census.packs_without_commit),
        ("duplicates", f"{census.duplicates} (the same key committed twice; gc removes them)"),
        ("in quarantine", census.quarantined),
        ("pins", len(census.pins)),
        ("leases", _leases(census)),
        ("jobs counted", census.jobs),
    ]
    table("beside that", ("what", "how much"), rows)
    if not census.jobs:
        line("No finished job has left a usage file, so hits and savings are not known.")


def _show_alarms(census: Census, not_used: Sequence[NotUsed], url: str) -> None:
    for alarm in alarms(census, not_used, url):
        console.print(f"ALARM: {alarm}", style="bold red", soft_wrap=True)
    for one in not_used:
        for commit in one.first:
            by = f"zone {commit['zone']}" if commit["zone"] else "unsigned"
            line(
                f"  {commit['identifier'] or commit['path']}, {by}, {commit['at']}: {one.reason} in {one.cache}"
            )
        if one.count > len(one.first):
            line(f"  and {one.count - len(one.first):,} older: {one.reason} in {one.cache}")


def _at_work(census: Census) -> int:
    """Leases that a job renews; the others keep a manifest of one that ended."""
    return sum(lease.seen is not None or lease.ttl_s <= TTL_S for lease in census.leases)


def _leases(census: Census) -> str:
    if not census.leases:
        return "0"
    at_work = _at_work(census)
    rest = len(census.leases) - at_work
    return f"{len(census.leases)} ({at_work} of jobs at work, {rest} keep the manifest of a job that ended)"


def alarms(census: Census, not_used: Sequence[NotUsed], url: str) -> list[str]:
    """What somebody should look at now; `url` is the cache's own."""
    found = []
    for one in not_used:
        of, where = "", "here"
        if one.cache != url:
            of, where = f" of {one.cache}, which this cache reads through,", "there"
        if one.reason not in DISTRUST:
            found.append(f"{one.count} commits{of} cannot be used: {one.reason}")
            continue
        found.append(
            f"{one.count} commits{of} are not used: {one.reason}. Somebody else writes {where}; see who may write to "
            "the store, and what `trust:` of the spec says"
        )
    if census.conflicts:
        found.append(
            f"{len(census.conflicts)} keys have entries that differ, the first is {census.conflicts[0]}: the encoder "
            "is not deterministic, or something that changes it is missing from the key. Ask "
            "`crab cache verify CACHE --all --recompute SPEC`"
        )
    if census.unreadable_usage:
        found.append(f"{len(census.unreadable_usage)} usage files cannot be read")
    return found


def _row(name: str, group: Group, prices: Prices | None) -> Sequence[object]:
    ratio = group.hit_ratio
    saved = group.saved(prices)
    return [
        name,
        group.entries,
        size(group.bytes),
        group.hits,
        "" if ratio is None else f"{ratio:.1%}",
        span(group.saved_cpu_s),
        span(group.saved_gpu_s),
        *([] if saved is None or prices is None else [money(saved, prices.currency)]),
    ]


def _record(
    url: str, census: Census, prices: Prices | None, not_used: Sequence[NotUsed]
) -> dict[str, Any]:
    return {
        "cache": url,
        "by": census.by,
        "groups": {name: _group(group, prices) for name, group in sorted(census.groups.items())},
        "total": _group(census.total, prices),
        "commits": census.commits,
        "packs": census.packs,
        "mean_pack_bytes": census.mean_pack_bytes,
        "packs_without_commit": census.packs_without_commit,
        "duplicates": census.duplicates,
        "conflicts": census.conflicts,
        "quarantined": census.quarantined,
        "skipped_commits": census.skipped,
        "not_used_commits": [asdict(one) for one in not_used],
        "alarms": alarms(census, not_used, url),
        "pins": len(census.pins),
        "leases": len(census.leases),
        "leases_of_jobs_at_work": _at_work(census),
        "dead_leases": census.dead_leases,
        "jobs": census.jobs,
        "unreadable_usage": census.unreadable_usage,
    }


def _group(group: Group, prices: Prices | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "entries": group.entries,
        "bytes": group.bytes,
        "hits": group.hits,
        "encoded": group.encoded,
        "hit_ratio": group.hit_ratio,
        "cpu_hours_saved": group.saved_cpu_s / 3600,
        "gpu_hours_saved": group.saved_gpu_s / 3600,
        "decode_s": group.decode_s,
        "encode_s": group.encode_s,
    }
    if prices is not None:
        record |= {"money_saved": group.saved(prices), "currency": prices.currency}
    return record
