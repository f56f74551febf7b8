"""The first level of the cache: what was decoded is kept as well, and another encoder need not decode again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cheap_clips import make_clips
from support.crab_runs import ray_home
from support.several_runs import run_all
from support.small_jobs import Encoders, run_here, spec_record

from crab_platform import commits
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, read_manifest
from crab_platform.manifest_reader import ManifestReader
from crab_platform.packs import Entry
from crab_platform.quarantine import read_quarantine
from crab_platform.storage import open_store
from crab_platform.work import Array, DecodeTask, Undecoded
from jobs.audit import decode_here
from jobs.preprocess import build_work
from jobs.spec import PreprocessSpec, parse_spec

CLIPS = 6
WINDOWS: dict[str, Any] = {"decoded_windows": {}}


class Counting:
    """The product's decoder, and which files it was given."""

    def __init__(self) -> None:
        self.files = Counter[str]()

    def __call__(self, task: DecodeTask) -> Mapping[str, Array | Undecoded]:
        self.files[Path(task.path).name] += 1
        return decode_here(task)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return Encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clips(tmp_path_factory.mktemp("windows") / "clips", CLIPS)


def features(cache: str, manifest: Manifest) -> dict[tuple[str, str], dict[str, bytes]]:
    """What a reader gets of every row, as bytes."""
    pairs = [(row.source, row.stream) for row in manifest.ready()]
    found = ManifestReader(FeatureCache(open_store(cache)), manifest).read(pairs)
    return {
        pair: {name: array.tobytes() for name, array in arrays.items()}
        for pair, arrays in zip(pairs, found, strict=True)
    }


def kept_windows(record: dict[str, Any]) -> dict[tuple[str, str], Entry]:
    """(file, stream) -> the window of it that the cache keeps."""
    spec = parse_spec(record)
    assert isinstance(spec, PreprocessSpec)
    work = build_work(spec)
    cache = FeatureCache(open_store(spec.cache.url))
    index = cache.index()
    found = {}
    for path in cache.store.list(commits.COMMITS):
        table = commits.read_commit(cache.store.read(path))
        columns = (table.column(name).to_pylist() for name in ("source_url", "media_sha256"))
        for url, sha256 in zip(*columns, strict=True):
            for stream in ("video", "audio"):
                key = work.decoded_key(stream, sha256).digest
                if entry := index.lookup([key]).get(key):
                    found[Path(url).name, stream] = entry
    return found


def direct(clips: Path, encoders: dict[str, Any], folder: Path) -> dict[Any, Any]:
    """The features as they are without windows."""
    record = spec_record(clips, str(folder / "direct"), encoders)
    manifest, summary = run_here(record)
    assert summary.decoded_files == CLIPS
    return features(str(folder / "direct"), manifest)


@pytest.mark.parametrize("mode", ["fused", "split"])
def test_another_encoder_decodes_nothing(
    clips: Path, encoders: Encoders, tmp_path: Path, mode: str
) -> None:
    cache = str(tmp_path / "cache")
    placed = {**WINDOWS, "pipeline": {"mode": mode, "clips_per_pack": 4}}
    first = spec_record(clips, cache, encoders.record(), **placed)
    decoder = Counting()
    manifest, summary = run_here(first, decoder=decoder)
    assert summary.decoded_files == len(decoder.files) == CLIPS
    assert features(cache, manifest) == direct(clips, encoders.record(), tmp_path / "one")
    assert len(kept_windows(first)) == 2 * CLIPS

    other = encoders.record(seed=1, layers=(1, 2))
    again, summary = run_here(spec_record(clips, cache, other, **placed), decoder=decoder)
    assert (summary.encoded, summary.hits, summary.decoded_files) == (2 * CLIPS, 0, 0)
    assert decoder.files.total() == CLIPS
    assert summary.by_encoder
    assert not any(u.spent_decode_s for u in summary.by_encoder.values())
    assert features(cache, again) == direct(clips, other, tmp_path / "two")
    # Windows that were found are not stored a second time.
    assert FeatureCache(open_store(cache)).index().duplicates == 0


def test_features_stored_otherwise_are_made_of_the_same_windows(
    clips: Path, encoders: Encoders, tmp_path: Path
) -> None:
    """Type and compression of what is stored say nothing about decoding."""
    cache = str(tmp_path / "cache")
    decoder = Counting()
    for stored in ({}, {"store_as": "float32"}, {"codec": "blosc2-shuffle-zstd1"}):
        record = spec_record(clips, cache, encoders.record() | stored, **WINDOWS)
        _, summary = run_here(record, decoder=decoder)
        assert summary.encoded == 2 * CLIPS
    assert decoder.files.total() == CLIPS


def test_other_sampling_is_decoded_anew(clips: Path, encoders: Encoders, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    run_here(spec_record(clips, cache, encoders.record(), **WINDOWS))
    record = spec_record(clips, cache, encoders.record(), **WINDOWS)
    record["sampling"] = {**record["sampling"], "num_frames": 3}
    _, summary = run_here(record)
    assert (summary.encoded, summary.hits, summary.decoded_files) == (CLIPS, CLIPS, CLIPS)


def test_large_windows_are_not_kept(clips: Path, encoders: Encoders, tmp_path: Path) -> None:
    everything = spec_record(clips, str(tmp_path / "all"), encoders.record(), **WINDOWS)
    run_here(everything)
    sizes: dict[str, set[int]] = {"video": set(), "audio": set()}
    for (_, stream), entry in kept_windows(everything).items():
        sizes[stream].add(entry.length)
    assert max(sizes["video"]) < min(sizes["audio"])  # two small pictures, a second of sound

    limit = {"decoded_windows": {"max_clip_mb": max(sizes["video"]) / 1e6}}
    some = spec_record(clips, str(tmp_path / "some"), encoders.record(), **limit)
    run_here(some)
    assert {stream for _, stream in kept_windows(some)} == {"video"}
    other = encoders.record(seed=1)
    again, summary = run_here(spec_record(clips, str(tmp_path / "some"), other, **limit))
    assert summary.decoded_files == CLIPS  # for their sound
    assert features(str(tmp_path / "some"), again) == direct(clips, other, tmp_path)

    none = spec_record(clips, str(tmp_path / "none"), encoders.record())
    run_here(none)
    assert kept_windows(none) == {}


def test_a_damaged_window_is_decoded_again_once(
    clips: Path, encoders: Encoders, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    first = spec_record(clips, cache, encoders.record(), **WINDOWS)
    run_here(first)
    bad = kept_windows(first)["0002.mkv", "video"]
    pack = tmp_path / "cache" / bad.pack
    data = bytearray(pack.read_bytes())
    data[bad.offset + 5] ^= 0x40
    pack.write_bytes(data)

    other, decoder = encoders.record(seed=1), Counting()
    again, summary = run_here(spec_record(clips, cache, other, **WINDOWS), decoder=decoder)
    assert decoder.files == {"0002.mkv": 1}
    assert summary.decoded_files == 1
    assert features(cache, again) == direct(clips, other, tmp_path / "two")
    # It was taken back and replaced, so that the next encoder finds it sound.
    taken = [entry for _, entry in read_quarantine(open_store(cache))]
    assert [(entry.key, entry.commit) for entry in taken] == [(bad.key, bad.commit)]
    third = encoders.record(seed=2)
    last, summary = run_here(spec_record(clips, cache, third, **WINDOWS), decoder=decoder)
    assert summary.decoded_files == 0
    assert features(cache, last) == direct(clips, third, tmp_path / "three")


def test_what_cannot_be_decoded_is_not_kept(encoders: Encoders, tmp_path: Path) -> None:
    """A file that is set aside is tried again by every job, and harms no other."""
    folder = make_clips(tmp_path / "clips", 2)
    (folder / "broken.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    record = spec_record(folder, str(tmp_path / "cache"), encoders.record(), **WINDOWS)
    _, summary = run_here(record)
    assert sum(summary.set_aside.values()) == 2
    other = spec_record(folder, str(tmp_path / "cache"), encoders.record(seed=1), **WINDOWS)
    decoder = Counting()
    _, summary = run_here(other, decoder=decoder)
    assert set(decoder.files) == {"broken.mkv"}
    assert summary.encoded == 4


@pytest.mark.ray
def test_the_real_job_in_both_modes(clips: Path, encoders: Encoders, tmp_path: Path) -> None:
    """With Ray's workers and decode children; the second encoder works in the other mode."""
    one, two = encoders.record(), encoders.record(seed=1)
    jobs = []
    for mode, other_mode in (("fused", "split"), ("split", "fused")):
        cache = str(tmp_path / mode)
        for record, how in ((one, mode), (two, other_mode)):
            placed = {"pipeline": {"mode": how, "clips_per_pack": 4, "encode_cpus": 0.5}}
            jobs.append(spec_record(clips, cache, record, **WINDOWS, **placed))
    with ray_home() as env:
        results = run_all(jobs, env, tmp_path)
    assert [result["decoded_files"] for result in results] == [CLIPS, 0, CLIPS, 0]
    assert [result["encoded"] for result in results] == [2 * CLIPS] * 4
    expected = {
        str(r): direct(clips, r, tmp_path / f"direct-{n}") for n, r in enumerate((one, two))
    }
    for job, result in zip(jobs, results, strict=True):
        manifest = read_manifest(open_store(job["cache"]), result["manifest"])
        assert features(job["cache"], manifest) == expected[str(job["encoders"])]
