"""The local tier on a real folder: it may forget anything, and must never be wrong or in the way."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_samples import entry as made
from cache_samples import equal_to_stored, features, key

from crab_platform.cache import FeatureCache
from crab_platform.local_tier import ABANDONED_S, LocalTier
from crab_platform.packs import CorruptEntry, Entry, build_pack, new_entry, open_entry
from crab_platform.storage import open_store

Sample = tuple[Entry, bytes]
HOUR_NS = 3600 * 10**9


def sample(number: int, size: int = 1000) -> Sample:
    """An entry of `size` float16 values, and its bytes."""
    values = np.random.default_rng(number).standard_normal(size).astype(np.float32)
    data, (placed,) = build_pack("packs/00/x", [new_entry(key(number), {"x": values})])
    return placed, data[placed.offset : placed.offset + placed.length]


def path(tier: LocalTier, one: Sample) -> Path:
    return tier.folder / one[0].blake3[:2] / one[0].blake3


def held(tier: LocalTier) -> int:
    return sum(file.stat().st_size for file in tier.folder.glob("??/*"))


def used_hours_ago(tier: LocalTier, one: Sample, hours: float) -> None:
    when = time.time_ns() - int(hours * HOUR_NS)
    os.utime(path(tier, one), ns=(when, when))


def test_what_was_put_comes_back_and_the_rest_is_a_miss(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path / "tier", 1_000_000)
    samples = [sample(number) for number in range(20)]
    assert tier.get([placed for placed, _ in samples]) == {}
    for placed, data in samples[:15]:
        tier.put(placed, data)
    found = LocalTier(tmp_path / "tier", 1_000_000).get([placed for placed, _ in samples * 2])
    assert found == {placed.blake3: data for placed, data in samples[:15]}
    for placed, _ in samples[:15]:
        open_entry(placed, found[placed.blake3])


def test_a_tier_that_was_pickled_is_the_same_folder(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 1_000_000)
    placed, data = sample(1)
    tier.put(placed, data)
    assert pickle.loads(pickle.dumps(tier)).get([placed]) == {placed.blake3: data}


def test_over_its_size_the_least_recently_used_go_and_no_more_than_needed(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 20_000)
    samples = [sample(number) for number in range(10)]  # 2,000 bytes each: the size exactly
    for hours, one in enumerate(samples):
        tier.put(*one)
        used_hours_ago(tier, one, 20 - hours)
    assert held(tier) == 20_000
    tier.get([samples[0][0], samples[2][0]])  # a read is a use
    tier.put(*sample(99))
    kept = [number for number, one in enumerate(samples) if path(tier, one).exists()]
    assert kept == [0, 2, 4, 5, 6, 7, 8, 9]
    assert held(tier) == 18_000  # 90 %


def test_many_of_one_age_are_not_all_deleted(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 20_000)
    samples = [sample(number) for number in range(10)]
    for one in samples:
        tier.put(*one)
        used_hours_ago(tier, one, 5)
    tier.put(*sample(99))
    assert held(tier) == 18_000
    assert path(tier, sample(99)).exists()


def test_a_new_process_counts_what_lies_there_already(tmp_path: Path) -> None:
    for number in range(50):
        LocalTier(tmp_path, 20_000).put(*sample(number))
        assert held(LocalTier(tmp_path, 20_000)) <= 20_000


def test_an_entry_larger_than_the_tier_is_not_kept_and_drives_nothing_out(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 5_000)
    tier.put(*sample(1))
    tier.put(*sample(2, size=2_400))  # 4,800 bytes: more than 90 %
    tier.put(*sample(3, size=100_000))
    assert list(tier.get([sample(1)[0], sample(2)[0], sample(3)[0]])) == [sample(1)[0].blake3]


@pytest.mark.parametrize(
    "change", [lambda data: data[:-1], lambda data: data + b"x", lambda _: b""]
)
def test_a_file_of_the_wrong_length_is_removed_and_a_miss(
    tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    tier = LocalTier(tmp_path, 1_000_000)
    one = sample(1)
    tier.put(*one)
    path(tier, one).write_bytes(change(one[1]))
    assert tier.get([one[0]]) == {}
    assert not path(tier, one).exists()


def test_a_damaged_file_is_found_by_its_digest_and_dropped(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 1_000_000)
    one = sample(1)
    tier.put(*one)
    path(tier, one).write_bytes(one[1][:-1] + bytes([one[1][-1] ^ 1]))
    with pytest.raises(CorruptEntry):
        open_entry(one[0], tier.get([one[0]])[one[0].blake3])
    tier.drop(one[0])
    tier.drop(one[0])  # another process may have been first
    assert tier.get([one[0]]) == {}


@pytest.mark.parametrize(
    "name", ["", "ab", "../" * 20 + "etcd", "A" * 64, "g" * 64, "0" * 63 + "\n", "0" * 65]
)
def test_a_name_that_is_not_a_digest_is_refused_and_never_a_path(tmp_path: Path, name: str) -> None:
    tier = LocalTier(tmp_path / "tier", 1_000_000)
    placed, data = sample(1)
    odd = replace(placed, blake3=name)
    assert tier.get([odd]) == {}
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        tier.put(odd, data)
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        tier.drop(odd)
    assert list(tmp_path.iterdir()) == []


def test_bytes_of_another_length_are_refused(tmp_path: Path) -> None:
    placed, data = sample(1)
    with pytest.raises(ValueError, match="has 2000 bytes, not 1999"):
        LocalTier(tmp_path, 1_000_000).put(placed, data[:-1])
    with pytest.raises(ValueError, match="max_bytes is 0"):
        LocalTier(tmp_path, 0)


def test_files_that_are_not_entries_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "aa").mkdir()
    foreign = [tmp_path / "thesis.tex", tmp_path / "aa" / "notes", tmp_path / "data.bin"]
    for file in foreign:
        file.write_bytes(b"x" * 50_000)
        os.utime(file, (0, 0))
    tier = LocalTier(tmp_path, 10_000)
    for number in range(20):
        tier.put(*sample(number))
    assert all(file.exists() for file in foreign)
    assert len(tier.get([sample(number)[0] for number in range(20)])) >= 4


def test_what_a_killed_process_left_half_written_is_removed_when_it_is_old(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 10_000)
    tier.put(*sample(1))
    old, young = tmp_path / ".incoming" / "1-a", tmp_path / ".incoming" / "2-b"
    for file in (old, young):
        file.write_bytes(b"half")
    past = time.time() - ABANDONED_S - 60
    os.utime(old, (past, past))
    LocalTier(tmp_path, 10_000).put(*sample(2))
    assert [file.name for file in (tmp_path / ".incoming").iterdir()] == ["2-b"]


def _hammer(folder: str, max_bytes: int, seed: int, rounds: int) -> tuple[int, int]:
    """(right, misses); anything else raises."""
    tier, rng = LocalTier(folder, max_bytes), random.Random(seed)
    samples = [sample(number) for number in range(40)]
    right = misses = 0
    for _ in range(rounds):
        batch = rng.sample(samples, 3)
        found = tier.get([placed for placed, _ in batch])
        for placed, data in batch:
            if placed.blake3 in found:
                assert found[placed.blake3] == data
                open_entry(placed, found[placed.blake3])
                right += 1
            else:
                misses += 1
                tier.put(placed, data)
        if rng.random() < 0.05:
            tier.drop(batch[0][0])
    assert tier._writes, "a race was taken for a broken disk"
    return right, misses


def test_processes_that_share_a_small_folder_read_what_is_right_or_nothing(tmp_path: Path) -> None:
    max_bytes, processes = 32_000, 4  # 16 of the 40 entries fit
    jobs = [(str(tmp_path), max_bytes, seed, 1500) for seed in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = pool.starmap(_hammer, jobs)
    for right, misses in results:
        assert right > 0  # how many depends on how the processes take turns
        assert misses > 0
    assert held(LocalTier(tmp_path, max_bytes)) <= max_bytes * (1 + processes / 16)
    assert list((tmp_path / ".incoming").iterdir()) == []


def test_a_file_appears_whole(tmp_path: Path) -> None:
    tier = LocalTier(tmp_path, 1 << 30)
    one = sample(1, size=2_000_000)
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            with suppress(FileNotFoundError):
                seen.add(path(tier, one).stat().st_size)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(50):
        tier.put(*one)
        tier.drop(one[0])
    done.set()
    watcher.join()
    assert seen <= {len(one[1])}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_writing_says_so_once_and_fails_nothing(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = LocalTier(small_disk, 1_000_000)
    samples = [sample(number) for number in range(60)]  # 120 kB
    with caplog.at_level(logging.WARNING):
        for placed, data in samples:
            tier.put(placed, data)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "takes no more entries: No space left on device" in caplog.text
    found = tier.get([placed for placed, _ in samples])
    assert 0 < len(found) < 40
    for placed, data in samples:
        assert found.get(placed.blake3, data) == data
    assert list((small_disk / ".incoming").iterdir()) == []


def test_a_folder_that_cannot_be_made_fails_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    tier = LocalTier(tmp_path / "file" / "tier", 1_000_000)
    for number in range(3):
        tier.put(*sample(number))
        assert tier.get([sample(number)[0]]) == {}
    assert len([r for r in caplog.records if "takes no more entries" in r.getMessage()]) == 1


def test_a_cache_reads_again_from_the_tier_and_repairs_it(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    placed = FeatureCache(store).commit([made(number) for number in range(5)])
    tier = LocalTier(tmp_path / "tier", 1_000_000)
    cache = FeatureCache(store, local=tier)
    for _ in range(2):
        for number, arrays in enumerate(cache.read([*placed, placed[0]])[:5]):
            assert equal_to_stored(arrays, number)
    assert len(tier.get(placed)) == 5
    victim = tier.folder / placed[3].blake3[:2] / placed[3].blake3
    victim.write_bytes(bytes(victim.stat().st_size))
    assert equal_to_stored(cache.read([placed[3]])[0], 3)
    assert (
        open_entry(placed[3], tier.get([placed[3]])[placed[3].blake3]).keys() == features(3).keys()
    )
    Path(store.url, placed[0].pack).unlink()  # the store is not asked for what is here
    assert equal_to_stored(cache.read(placed)[4], 4)
