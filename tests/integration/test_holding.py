"""Leases and pins of jobs whose features lie in several caches, some of them moved, unread or broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cache_samples import entry
from support.small_jobs import DAY_S, Later
from support.two_caches import CLIPS, PAIRS, publish, team_a, team_b

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.catalog import MANIFESTS, Manifest, read_manifest
from crab_platform.garbage import Collector
from crab_platform.holding import (
    FeaturesGone,
    check_present,
    hold_job,
    hold_manifest,
    pin_manifest,
    unpin_manifest,
)
from crab_platform.leases import LEASES, Lease, read_leases
from crab_platform.manifest_reader import ManifestReader
from crab_platform.pins import Pin, read_pins
from crab_platform.quarantine import CORRUPT, BadEntry, write_quarantine
from crab_platform.storage import Data, FolderStore, Store, StoreRefused, StoreUnreachable


class Failing(FolderStore):
    """A folder where creates of some paths fail."""

    def __init__(self, folder: Path, fails: Callable[[str], bool], error: type[Exception]) -> None:
        super().__init__(folder)
        self._fails = fails
        self._error = error

    def create(self, path: str, data: Data) -> None:
        if self._fails(path):
            raise self._error(f"no {path} here")
        super().create(path, data)


def second_lease(path: str) -> bool:
    return path.startswith(LEASES) and path.endswith("2.json")


def leases(store: Store) -> list[Lease]:
    return [lease for _, lease in read_leases(store)]


def forget_leases(*stores: Store) -> None:
    for store in stores:
        store.delete_all(store.list(LEASES))


def pin_of(manifest: Manifest) -> Pin:
    return Pin(project="p", name="n", manifest=manifest.digest)


# a layer that is no longer read


def test_features_of_a_moved_layer_are_held_and_pinned_where_they_lie_now(tmp_path: Path) -> None:
    team_a(tmp_path)
    manifest = publish(team_b(tmp_path))
    (tmp_path / "a").rename(tmp_path / "moved")
    clock = Later()
    cache = team_b(tmp_path, ["unused", "moved"], clock=clock)
    unused, moved = cache.layers
    forget_leases(cache.store, moved)
    moved.delete(manifest.path)

    check_present(cache, manifest)
    holders = hold_manifest(cache, manifest, "train")
    for store in (cache.store, moved):
        (lease,) = leases(store)
        assert (lease.job, lease.manifests) == ("train", (manifest.digest,))
    for holder in holders:
        holder.release()
    pin_manifest(cache, pin_of(manifest))
    assert [pin.manifest for pin in read_pins(moved)] == [manifest.digest]
    assert unused.list() == []

    for days in (8, 4):
        clock.ahead_s += days * DAY_S
        Collector(moved, clock=clock).run(apply=True)
    assert len(moved.list(commits.PACKS)) == CLIPS
    assert len(ManifestReader(cache, manifest).read(PAIRS)) == CLIPS
    unpin_manifest(cache, "p", "n")
    assert read_pins(moved) == []


def test_a_layer_is_not_needed_for_what_lies_in_the_cache_too(tmp_path: Path) -> None:
    team_a(tmp_path)
    manifest = publish(team_b(tmp_path))
    cache = team_b(tmp_path, ["other"])
    cache.commit([entry(number) for number in range(CLIPS)])
    forget_leases(cache.store)
    hold_manifest(cache, manifest, "train")
    pin_manifest(cache, pin_of(manifest))
    assert len(leases(cache.store)) == len(read_pins(cache.store)) == 1
    assert cache.layers[0].list() == []


def test_features_that_lay_in_a_layer_that_is_not_read_are_gone(tmp_path: Path) -> None:
    team_a(tmp_path)
    manifest = publish(team_b(tmp_path))
    alone = team_b(tmp_path, [])
    alone.commit([entry(1)])
    forget_leases(alone.store)
    for ask in (
        lambda: check_present(alone, manifest),
        lambda: hold_manifest(alone, manifest, "train"),
        lambda: pin_manifest(alone, pin_of(manifest)),
    ):
        with pytest.raises(FeaturesGone) as error:
            ask()
        assert "2 of 3 features" in str(error.value)
        assert f"lay in {tmp_path / 'a'}, which this job does not read" in str(error.value)
        assert "add it to cache.read_through of the spec" in str(error.value)
        assert "run its preprocess job again" in str(error.value)
    assert leases(alone.store) == []
    assert len(read_pins(alone.store)) == 1  # for what is left


def test_a_copy_that_is_in_quarantine_or_being_deleted_does_not_count(tmp_path: Path) -> None:
    team_a(tmp_path)
    manifest = publish(team_b(tmp_path))
    (tmp_path / "a").rename(tmp_path / "moved")
    cache = team_b(tmp_path, ["moved"])
    (moved,) = cache.layers
    check_present(cache, manifest)
    clock = Later(8 * DAY_S)
    forget_leases(cache.store, moved)
    Collector(moved, clock=clock).run(apply=True)
    (condemned,) = moved.list("condemned")
    moved.create(condemned.replace(".parquet", ".sweeping"), b"")
    with pytest.raises(FeaturesGone, match="3 of 3"):
        check_present(cache, manifest)
    moved.delete_all(moved.list("condemned"))
    found = next(cache.index().below[0].entries())
    write_quarantine(moved, [BadEntry(key=found.key, commit=found.commit, reason=CORRUPT)])
    with pytest.raises(FeaturesGone, match="1 of 3"):
        check_present(cache, manifest)


def test_the_owner_of_a_layer_holds_and_pins_the_manifest_that_another_team_left_there(
    tmp_path: Path,
) -> None:
    team_a(tmp_path)
    digest = publish(team_b(tmp_path)).digest
    (tmp_path / "home").symlink_to(tmp_path / "a")
    for url in ("a", "home"):
        owner = team_b(tmp_path, [], url=url)
        forget_leases(owner.store)
        manifest = read_manifest(owner.store, digest)
        (holder,) = hold_manifest(owner, manifest, "train")
        assert [lease.manifests for lease in leases(owner.store)] == [(digest,)]
        holder.release()
        pin_manifest(owner, pin_of(manifest))
        assert Collector(owner.store).roots().manifests == {digest}
        unpin_manifest(owner, "p", "n")


# stores that fail


def broken(
    tmp_path: Path, fails: Callable[[str], bool], error: type[Exception] = StoreUnreachable
) -> FeatureCache:
    """B's cache with A's below it and then C's, which fails."""
    sound = team_b(tmp_path, ["a"])
    layers = [*sound.layers, Failing(tmp_path / "c", fails, error)]
    return FeatureCache(sound.store, layers=layers)


def no_leases(cache: FeatureCache) -> bool:
    return all(store.list(LEASES) == [] for store in (cache.store, *cache.layers))


@pytest.mark.parametrize("error", [StoreUnreachable, ValueError, KeyboardInterrupt])
def test_a_job_that_cannot_start_gives_its_leases_back(
    tmp_path: Path, error: type[Exception]
) -> None:
    cache = broken(tmp_path, second_lease, error)
    with pytest.raises(error, match="no leases"):
        hold_job(cache, "job")
    assert no_leases(cache)


def test_a_layer_that_refuses_half_way_is_left_without_a_lease(tmp_path: Path) -> None:
    cache = broken(tmp_path, second_lease, StoreRefused)
    hold = hold_job(cache, "job")
    assert hold.not_held == (str(tmp_path / "c"),)
    assert cache.layers[1].list(LEASES) == []
    assert len(leases(cache.layers[0])) == 1
    hold.release()
    assert no_leases(cache)


def test_a_store_that_fails_does_not_keep_the_leases_in_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team_a(tmp_path)
    cache = team_b(tmp_path)
    hold = hold_job(cache, "job")

    def delete(path: str) -> None:
        raise StoreUnreachable(f"cannot delete {path}")

    monkeypatch.setattr(cache.store, "delete", delete)
    hold.release()
    assert len(leases(cache.store)) == 1
    assert leases(cache.layers[0]) == []


@pytest.mark.parametrize("folder", [LEASES, MANIFESTS])
def test_a_job_that_cannot_hold_its_manifest_gives_its_leases_back(
    tmp_path: Path, folder: str
) -> None:
    team_a(tmp_path)
    (tmp_path / "a").rename(tmp_path / "c")
    manifest = publish(team_b(tmp_path, ["c"]))
    cache = broken(tmp_path, lambda path: path.startswith(folder))
    cache.layers[1].delete(manifest.path)
    forget_leases(cache.store, *cache.layers)
    with pytest.raises(StoreUnreachable, match=f"no {folder}"):
        hold_manifest(cache, manifest, "train")
    assert no_leases(cache)

    refusing = broken(tmp_path, lambda path: path.startswith(folder), StoreRefused)
    (holder,) = hold_manifest(refusing, manifest, "train")
    assert refusing.layers[1].list(LEASES) == []
    holder.release()
    assert no_leases(refusing)
