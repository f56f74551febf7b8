"""Reading by a manifest whose places are wrong: key and digest lead to a copy, or words say what to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cache_samples import entry, equal_to_stored, features, key, rows
from support.small_jobs import Later
from support.two_caches import CLIPS, PAIRS, publish, team_a, team_b

from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, build_manifest, read_manifest
from crab_platform.index import CacheIndex
from crab_platform.manifest_reader import RELOAD_S, ManifestReader
from crab_platform.packs import CorruptEntry, new_entry
from crab_platform.quarantine import QUARANTINE, read_quarantine
from crab_platform.storage import open_store


class Counting(FeatureCache):
    """A cache that counts how often its index is loaded."""

    loads = 0

    def index(self, *arguments: Any) -> CacheIndex:
        self.loads += 1
        return super().index(*arguments)


def is_whole(cache: FeatureCache, manifest: Manifest) -> bool:
    found = ManifestReader(cache, manifest).read(PAIRS)
    return all(equal_to_stored(arrays, number) for number, arrays in enumerate(found))


@pytest.mark.parametrize("where", ["own cache", "another layer", "partly in each"])
def test_a_layer_that_is_no_longer_read_is_a_wrong_place(tmp_path: Path, where: str) -> None:
    team_a(tmp_path)
    manifest = publish(team_b(tmp_path))
    if where == "own cache":
        team_b(tmp_path, []).commit([entry(number) for number in range(CLIPS)])
        assert is_whole(team_b(tmp_path, []), manifest)
        return
    (tmp_path / "a").rename(tmp_path / "moved")
    if where == "partly in each":
        team_b(tmp_path, []).commit([entry(1)])
    assert is_whole(team_b(tmp_path, ["moved"]), manifest)


def test_features_of_a_layer_that_is_not_read_and_nowhere_else_say_so(tmp_path: Path) -> None:
    team_a(tmp_path)
    manifest = publish(team_b(tmp_path))
    alone = team_b(tmp_path, [])
    # The same key with other features does not count.
    other = {name: array + 1 for name, array in features(0).items()}
    alone.commit([new_entry(key(0), other), entry(1)])
    reader = ManifestReader(alone, manifest)
    assert equal_to_stored(reader.read(PAIRS[1:2])[0], 1)
    for pair in (PAIRS[0], PAIRS[2]):
        with pytest.raises(CorruptEntry) as error:
            reader.read([pair])
        assert str(tmp_path / "a") in str(error.value)
        assert "does not read: add it to cache.read_through of the spec" in str(error.value)
        assert "run the preprocess job again" in str(error.value)
        assert "owners" not in str(error.value)
    assert alone.store.list(QUARANTINE) == []
    # What it says helps.
    assert is_whole(team_b(tmp_path), manifest)


def test_the_owner_of_a_layer_reads_the_manifest_that_another_team_left_there(
    tmp_path: Path,
) -> None:
    team_a(tmp_path)
    manifest = publish(team_b(tmp_path))
    # The owner calls the same store by another URL.
    (tmp_path / "home").symlink_to(tmp_path / "a")
    for url in ("a", "home"):
        owner = team_b(tmp_path, [], url=url)
        left = read_manifest(owner.store, manifest.digest)
        assert {row.entry.layer for row in left.ready() if row.entry} == {str(tmp_path / "a")}
        assert is_whole(owner, left)
        # And when the owner publishes the same data, it is the same manifest.
        assert publish(owner).digest == manifest.digest


def test_many_bad_entries_load_the_index_once(tmp_path: Path) -> None:
    clock = Later()
    store = open_store(tmp_path)
    cache = Counting(store, pack_bytes=1, clock=clock)
    placed = cache.commit([entry(number) for number in range(20)])
    reader = ManifestReader(cache, build_manifest(rows(placed)))
    shutil.rmtree(tmp_path / "packs")
    for number in [*range(20), *range(20)]:
        with pytest.raises(CorruptEntry, match="it is in quarantine now"):
            reader.read([(f"clip-{number}", "video")])
    assert cache.loads == 1
    taken = [(bad.key, bad.commit) for _, bad in read_quarantine(store)]
    assert sorted(taken) == sorted((one.key, one.commit) for one in placed)

    # An index that is older than that is loaded anew: somebody may have computed them again.
    clock.ahead_s += RELOAD_S
    cache.commit([entry(number) for number in range(20)])
    for number in range(20):
        (found,) = reader.read([(f"clip-{number}", "video")])
        assert equal_to_stored(found, number)
    assert cache.loads == 2
