"""Samples: round trip, paths, media that are needed, errors that name file and line."""

import json
from pathlib import Path

import pytest

from crab.samples import MaskRef, Sample, read_samples, write_samples


def make(**changes: object) -> Sample:
    row: dict[str, object] = {
        "id": "a",
        "task": "ave",
        "split": "train",
        "clip": "c",
        "video": "clips/c.mp4",
        "instruction": "Say what happens.",
        "answer": "<event> x </event> <range> 0,2 </range>",
        "label": {"event": "x", "start_s": 0, "end_s": 2},
    }
    return Sample.model_validate(row | changes)


def with_masks(*masks: dict[str, object]) -> str:
    return json.dumps(make(id="b").model_dump() | {"masks": masks})


def test_written_samples_read_back_equal_and_in_order(tmp_path: Path) -> None:
    samples = [
        make(id="b", reasoning="Größe \n two lines"),
        make(id="a", video=None, audio="/x/a.wav"),
    ]
    path = write_samples(tmp_path / "deep" / "samples.jsonl", samples)
    assert read_samples(path, resolve=False) == samples
    assert [entry.name for entry in path.parent.iterdir()] == ["samples.jsonl"]


def test_relative_paths_are_resolved_against_the_file_and_others_kept(tmp_path: Path) -> None:
    samples = [make(audio="s3://bucket/a.wav", image="/abs/i.jpg")]
    (read,) = read_samples(write_samples(tmp_path / "samples.jsonl", samples))
    assert read.media() == [
        (str(tmp_path / "clips/c.mp4"), "video"),
        ("s3://bucket/a.wav", "audio"),
        ("/abs/i.jpg", "image"),
    ]


def test_a_url_base_joins_as_url() -> None:
    sample = make(masks=[{"frame": 0, "file": "masks/0.png"}]).resolve("s3://bucket/set/")
    assert sample.video == "s3://bucket/set/clips/c.mp4"
    assert sample.masks[0].file == "s3://bucket/set/masks/0.png"


def test_masks_are_kept_with_their_paths_resolved_and_are_no_media(tmp_path: Path) -> None:
    masks = (
        MaskRef(frame=0, file="masks/c/0.png"),
        MaskRef(frame=4, file="masks/c/4.png", values=(3, 12)),
        MaskRef(frame=9, file="/abs/9.png", values=()),
        MaskRef(frame=1, file="s3://bucket/1.png"),
    )
    sample = make(masks=masks)
    path = write_samples(tmp_path / "samples.jsonl", [sample])
    assert read_samples(path, resolve=False) == [sample]
    (read,) = read_samples(path)
    assert [(mask.frame, mask.file, mask.values) for mask in read.masks] == [
        (0, str(tmp_path / "masks/c/0.png"), None),
        (4, str(tmp_path / "masks/c/4.png"), (3, 12)),
        (9, "/abs/9.png", ()),
        (1, "s3://bucket/1.png", None),
    ]
    assert read.media() == make().resolve(tmp_path).media()
    assert make().masks == ()


def test_samples_can_be_read_from_a_url(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "samples.jsonl", [make()])
    (read,) = read_samples(path.as_uri())
    assert read.video == f"{tmp_path.as_uri()}/clips/c.mp4"


def test_audio_left_out_means_the_track_of_the_video() -> None:
    assert make().media() == [("clips/c.mp4", "video"), ("clips/c.mp4", "audio")]
    assert make(video=None, image="i.jpg").media() == [("i.jpg", "image")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json", "not JSON"),
        ("[]", "expected one sample object"),
        (json.dumps({"id": "b"}), "task: Field required"),
        (make(id="b").model_dump_json().replace('"clip"', '"klip"'), "klip"),
        (make(id="b").model_dump_json().replace('"train"', '"training"'), "split"),
        (make(id="b").model_dump_json().replace('"clips/c.mp4"', "null"), "at least one of video"),
        (make(id="a").model_dump_json(), "was used in line 1"),
        (with_masks({"frame": -1, "file": "0.png"}), "masks.0.frame"),
        (with_masks({"frame": 0, "file": ""}), "masks.0.file"),
        (with_masks({"frame": 0}), "masks.0.file"),
        (with_masks({"frame": 0, "file": "0.png", "value": [1]}), "masks.0.value"),
        (with_masks(*[{"frame": 2, "file": "0.png"}] * 2), "one a frame at most"),
    ],
)
def test_a_wrong_line_is_named_with_its_file_and_number(
    tmp_path: Path, line: str, words: str
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(make().model_dump_json() + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl:3: ") as caught:
        read_samples(path)
    assert words in str(caught.value)


def test_samples_that_share_an_id_are_not_written(tmp_path: Path) -> None:
    path = write_samples(tmp_path / "samples.jsonl", [make()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="two samples have the id 'a'"):
        write_samples(path, [make(), make(clip="other")])
    assert path.read_bytes() == before
