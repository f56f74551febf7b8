"""`crab cache gc`: what nobody needs is condemned, and deleted days later. Without --apply it only tells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.garbage import DAY_S, Collector, Report, Roots
from jobs.output import console, line, progress, table


def collect(
    cache: FeatureCache, place: str, *, apply: bool, grace_days: float, sweep_after_days: float
) -> dict[str, Any]:
    """One pass; shows it, and returns what `--json` prints."""
    collector = Collector(
        cache.store,
        trust=cache.trust,
        grace_s=grace_days * DAY_S,
        sweep_after_s=sweep_after_days * DAY_S,
        clock=cache.clock,
    )
    sizes = _sizes(cache)
    roots = collector.roots()
    with progress("files deleted", 0) as bar:
        report = collector.run(apply=apply, on_progress=bar)
    record = {
        "cache": cache.store.url,
        "applied": apply,
        "condemned": _sums(report.condemned, sizes),
        "deleted": _sums(report.deleted, sizes),
        "spared": _sums(report.spared, sizes),
        "waiting": [vars(one) for one in report.waiting],
        "leases": [
            {
                "job": lease.job,
                "by": lease.by,
                "renewed_s_ago": _age_s(cache, lease.renewed_ns),
                "manifests": list(lease.manifests),
                "snapshot": lease.seen is not None,
            }
            for lease in roots.leases
        ],
        "dead_leases": len(roots.dead_leases),
        "pins": [vars(pin) for pin in roots.pins],
        "missing_manifests": report.missing_manifests,
        "left_alone": report.left_alone,
    }
    _show(cache, place, report, roots, record)
    return record


def _show(
    cache: FeatureCache, place: str, report: Report, roots: Roots, record: dict[str, Any]
) -> None:
    url = cache.store.url
    _show_sums(
        f"{url}: " + ("condemned now" if report.applied else "would be condemned"),
        record["condemned"],
    )
    _show_sums("deleted now" if report.applied else "would be deleted", record["deleted"])
    _show_sums("condemned before, and needed again: kept", record["spared"])
    if report.waiting:
        table(
            "condemned, not deleted yet",
            ("set", "files", "why"),
            [(one.identifier, one.paths, one.why) for one in report.waiting],
        )
    if roots.leases:
        table(
            "leases: kept for",
            ("job", "by", "renewed", "manifests"),
            [
                (
                    lease.job,
                    lease.by,
                    f"{_age_s(cache, lease.renewed_ns) / 60:.0f} min ago",
                    ", ".join(digest[:12] for digest in lease.manifests) or "(still at work)",
                )
                for lease in roots.leases
            ],
        )
    if roots.pins:
        table(
            "pins: kept for",
            ("project", "name", "manifest", "reason"),
            [(pin.project, pin.name, pin.manifest[:12], pin.reason) for pin in roots.pins],
        )
    if report.left_alone:
        reasons: dict[str, int] = {}
        for reason in report.left_alone.values():
            reasons[reason] = reasons.get(reason, 0) + 1
        table(
            "commits left alone, and with them all packs that no commit names",
            ("reason", "commits"),
            sorted(reasons.items()),
        )
    for digest in report.missing_manifests:
        console.print(
            f"ALARM: manifest {digest} is leased or pinned, but not there. What it needs is not known, so nothing is "
            "condemned or deleted: run the preprocess job that made it again, or end its pin (`crab cache pins`)",
            style="bold red",
            soft_wrap=True,
        )
    if report.applied and (report.condemned or report.waiting):
        line("Condemned files are deleted by a later pass: run the same command again in some days")
    elif report.missing_manifests:
        line("Nothing was changed.")
    elif report.applied:
        line("There was nothing to condemn." if report.deleted else "There was nothing to do.")
    elif report.condemned or report.deleted:
        line(f"Nothing was changed. To do it: crab cache gc {place} --apply")
    else:
        line("Nothing was changed, and there is nothing to do.")


def _show_sums(title: str, sums: Mapping[str, Mapping[str, int]]) -> None:
    if sums:
        rows = [(why, one["files"], f"{one['bytes'] / 1e6:.1f}") for why, one in sums.items()]
        table(title, ("why", "files", "MB of features"), rows)


def _sums(doomed: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Reason -> files and bytes of features. A pack's bytes count with its commit."""
    found: dict[str, dict[str, int]] = {}
    for path, why in sorted(doomed.items()):
        one = found.setdefault(why, {"files": 0, "bytes": 0})
        one["files"] += 1
        one["bytes"] += sizes.get(path, 0)
    return found


def _sizes(cache: FeatureCache) -> dict[str, int]:
    """Bytes of features that each commit names, and of each pack that no commit names."""
    sizes: dict[str, int] = {}
    packs = cache.store.list(commits.PACKS)
    named: set[str] = set()
    for name, rows in cache.scan(["key", "pack", "length"]):
        lengths = dict(
            zip(rows.column("key").to_pylist(), rows.column("length").to_pylist(), strict=True)
        )
        sizes[name.path] = sum(lengths.values())
        named.update(rows.column("pack").unique().to_pylist())
    for path in packs:
        if path not in named:
            try:
                sizes[path] = cache.store.size(path)
            except FileNotFoundError:  # swept by another pass
                continue
    return sizes


def _age_s(cache: FeatureCache, at_ns: int) -> float:
    return max(0.0, (cache.clock.time_ns() - at_ns) / 1e9)
