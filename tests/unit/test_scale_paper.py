"""docs/scale.md says what its script computes, from what the code really stores."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks import scale_paper
from benchmarks.scale_paper import PAPER, TINY, Preset
from crab.encoders.beats import BeatsConfig
from crab.encoders.config import TINY_SELECT_LAYERS
from crab.encoders.tiny import tiny_beats_config, tiny_clip_config
from crab.model import config as crab_config
from crab_platform.catalog import ManifestRow, manifest_path, write_manifest
from crab_platform.commits import Writer, pack_path, read_commit, write_commit
from crab_platform.identity import FeatureKey
from crab_platform.packs import Entry, NewEntry, TensorSpec
from crab_platform.snapshots import write_snapshot
from crab_platform.storage import open_store

DOC = Path(__file__).resolve().parents[2] / "docs" / "scale.md"


def test_the_document_has_the_table_that_the_script_prints() -> None:
    text = DOC.read_text()
    expected = scale_paper.with_table(text, scale_paper.table())
    assert text == expected, "run: python benchmarks/scale_paper.py --write docs/scale.md"


def test_a_document_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the marks"):
        scale_paper.with_table("# A text", "| table |")


def test_the_shapes_are_those_of_the_encoders() -> None:
    clip, beats = tiny_clip_config(), tiny_beats_config()
    patches = (clip.image_size // clip.patch_size) ** 2
    assert TINY.video == (len(TINY_SELECT_LAYERS), 10, patches, clip.hidden_size)
    paper = crab_config.paper()
    assert PAPER.video == (len(paper.layers("video")), 10, (224 // 14) ** 2, 1024)
    assert paper.video.feature_size == 1024
    assert PAPER.audio == (10, BeatsConfig().num_tokens(16_000), paper.audio.feature_size)
    assert TINY.audio == (10, beats.num_tokens(16_000), beats.encoder_embed_dim)
    assert (PAPER.clip_bytes, TINY.clip_bytes) == (16_465_920, 844_800)
    assert (PAPER.clips_per_pack, TINY.clips_per_pack) == (16, 317)


@pytest.mark.parametrize("preset", [PAPER, TINY], ids=lambda preset: preset.name)
def test_the_size_of_a_commit_is_what_is_written_today(preset: Preset) -> None:
    found = len(write_commit(_rows(preset), Writer(run="r" * 40, experiment="e", team="t")))
    assert found == pytest.approx(preset.commit_bytes, rel=0.1)


def test_the_sizes_of_rows_are_what_is_written_today(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    packs = [_rows(PAPER, 16 * number) for number in range(200)]
    tables = [read_commit(write_commit(rows, Writer())) for rows in packs]
    for rows, position in zip(packs, range(len(tables)), strict=True):
        commit = pa.array([rows[0][1].commit] * len(rows))
        tables[position] = tables[position].append_column("commit", commit)
    count = sum(map(len, packs))
    snapshot = store.size(write_snapshot(store, tables)) / count
    assert snapshot == pytest.approx(scale_paper.SNAPSHOT_ROW_BYTES, rel=0.15)
    manifest = write_manifest(
        store,
        (
            ManifestRow(
                source=f"shapes/{new.source_url[-13:]}",
                stream=str(new.record["stream"]),
                status="ready",
                media_sha256=str(new.record["media_sha256"]),
                entry=entry,
            )
            for rows in packs
            for new, entry in rows
        ),
    )
    assert store.size(manifest_path(manifest.digest)) / count == pytest.approx(
        scale_paper.MANIFEST_ROW_BYTES, rel=0.15
    )


def _hex(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _rows(preset: Preset, first: int = 0) -> list[tuple[NewEntry, Entry]]:
    """The rows of one full pack; random where real ones are, since that is what does not compress."""
    layers, frames, patches, width = preset.video
    video = [
        TensorSpec(name=f"layer_{n}", dtype="float16", shape=(frames, patches, width), offset=0)
        for n in range(layers)
    ]
    audio = [TensorSpec(name="tokens", dtype="float16", shape=preset.audio, offset=0)]
    rng, rows, at = random.Random(first), [], 4096
    identifier = f"{first:016x}-{_hex('pack', first)[:16]}"
    for clip in range(first, first + preset.clips_per_pack):
        for stream, specs in (("video", video), ("audio", audio)):
            key = FeatureKey(
                media_sha256=_hex("media", clip),
                stream=stream,
                sampling={"num_frames": 10, "size": 224, "version": 1},
                decode={"version": 3, "backend": "decord or pyav"},
                encoder={
                    "name": f"{stream}-encoder-of-some-size",
                    "weights_sha256": "ab" * 32,
                    "layers": [14, 22, 23],
                    "compute_dtype": "float32",
                    "version": 1,
                },
                dtype="float16",
            )
            length = sum(spec.nbytes for spec in specs)
            new = NewEntry(
                key=key.digest,
                record=key.record(),
                arrays={},
                source_url=f"s3://team-media/datasets/clips/{clip:09d}.mp4",
                source_version=f"{rng.randrange(10**7)}-{_hex('etag', clip)[:32]}",
            )
            new = replace(new, decode_s=rng.random(), encode_s=rng.random(), device="cuda")
            entry = Entry(
                key=key.digest,
                pack=pack_path(identifier),
                offset=at,
                length=length,
                blake3=_hex("blake3", clip, stream),
                tensors=tuple(specs),
                commit=identifier,
            )
            rows.append((new, entry))
            at += length
    return rows
