"""Compaction: what is needed of small and half-dead packs, put together in packs of full size.

By the rules of garbage collection: the copies are ordinary commits, the old commits are condemned,
and the sweep deletes them days later, when it finds the copies. Readers that still have the old
places look the key up (`manifest_reader.py`). Killed in the middle, there are duplicates.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from crab_platform import condemned
from crab_platform.cache import FeatureCache
from crab_platform.commit_table import CommitTable, content_of
from crab_platform.condemned import Doomed
from crab_platform.copying import copy_entries
from crab_platform.garbage import Collector, Report
from crab_platform.packs import Entry

COPIED = "copied into a larger pack"
SMALL = 0.25
"""A pack with less than this share of `pack_bytes` in needed entries is small."""
HALF_DEAD = 0.5
"""A pack with less than this share of its own bytes in needed entries is half dead."""


@dataclass(frozen=True, kw_only=True)
class Compaction:
    """What was put together, or would be."""

    packs: int
    entries: int
    bytes: int
    applied: bool
    missing_manifests: tuple[str, ...]
    """Leased or pinned, but not there: while there are any, nothing is put together."""


def compact(cache: FeatureCache, collector: Collector, *, apply: bool) -> Compaction:
    """Copies what is needed of small and half-dead packs that are older than the collector's grace.

    Only packs of this cache's own zone: another zone's entries would be signed by us. A single
    small pack stays: there is nothing to put it together with.
    """
    table = CommitTable.load(cache.store, cache.trust)
    known = condemned.paths_of(cache.store, condemned.list_sets(cache.store))
    report = Report(applied=False)
    needed = collector.needed(collector.roots(), table, report)
    kept = table.kept(needed, exclude=known)
    zone = cache.signer.zone if cache.signer else ""
    total: Counter[str] = Counter()
    alive: dict[str, list[Entry]] = {}
    path_of = {identifier: path for path, identifier in table.ids.items()}
    for entry in cache.index().entries():
        path = path_of.get(entry.commit, "")
        total[path] += entry.length
        if path in kept and content_of(entry.key, entry.blake3) in needed:
            alive.setdefault(path, []).append(entry)
    chosen: dict[str, list[Entry]] = {}
    for path, entries in alive.items():
        live = sum(entry.length for entry in entries)
        is_poor = live < SMALL * cache.pack_bytes or live < HALF_DEAD * total[path]
        if is_poor and table.zones[path] == zone and collector.is_old(table.ids[path]):
            chosen[path] = entries
    is_any_half_dead = any(
        sum(entry.length for entry in entries) < HALF_DEAD * total[path]
        for path, entries in chosen.items()
    )
    # What a missing manifest needs is not known, so nothing may be left behind in an old pack.
    if (len(chosen) < 2 and not is_any_half_dead) or report.missing_manifests:
        chosen = {}
    entries = [entry for path in sorted(chosen) for entry in chosen[path]]
    if apply and entries:
        copied = copy_entries(cache, entries)
        # A commit goes only when all that is needed of it was copied.
        doomed: Doomed = {
            path: COPIED
            for path, members in chosen.items()
            if all(content_of(entry.key, entry.blake3) in copied for entry in members)
        }
        if doomed:
            condemned.write_doomed(cache.store, condemned.set_path(cache.clock.new_id()), doomed)
    return Compaction(
        packs=len(chosen),
        entries=len(entries),
        bytes=sum(entry.length for entry in entries),
        applied=apply,
        missing_manifests=tuple(report.missing_manifests),
    )
