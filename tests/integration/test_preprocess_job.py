"""`crab run` with a preprocess spec over real media: what is encoded, what is set aside, and where the cache may lie.

A start of the command line costs much of a minute on a small machine, so each run answers several questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pytest
from s3fs import S3FileSystem
from servers.seaweedfs import S3Server
from support.cache_truth import problems, truth_of
from support.crab_runs import CrabRun, ray_home
from support.media_files import counting_clip, tone

from crab.samples import Sample, write_samples
from crab_platform.cache import FeatureCache
from crab_platform.catalog import Manifest, read_manifest
from crab_platform.storage import open_store

pytestmark = pytest.mark.ray
SPEC = "jobs/specs/preprocess-media.yaml"


@dataclass(frozen=True, kw_only=True)
class Done:
    """A run over all shared media."""

    cache: str
    result: dict[str, Any]
    stderr: str

    def manifest(self) -> Manifest:
        return read_manifest(FeatureCache(open_store(self.cache)).store, self.result["manifest"])


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[dict, str]]]:
    """Run a spec to its end: (what it printed as JSON, what it told people)."""
    folder = tmp_path_factory.mktemp("jobs")
    with ray_home() as env:

        def run(spec: str | Path, *changes: str) -> tuple[dict[str, Any], str]:
            changes += (f"runs={folder}/runs", f"tracking.uri=sqlite:///{folder}/mlflow.db")
            sets = [part for change in changes for part in ("--set", change)]
            job = CrabRun(["run", str(spec), *sets, "--json"], env, folder)
            try:
                return job.finish(), job.stderr()
            finally:
                job.end_all()

        yield run


@pytest.fixture(scope="module")
def on_folder(start, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    cache = str(tmp_path_factory.mktemp("cache") / "new")
    result, stderr = start(media_spec(shared_dir, tmp_path_factory), f"cache={cache}")
    return Done(cache=cache, result=result, stderr=stderr)


def media_spec(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped spec, with the media where they lie on this machine."""
    text = (Path(__file__).parents[2] / SPEC).read_text()
    path = tmp_path_factory.mktemp("spec") / "media.yaml"
    path.write_text(text.replace("../shared", str(shared_dir)))
    return path


def test_all_real_media(on_folder: Done, start, shared_dir, tmp_path_factory):
    manifest = on_folder.manifest()
    aside = {(row.source, row.stream): row.reason for row in manifest.set_aside()}
    ready = {(row.source, row.stream) for row in manifest.ready()}

    assert aside["crab/avqa/00006835.mp4", "video"] == "not_found"  # missing on purpose
    assert ("crab/avqa/00006835.mp3", "audio:music-avqa") in ready  # its sound is there
    assert aside["loose/odd/corrupted.mp4", "video"] == "corrupt"
    for name in ("h265_no_audio.mp4", "non_zero_start.mp4", "rotated_90.mov", "av1_video.mkv"):
        assert (f"loose/odd/{name}", "video") in ready
        assert aside[f"loose/odd/{name}", "audio"] == "no_audio_stream"
    assert ("loose/odd/sine_mono_s16.wav", "audio") in ready
    for stream in ("video", "audio"):
        assert ("crab/-en7GAdXAQk.mp4", stream) in ready
        assert ("loose/general/video2.mp4", stream) in ready
    for name in ("arig/1.jpg", "s4/0.jpg", "ms3/1.jpg", "ref-avs/7.jpg", "avss/0.jpg"):
        assert (f"crab/{name}", "image") in ready

    # What both data sets name is one file under two names, and was worked on once.
    names = {row.source for row in manifest.rows}
    twice = {name for name in names if name.startswith("loose/") and name[6:] in names}
    assert "loose/crab/-en7GAdXAQk.mp4" in twice
    for name in twice:
        for stream in ("video", "audio", "image"):
            if (name, stream) in ready:
                assert manifest.row(name, stream).entry == manifest.row(name[6:], stream).entry
    ready = {row for row in ready if row[0] not in twice}
    aside = {row: reason for row, reason in aside.items() if row[0] not in twice}

    result = on_folder.result
    files = {path for path in (shared_dir / "media").rglob("*") if path.is_file()}
    assert result["files"] == len(files) + 1  # and the missing one
    assert result["encoded"] == len(ready)
    assert result["hits"] == 0
    assert sum(result["set_aside"].values()) == len(aside)
    assert "not_found" in on_folder.stderr

    again, _ = start(media_spec(shared_dir, tmp_path_factory), f"cache={on_folder.cache}")
    assert again["encoded"] == 0
    assert again["feature_bytes_written"] == 0
    assert again["hits"] == len(ready)
    assert again["set_aside"] == result["set_aside"]
    assert again["manifest"] == result["manifest"]


def test_cache_on_s3_and_split(on_folder: Done, start, s3: S3Server, shared_dir, tmp_path_factory):
    """Another store and another placement of the work: the same features under the same digest."""
    cache = s3.url("jobs/media")
    result, _ = start(
        media_spec(shared_dir, tmp_path_factory), f"cache={cache}", "pipeline.mode=split"
    )
    assert result["encoded"] == on_folder.result["encoded"]
    truth = truth_of(on_folder.cache, on_folder.result["manifest"])
    assert problems(cache, result["manifest"], truth) == []


def test_media_on_s3(start, s3: S3Server, tmp_path):
    """A sample may name a URL; once its features are cached the object is not fetched again."""
    local = counting_clip(tmp_path / "clip.mkv", 3, samples=tone([440.0] * 3))
    url = s3.url("clips/counting.mkv")
    S3FileSystem.clear_instance_cache()
    with fsspec.open(url, "wb") as file:
        file.write(local.read_bytes())
    common = {
        "task": "ave",
        "split": "train",
        "instruction": "What is seen?",
        "answer": "numbers",
        "label": {},
    }
    write_samples(
        tmp_path / "samples.jsonl",
        [
            Sample(id="remote", clip="remote", video=url, **common),
            Sample(id="gone", clip="gone", video=s3.url("clips/gone.mkv"), **common),
        ],
    )
    spec = tmp_path / "remote.yaml"
    spec.write_text(
        json.dumps(
            {
                "job": "preprocess",
                "name": "remote",
                "data": [{"name": "remote", "samples": str(tmp_path / "samples.jsonl")}],
                "cache": str(tmp_path / "cache"),
            }
        )
    )
    first, _ = start(spec)
    assert first["encoded"] == 2
    assert first["set_aside"] == {"not_found": 2}
    assert first["media_bytes_read"] == local.stat().st_size
    second, _ = start(spec)
    assert (second["encoded"], second["hits"], second["decoded_files"]) == (0, 2, 0)
    assert second["media_bytes_read"] == 0
    assert second["manifest"] == first["manifest"]
