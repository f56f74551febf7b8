"""Damage, killed writers and a wrong order of writes: planted here, and found out by the cache.

On a folder and on a real S3 server.
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_samples import Damage, entry, equal_to_stored, key

from crab_platform.cache import Blob, FeatureCache, publish_pack_then_commit
from crab_platform.packs import CorruptEntry, Entry, NewEntry, new_entry
from crab_platform.storage import Store, open_store


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def zero(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes(16) + data[at + 16 :]


@pytest.mark.parametrize("kind", ["first", "last", "zeros", "truncated", "empty"])
def test_damage_is_found_before_an_array_leaves(store: Store, damage: Damage, kind: str) -> None:
    cache = FeatureCache(store)
    sound, hit = cache.commit([entry(1)])[0], cache.commit([entry(2)])[0]
    changes: dict[str, Callable[[bytes], bytes]] = {
        "first": flip(hit.offset),
        "last": flip(hit.offset + hit.length - 1),
        "zeros": zero(hit.offset + 32),
        "truncated": lambda data: data[:-1],
        "empty": lambda data: b"",
    }
    damage(hit.pack, changes[kind])
    with pytest.raises(CorruptEntry) as error:
        cache.read([sound, hit])
    for word in (hit.key, hit.pack):
        assert word in str(error.value)
    assert equal_to_stored(cache.read([sound])[0], 1)


def test_two_valid_packs_that_changed_places_are_found(store: Store, damage: Damage) -> None:
    cache = FeatureCache(store)
    same = {"x": np.ones((2, 3))}
    one, other = (cache.commit([new_entry(key(n), same)])[0] for n in (1, 2))
    packs = [store.read(one.pack), store.read(other.pack)]
    damage(one.pack, lambda data: packs[1])
    damage(other.pack, lambda data: packs[0])
    # Features of the same value and shape lie at the same offset: these bytes are right by chance.
    assert (one.offset, one.length) == (other.offset, other.length)
    cache.read([one, other])
    one, other = (cache.commit([entry(n)])[0] for n in (3, 6))
    packs = [store.read(one.pack), store.read(other.pack)]
    damage(one.pack, lambda data: packs[1])
    damage(other.pack, lambda data: packs[0])
    for swapped in (one, other):
        with pytest.raises(CorruptEntry, match=swapped.key):
            cache.read([swapped])


def test_a_lost_pack_is_reported_as_damage(tmp_path: Path) -> None:
    cache = FeatureCache(open_store(tmp_path))
    (placed,) = cache.commit([entry(1)])
    (tmp_path / placed.pack).unlink()
    with pytest.raises(CorruptEntry, match=placed.key):
        cache.read([placed])


def test_an_index_row_that_was_changed_is_found(tmp_path: Path) -> None:
    cache = FeatureCache(open_store(tmp_path))
    one, other = cache.commit([entry(3), entry(6)])
    spec = one.tensors[0]
    wrong: list[Entry] = [
        replace(one, key=other.key),
        replace(other, key=one.key),
        replace(one, offset=one.offset + 2),
        replace(one, length=one.length - 2),
        replace(one, blake3=other.blake3),
        replace(one, tensors=(replace(spec, shape=spec.shape[::-1]), *one.tensors[1:])),
        replace(one, tensors=(replace(spec, name="other"), *one.tensors[1:])),
        replace(one, tensors=(replace(spec, dtype="bfloat16"), *one.tensors[1:])),
        replace(one, tensors=(replace(spec, dtype="float64"), *one.tensors[1:])),
        replace(one, tensors=one.tensors[:1]),
        replace(one, pack="packs/../../x"),
        replace(one, offset=-1),
    ]
    for entry_ in wrong:
        with pytest.raises(CorruptEntry, match=entry_.key):
            cache.read([entry_])


def rewrite_commit(
    store: Store, placed: Entry, damage: Damage, change: Callable[[pa.Table], pa.Table]
) -> None:
    def apply(data: bytes) -> bytes:
        sink = io.BytesIO()
        pq.write_table(change(pq.read_table(io.BytesIO(data))), sink)
        return sink.getvalue()

    damage(f"commits/{placed.commit}.parquet", apply)


def test_a_commit_of_a_newer_schema_is_skipped_with_a_reason(store: Store, damage: Damage) -> None:
    cache = FeatureCache(store)
    old, new = cache.commit([entry(1)])[0], cache.commit([entry(2)])[0]

    def newer(table: pa.Table) -> pa.Table:
        return pa.table({"schema": pa.array([3], pa.int32()), "unheard_of": ["x"]})

    rewrite_commit(store, new, damage, newer)
    index = cache.index()
    assert index.lookup([old.key, new.key]) == {old.key: old}
    assert index.skipped == {"schema_newer": 1}
    assert index.skipped_commits == {f"commits/{new.commit}.parquet": "schema_newer"}


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"not parquet",
        lambda data: data[:-5],
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
    ],
    ids=["empty", "text", "truncated", "flipped"],
)
def test_a_damaged_commit_is_skipped_with_a_reason(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    cache = FeatureCache(open_store(tmp_path))
    old, new = cache.commit([entry(1)])[0], cache.commit([entry(2)])[0]
    file = tmp_path / f"commits/{new.commit}.parquet"
    file.write_bytes(change(file.read_bytes()))
    index = cache.index()
    assert index.lookup([old.key, new.key]) == {old.key: old}
    assert index.skipped == {"commit_unreadable": 1}


def test_a_commit_with_foreign_columns_or_paths_is_skipped(
    tmp_path: Path,
) -> None:
    store = open_store(tmp_path)

    def on_folder(path: str, change: Callable[[bytes], bytes]) -> None:
        (tmp_path / path).write_bytes(change((tmp_path / path).read_bytes()))

    def replace_column(name: str, value: pa.Array) -> Callable[[pa.Table], pa.Table]:
        return lambda table: table.set_column(table.column_names.index(name), name, value)

    changes = [
        replace_column("pack", pa.array(["../../etc/passwd"])),
        replace_column("offset", pa.array(["12"])),
        replace_column("key", pa.array([None], pa.string())),
        replace_column("schema", pa.array(["1"])),
        lambda table: table.drop_columns(["tensors"]),
    ]
    for change in changes:
        (placed,) = FeatureCache(store).commit([entry(1)])
        rewrite_commit(store, placed, on_folder, change)
    index = FeatureCache(store).index()
    assert len(index) == 0
    assert index.skipped == {"commit_unreadable": len(changes)}


WRITER = """
import sys
from crab_platform import cache as c
from crab_platform.storage import open_store
import test_cache_faults as t
cache = c.FeatureCache(open_store(sys.argv[1]))
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 1000):
    new = t.big_entry(number)
    print("next", flush=True)
    cache.commit([new])
"""


def publish_commit_then_pack(store: Store, pack: Blob, commit: Blob) -> None:
    """The planted bug: for a moment, entries exist whose features do not."""
    store.create(commit.path, commit.data)
    store.create(pack.path, pack.data)


def big_entry(number: int) -> NewEntry:
    """Large enough (8 MiB) that writing the pack takes most of the time."""
    array = np.random.default_rng(number).integers(0, 255, 1 << 23, np.uint8).view(np.float16)
    return new_entry(key(number), {"x": np.nan_to_num(array, posinf=1, neginf=-1)})


def unreadable_after_kills(store: Store, *, kills: int, seed: int) -> tuple[int, int]:
    """Kill writers at random; returns (entries that exist, how many of them cannot be read)."""
    chance = random.Random(seed)
    for round_number in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, store.url, str(1000 * round_number)],
            env=os.environ | {"PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path])},
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        for _ in range(chance.randint(1, 3)):
            child.stdout.readline()
        timer = threading.Timer(chance.uniform(0, 0.06), child.send_signal, [signal.SIGKILL])
        timer.start()
        child.stdout.read()
        child.wait()
        child.stdout.close()
        timer.join()
    cache = FeatureCache(store)
    index = cache.index()
    assert index.skipped == {}
    broken = 0
    for found in index.lookup(index).values():
        try:
            cache.read([found])
        except CorruptEntry:
            broken += 1
    return len(index), broken


def test_killed_writers_leave_no_half_entries(store: Store) -> None:
    there, broken = unreadable_after_kills(store, kills=5, seed=3)
    assert there > 0
    assert broken == 0


def holds_at_every_step(store: Store, publish: Callable[[Store, Blob, Blob], None]) -> bool:
    """Whether all that readers see can be read after every single write of a commit."""
    sound = []

    class Watched(type(store)):  # type: ignore[misc]  # the class is known only at run time
        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            cache = FeatureCache(open_store(store.url))
            index = cache.index()
            try:
                cache.read(list(index.lookup(index).values()))
            except CorruptEntry:
                sound.append(False)
            else:
                sound.append(True)

    FeatureCache(Watched(store.url), publish=publish).commit([entry(1), entry(2)])
    assert len(sound) == 2
    return all(sound)


def test_readers_never_see_an_entry_without_features(store: Store) -> None:
    assert holds_at_every_step(store, publish_pack_then_commit)


def test_publishing_the_commit_first_is_caught(store: Store) -> None:
    assert not holds_at_every_step(store, publish_commit_then_pack)
