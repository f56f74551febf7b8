"""Sixteen writers want the same name, or the same key, at the same moment.

On a folder and on a real S3 server. Each check is also given writers or readers with a planted bug, which it must find.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import obstore
import pytest
from cache_samples import key

from crab_platform.cache import FeatureCache
from crab_platform.objects import ObjectStore
from crab_platform.packs import CorruptEntry, Entry, NewEntry, new_entry
from crab_platform.storage import AlreadyExists, FolderStore, Store, open_store

WRITERS = 16
READERS = 2
VALUE_BYTES = 100_000
QUICK_KEYS = 4
FULL_KEYS = 200
RACES_AT_ONCE = 20
"""SeaweedFS asks once a second for the lock of a name that somebody holds, so a race of 16 takes seconds."""

Create = Callable[[Store, str, bytes], None]
Lookup = Callable[[FeatureCache, Sequence[str], dict[str, Entry]], dict[str, Entry]]
"""(cache, keys, what this reader committed itself) -> entries."""


def create(store: Store, path: str, data: bytes) -> None:
    store.create(path, data)


def overwrite(store: Store, path: str, data: bytes) -> None:
    """Planted bug: a PUT without a condition."""
    assert isinstance(store, ObjectStore)
    obstore.put(store._writes(len(data)), path, data, mode="overwrite", use_multipart=False)


def look_then_overwrite(store: Store, path: str, data: bytes) -> None:
    """Planted bug: two steps where there must be one."""
    if store.exists(path):
        raise AlreadyExists(path)
    overwrite(store, path, data)


def write_in_place(store: Store, path: str, data: bytes) -> None:
    """Planted bug: the name exists before the bytes do."""
    file = os.path.join(store.url, path)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError as error:
        raise AlreadyExists(path) from error
    with open(handle, "wb", buffering=0) as out:
        out.write(data[:1000])
        time.sleep(0.05)  # a slow disk
        out.write(data[1000:])


@dataclass(kw_only=True)
class Race:
    """What writers and readers of one name saw."""

    winners: list[int] = field(default_factory=list)
    losers_saw: list[bytes] = field(default_factory=list)
    readers_saw: set[bytes] = field(default_factory=set)
    reads: int = 0
    final: bytes = b""

    def problems(self) -> list[str]:
        found = []
        if len(self.winners) != 1:
            found.append(f"{len(self.winners)} winners")
        if any(not is_whole(value) for value in (*self.losers_saw, *self.readers_saw, self.final)):
            found.append("a torn read")
        if any(value != self.final for value in (*self.losers_saw, *self.readers_saw)):
            found.append("the value changed, or a loser read another one")
        if [self.final[:1]] != [bytes([winner]) for winner in self.winners[:1]]:
            found.append("the value is not the winner's")
        return found


def value_of(number: int) -> bytes:
    return bytes([number]) * VALUE_BYTES


def is_whole(value: bytes) -> bool:
    return len(value) == VALUE_BYTES and value.count(value[:1]) == VALUE_BYTES


def race(store: Store, path: str, create: Create, pool: ThreadPoolExecutor) -> Race:
    """All writers start together; readers look until the writers are done."""
    seen = Race()
    lock = threading.Lock()
    start = threading.Barrier(WRITERS + READERS)
    done = threading.Event()

    def write(number: int) -> None:
        own = open_store(store.url) if isinstance(store, FolderStore) else store
        start.wait()
        try:
            create(own, path, value_of(number))
        except AlreadyExists:
            value = own.read(path)
            with lock:
                seen.losers_saw.append(value)
        else:
            with lock:
                seen.winners.append(number)

    def look() -> None:
        start.wait()
        while not done.is_set():
            try:
                value = store.read(path)
            except FileNotFoundError:
                pass
            else:
                with lock:
                    seen.reads += 1
                    seen.readers_saw.add(value)
            time.sleep(0.001)  # leave some of the processor to the writers

    readers = [pool.submit(look) for _ in range(READERS)]
    for writer in [pool.submit(write, number) for number in range(WRITERS)]:
        writer.result()
    done.set()
    for reader in readers:
        reader.result()
    seen.final = store.read(path)
    return seen


def race_problems(store: Store, create: Create, keys: int) -> list[str]:
    found = []
    reads = losers = 0
    at_once = min(keys, RACES_AT_ONCE)
    with (
        ThreadPoolExecutor(at_once * (WRITERS + READERS)) as runners,
        ThreadPoolExecutor(at_once) as races,
    ):
        seen_of = races.map(lambda n: race(store, f"race/{n}", create, runners), range(keys))
        for number, seen in enumerate(seen_of):
            found += [f"key {number}: {problem}" for problem in seen.problems()]
            losers += len(seen.losers_saw)
            reads += seen.reads
    print(
        f"{keys * WRITERS} creates, {keys * WRITERS - losers} winners of {keys} keys, "
        f"{losers} losers, {reads} reads beside them, {len(found)} problems"
    )
    return found


def test_sixteen_writers_of_a_name_have_one_winner(store: Store) -> None:
    assert race_problems(store, create, QUICK_KEYS) == []


@pytest.mark.faults
def test_sixteen_writers_of_200_names(store: Store) -> None:
    assert race_problems(store, create, FULL_KEYS) == []


@pytest.mark.parametrize("store", ["s3"], indirect=True)
@pytest.mark.parametrize("planted", [overwrite, look_then_overwrite])
def test_writers_that_overwrite_are_caught(store: Store, planted: Create) -> None:
    found = race_problems(store, planted, 2)
    assert any("winners" in problem for problem in found)


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_writer_in_place_is_caught(store: Store) -> None:
    found = race_problems(store, write_in_place, QUICK_KEYS)
    assert any("torn" in problem for problem in found)
    assert not any("winners" in problem for problem in found)


def rival_entry(number: int, writer: int) -> NewEntry:
    """The key of a clip with features that only this writer computes: an encoder that is not deterministic."""
    rng = np.random.default_rng((number, writer))
    return new_entry(key(number), {"x": rng.standard_normal((16, 64)).astype(np.float32)})


def from_index(cache: FeatureCache, keys: Sequence[str], own: dict[str, Entry]) -> dict[str, Entry]:
    return cache.index().lookup(keys)


def own_first(cache: FeatureCache, keys: Sequence[str], own: dict[str, Entry]) -> dict[str, Entry]:
    """Planted bug: who has committed a key keeps its own features, whatever the index says."""
    return cache.index().lookup(keys) | own


def rival_problems(store: Store, lookup: Lookup, keys: int) -> list[str]:
    """Every writer commits every key with features of its own; what readers then disagree about."""
    caches = [FeatureCache(open_store(store.url)) for _ in range(WRITERS)]
    names = [key(number).digest for number in range(keys)]
    found: list[str] = []
    start = threading.Barrier(WRITERS)
    done = threading.Event()
    loads = 0

    def write(writer: int) -> dict[str, Entry]:
        start.wait()
        placed = {}
        for number in range(keys):
            entry = rival_entry(number, writer)
            (placed[entry.key],) = caches[writer].commit([entry])
        return placed

    def look() -> None:
        nonlocal loads
        cache = FeatureCache(open_store(store.url))
        while not done.is_set():
            entries = list(cache.index().lookup(names).values())
            loads += bool(entries)
            try:
                cache.read(entries)
            except CorruptEntry as error:
                found.append(f"while writers wrote: {error}")

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        reader = pool.submit(look)
        placed = list(pool.map(write, range(WRITERS)))
        done.set()
        reader.result()
    # Readers who wrote something themselves, and one who did not.
    views = [
        lookup(FeatureCache(open_store(store.url)), names, own)
        for own in ({}, placed[0], placed[-1])
    ]
    for number, name in enumerate(names):
        commits = {mine[name].commit: writer for writer, mine in enumerate(placed)}
        first = min(commits)
        for view in views:
            if view[name].commit != first:
                found.append(f"a reader has {name} of another commit than the earliest")
                continue
            (arrays,) = caches[0].read([view[name]])
            expected = rival_entry(number, commits[first]).arrays["x"]
            if arrays["x"].tobytes() != expected.tobytes():
                found.append(f"the features of {name} are not those of the earliest writer")
    index = caches[0].index()
    if sorted(index.conflicts) != sorted(names):
        found.append(f"{len(index.conflicts)} conflicts reported of {keys}")
    if index.duplicates != keys * (WRITERS - 1):
        found.append(f"{index.duplicates} duplicates counted of {keys * (WRITERS - 1)}")
    if index.skipped:
        found.append(f"commits skipped: {index.skipped}")
    print(
        f"{keys * WRITERS} commits of {keys} keys, {loads} loads beside them found some, {len(found)} problems"
    )
    return found


def test_readers_agree_about_a_key_that_sixteen_committed(store: Store) -> None:
    assert rival_problems(store, from_index, 2) == []


@pytest.mark.faults
def test_readers_agree_about_200_keys_that_sixteen_committed(store: Store) -> None:
    assert rival_problems(store, from_index, FULL_KEYS) == []


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_reader_who_prefers_its_own_is_caught(store: Store) -> None:
    found = rival_problems(store, own_first, 2)
    assert any("another commit than the earliest" in problem for problem in found)
