"""AVE: spans, splits, ids and lines that do not fit."""

from pathlib import Path

import pytest
from support.official_sets import read_source, write_text

from crab.tasks import TASKS
from crab.tasks.base import Answer

LINES = (
    "Church bell&abc&good&0&10",
    "Male speech, man speaking&abc&good&2&4",
    "Frying (food)&def&good&6&8",
)


def test_spans_names_and_places(tmp_path: Path) -> None:
    write_text(tmp_path / "AVE_Dataset" / "Annotations.txt", *LINES)
    samples, problems, report = read_source("ave", tmp_path)
    assert not problems
    assert [sample.label for sample in samples] == [
        {"event": "Church bell", "start_s": 0, "end_s": 10},
        {"event": "Male speech, man speaking", "start_s": 2, "end_s": 4},
        {"event": "Frying (food)", "start_s": 6, "end_s": 8},
    ]
    for sample in samples:
        prediction = TASKS["ave"].parse(sample.answer)
        assert prediction is not None
        assert prediction.end_s == sample.label["end_s"]
    assert samples[0].video == str(tmp_path / "AVE_Dataset" / "AVE" / "abc.mp4")
    assert {sample.split for sample in samples} == {"train"}
    assert "all clips went to train" in report.notes[0]


def test_two_events_of_one_video_have_two_ids(tmp_path: Path) -> None:
    write_text(tmp_path / "Annotations.txt", *LINES)
    samples, _, _ = read_source("ave", tmp_path)
    assert [sample.id for sample in samples] == ["ave/abc", "ave/abc#2", "ave/def"]
    assert [sample.clip for sample in samples] == ["abc", "abc", "def"]


def test_official_splits(tmp_path: Path) -> None:
    write_text(
        tmp_path / "Annotations.txt",
        "Category&VideoID&Quality&StartTime&EndTime",
        *LINES,
        "Dog&x&good&0&2",
    )
    write_text(tmp_path / "trainSet.txt", LINES[1], newline="\r\n")
    write_text(tmp_path / "valSet.txt", LINES[2])
    write_text(tmp_path / "testSet.txt", LINES[0])
    samples, problems, report = read_source("ave", tmp_path)
    assert [sample.split for sample in samples] == ["test", "train", "val"]
    assert [(problem["line"], problem["reason"]) for problem in problems] == [
        (5, "in none of the split files")
    ]
    assert report.rows == {"Annotations.txt": 4}
    assert not report.notes


def test_events_of_the_split_files_alone_are_told(tmp_path: Path) -> None:
    write_text(tmp_path / "Annotations.txt", LINES[0])
    for name in ("trainSet.txt", "valSet.txt", "testSet.txt"):
        write_text(tmp_path / name, *LINES)
    samples, problems, report = read_source("ave", tmp_path)
    assert len(samples) == 1
    assert not problems
    assert report.notes == [
        "2 events of the split files stand not in Annotations.txt: not imported"
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("Church bell&abc&good&5&5", "5,5"),
        ("Church bell&abc&good&4&11", "4,11"),
        ("Church bell&abc&good&x&3", "start"),
        ("Church bell&abc&good&3", "4 fields"),
        ("&abc&good&3&4", "category"),
    ],
)
def test_lines_that_do_not_fit(tmp_path: Path, line: str, reason: str) -> None:
    write_text(tmp_path / "Annotations.txt", LINES[0], line, LINES[2])
    samples, problems, _ = read_source("ave", tmp_path)
    assert len(samples) == 2
    assert problems[0]["line"] == 2
    assert reason in str(problems[0]["reason"])


def test_the_line_with_span_0_0_is_background_alone(tmp_path: Path) -> None:
    write_text(tmp_path / "Annotations.txt", LINES[0], "Church bell&abc&good&0&0")
    samples, problems, _ = read_source("ave", tmp_path)
    assert not problems
    assert samples[1].label == {"event": "background", "start_s": 0, "end_s": 10}
    texts = [samples[1].answer, "", samples[0].answer]
    scores = [TASKS["ave"].score([samples[1]], [Answer(text=text)])["accuracy"] for text in texts]
    assert scores[:2] == [1.0, 1.0] > [scores[2]]


def test_a_line_twice_is_a_duplicate(tmp_path: Path) -> None:
    write_text(tmp_path / "Annotations.txt", *LINES, LINES[0])
    samples, problems, report = read_source("ave", tmp_path)
    assert len(samples) == 3
    assert [(p["line"], p["kind"], p["reason"]) for p in problems] == [
        (4, "duplicate", "the same as line 1")
    ]
    assert report.counts["problem"] == 0


def test_without_annotations(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Annotations\.txt"):
        read_source("ave", tmp_path)
