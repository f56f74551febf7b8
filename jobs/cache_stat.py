"""`crab cache stat`: what is in a cache, and what it has saved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from crab_platform.cache import FeatureCache
from crab_platform.census import WAYS as WAYS
from crab_platform.census import Census, Group, take_census
from crab_platform.cost import Prices, load_profile, money
from crab_platform.trust import DISTRUST
from jobs.output import console, line, table
from jobs.spec import SpecError

_DAY_NS = 86400 * 10**9


def stat(
    cache: FeatureCache, by: str, since_days: float | None = None, profile: str | None = None
) -> dict[str, Any]:
    """Counts, shows, and returns what `--json` prints. Raises SpecError for another `by` than WAYS."""
    if by not in WAYS:
        raise SpecError(f"--by {by}: expected one of {', '.join(WAYS)}")
    prices = load_profile(profile).prices if profile else None
    since_ns = time.time_ns() - int(since_days * _DAY_NS) if since_days is not None else 0
    census = take_census(cache, by=by, since_ns=since_ns)  # type: ignore[arg-type]  # checked above
    _show(cache.store.url, census, prices, since_days)
    return _record(cache.store.url, census, prices)


def _show(url: str, census: Census, prices: Prices | None, since_days: float | None) -> None:
    when = "" if since_days is None else f", of the last {since_days:g} days"
    head = [census.by, "entries", "GB", "hits", "hit ratio", "CPU-hours saved", "GPU-hours saved"]
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
            f"{census.packs}, {census.mean_pack_bytes / 1e6:.1f} MB of features on average",
        ),
        ("packs without a commit", census.packs_without_commit),
        ("duplicates", f"{census.duplicates} (the same key committed twice; gc removes them)"),
        ("in quarantine", census.quarantined),
        ("pins", len(census.pins)),
        ("leases of live jobs", len(census.leases)),
        ("jobs counted", census.jobs),
    ]
    table("beside that", ("what", "how much"), rows)
    if not census.jobs:
        line("No finished job has left a usage file, so hits and savings are not known.")
    for alarm in alarms(census):
        console.print(f"ALARM: {alarm}", style="bold red", soft_wrap=True)


def alarms(census: Census) -> list[str]:
    """What somebody should look at now."""
    found = []
    for reason in sorted(set(census.skipped) & set(DISTRUST)):
        found.append(
            f"{census.skipped[reason]} commits are not used: {reason}. Somebody else writes here; see who may write to "
            "the store, and what `trust:` of the spec says"
        )
    for reason in sorted(set(census.skipped) - set(DISTRUST)):
        found.append(f"{census.skipped[reason]} commits cannot be used: {reason}")
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
        f"{group.bytes / 1e9:.3f}",
        group.hits,
        "" if ratio is None else f"{ratio:.1%}",
        f"{group.saved_cpu_s / 3600:.2f}",
        f"{group.saved_gpu_s / 3600:.2f}",
        *([] if saved is None or prices is None else [money(saved, prices.currency)]),
    ]


def _record(url: str, census: Census, prices: Prices | None) -> dict[str, Any]:
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
        "alarms": alarms(census),
        "pins": len(census.pins),
        "leases": len(census.leases),
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
