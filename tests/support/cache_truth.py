"""What a cache must hold, and what is wrong with one that a job left behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.catalog import read_manifest
from crab_platform.packs import Array, CorruptEntry
from crab_platform.storage import open_store


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a run without faults left: the digest of its manifest, and the features of every key."""

    manifest: str
    features: dict[str, dict[str, Array]]


def truth_of(cache_url: str, manifest_digest: str) -> Truth:
    cache = FeatureCache(open_store(cache_url))
    entries = [
        row.entry for row in read_manifest(cache.store, manifest_digest).ready() if row.entry
    ]
    features = dict(zip([entry.key for entry in entries], cache.read(entries), strict=True))
    return Truth(manifest=manifest_digest, features=features)


def problems(cache_url: str, manifest_digest: str, truth: Truth) -> list[str]:
    """What readers of the cache, through its index or through a manifest, would see other than the truth."""
    cache = FeatureCache(open_store(cache_url))
    index = cache.index()
    found = []
    if manifest_digest != truth.manifest:
        found.append(f"manifest {manifest_digest} instead of {truth.manifest}")
    found += [f"{path} is {reason}" for path, reason in index.skipped_commits.items()]
    found += [f"commits disagree about {key}" for key in index.conflicts]
    named = [row.entry for row in read_manifest(cache.store, manifest_digest).ready() if row.entry]
    views = {
        "the index": list(index.lookup(index).values()),
        # A file may stand under several names; all of them must mean the same entry.
        "the manifest": list(set(named)),
    }
    for view, entries in views.items():
        count = Counter(entry.key for entry in entries)
        found += [f"{view} has {n} entries of {key}" for key, n in count.items() if n != 1]
        found += [f"{view} has no entry of {key}" for key in truth.features.keys() - count.keys()]
        for entry in entries:
            expected = truth.features.get(entry.key)
            if expected is None:
                found.append(f"{view} has an entry of {entry.key}, which no clip has")
                continue
            try:
                (arrays,) = cache.read([entry])
            except CorruptEntry as error:
                found.append(f"{view}: {error}")
                continue
            if not _equal(arrays, expected):
                found.append(f"{view}: the features of {entry.key} are others")
    return found


def committed(cache: Path) -> set[str]:
    """File names of the media that commits in a folder name by now."""
    names: set[str] = set()
    for path in (cache / commits.COMMITS).glob("*.parquet"):
        urls = commits.read_commit(path.read_bytes()).column("source_url").to_pylist()
        names |= {url.rpartition("/")[2] for url in urls}
    return names


def num_commits(cache: Path) -> int:
    return len(list((cache / commits.COMMITS).glob("*.parquet")))


def _equal(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].tobytes() == other[name].tobytes()
        for name in one
    )
