"""`crab plan` and `crab cache why` over real files: what they say, and that they touch nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.crab_runs import CrabRun
from support.media_files import counting_clip, tone

from crab_platform import source as media
from crab_platform.cache import FeatureCache
from crab_platform.catalog import ManifestRow, write_manifest
from crab_platform.commits import Writer
from crab_platform.packs import new_entry
from crab_platform.storage import open_store
from crab_platform.usage import Usage, write_usage
from jobs.cache_why import why
from jobs.plan import plan_spec, sources_of
from jobs.preprocess import build_work
from jobs.spec import PreprocessSpec, SpecError, load_spec


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """A job over three clips and a file that is no video, of which an earlier run encoded all but the last clip."""
    (tmp_path / "clips").mkdir()
    for number in range(3):
        samples = tone([440.0 + number])
        counting_clip(tmp_path / "clips" / f"{number}.mkv", 1 + number, samples=samples)
    (tmp_path / "clips" / "notes.txt").write_text("no video")
    path = tmp_path / "spec.yaml"
    values = {
        "job": "preprocess",
        "name": "prep",
        "runs": str(tmp_path / "runs"),
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "data": [{"name": "mine", "files": str(tmp_path / "clips")}],
        "cache": str(tmp_path / "cache"),
    }
    path.write_text(yaml.safe_dump(values))
    _fill(path)
    return path


def _fill(path: Path) -> None:
    """What the earlier run left: entries, a manifest, result.json and a data base."""
    spec = load_spec(path)
    assert isinstance(spec, PreprocessSpec)
    work = build_work(spec)
    cache = FeatureCache(open_store(spec.cache.url), writer=Writer(run="r1", team="vision"))
    rows = []
    for source in sources_of(spec):
        data = Path(source.url).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        version = media.versions([source.url])[source.url] or ""
        for stream in source.streams:
            common: dict[str, Any] = {"source": source.name, "stream": stream}
            if source.name.endswith("txt"):
                rows.append(
                    ManifestRow(status="set_aside", reason="corrupt", media_sha256=sha256, **common)
                )
                continue
            if source.name.endswith("2.mkv"):
                continue
            new = new_entry(
                work.key(stream, sha256),
                {"x": np.ones((2, 3), np.float32)},
                source_url=source.url,
                source_version=version,
                decode_s=0.5,
                encode_s=0.25,
                device="cpu",
            )
            (entry,) = cache.commit([new])
            rows.append(ManifestRow(status="ready", entry=entry, media_sha256=sha256, **common))
    manifest = write_manifest(cache.store, rows)
    spec.folder.mkdir(parents=True)
    result = {"cache": spec.cache.url, "manifest": manifest.digest}
    (spec.folder / "result.json").write_text(json.dumps(result))
    (path.parent / "mlflow.db").write_bytes(b"a data base")


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file and folder with its content and its time of change."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
    }


def counts(plan: dict[str, Any]) -> dict[tuple[str, str], int]:
    return {(group["stream"], group["reason"]): group["count"] for group in plan["groups"]}


def test_plan_and_why_touch_nothing(spec_file: Path):
    before = everything(spec_file.parent)

    plan_spec(load_spec(spec_file), profile="laptop")
    plan_spec(load_spec(spec_file, ["encoders.store_as=float32"]), hashed=True)
    why("mine/0.mkv", str(spec_file), None)
    why(str(spec_file.parent / "clips" / "0.mkv"), None, str(spec_file.parent / "cache"))

    assert everything(spec_file.parent) == before


def test_each_clip_has_its_reason_and_the_whole_its_price(spec_file: Path):
    plan = plan_spec(load_spec(spec_file), profile="laptop")
    assert counts(plan) == {
        ("video", "hit"): 2,
        ("audio", "hit"): 2,
        ("video", "never_seen"): 1,
        ("audio", "never_seen"): 1,
        ("video", "set_aside_before"): 1,
    }
    assert plan["files_to_read"] == 2
    clips = spec_file.parent / "clips"
    sizes = sum((clips / name).stat().st_size for name in ("2.mkv", "notes.txt"))
    assert plan["bytes_to_read"] == sizes
    assert plan["bytes_to_write"] == 2 * 12
    assert plan["cpu_s"] == pytest.approx(2 * 0.75)
    assert plan["money"]["total"] > 0
    assert plan["spared_decode_s"] == pytest.approx(4 * 0.5)

    changed = plan_spec(load_spec(spec_file, ["encoders.store_as=float32"]))
    (video,) = [
        group
        for group in changed["groups"]
        if group["stream"] == "video" and group["reason"] == "key_differs"
    ]
    assert video["count"] == 2
    assert video["fields"] == [{"field": "dtype", "cached": "float16", "wanted": "float32"}]
    assert video["from"][0]["run"] == "r1"
    assert changed["bytes_to_write"] is None  # nothing of that type is there to say how large it is


def test_why_tells_where_a_hit_lies_and_what_makes_a_miss(spec_file: Path):
    found = why("0.mkv", str(spec_file), None)
    (video,) = [one for one in found["streams"] if one["stream"] == "video"]
    assert video["status"] == "hit"
    assert video["entry"]["run"] == "r1"
    assert video["entry"]["decode_s"] == 0.5

    values = yaml.safe_load(spec_file.read_text()) | {"sampling": {"num_frames": 3}}
    other = spec_file.with_name("other.yaml")
    other.write_text(yaml.safe_dump(values))
    by_digits = why(found["media_sha256"][:16], str(other), None)
    (video,) = [one for one in by_digits["streams"] if one["stream"] == "video"]
    assert video["reason"] == "key_differs"
    assert [field["field"] for field in video["earlier"][0]["fields"]] == ["sampling.num_frames"]

    with pytest.raises(SpecError, match=r"did you mean '0.mkv'"):
        why("00.mkv", str(spec_file), None)


def test_why_of_a_clip_that_was_set_aside_says_so(
    spec_file: Path, capsys: pytest.CaptureFixture[str]
):
    place = f"{spec_file.parent}/clips/../clips/notes.txt"
    found = why(place, str(spec_file), None)
    (video,) = found["streams"]  # the job wants no sound of it
    assert (video["stream"], video["status"], video["detail"]) == ("video", "set_aside", "corrupt")
    assert "video: set aside, by the last run; it is tried again (corrupt)" in (
        capsys.readouterr().err
    )
    by_digits = why(found["media_sha256"][:12], str(spec_file), None)
    assert [one["status"] for one in by_digits["streams"]] == ["set_aside"]


def test_why_of_a_clip_that_is_not_in_the_data_says_so(
    spec_file: Path, capsys: pytest.CaptureFixture[str]
):
    other = spec_file.with_name("other.bin")
    other.write_text("no clip of the job")
    found = why(str(other), str(spec_file), None)
    assert found["in_spec"] is False
    assert [one["reason"] for one in found["streams"]] == ["never_seen"] * len(found["streams"])
    said = capsys.readouterr().err
    assert "it is no clip of this spec's data" in said
    assert "never seen here, neither under this name nor by its content" in said
    assert why("mine/0.mkv", str(spec_file), None)["in_spec"] is True


def test_people_read_the_names_of_specs_jobs_and_sums(
    spec_file: Path, capsys: pytest.CaptureFixture[str]
):
    store = open_store(spec_file.parent / "cache")
    write_usage(store, Usage(kind="preprocess", job="prep", run="r1"))
    changes = ["encoders.store_as=float32", "encoders.codec=blosc2-shuffle-zstd1"]
    plan_spec(load_spec(spec_file, changes))
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "encoders.codec: raw -> blosc2-shuffle-zstd1" in said
    assert "encoders.store_as: float16 -> float32" in said
    assert "by job prep (run r1), team vision" in said
    assert "never seen here under this name, size and time" in said
    assert "with 1 encode actor, plus the start of Ray" in said
    assert said.count("unsure:") == 1

    why("mine/0.mkv", str(spec_file), None)
    said = capsys.readouterr().err
    assert "decode 1 s, for all its streams together" in said
    assert said.count("decode") == 1


def test_a_sequence_says_of_each_step_what_it_needs(spec_file: Path):
    preprocess = yaml.safe_load(spec_file.read_text())
    common = {name: preprocess.pop(name) for name in ("runs", "tracking")}
    train = {
        "job": "train",
        "name": "train",
        "data": preprocess["data"],
        "features": {"cache": preprocess["cache"], "manifest": "prep"},
        "optimisation": {"steps": 1, "batch_size": 1},
    }
    synth = {"job": "synth", "name": "clips", "out": str(spec_file.parent / "shapes")}
    later = {**preprocess, "name": "later"}
    later["data"] = [{"name": "shapes", "samples": f"{synth['out']}/samples.jsonl"}]
    steps = [synth, later, preprocess, train]
    path = spec_file.with_name("sequence.yaml")
    path.write_text(yaml.safe_dump({"job": "sequence", "name": "all", "steps": steps, **common}))

    made, waits, planned, reads = plan_spec(load_spec(path))["steps"]

    assert made["cache"] is None
    assert waits["waits_for"] == "clips"
    assert planned["hit"] == 4
    assert (reads["is_there"], reads["made_by"]) == (True, "prep")


def test_the_command_line_prints_one_object_and_writes_every_clip(spec_file: Path):
    folder = spec_file.parent
    out = folder / "clips.jsonl"
    arguments = ["plan", str(spec_file), "--json", "--limit", "1", "--clips-to", str(out)]
    run = CrabRun(arguments, {}, folder)
    plan = run.finish()
    assert len(plan["sample"]) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == plan["streams"] == 7
    assert {row["clip"] for row in rows} == {
        *(f"mine/{number}.mkv" for number in range(3)),
        "mine/notes.txt",
    }
    again = CrabRun(arguments, {}, folder)
    assert again.wait() == 2
    assert "--clips-to writes a new file" in again.stderr()
