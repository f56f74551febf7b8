"""What is in a cache and what it has saved, counted once: the figures of `crab cache stat`.

Entries come from the commits, hits and savings from what finished jobs left in `usage/`. One pass
over the commits, a file at a time; what stays in memory is the index and one count a group.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pyarrow.compute as pc

from crab_platform import commits, usage
from crab_platform.cache import FeatureCache
from crab_platform.cost import Prices, compute_cost
from crab_platform.index import CacheIndex
from crab_platform.leases import Lease, read_leases
from crab_platform.pins import Pin, read_pins
from crab_platform.quarantine import read_quarantine
from crab_platform.usage import Usage, encoder_label, read_usage

By = Literal["encoder", "experiment", "team", "run"]
WAYS: tuple[str, ...] = get_args(By)
NOT_SAID = "(not said)"
"""Group of entries whose writer gave no experiment, team or run."""

_COLUMNS = ("key", "pack", "length", "record", "run", "experiment", "team", "decode_s", "encode_s")
_MEDIA = r'"media_sha256":"[0-9a-f]*"'


@dataclass(kw_only=True)
class Group:
    """Sums over entries and jobs that belong together."""

    entries: int = 0
    bytes: int = 0
    decode_s: float = 0.0
    """What the entries cost, where it is known."""
    encode_s: float = 0.0
    hits: int = 0
    encoded: int = 0
    saved_cpu_s: float = 0.0
    saved_gpu_s: float = 0.0

    @property
    def hit_ratio(self) -> float | None:
        """Share of what jobs asked for that was there; None when no job has said."""
        asked = self.hits + self.encoded
        return self.hits / asked if asked else None

    def saved(self, prices: Prices | None) -> float | None:
        """Money that was not spent on computing again."""
        return None if prices is None else compute_cost(self.saved_cpu_s, self.saved_gpu_s, prices)


@dataclass(kw_only=True)
class Census:
    """Everything at once."""

    total: Group = field(default_factory=Group)
    groups: dict[str, Group] = field(default_factory=dict)
    by: str = "encoder"
    keys: int = 0
    """Keys that readers find; entries of `total` are these, without duplicates."""
    duplicates: int = 0
    conflicts: list[str] = field(default_factory=list)
    quarantined: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    commits: int = 0
    packs: int = 0
    packs_bytes: int = 0
    """Bytes of features in packs that a commit names, duplicates among them."""
    packs_without_commit: int = 0
    pins: list[Pin] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    """Live ones."""
    dead_leases: int = 0
    jobs: int = 0
    """Jobs that left a usage file."""
    unreadable_usage: dict[str, str] = field(default_factory=dict)

    @property
    def mean_pack_bytes(self) -> float:
        return self.packs_bytes / self.packs if self.packs else 0.0


def take_census(cache: FeatureCache, *, by: By = "encoder", since_ns: int = 0) -> Census:
    """Counts a cache; entries committed and jobs ended before `since_ns` are left out."""
    store, found = cache.store, Census(by=by)
    listed = set(store.list(commits.PACKS))
    index = cache.index()
    found.keys, found.duplicates, found.conflicts = len(index), index.duplicates, index.conflicts
    found.skipped = index.skipped
    found.quarantined = len({(e.key, e.commit) for _, e in read_quarantine(store, cache.trust)})
    named = _count_entries(cache, index, found, by, since_ns)
    found.packs = len(named)
    found.packs_without_commit = len(listed - named) if not index.skipped else 0
    _count_jobs(read_usage(store, found.unreadable_usage), found, by, since_ns)
    found.pins = read_pins(store)
    for _, lease in read_leases(store):
        if lease.is_dead(cache.clock.time_ns()):
            found.dead_leases += 1
        else:
            found.leases.append(lease)
    return found


def _count_entries(
    cache: FeatureCache, index: CacheIndex, found: Census, by: By, since_ns: int
) -> set[str]:
    """Counts entries that readers find; returns the packs that commits name."""
    named: set[str] = set()
    for name, table in cache.scan(_COLUMNS):
        if commits.id_time_ns(name.identifier) < since_ns:
            named.update(table.column("pack").unique().to_pylist())
            continue
        found.commits += 1
        columns = {one: table.column(one).to_pylist() for one in table.column_names[:3]}
        labels = (
            _encoders(table) if by == "encoder" else [v or NOT_SAID for v in _strings(table, by)]
        )
        decode_s, encode_s = (table.column(one).to_pylist() for one in ("decode_s", "encode_s"))
        won = index.lookup(columns["key"])
        seen: set[str] = set()
        for at, key in enumerate(columns["key"]):
            named.add(columns["pack"][at])
            if key in seen:  # another source of the same entry
                continue
            seen.add(key)
            found.packs_bytes += columns["length"][at]
            entry = won.get(key)
            if entry is None or entry.layer or entry.commit != name.identifier:
                continue
            for group in (found.total, found.groups.setdefault(labels[at], Group())):
                group.entries += 1
                group.bytes += columns["length"][at]
                group.decode_s += decode_s[at]
                group.encode_s += encode_s[at]
    return named


def _strings(table: Any, name: str) -> list[str]:
    return [str(value) for value in table.column(name).to_pylist()]


def _encoders(table: Any) -> list[str]:
    """The label of each row. Records differ in little but the media, so few of them are parsed."""
    same = pc.replace_substring_regex(table.column("record"), _MEDIA, '"media_sha256":""')
    encoded = same.combine_chunks().dictionary_encode()
    labels = [_label(text) for text in encoded.dictionary.to_pylist()]
    return [labels[at] for at in encoded.indices.to_pylist()]


def _label(text: str) -> str:
    try:
        record = json.loads(text)
    except ValueError:
        return usage.UNKNOWN
    return encoder_label(record) if isinstance(record, dict) else usage.UNKNOWN


def _count_jobs(jobs: Iterable[Usage], found: Census, by: By, since_ns: int) -> None:
    for job in _since(jobs, since_ns):
        found.jobs += 1
        cpu_s, gpu_s = _saved(job)
        for group in (found.total, *_group_of_job(job, found, by)):
            group.hits += sum(job.hits.values())
            group.encoded += sum(job.encoded.values())
            group.saved_cpu_s += cpu_s
            group.saved_gpu_s += gpu_s
        if by == "encoder":
            hits = sum(job.hits.values())
            for name in {**job.hits, **job.encoded}:
                group = found.groups.setdefault(name, Group())
                group.hits += job.hits.get(name, 0)
                group.encoded += job.encoded.get(name, 0)
                # A job says what it saved in all; an encoder's part is taken as that of its hits.
                part = job.hits.get(name, 0) / hits if hits else 0.0
                group.saved_cpu_s += cpu_s * part
                group.saved_gpu_s += gpu_s * part


def _since(jobs: Iterable[Usage], since_ns: int) -> Iterator[Usage]:
    return (job for job in jobs if job.at_ns >= since_ns)


def _group_of_job(job: Usage, found: Census, by: By) -> list[Group]:
    if by == "encoder":
        return []
    return [found.groups.setdefault(str(getattr(job, by)) or NOT_SAID, Group())]


def _saved(job: Usage) -> tuple[float, float]:
    """(CPU-seconds, GPU-seconds): decoding is always a CPU's work."""
    if job.device.startswith("cuda"):
        return job.saved_decode_s, job.saved_encode_s
    return job.saved_decode_s + job.saved_encode_s, 0.0
