"""Stored features are damaged in five ways: none of it reaches a reader, and all of it heals by computing anew."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from cache_samples import Damage, entry, equal_to_stored, key

from crab_platform import dtypes, packs
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, ManifestRow, write_manifest
from crab_platform.manifest_reader import ManifestReader
from crab_platform.packs import CorruptEntry, Entry
from crab_platform.quarantine import CORRUPT
from crab_platform.storage import Store
from crab_platform.verify import take_back, verify

WAYS = ("bit flip", "truncate", "zero range", "swap", "empty")
SOUND = 40
"""Entries beside the damaged ones that nobody touches."""
DAMAGED = (60, pytest.param(500, marks=pytest.mark.faults))

Change = Callable[[bytes], bytes]


def fill(store: Store, count: int) -> tuple[FeatureCache, list[Entry], Manifest]:
    """A cache with one entry a pack, and the manifest of all."""
    cache = FeatureCache(store, pack_bytes=1)
    entries = cache.commit([entry(number) for number in range(count)])
    rows = [
        ManifestRow(
            source=f"clip/{number}",
            stream="video",
            status="ready",
            media_sha256=f"{number:064x}",
            entry=one,
        )
        for number, one in enumerate(entries)
    ]
    return cache, entries, write_manifest(store, rows)


def damages(cache: FeatureCache, entries: Sequence[Entry]) -> Iterator[tuple[str, str, Change]]:
    """(way, pack, what happens to its bytes): each way equally often, at places drawn by chance."""
    chance = random.Random(6)
    share = len(entries) // len(WAYS)
    parts = {way: entries[n * share : (n + 1) * share] for n, way in enumerate(WAYS)}
    for one in parts["bit flip"]:
        yield (
            "bit flip",
            one.pack,
            flip(one.offset + chance.randrange(one.length), chance.randrange(8)),
        )
    for one in parts["truncate"]:
        yield "truncate", one.pack, cut(chance.randrange(one.offset + one.length))
    for one in parts["zero range"]:
        start = one.offset + chance.randrange(one.length - 16)
        yield "zero range", one.pack, zeros(start, chance.randrange(16, 200))
    # With a neighbour of the same shapes, whose bytes fit exactly; a cycle when their number is odd.
    swapped = parts["swap"]
    bytes_of = {one.pack: cache.store.read(one.pack) for one in swapped}
    for remainder in range(3):
        alike = [one for n, one in enumerate(swapped) if n % 3 == remainder]
        for one, other in zip(alike, [*alike[1:], alike[0]], strict=True):
            assert one.length == other.length
            yield "swap", one.pack, becomes(bytes_of[other.pack])
    for one in parts["empty"]:
        yield "empty", one.pack, becomes(b"")


def flip(at: int, bit: int) -> Change:
    return lambda data: data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def cut(at: int) -> Change:
    return lambda data: data[:at]


def zeros(at: int, count: int) -> Change:
    def change(data: bytes) -> bytes:
        end = min(len(data), at + count)
        assert any(data[at:end])  # otherwise nothing would be damaged
        return data[:at] + bytes(end - at) + data[end:]

    return change


def becomes(data: bytes) -> Change:
    return lambda before: data


def spoil(cache: FeatureCache, entries: Sequence[Entry], damage: Damage) -> dict[str, int]:
    """Damages all of `entries`; returns how many in which way."""
    count = dict.fromkeys(WAYS, 0)
    for way, pack, change in list(damages(cache, entries)):
        damage(pack, change)
        count[way] += 1
    return count


def detected(cache: FeatureCache, entries: Sequence[Entry]) -> int:
    """How many reads, each of one entry, end with CorruptEntry instead of tensors."""
    found = 0
    for one in entries:
        try:
            cache.read([one])
        except CorruptEntry:
            found += 1
    return found


def unchecked(one: Entry, data: memoryview) -> dict[str, np.ndarray]:
    """Planted bug: a reader that takes the bytes that lie where the index says."""
    arrays = {spec.name: (spec.dtype, packs._array(spec, data)) for spec in one.tensors}
    return dtypes.restored(arrays)


@pytest.mark.parametrize("count", DAMAGED)
def test_all_damage_is_detected_before_a_tensor_leaves_and_heals(
    store: Store, damage: Damage, count: int
) -> None:
    cache, entries, manifest = fill(store, count + SOUND)
    spoiled, sound = entries[:count], entries[count:]
    assert spoil(cache, spoiled, damage) == dict.fromkeys(WAYS, count // len(WAYS))

    assert detected(cache, spoiled) == count  # one by one
    arrays, bad = cache.read_each(entries)  # and in one batch, with sound ones among them
    assert sorted(bad) == list(range(count))
    assert all(found is None for found in arrays[:count])
    assert all(equal_to_stored(arrays[n], n) for n in range(count, count + SOUND))

    result = verify(cache)
    assert (result.entries, result.checked, len(result.bad)) == (len(entries), len(entries), count)
    assert {finding.reason for finding in result.bad} == {CORRUPT}
    assert {finding.entry.key for finding in result.bad} == {one.key for one in spoiled}
    take_back(cache, result.bad)

    # What a preprocess job does: what is a miss is computed and committed.
    keys = [key(number).digest for number in range(len(entries))]
    held = cache.index().holds(keys)
    misses = [number for number in range(len(entries)) if not held[number]]
    assert misses == list(range(count))
    cache.commit([entry(number) for number in misses])

    healed = cache.index().lookup(keys)
    assert len(healed) == len(entries)
    wrong = [
        n
        for n, arrays in enumerate(cache.read([healed[one] for one in keys]))
        if not equal_to_stored(arrays, n)
    ]
    assert wrong == []
    # A reader that holds the manifest from before the damage finds the new copies.
    reader = ManifestReader(FeatureCache(store), manifest)
    pairs = [(f"clip/{number}", "video") for number in range(len(entries))]
    assert all(equal_to_stored(arrays, n) for n, arrays in enumerate(reader.read(pairs)))
    again = verify(cache)
    assert (again.checked, again.bad) == (len(entries), [])
    assert len(sound) == SOUND


@pytest.mark.parametrize("store", ["folder"], indirect=True)
def test_a_reader_without_the_digest_check_is_found(
    store: Store, damage: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, entries, _ = fill(store, 60)
    spoil(cache, entries, damage)
    assert detected(cache, entries) == 60
    monkeypatch.setattr("crab_platform.cache.open_entry", unchecked)
    assert detected(cache, entries) <= 60 * 2 // 5  # only what is too short
    assert len(verify(cache).bad) <= 60 * 2 // 5
