"""Garbage collection with the clock moved on: what is needed stays, all else goes, and it says why.

That it holds when everything happens at once is for the simulation (tests/simulation).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cache_samples import entry, key, rows
from support.small_jobs import Later

from crab_platform import condemned
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest
from crab_platform.garbage import DAY_S, NO_COMMIT, NOT_HELD, NOT_NEEDED, TAKEN_BACK, Collector
from crab_platform.holding import hold_job, pin_manifest, publish_manifest
from crab_platform.identity import WINDOW, DecodedKey
from crab_platform.leases import LeaseHolder, LeaseLost
from crab_platform.manifest_reader import ManifestReader
from crab_platform.packs import Entry, new_entry
from crab_platform.pins import Pin, remove_pin
from crab_platform.quarantine import CORRUPT, bad_entry, write_quarantine
from crab_platform.storage import open_store
from crab_platform.trust import Signer, Trust, make_key


@pytest.fixture
def clock() -> Later:
    return Later()


@pytest.fixture
def cache(tmp_path: Path, clock: Later) -> FeatureCache:
    return FeatureCache(open_store(tmp_path), clock=clock)


def publish(cache: FeatureCache, entries: list[Entry], keep_s: float = 60) -> Manifest:
    return publish_manifest(hold_job(cache, "job"), rows(entries), keep_s=keep_s)


def collect(cache: FeatureCache, clock: Later) -> dict[str, str]:
    """Both phases: condemned when the grace is over, deleted when the wait is over; path -> why."""
    collector = Collector(cache.store, clock=clock)
    clock.ahead_s += 8 * DAY_S
    assert collector.run(apply=True).deleted == {}
    clock.ahead_s += 4 * DAY_S
    return collector.run(apply=True).deleted


def test_what_a_pin_needs_stays_and_all_else_goes(cache: FeatureCache, clock: Later) -> None:
    placed = [cache.commit([entry(n)])[0] for n in range(4)]
    kept = publish(cache, placed[:2])
    publish(cache, placed[2:])
    pin_manifest(cache, Pin(project="p", name="n", manifest=kept.digest))
    gone = collect(cache, clock)
    assert set(gone.values()) == {NOT_NEEDED, NOT_HELD}
    assert set(cache.index()) == {one.key for one in placed[:2]}
    assert len(cache.store.list("packs")) == 2
    ManifestReader(cache, kept).read([("clip-0", "video"), ("clip-1", "video")])
    remove_pin(cache.store, "p", "n")
    collect(cache, clock)
    assert cache.store.list() == []


def test_a_dry_pass_writes_nothing(cache: FeatureCache, clock: Later, tmp_path: Path) -> None:
    cache.commit([entry(1)])
    clock.ahead_s += 8 * DAY_S
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    report = Collector(cache.store, clock=clock).run(apply=False)
    assert list(report.condemned.values()) == [NOT_NEEDED]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_young_are_left_alone_whoever_needs_them(cache: FeatureCache, clock: Later) -> None:
    cache.commit([entry(1)])
    clock.ahead_s += 6 * DAY_S
    assert Collector(cache.store, clock=clock).run(apply=True).condemned == {}


def test_orphans_and_what_was_taken_back_are_garbage(cache: FeatureCache, clock: Later) -> None:
    (bad,) = cache.commit([entry(1)])
    write_quarantine(cache.store, [bad_entry(bad, CORRUPT, "")], clock=clock)
    (orphan,) = cache.commit([entry(2)])
    cache.store.delete(f"commits/{orphan.commit}.parquet")
    gone = collect(cache, clock)
    assert gone[f"commits/{bad.commit}.parquet"] == TAKEN_BACK
    assert gone[orphan.pack] == NO_COMMIT
    assert not cache.store.list("packs")


def test_decoded_windows_stay_as_long_as_features_of_their_clips(
    cache: FeatureCache, clock: Later
) -> None:
    def window(number: int) -> DecodedKey:
        one = key(number)
        return DecodedKey(
            media_sha256=one.media_sha256, stream="video", sampling={"num_frames": 3}, decode={}
        )

    frames = {WINDOW: np.zeros((3, 4, 4, 3), np.uint8)}
    placed = [cache.commit([entry(n)])[0] for n in range(2)]
    for number in range(2):
        cache.commit([new_entry(window(number), frames)])
    kept = publish(cache, placed[:1])
    pin_manifest(cache, Pin(project="p", name="n", manifest=kept.digest))
    collect(cache, clock)
    assert set(cache.index()) == {placed[0].key, window(0).digest}


# What somebody who may create files, or who has a wrong key in a spec, must not be able to make a collection delete.


def signed(cache: FeatureCache, tmp_path: Path) -> FeatureCache:
    public = make_key(tmp_path / "vision.key")
    return FeatureCache(
        cache.store,
        signer=Signer("vision", str(tmp_path / "vision.key")),
        trust=Trust({"vision": public}),
        clock=cache.clock,
    )


def pinned(cache: FeatureCache) -> Manifest:
    kept = publish(cache, cache.commit([entry(0)]))
    pin_manifest(cache, Pin(project="p", name="n", manifest=kept.digest))
    return kept


def passes(cache: FeatureCache, clock: Later) -> None:
    for _ in range(3):
        clock.ahead_s += 8 * DAY_S
        Collector(cache.store, trust=cache.trust, clock=clock).run(apply=True)


def test_a_wrong_key_in_a_spec_deletes_nothing(tmp_path: Path, clock: Later) -> None:
    ours = signed(FeatureCache(open_store(tmp_path / "cache"), clock=clock), tmp_path)
    kept = pinned(ours)
    wrong = Trust({"vision": make_key(tmp_path / "other.key")})
    passes(FeatureCache(ours.store, trust=wrong, clock=clock), clock)
    assert ManifestReader(ours, kept).read([("clip-0", "video")])


@pytest.mark.parametrize("is_signed", [False, True])
def test_a_file_of_the_same_id_hides_no_commit(
    tmp_path: Path, clock: Later, is_signed: bool
) -> None:
    cache = FeatureCache(open_store(tmp_path / "cache"), clock=clock)
    cache = signed(cache, tmp_path) if is_signed else cache
    kept = pinned(cache)
    (path,) = cache.store.list("commits")
    decoy = f"{path.split('.')[0]}.zzz.{'0' * 128}.parquet"
    cache.store.create(decoy, b"x")
    assert len(cache.index()) == 1
    if is_signed:
        passes(cache, clock)
    else:
        with pytest.raises(ValueError, match="signed by zzz"):
            passes(cache, clock)
    assert ManifestReader(cache, kept).read([("clip-0", "video")])


def test_a_planted_decision_deletes_nothing_that_is_needed(
    cache: FeatureCache, clock: Later
) -> None:
    kept = pinned(cache)
    identifier = clock.new_id()
    everything = dict.fromkeys(cache.store.list(), "planted")
    condemned.write_doomed(cache.store, condemned.set_path(identifier), everything)
    condemned.write_doomed(cache.store, condemned.decision_path(identifier), everything)
    cache.store.create(condemned.sweeping_path(identifier), b"")
    passes(cache, clock)
    assert ManifestReader(cache, kept).read([("clip-0", "video")])
    assert remove_pin(cache.store, "p", "n").manifest == kept.digest


def test_while_a_pinned_manifest_is_missing_nothing_is_deleted(
    cache: FeatureCache, clock: Later
) -> None:
    kept = pinned(cache)
    publish(cache, cache.commit([entry(1)]))
    clock.ahead_s += 8 * DAY_S
    collector = Collector(cache.store, clock=clock)
    condemned_before = collector.run(apply=True).condemned
    assert condemned_before
    data = cache.store.read(kept.path)
    cache.store.delete(kept.path)
    clock.ahead_s += 8 * DAY_S
    cache.commit([entry(2)])
    clock.ahead_s += 8 * DAY_S
    files = set(cache.store.list())
    report = collector.run(apply=True)
    assert report.missing_manifests == [kept.digest]
    assert not report.condemned
    assert not report.deleted
    assert [one.paths for one in report.waiting] == [len(condemned_before)]
    assert {path for path in files if not path.startswith("leases/")} <= set(cache.store.list())

    cache.store.create(kept.path, data)
    assert condemned_before.keys() <= collector.run(apply=True).deleted.keys()
    assert ManifestReader(cache, kept).read([("clip-0", "video")])


def test_a_lease_that_was_given_back_is_not_renewed(cache: FeatureCache) -> None:
    """The thread that renews leases runs until its block ends, some of them are over before."""
    for end in (LeaseHolder.release, lambda holder: holder.leave(60, ["m"])):
        holder = LeaseHolder(cache.store, "job", clock=cache.clock)
        holder.renew()
        end(holder)
        left = cache.store.list("leases")
        with pytest.raises(LeaseLost, match="given back"):
            holder.renew()
        assert cache.store.list("leases") == left


def test_a_signed_cache_is_not_collected_by_its_url_alone(tmp_path: Path, clock: Later) -> None:
    ours = signed(FeatureCache(open_store(tmp_path / "cache"), clock=clock), tmp_path)
    pinned(ours)
    with pytest.raises(ValueError, match="signed by vision"):
        Collector(ours.store, clock=clock).run(apply=True)


def test_a_copy_of_another_zone_does_not_stand_for_ours(tmp_path: Path, clock: Later) -> None:
    """Condemned while nobody needed it, then pinned: that another zone has the same does not help our readers."""
    ours = signed(FeatureCache(open_store(tmp_path / "cache"), clock=clock), tmp_path)
    audio = make_key(tmp_path / "audio.key")
    theirs = FeatureCache(
        ours.store, signer=Signer("audio", str(tmp_path / "audio.key")), clock=clock
    )
    both = Trust({**ours.trust.zones, "audio": audio})
    kept = publish(ours, ours.commit([entry(0)]))
    clock.ahead_s += 8 * DAY_S
    assert Collector(ours.store, trust=both, clock=clock).run(apply=True).condemned
    theirs.commit([entry(0)])
    pin_manifest(ours, Pin(project="p", name="n", manifest=kept.digest))
    clock.ahead_s += 4 * DAY_S
    Collector(ours.store, trust=both, clock=clock).run(apply=True)
    assert len(ours.index()) == 1
