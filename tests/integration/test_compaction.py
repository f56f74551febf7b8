"""Small and half-dead packs are put together, and nobody who reads notices: not before, not meanwhile, not after.

On a folder and on a real S3 server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from cache_samples import Damage, entry, equal_to_stored, features, key
from support.dying_store import Died, DyingStore
from support.small_jobs import DAY_S, Later

from crab_platform import commits, condemned
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, ManifestRow, build_manifest, write_manifest
from crab_platform.compaction import Compaction, compact
from crab_platform.garbage import Collector, Report
from crab_platform.holding import pin_manifest
from crab_platform.manifest_reader import ManifestReader
from crab_platform.packs import CorruptEntry, Entry, new_entry
from crab_platform.pins import Pin
from crab_platform.storage import Store
from crab_platform.trust import Signer, Trust, make_key

SMALL_PACKS = 6


def manifest_of(entries: Sequence[tuple[int, Entry]]) -> Manifest:
    return build_manifest(
        ManifestRow(
            source=f"clips/{number}",
            stream="video",
            status="ready",
            media_sha256=f"{number:064x}",
            entry=found,
        )
        for number, found in entries
    )


def keep(cache: FeatureCache, entries: Sequence[tuple[int, Entry]], name: str = "kept") -> Manifest:
    """A manifest of these entries that a project has pinned."""
    manifest = write_manifest(cache.store, manifest_of(entries).rows)
    pin_manifest(cache, Pin(project="test", name=name, manifest=manifest.digest))
    return manifest


def small_packs(cache: FeatureCache, numbers: Sequence[int]) -> list[tuple[int, Entry]]:
    """One pack and one commit for each."""
    return [(number, cache.commit([entry(number)])[0]) for number in numbers]


def read_all(cache: FeatureCache, manifest: Manifest) -> None:
    """Everything that the manifest names, by name, compared with what was stored."""
    check(ManifestReader(cache, manifest))


def check(reader: ManifestReader) -> None:
    rows = reader.manifest.rows
    found = reader.read([(row.source, row.stream) for row in rows])
    assert len(found) == len(rows)
    for row, arrays in zip(rows, found, strict=True):
        assert equal_to_stored(arrays, int(row.source.rpartition("/")[2]))


def put_together(store: Store, clock: Later, *, apply: bool = True) -> Compaction:
    cache = FeatureCache(store, clock=clock)
    return compact(cache, Collector(store, clock=clock), apply=apply)


def sweep(store: Store, clock: Later) -> Report:
    clock.ahead_s += 4 * DAY_S
    return Collector(store, clock=clock).run(apply=True)


@pytest.fixture
def clock() -> Later:
    """Eight days ahead: what is written now is older than the grace."""
    return Later(8 * DAY_S)


def test_small_packs_become_one_and_readers_go_on(store: Store, clock: Later) -> None:
    cache = FeatureCache(store)
    manifest = keep(cache, small_packs(cache, range(SMALL_PACKS)))
    early = ManifestReader(FeatureCache(store), manifest)
    old_packs = set(store.list(commits.PACKS))

    told = put_together(store, clock, apply=False)
    assert set(store.list(commits.PACKS)) == old_packs
    done = put_together(store, clock)
    assert (told.packs, told.entries) == (done.packs, done.entries) == (SMALL_PACKS, SMALL_PACKS)
    (new_pack,) = set(store.list(commits.PACKS)) - old_packs
    check(early)
    read_all(FeatureCache(store), manifest)
    assert put_together(store, clock).packs == 0  # what is condemned is not taken again

    assert old_packs <= sweep(store, clock).deleted.keys()
    assert store.list(commits.PACKS) == [new_pack]
    assert len(store.list(commits.COMMITS)) == 1
    check(early)  # its places are all gone
    read_all(FeatureCache(store), manifest)
    assert put_together(store, clock).packs == 0
    assert Collector(store, clock=clock).run(apply=True).condemned == {}


def test_a_half_dead_pack_gives_its_room_back(store: Store, clock: Later) -> None:
    # Packs so small that one entry fills a quarter of them: it is not their size that counts here.
    cache = FeatureCache(store, pack_bytes=4 * entry(0).nbytes + 400)
    stored = cache.commit([entry(number) for number in range(3)])
    manifest = keep(cache, [(1, stored[1])])
    collector = Collector(store, clock=clock)
    cache.clock = clock
    assert {stored[0].pack} == set(store.list(commits.PACKS))
    before = store.size(stored[0].pack)
    assert compact(cache, collector, apply=True).entries == 1
    sweep(store, clock)
    (pack,) = store.list(commits.PACKS)
    assert store.size(pack) < before / 2
    read_all(FeatureCache(store), manifest)
    assert key(0).digest not in FeatureCache(store).index()


def test_a_full_pack_and_a_young_one_stay(store: Store) -> None:
    cache = FeatureCache(store, pack_bytes=2 * entry(0).nbytes + 400)
    full = cache.commit([entry(0), entry(1)])
    keep(cache, [(0, full[0]), (1, full[1])], "full")
    later = Later(8 * DAY_S)
    cache.clock = later
    young = small_packs(cache, range(2, 5))
    keep(cache, young, "young")
    big = FeatureCache(store, pack_bytes=cache.pack_bytes, clock=later)
    assert compact(big, Collector(store, clock=later), apply=True).packs == 0


Step = Callable[[Store, Later], object]


def delete_then_copy(store: Store, clock: Later) -> None:
    """Planted bug: room is made before the copy exists."""
    for path in [*store.list(commits.COMMITS), *store.list(commits.PACKS)]:
        store.delete(path)
    FeatureCache(store, clock=clock).commit([entry(number) for number in range(3)])


def condemn_and_forget(store: Store, clock: Later) -> None:
    """Planted bug: the old commits are marked as decided garbage, without a look at who needs them."""
    doomed = dict.fromkeys(store.list(commits.COMMITS), "planted")
    identifier = clock.new_id()
    condemned.write_doomed(store, condemned.decision_path(identifier), doomed)
    condemned.write_doomed(store, condemned.set_path(identifier), doomed)


@pytest.mark.parametrize("planted", [delete_then_copy, condemn_and_forget])
def test_a_compaction_that_deletes_before_it_copies_is_found(tmp_path: Path, planted: Step) -> None:
    with pytest.raises((CorruptEntry, AssertionError)):
        kill_at_any_write(tmp_path, planted)


def test_killed_at_any_write_nothing_is_lost(tmp_path: Path) -> None:
    assert kill_at_any_write(tmp_path, put_together) >= 8  # pack, commit, set, mark, decision, ...


def kill_at_any_write(tmp_path: Path, together: Step) -> int:
    """Compaction and the collection after it die at their first write, their second, and so on; how often they did."""
    deaths = 0
    for writes in range(100):
        folder = tmp_path / str(writes)
        cache = FeatureCache(DyingStore(folder, 1000))
        manifest = keep(cache, small_packs(cache, range(3)))
        early = ManifestReader(FeatureCache(DyingStore(folder, 0)), manifest)
        clock = Later(8 * DAY_S)
        dying = DyingStore(folder, writes)
        try:
            together(dying, clock)
            sweep(dying, clock)
        except Died:
            deaths += 1
        else:
            read_all(FeatureCache(DyingStore(folder, 1000)), manifest)
            break
        fresh = DyingStore(folder, 1000)
        check(early)
        read_all(FeatureCache(fresh), manifest)
        # Whoever comes next finishes it, and clears up after it.
        clock.ahead_s += 8 * DAY_S
        put_together(fresh, clock)
        for _ in range(3):
            sweep(fresh, clock)
            clock.ahead_s += 8 * DAY_S
        check(early)
        read_all(FeatureCache(fresh), manifest)
        assert len(fresh.list(commits.PACKS)) == 1
        assert len(fresh.list(commits.COMMITS)) == 1
    return deaths


def test_a_damaged_entry_is_not_copied_and_its_pack_stays(
    store: Store, clock: Later, damage: Damage
) -> None:
    cache = FeatureCache(store)
    stored = small_packs(cache, range(4))
    manifest = keep(cache, stored)
    _, bad = stored[2]
    damage(bad.pack, lambda data: data[: bad.offset] + b"\xff" * 8 + data[bad.offset + 8 :])
    put_together(store, clock)
    sweep(store, clock)
    packs = store.list(commits.PACKS)
    assert bad.pack in packs
    assert len(packs) == 2
    sound = [(number, found) for number, found in stored if found is not bad]
    read_all(FeatureCache(store), manifest_of(sound))
    (copy,) = FeatureCache(store).index().copies(bad.key)
    assert copy.pack == bad.pack
    assert manifest.row("clips/2", "video").entry == bad


def test_packs_of_another_zone_are_left_alone(store: Store, clock: Later, tmp_path: Path) -> None:
    zones = {zone: make_key(tmp_path / zone) for zone in ("team-a", "team-b")}
    caches = {
        zone: FeatureCache(store, signer=Signer(zone, str(tmp_path / zone)), trust=Trust(zones))
        for zone in zones
    }
    stored = {
        "team-a": small_packs(caches["team-a"], range(3)),
        "team-b": small_packs(caches["team-b"], range(3, 6)),
    }
    manifest = keep(caches["team-a"], [*stored["team-a"], *stored["team-b"]])
    theirs = {found.pack for _, found in stored["team-b"]}
    ours = caches["team-a"]
    ours.clock = clock
    done = compact(ours, Collector(store, trust=Trust(zones), clock=clock), apply=True)
    assert done.entries == 3
    clock.ahead_s += 4 * DAY_S
    Collector(store, trust=Trust(zones), clock=clock).run(apply=True)
    packs = set(store.list(commits.PACKS))
    assert theirs < packs
    assert len(packs) == len(theirs) + 1
    zones_left = [path.split(".")[1] for path in store.list(commits.COMMITS)]
    assert sorted(zones_left) == ["team-a", "team-b", "team-b", "team-b"]
    read_all(FeatureCache(store, trust=Trust(zones)), manifest)


def test_copies_keep_what_an_entry_cost_and_where_it_came_from(store: Store, clock: Later) -> None:
    cache = FeatureCache(store)
    before = small_packs(cache, range(3))
    keep(cache, before)
    put_together(store, clock)
    sweep(store, clock)
    index = FeatureCache(store).index()
    known = index.known_media([(f"file:///media/{n}.mp4", f"{n}-1") for n in range(3)])
    assert known == [f"{n:064x}" for n in range(3)]
    (path,) = store.list(commits.COMMITS)
    table = commits.read_commit(store.read(path), commits.COLUMNS.names)
    assert sorted(table.column("key").to_pylist()) == sorted(found.key for _, found in before)


def test_features_that_differ_under_one_key_are_not_mixed_up(store: Store, clock: Later) -> None:
    """Two runs of an encoder that is not deterministic: two teams have pinned one each."""
    cache = FeatureCache(store)
    first = cache.commit([entry(0), entry(1)])
    other = new_entry(key(0), features(7))
    second = cache.commit([other, entry(2)])
    ours = keep(cache, [(0, first[0]), (1, first[1])], "ours")
    theirs = keep(cache, [(7, second[0]), (2, second[1])], "theirs")
    put_together(store, clock)
    for _ in range(2):
        for manifest in (ours, theirs):
            read_all(FeatureCache(store), manifest)
        for found in FeatureCache(store).index().entries():
            FeatureCache(store).read([found])  # or raises CorruptEntry
        sweep(store, clock)
