"""Ref-AVS: subsets, frames and videos, empty masks."""

from pathlib import Path

import numpy as np
from PIL import Image
from support.official_sets import read_source, write_csv, write_map

from crab.masks import MASK_SIZE, read_mask
from crab.tasks import TASKS

HEADER = ["vid", "uid", "split", "fid", "exp"]


def write(folder: Path, *rows: tuple[str, str, object, str]) -> None:
    """(uid, split, fid, exp)"""
    write_csv(folder / "metadata.csv", HEADER, [("?", *row) for row in rows])


def test_subsets_and_frames_without_media(tmp_path: Path) -> None:
    write(
        tmp_path,
        ("-v_1_0_10000_hair-dryer_1", "train", 3, 'The "loud" one, in front.'),
        ("w_0_10000_cat_2", "test_u", 0, "The cat"),
        ("w_0_10000_cat_3", "test_n", 1, "The dog"),
    )
    samples, problems, _ = read_source("ref-avs", tmp_path)
    assert not problems
    assert len(samples) == 30
    first = samples[4]
    assert first.id == "ref-avs/-v_1_0_10000_hair-dryer_1/4"
    assert first.image == str(tmp_path / "media/-v_1_0_10000/frames/4.jpg")
    assert first.audio == str(tmp_path / "media/-v_1_0_10000/audio.wav")
    assert first.masks[0].file == str(tmp_path / "gt_mask/-v_1_0_10000/fid_3/00004.png")
    assert first.label == {"expression": 'The "loud" one, in front.', "subset": "seen"}
    assert " hair-dryer <mask_start>" in first.answer
    assert {(s.split, s.label["subset"]) for s in samples[10:]} == {
        ("test", "unseen"),
        ("test", "null"),
    }
    null = samples[-1]
    assert null.answer == "<range> none </range>"
    assert null.masks[0].values == ()
    assert all(TASKS["ref-avs"].parse(sample.answer) is not None for sample in samples)


def test_frames_in_which_the_object_is_not_seen(tmp_path: Path) -> None:
    write(tmp_path, ("v_0_10000_cat_1", "val", 0, "The cat"))
    for frame in range(10):
        seen = [(255, 0, 0, 100, 100)] if frame in (2, 3, 7) else []
        write_map(tmp_path / f"gt_mask/v_0_10000/fid_0/{frame:05d}.png", seen)
    samples, _, _ = read_source("ref-avs", tmp_path)
    answers = [TASKS["ref-avs"].parse(sample.answer) for sample in samples]
    assert [bool(answer) for answer in answers] == [frame in (2, 3, 7) for frame in range(10)]
    assert [read_mask(s.masks[0], MASK_SIZE).any() for s in samples] == [bool(a) for a in answers]


def test_a_broken_mask_is_told(tmp_path: Path) -> None:
    write(tmp_path, ("v_0_10000_cat_1", "val", 0, "The cat"), ("w_0_10000_cat_1", "val", 0, "It"))
    path = tmp_path / "gt_mask/v_0_10000/fid_0/00003.png"
    path.parent.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 70, (448, 448), np.uint8)
    Image.fromarray(noise).save(path)
    head, first, rest = path.read_bytes().split(b"IDAT", 2)
    path.write_bytes(head + b"IDAT" + first + b"!!!!" + rest)
    samples, problems, _ = read_source("ref-avs", tmp_path)
    assert {sample.clip for sample in samples} == {"w_0_10000"}
    assert [problem["line"] for problem in problems] == [2]
    assert "00003.png cannot be read" in str(problems[0]["reason"])


def test_a_video_makes_one_sample_of_all_ten_masks(tmp_path: Path) -> None:
    write(tmp_path, ("v_0_10000_cat_1", "val", 0, "The cat"))
    for frame in range(10):
        seen = [(255, 0, 0, 100, 100)] if frame in (2, 3, 7) else []
        write_map(tmp_path / f"gt_mask/v_0_10000/fid_0/{frame:05d}.png", seen)
    (tmp_path / "v_0_10000.mp4").touch()
    (sample,), _, _ = read_source("ref-avs", tmp_path)
    assert sample.video == str(tmp_path / "v_0_10000.mp4")
    assert [mask.frame for mask in sample.masks] == list(range(10))
    items = TASKS["ref-avs"].parse(sample.answer)
    assert [(item.start_s, item.end_s) for item in items] == [(2, 4), (7, 8)]


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    write(
        tmp_path,
        ("v_0_10000_cat_1", "TODO", 0, "The cat"),
        ("cat", "train", 0, "The cat"),
        ("v_0_10000_cat_1", "train", "x", "The cat"),
        ("v_0_10000_cat_1", "train", 0, " "),
        ("v_0_10000_cat_1", "train", 0, "The cat"),
        ("v_0_10000_cat_1", "train", 0, "The cat"),
        ("v_0_10000_cat_1", "train", 0, "Another one"),
    )
    samples, problems, report = read_source("ref-avs", tmp_path)
    assert [problem["line"] for problem in problems] == [2, 3, 4, 5, 7]
    assert report.counts == {"problem": 4, "duplicate": 1}
    assert {sample.id.rsplit("/", 1)[0] for sample in samples} == {
        "ref-avs/v_0_10000_cat_1",
        "ref-avs/v_0_10000_cat_1#2",
    }


def test_expressions_that_mean_nothing_are_kept_and_told(tmp_path: Path) -> None:
    write(tmp_path, ("v_0_10000_cat_1", "train", 0, "NO."))
    samples, _, report = read_source("ref-avs", tmp_path)
    assert len(samples) == 10
    assert "NO." in report.notes[0]
