"""Key completeness (A7): what decides features is in their key, and nothing else is.

No list of fields is trusted: the fields of a key are those of the records that a real preprocess job makes, the fields
of a spec are found by walking its model, and each must stand below in one of four classes. A new field without a class
fails here, and so does a key function that forgets any one field.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from pydantic import ValidationError
from support.fields import Path as Field
from support.fields import another, leaves, model_fields, value_at, with_value, without
from support.media_files import counting_clip, tone

import crab_platform.identity as identity
from crab.encoders.tiny import build_random, save_encoder, tiny_beats_config, tiny_clip_config
from crab.sampling import AudioSampling, VideoSampling
from crab_platform import ray_cluster
from crab_platform.identity import CODECS, DTYPES, differing_fields, digest
from crab_platform.work import StreamWork, Work
from jobs.preprocess import build_work, run
from jobs.presets import TINY
from jobs.spec import PreprocessSpec, SpecError, parse_spec

CLIP = "ab" * 32

SPEC: dict[str, Any] = {
    "job": "preprocess",
    "name": "keys",
    "runs": "runs",
    "data": [{"name": "clips", "files": "clips"}],
    "cache": {"url": "cache", "local": {"folder": "fast"}},
    "decoded_windows": {"max_clip_mb": 16},
    "sampling": {"tasks": {"avqa": "music-avqa"}},
    "encoders": {
        "video": {"kind": "clip", "path": str(TINY / "clip"), "select_layers": [2, 4]},
        "audio": {"kind": "beats", "path": str(TINY / "beats")},
        "codec": "blosc2-shuffle-zstd1",
    },
}
"""Both encoders in full, so that every field of theirs can be changed alone."""

# The four classes of a spec's fields. What is changed, and into what.

IDENTITY: dict[str, Any] = {
    "sampling.num_frames": 7,
    "sampling.num_segments": 7,
    "sampling.segment_ms": 900,
    "sampling.stride_ms": 900,
    "sampling.offset_ms": 100,
    "sampling.tasks": {},  # takes a stream away
    "encoders.video.select_layers": [1, 4],
    "encoders.video.dtype": "bfloat16",
    "encoders.audio.dtype": "bfloat16",
    "encoders.store_as": "float32",
    "encoders.codec": "raw",
}
"""Another value, another key for at least one stream."""

EXECUTION: dict[str, Any] = {
    "name": "other",
    "runs": "other-runs",
    "tracking.uri": "sqlite:///other.db",
    "tracking.experiment": "other",
    "data[].name": "other",
    "data[].files": "other-clips",
    "data[].samples": "samples.jsonl",
    "cache.url": "s3://other/cache",
    "cache.team": "others",
    "cache.read_through": ["s3://other/cache"],
    "cache.zone": "others",
    "cache.trust": {"others": "ab" * 32},
    "cache.local.folder": "faster",
    "cache.local.max_gb": 7,
    "cache.keep_days": 7,
    "decoded_windows.max_clip_mb": 7,
    "encoders.video.device": "cpu",
    "encoders.audio.device": "cpu",
    "encoders.video.batch_size": 3,
    "encoders.audio.batch_size": 3,
    "decode.timeout_s": 7,
    "decode.memory_mb": 512,
    "decode.clips_per_process": 3,
    "pipeline.mode": "split",
    "pipeline.encode_actors": 3,
    "pipeline.decode_tasks": 3,
    "pipeline.decode_processes": 3,
    "pipeline.encode_cpus": 0.5,
    "pipeline.encode_gpus": 1,
    "pipeline.clips_per_pack": 3,
    "pipeline.clips_per_decode": 3,
}
"""Where and how: another value, the same key for every stream of the same clip."""

PLACE = (
    "encoders.preset",
    "encoders.video.path",
    "encoders.video.hub_id",
    "encoders.video.revision",
    "encoders.audio.path",
    "encoders.audio.hub_id",
    "encoders.audio.revision",
)
"""Where weights are found: the same weights from another place give the same key, other weights another."""

FIXED: dict[str, Any] = {
    "job": "train",
    "encoders.video.kind": "beats",
    "encoders.audio.kind": "clip",
    "encoders.audio.select_layers": [1],
}
"""Has one right value, and any other is refused."""


# The fields of a job as its workers get it.

STREAM_IDENTITY = {"stream", "sampling", "encoder", "dtype", "codec"}
WORK_IDENTITY = {"decode"}
STREAM_EXECUTION = {"make_encoder", "request", "device", "tolerance"}
WORK_EXECUTION = {
    *("name", "by", "open_cache", "streams", "make_decoder", "config"),
    *("keep_decoded_bytes", "keep_s"),
}
"""`streams` holds the records; `request` says to the decoder what `sampling` says to the key."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """One of the two kinds of entry that a job has keys for."""

    key: Callable[[Work, str, str], identity.AnyKey]
    many: Callable[[Work, str, Sequence[str]], list[str]]
    kind: type[identity.AnyKey]
    identity: set[str]
    """Which of STREAM_IDENTITY count."""


LEVELS = {
    "features": Level(
        key=Work.key, many=Work.key_digests, kind=identity.FeatureKey, identity=STREAM_IDENTITY
    ),
    "decoded": Level(
        key=Work.decoded_key,
        many=Work.decoded_digests,
        kind=identity.DecodedKey,
        identity={"stream", "sampling"},
    ),
}
each_level = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)


@pytest.fixture(scope="module")
def work() -> Work:
    return work_of(SPEC)


def work_of(values: Mapping[str, Any]) -> Work:
    spec = parse_spec(values)
    assert isinstance(spec, PreprocessSpec)
    return build_work(spec)


def changed_spec(name: str, value: Any) -> dict[str, Any]:
    """SPEC with the field of a dotted name replaced."""
    if name.startswith("data[]."):
        source = {"name": "clips", "files": "clips"} | {name.removeprefix("data[]."): value}
        if "samples" in source:
            del source["files"]
        return SPEC | {"data": [source]}
    path = tuple(name.split("."))
    return with_value(SPEC | {path[0]: SPEC.get(path[0], {})}, path, value)


def keys(work: Work) -> dict[str, str]:
    return {stream: work.key(stream, CLIP).digest for stream in work.streams}


def keys_of(values: Mapping[str, Any]) -> dict[str, str]:
    return keys(work_of(values))


# Fields of the key itself.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """One field of the key of one stream, as the job declares it, and another value for it."""

    stream: str
    path: Field
    other: Any

    @property
    def name(self) -> str:
        return ".".join(self.path)


def declared_fields(work: Work, level: Level) -> list[Declared]:
    """Every field that the keys of a job should have. Taken from the job, not from its keys, which may forget some."""
    found = []
    for stream, todo in work.streams.items():
        record: dict[str, Any] = {
            "schema": identity.KEY_SCHEMA,
            "media_sha256": CLIP,
            **{name: getattr(todo, name) for name in level.identity},
            **{name: getattr(work, name) for name in WORK_IDENTITY},
        }
        for path in leaves(record):
            other = another(value_at(record, path))
            if path == ("media_sha256",):
                other = "cd" * 32
            elif path == ("codec",):
                other = next(name for name in CODECS if name != todo.codec)
            elif path == ("dtype",):
                other = next(name for name in DTYPES if name != todo.dtype)
            found.append(Declared(stream=stream, path=path, other=other))
    return found


def key_with(work: Work, level: Level, field: Declared) -> identity.AnyKey:
    """The key that the job's own function makes of it with one field changed."""
    top, *below = field.path
    sha256 = CLIP
    if top == "media_sha256":
        sha256 = field.other
    elif top in STREAM_IDENTITY:
        todo = work.streams[field.stream]
        changed = {top: replaced(getattr(todo, top), below, field.other)}
        streams = {**work.streams, field.stream: dataclasses.replace(todo, **changed)}
        work = dataclasses.replace(work, streams=streams)
    elif top in WORK_IDENTITY:
        changed = {top: replaced(getattr(work, top), below, field.other)}
        work = dataclasses.replace(work, **changed)
    return level.key(work, field.stream, sha256)


def replaced(value: Any, path: Sequence[str], other: Any) -> Any:
    return with_value(value, tuple(path), other) if path else other


def forgotten(work: Work, level: Level) -> set[str]:
    """Fields that may change alone without a new key, or without being named as what differs: none, we hope."""
    found = set()
    for field in declared_fields(work, level):
        old = level.key(work, field.stream, CLIP)
        before, key = old.record(), old.digest
        with pytest.MonkeyPatch.context() as patch:
            if field.path == ("schema",):
                patch.setattr(identity, "KEY_SCHEMA", field.other)
            new = key_with(work, level, field)
            if new.digest == key or list(differing_fields(before, new.record())) != [field.name]:
                found.add(field.name)
    return found


def written_fields(work: Work, level: Level) -> set[Field]:
    return {path for s in work.streams for path in leaves(level.key(work, s, CLIP).record())}


@each_level
def test_every_field_of_every_key_changes_it_and_is_named(work: Work, level: Level) -> None:
    assert len(declared_fields(work, level)) > 25  # four streams of many fields: the walk walks
    assert forgotten(work, level) == set()


@each_level
def test_every_field_of_a_key_was_declared(work: Work, level: Level) -> None:
    declared = {field.path for field in declared_fields(work, level)}
    assert written_fields(work, level) - {("level",)} == declared


@each_level
@pytest.mark.parametrize("place", ["digest", "record"])
def test_a_key_that_forgets_any_one_field_is_found(work: Work, level: Level, place: str) -> None:
    """Mutants, one for each field and one for each part: dropped before the digest, or from the record itself."""
    fields = {field.path for field in declared_fields(work, level)}
    parts = {path[:length] for path in fields for length in range(1, len(path))}
    mutants = sorted(fields | parts)
    true_record: Callable[[identity.AnyKey], dict[str, Any]] = level.kind.record
    survivors = []
    for path in mutants:

        def blind(key: identity.AnyKey, path: Field = path) -> dict[str, Any]:
            record = true_record(key)
            try:
                return without(record, path)
            except KeyError:  # streams of this kind have no such field
                return record

        with pytest.MonkeyPatch.context() as patch:
            if place == "record":
                patch.setattr(level.kind, "record", blind)
            else:
                patch.setattr(level.kind, "digest", property(lambda key: digest(blind(key))))
            name = ".".join(path)
            if not any(f"{field}.".startswith(f"{name}.") for field in forgotten(work, level)):
                survivors.append(name)
    assert survivors == []
    assert len(mutants) > 14
    assert forgotten(work, level) == set()  # nothing of a mutant is left


@each_level
def test_keys_of_many_files_are_the_keys_of_each(work: Work, level: Level) -> None:
    media = [CLIP, "cd" * 32, "0" * 64]
    for stream in work.streams:
        one_by_one = [level.key(work, stream, sha256).digest for sha256 in media]
        assert level.many(work, stream, media) == one_by_one


def test_decoded_windows_have_keys_of_their_own_that_no_encoder_changes(work: Work) -> None:
    features = {work.key(stream, CLIP).digest for stream in work.streams}
    decoded = {stream: work.decoded_key(stream, CLIP).digest for stream in work.streams}
    assert features.isdisjoint(decoded.values())
    for name in ("encoders.video.select_layers", "encoders.audio.dtype", "encoders.store_as"):
        other = work_of(changed_spec(name, IDENTITY[name]))
        assert {s: other.decoded_key(s, CLIP).digest for s in other.streams} == decoded


# How a job is described to the workers.


def test_every_field_of_a_job_is_in_its_keys_or_says_how_and_where() -> None:
    of_job = {field.name for field in dataclasses.fields(Work)}
    assert of_job == WORK_IDENTITY | WORK_EXECUTION
    of_stream = {field.name for field in dataclasses.fields(StreamWork)}
    assert of_stream == STREAM_IDENTITY | STREAM_EXECUTION


def test_what_the_decoder_is_asked_is_what_the_key_says(work: Work) -> None:
    for stream in work.streams.values():
        assert stream.request.record() == stream.sampling


@pytest.mark.parametrize("kind", [VideoSampling, AudioSampling])
def test_every_field_of_a_sampling_is_in_its_record(
    kind: type[VideoSampling | AudioSampling],
) -> None:
    base = kind()
    for field in dataclasses.fields(kind):
        value = getattr(base, field.name) + (1000 if field.name == "sample_rate_hz" else 10)
        changed = dataclasses.replace(base, **{field.name: value})
        assert list(differing_fields(base.record(), changed.record())) == [field.name]


# Fields of the spec.


def test_every_field_of_the_spec_has_a_class() -> None:
    classes = [*IDENTITY, *EXECUTION, *PLACE, *FIXED]
    assert len(classes) == len(set(classes))
    assert set(model_fields(PreprocessSpec)) == set(classes)


@pytest.mark.parametrize("name", IDENTITY)
def test_an_identity_field_changes_a_key(name: str, work: Work) -> None:
    assert keys_of(changed_spec(name, IDENTITY[name])) != keys(work)


@pytest.mark.parametrize("name", EXECUTION)
def test_an_execution_field_changes_no_key(name: str, work: Work) -> None:
    assert keys_of(changed_spec(name, EXECUTION[name])) == keys(work)


@pytest.mark.parametrize("name", ["decoded_windows", "cache.local"])
def test_a_part_that_is_left_out_changes_no_key(name: str, work: Work) -> None:
    assert keys_of(changed_spec(name, None)) == keys(work)


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_field_is_refused_with_another_value(name: str) -> None:
    spec = changed_spec(name, FIXED[name])
    if name.endswith("video.kind"):
        spec["encoders"]["video"] |= {"select_layers": [], "path": str(TINY / "beats")}
    if name.endswith("audio.kind"):
        spec["encoders"]["audio"] |= {"select_layers": [2], "path": str(TINY / "clip")}
    with pytest.raises((SpecError, ValidationError)):
        keys_of(spec)


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_weights_count_and_their_place_does_not(stream: str, work: Work, tmp_path: Path) -> None:
    folder = Path(SPEC["encoders"][stream]["path"])
    shutil.copytree(folder, tmp_path / "copy")
    name = f"encoders.{stream}.path"
    assert keys_of(changed_spec(name, str(tmp_path / "copy"))) == keys(work)
    assert keys_of(changed_spec(f"encoders.{stream}.revision", "v2")) == keys(work)  # of no hub

    other_weights(stream, tmp_path / "other")
    changed = keys_of(changed_spec(name, str(tmp_path / "other")))
    heard = {key for key in changed if key.startswith("audio")}
    concerned = heard if stream == "audio" else changed.keys() - heard
    assert {key for key in changed if changed[key] != keys(work)[key]} == concerned


def other_weights(stream: str, folder: Path) -> None:
    """An encoder of the preset's shape with other numbers."""
    config = tiny_clip_config() if stream == "video" else tiny_beats_config()
    save_encoder(build_random(config, seed=1), folder)


def test_a_preset_is_its_weights(work: Work) -> None:
    by_name = SPEC | {"encoders": {"preset": "tiny", "codec": SPEC["encoders"]["codec"]}}
    assert keys_of(by_name) == keys(work)
    for preset in (None, "paper"):
        assert keys_of(changed_spec("encoders.preset", preset)) == keys(work)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The download folder of a hub that cannot be reached: repositories in it are found, others are not."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_on_hub(hub: Path, name: str, revision: str, files: Path) -> None:
    folder = hub / f"models--{name.replace('/', '--')}"
    commit = digest([name, revision])[:40]
    shutil.copytree(files, folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)


@pytest.mark.parametrize("stream", ["video", "audio"])
def test_weights_from_a_hub_count_and_their_name_does_not(
    stream: str, work: Work, hub: Path, tmp_path: Path
) -> None:
    files = Path(SPEC["encoders"][stream]["path"])
    other_weights(stream, tmp_path / "other")
    put_on_hub(hub, "we/tiny", "main", files)
    put_on_hub(hub, "we/tiny", "same", files)
    put_on_hub(hub, "they/copy", "main", files)
    put_on_hub(hub, "we/tiny", "newer", tmp_path / "other")

    def found(name: str, revision: str) -> dict[str, str]:
        encoder = SPEC["encoders"][stream] | {"path": "", "hub_id": name, "revision": revision}
        return keys_of(changed_spec(f"encoders.{stream}", encoder))

    for name, revision in (("we/tiny", "main"), ("we/tiny", "same"), ("they/copy", "main")):
        assert found(name, revision) == keys(work)
    assert found("we/tiny", "newer") != keys(work)


# The same through a whole job.


@pytest.fixture
def cluster() -> Iterator[None]:
    """One Ray for the jobs of a test. With the HOME of all tests: a process keeps the token of its first Ray."""
    with ray_cluster.connected():
        yield


@pytest.mark.ray
def test_a_cached_clip_is_a_hit_from_another_path_with_other_workers(
    tmp_path: Path, cluster: None
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for number in range(3):
        pictures = {"samples": tone([300.0 + 100 * number] * 2)}
        counting_clip(clips / f"{number}.mkv", 2, **pictures)
    first = job(tmp_path, "first", clips)
    assert (first["encoded"], first["hits"], first["decoded_files"]) == (6, 0, 3)

    shutil.copytree(clips, tmp_path / "moved" / "elsewhere")
    placed = {
        "pipeline": {"encode_actors": 2, "clips_per_pack": 1, "decode_processes": 2},
        "decode": {"timeout_s": 30, "clips_per_process": 1},
        "runs": str(tmp_path / "other-runs"),
    }
    encoders = {
        "video": SPEC["encoders"]["video"] | {"batch_size": 3},
        "audio": SPEC["encoders"]["audio"] | {"batch_size": 3},
    }
    again = job(tmp_path, "again", tmp_path / "moved" / "elsewhere", encoders=encoders, **placed)
    assert (again["encoded"], again["hits"], again["decoded_files"]) == (0, 6, 0)
    assert again["feature_bytes_written"] == 0
    assert again["manifest"] == first["manifest"]

    # And it would have been seen: an identity field changed, and all is decoded and encoded again.
    anew = job(tmp_path, "anew", clips, sampling={"num_frames": 3, "num_segments": 3})
    assert (anew["encoded"], anew["hits"], anew["decoded_files"]) == (6, 0, 3)


def job(folder: Path, name: str, clips: Path, **changes: Any) -> dict[str, Any]:
    values = {
        "job": "preprocess",
        "name": name,
        "runs": str(folder / "runs"),
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "data": [{"name": "clips", "files": str(clips)}],
        "cache": str(folder / "cache"),
    }
    spec = parse_spec(values | changes)
    assert isinstance(spec, PreprocessSpec)
    return run(spec)
