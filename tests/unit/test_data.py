"""Data sets of a spec: names of files, streams, and files that several data sets share."""

import json
from pathlib import Path

from crab.synth.make import make_scene
from crab.synth.questions import samples_of
from crab_platform.work import Source
from jobs.data import load_dataset, merge_sources, stream_name
from jobs.spec import DataSource


def write_samples(folder: Path) -> Path:
    samples = samples_of(make_scene(0, 0))
    path = folder / "samples.jsonl"
    path.write_text("".join(sample.model_dump_json(exclude_none=True) + "\n" for sample in samples))
    return path


def test_names_do_not_say_where_the_data_lies(tmp_path: Path) -> None:
    names = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        path = write_samples(tmp_path / place)
        dataset = load_dataset(DataSource(name="d", samples=str(path)), {})
        names.append([source.name for source in dataset.sources])
        assert all(source.url.startswith(str(tmp_path / place)) for source in dataset.sources)
    assert names[0] == names[1]
    assert names[0][0].startswith("d/clips/")


def test_samples_of_one_clip_share_its_source(tmp_path: Path) -> None:
    dataset = load_dataset(DataSource(name="d", samples=str(write_samples(tmp_path))), {})
    assert len(dataset.samples) > 1
    assert [source.streams for source in dataset.sources] == [("video", "audio")]
    assert {ref.source for refs in dataset.media.values() for ref in refs} == {
        dataset.sources[0].name
    }


def test_a_file_in_two_data_sets_is_one_source_under_both_names() -> None:
    one = Source(name="a/x.mp4", url="/m/x.mp4", streams=("video",))
    other = Source(name="b/x.mp4", url="/m/x.mp4", streams=("video", "audio"))
    (merged,) = merge_sources([one, other])
    assert (merged.name, merged.aliases) == ("a/x.mp4", ("b/x.mp4",))
    assert merged.streams == ("video", "audio")


def test_loose_files_are_tried_by_their_kind(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.wav", "c.png", "d.txt", ".hidden"):
        (tmp_path / name).touch()
    dataset = load_dataset(DataSource(name="d", files=str(tmp_path)), {})
    assert {source.name: source.streams for source in dataset.sources} == {
        "d/a.mp4": ("video", "audio"),
        "d/b.wav": ("audio",),
        "d/c.png": ("image",),
        "d/d.txt": ("video",),
    }


def test_examples_name_the_video_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "samples.json"
    path.write_text(json.dumps([{"task": "avqa", "audio": "q/1.mp3", "question": "?"}]))
    dataset = load_dataset(DataSource(name="d", samples=str(path)), {"avqa": "music-avqa"})
    assert {source.name: source.streams for source in dataset.sources} == {
        "d/q/1.mp4": ("video",),
        "d/q/1.mp3": ("audio:music-avqa",),
    }


def test_only_sound_is_sampled_in_special_ways() -> None:
    assert stream_name("video", "avqa", {"avqa": "music-avqa"}) == "video"
    assert stream_name("audio", "ave", {"avqa": "music-avqa"}) == "audio"
