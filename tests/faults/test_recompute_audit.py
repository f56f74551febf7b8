"""Entries that were stored wrong on purpose, with every digest and signature in order, are found by computing anew.

An audit computes 1 % of all hits again. When a share p of the hits is wrong, each hit shows it with probability
p/100, so that the first wrong one is found after 100/p hits on average, and h hits find none with (1 - p/100)^h.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.clock import Clock
from crab_platform.identity import sha256_hex
from crab_platform.packs import NewEntry, build_pack, new_entry, tolerance_of
from crab_platform.quarantine import CORRUPT, RECOMPUTED_OTHERWISE
from crab_platform.storage import open_store
from crab_platform.trust import Signer, Trust, file_path, make_key
from crab_platform.verify import Recomputer, lot, take_back, verify
from crab_platform.work import Array, DecodeTask, StreamWork, Undecoded, Work

SHARE = 0.01
"""Of the hits, that are computed anew."""
ENTRIES = 2000
PLANTED = 20


class Counting(Clock):
    """Ids that repeat: the lots of entries follow from them, so that a seed means one sample."""

    def __init__(self) -> None:
        self._count = 0

    def new_id(self) -> str:
        self._count += 1
        return f"{self._count:016x}-{0:016x}"


class Bytes:
    """Decodes a file of bytes: ten numbers from each."""

    def __call__(self, task: DecodeTask) -> Mapping[str, Array | Undecoded]:
        seed = int(sha256_hex(Path(task.path).read_bytes())[:8], 16)
        return {name: np.random.default_rng(seed).random((3, 10)) for name in task.requests}


def encode(windows: Array) -> dict[str, Array]:
    return {"layer_1": np.sin(7 * windows).astype(np.float32)}


def encode_on_another_device(windows: Array) -> dict[str, Array]:
    """The same to within float32's last bits."""
    return {"layer_1": encode(windows)["layer_1"] * np.float32(1 + 3e-6)}


def work(encoder: Any = encode, weights: str = "00" * 32) -> Work:
    return Work(
        name="audit",
        by="test",
        open_cache=lambda: pytest.fail("an audit opens no cache of its own"),
        streams={
            "video": StreamWork(
                stream="video",
                sampling={"num_frames": 3},
                encoder={"name": "toy", "weights_sha256": weights},
                dtype="float16",
                request=None,
                make_encoder=lambda: encoder,
                tolerance=tolerance_of("float16"),
            )
        },
        decode={"version": 1},
        make_decoder=Bytes,
    )


def media(folder: Path, number: int) -> Path:
    path = folder / f"{number}.bin"
    path.write_bytes(f"clip {number}".encode())
    return path


def made(path: Path, todo: Work, *, wrong: float = 0.0, **changes: Any) -> NewEntry:
    """The entry of a file as a job makes it; `wrong` is added to its features."""
    (array,) = Bytes()(DecodeTask(path=str(path), requests={"video": None})).values()
    features = {name: a + wrong for name, a in todo.streams["video"].make_encoder()(array).items()}
    entry = new_entry(
        todo.key("video", sha256_hex(path.read_bytes())),
        features,
        source_url=str(path),
        device="cpu",
        tolerance=todo.streams["video"].tolerance,
    )
    return replace(entry, **changes)


def plant(cache: FeatureCache, entries: list[NewEntry]) -> None:
    """Commits whatever it is given, as somebody does who has the key and not our code."""
    path = commits.pack_path(cache.clock.new_id())
    data, found = build_pack(path, entries)
    rows = commits.write_commit(list(zip(entries, found, strict=True)), cache.writer)
    cache.store.create(path, data)
    commit = file_path(commits.COMMITS, cache.clock.new_id(), rows, cache.signer)
    cache.store.create(commit, rows)


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    """An empty cache that takes only what zone `a` signs."""
    public = make_key(tmp_path / "a.key")
    signer = Signer("a", str(tmp_path / "a.key"))
    return FeatureCache(
        open_store(tmp_path / "cache"),
        signer=signer,
        trust=Trust({"a": public}),
        clock=Counting(),
    )


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "media"
    folder.mkdir()
    return [media(folder, number) for number in range(ENTRIES)]


def fill(cache: FeatureCache, files: list[Path], todo: Work) -> None:
    for start in range(0, len(files), 100):
        cache.commit([made(path, todo) for path in files[start : start + 100]])


def test_an_audit_of_a_sound_cache_finds_nothing(cache: FeatureCache, files: list[Path]) -> None:
    fill(cache, files, work())
    result = verify(cache, share=SHARE, seed=3, recompute=Recomputer(work()))
    # Within four standard deviations of a binomial count.
    expected, sigma = SHARE * ENTRIES, math.sqrt(ENTRIES * SHARE * (1 - SHARE))
    assert abs(result.checked - expected) < 4 * sigma
    assert (result.recomputed, result.bad, result.unanswered) == (result.checked, [], [])
    assert result.largest_error == 0

    elsewhere = verify(cache, recompute=Recomputer(work(encode_on_another_device)))
    assert (elsewhere.recomputed, elsewhere.bad) == (ENTRIES, [])
    assert 0 < elsewhere.largest_error < tolerance_of("float16")


def test_entries_planted_with_a_stolen_key_are_found_as_computed(
    cache: FeatureCache, files: list[Path]
) -> None:
    todo = work()
    fill(cache, files[PLANTED:], todo)
    # Ten are merely wrong. Five say that anything goes, five name a file that is theirs beside another's key.
    plain = [made(path, todo, wrong=0.02) for path in files[:10]]
    loose = [made(path, todo, wrong=0.5, tolerance=1e9, device="cuda") for path in files[10:15]]
    lying = [made(path, todo, wrong=0.5) for path in files[15:PLANTED]]
    for entry in lying:
        record = json.loads(json.dumps(entry.record)) | {"stream": "audio"}
        entry.record.update(record)
    planted = [*plain, *loose, *lying]
    plant(cache, planted)
    wrong = {entry.key for entry in planted}
    index = cache.index()
    assert index.skipped_commits == {}  # the signature is good: nothing else can tell
    assert all(index.holds([entry.key for entry in planted]))
    cache.read(list(index.lookup(wrong).values()))  # and so are the digests

    p = PLANTED / ENTRIES
    limit = 100 / p
    hits, seed, found = 0, 0, set[str]()
    while not found and hits < limit:
        result = verify(cache, share=SHARE, seed=seed, recompute=Recomputer(todo))
        hits, seed = hits + result.entries, seed + 1
        found = {finding.entry.key for finding in result.bad}
    assert found
    assert found <= wrong
    assert hits <= limit

    # That was one draw. How long it takes in general is the lots' alone: no need to compute.
    entries = list(index.entries())
    assert len(entries) == ENTRIES
    trials, first = 200, []
    for trial in range(trials):
        hits, seed = 0, 1_000_000 * (trial + 1)
        while True:
            at = next(
                (n for n, one in enumerate(entries) if one.key in wrong and lot(one, seed) < SHARE),
                None,
            )
            if at is not None:
                first.append(hits + at + 1)
                break
            hits, seed = hits + ENTRIES, seed + 1
    # Geometric with mean 100/p, whose standard deviation is its mean; entries come in the order of their keys.
    assert statistics.mean(first) == pytest.approx(limit, abs=4 * limit / math.sqrt(trials))
    within = sum(hits <= limit for hits in first) / trials
    expected = 1 - (1 - SHARE * p) ** limit  # 63.2 %
    assert expected == pytest.approx(1 - math.exp(-1), abs=1e-3)
    assert within == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / trials))
    print(f"first wrong entry after {statistics.mean(first):.0f} hits (computed: {limit:.0f})")

    everything = verify(cache, recompute=Recomputer(todo))
    assert {finding.entry.key for finding in everything.bad} == wrong
    assert [finding.reason for finding in everything.bad].count(CORRUPT) == len(lying)
    assert [f.reason for f in everything.bad].count(RECOMPUTED_OTHERWISE) == PLANTED - len(lying)

    take_back(cache, everything.bad)
    assert not any(cache.index().holds(list(wrong)))
    cache.commit([made(path, todo) for path in files[:PLANTED]])
    assert verify(cache, recompute=Recomputer(todo)).bad == []


def test_what_cannot_be_computed_anew_is_told_and_is_not_bad(
    cache: FeatureCache, files: list[Path]
) -> None:
    fill(cache, files[:4], work())
    fill(cache, files[4:6], work(weights="11" * 32))
    files[0].unlink()
    files[1].write_bytes(b"another clip")
    result = verify(cache, recompute=Recomputer(work()))
    assert {(Path(one.source_url).name, one.reason) for one in result.unanswered} == {
        ("0.bin", "media_gone"),
        ("1.bin", "media_changed"),
    }
    assert (result.checked, result.recomputed, result.other_settings) == (6, 2, 2)
    assert result.bad == []


def test_taking_back_needs_the_key_where_readers_ask_for_it(
    cache: FeatureCache, files: list[Path]
) -> None:
    plant(cache, [made(files[0], work(), wrong=0.5)])
    reader = FeatureCache(cache.store, trust=cache.trust)
    found = verify(reader, recompute=Recomputer(work())).bad
    assert len(found) == 1
    with pytest.raises(ValueError, match="must be signed"):
        take_back(reader, found)


def test_an_audit_that_believes_every_tolerance_misses_some(
    cache: FeatureCache, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(cache, [made(files[0], work(), wrong=0.5, tolerance=1e9)])
    assert len(verify(cache, recompute=Recomputer(work())).bad) == 1
    monkeypatch.setattr("crab_platform.verify.allowed_error", lambda stored: stored.tolerance)
    assert verify(cache, recompute=Recomputer(work())).bad == []
