"""Manifests: what a run uses, with a digest that does not depend on where it lies."""

from __future__ import annotations

import pickle
import secrets
from dataclasses import replace
from pathlib import Path

import pytest
from cache_samples import Damage, entry, equal_to_stored, rows
from servers.seaweedfs import S3Server

from crab_platform.cache import FeatureCache
from crab_platform.catalog import (
    CorruptManifest,
    ManifestRow,
    read_manifest,
    write_manifest,
)
from crab_platform.manifest_reader import ManifestReader
from crab_platform.packs import Entry
from crab_platform.storage import Store, open_store


def all_rows(placed: list[Entry]) -> list[ManifestRow]:
    aside = ManifestRow(
        source="clip-9",
        stream="audio",
        status="set_aside",
        reason="no_audio",
        detail="/data/9.mp4 has no audio track",
    )
    return [*rows(placed), aside]


def test_a_manifest_reads_back_and_reads_features(store: Store) -> None:
    cache = FeatureCache(store)
    written = write_manifest(store, all_rows(cache.commit([entry(0), entry(1)])))
    manifest = read_manifest(open_store(store.url), written.digest)
    assert manifest == written
    assert [row.source for row in manifest.ready()] == ["clip-0", "clip-1"]
    assert [row.reason for row in manifest.set_aside()] == ["no_audio"]
    reader = pickle.loads(pickle.dumps(ManifestReader(cache, manifest)))
    one, other = reader.read([("clip-1", "video"), ("clip-0", "video")])
    assert equal_to_stored(one, 1)
    assert equal_to_stored(other, 0)
    with pytest.raises(ValueError, match=r"no_audio.*has no audio track"):
        reader.read([("clip-9", "audio")])
    with pytest.raises(ValueError, match="streams"):
        reader.read([("clip-0", "audio")])
    with pytest.raises(ValueError, match="no such source"):
        reader.read([("clip-5", "video")])


def test_same_data_has_the_same_digest_wherever_it_lies(s3: S3Server, tmp_path: Path) -> None:
    digests = set()
    for url, order in ((tmp_path / "a", 1), (s3.url(f"same/{secrets.token_hex(6)}"), -1)):
        store = open_store(url)
        cache = FeatureCache(store, pack_bytes=1 if order == 1 else 1 << 20)
        cache.commit([entry(7)])
        made = all_rows(cache.commit([entry(0), entry(1)]))
        made[-1] = replace(made[-1], detail=f"{url}/9.mp4 has no audio track")
        digests.add(write_manifest(store, made[::order]).digest)
    assert len(digests) == 1


def test_every_part_of_the_content_changes_the_digest(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    made = all_rows(FeatureCache(store).commit([entry(0), entry(1)]))
    ready, aside = made[0], made[-1]
    assert ready.entry is not None
    variants = [
        made,
        made[1:],
        [replace(ready, source="clip-x"), *made[1:]],
        [replace(ready, stream="audio"), *made[1:]],
        [replace(ready, entry=replace(ready.entry, key="0" * 64)), *made[1:]],
        [replace(ready, entry=replace(ready.entry, blake3="0" * 64)), *made[1:]],
        [*made[:-1], replace(aside, reason="unreadable")],
    ]
    assert len({write_manifest(store, variant).digest for variant in variants}) == len(variants)


def test_writing_a_manifest_again_keeps_the_first(store: Store) -> None:
    made = all_rows(FeatureCache(store).commit([entry(0)]))
    first = write_manifest(store, made)
    moved = all_rows(FeatureCache(store).commit([entry(0)]))
    assert moved[0].entry != made[0].entry
    assert write_manifest(store, moved) == first


def test_a_manifest_that_was_changed_is_refused(store: Store, damage: Damage) -> None:
    cache = FeatureCache(store)
    one = write_manifest(store, all_rows(cache.commit([entry(0), entry(1)])))
    other = write_manifest(store, all_rows(cache.commit([entry(2)])))
    data = store.read(other.path)
    damage(one.path, lambda _: data)
    with pytest.raises(CorruptManifest, match=other.digest):
        read_manifest(store, one.digest)
    damage(one.path, lambda _: data[:-9])
    with pytest.raises(CorruptManifest, match=one.digest):
        read_manifest(store, one.digest)
    with pytest.raises(FileNotFoundError):
        read_manifest(store, "0" * 64)
    with pytest.raises(ValueError, match="not a manifest digest"):
        read_manifest(store, "../packs")


def test_rows_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    made = all_rows(FeatureCache(open_store(tmp_path)).commit([entry(0)]))
    for change in (
        {"source": "/data/clip.mp4"},
        {"source": "s3://b/clip.mp4"},
        {"source": ""},
        {"entry": None},
        {"status": "set_aside"},
        {"status": "lost"},
        {"reason": "no_audio"},
    ):
        with pytest.raises(ValueError, match=r"source|clip-0|status"):
            replace(made[0], **change)
    with pytest.raises(ValueError, match="two rows"):
        write_manifest(open_store(tmp_path), [made[0], made[0]])
