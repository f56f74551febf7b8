"""MUSIC-AVQA: slots, answers, deleted questions, two official sets."""

from pathlib import Path

import pytest
from support.official_sets import question, read_source, write_json

from crab.datasets.music_avqa import fill


def test_a_question_becomes_a_sample(tmp_path: Path) -> None:
    write_json(tmp_path / "data" / "json_update" / "avqa-val.json", [question(7)])
    (sample,), problems, report = read_source("music-avqa", tmp_path)
    assert not problems
    assert (sample.id, sample.split, sample.clip) == ("music-avqa/7", "val", "00000007")
    assert sample.instruction.endswith("How many sounding violin in the video?")
    assert sample.answer == "<answer> two </answer>"
    assert sample.label == {"answer": "two", "type": ["Audio-Visual", "Counting"]}
    assert sample.video == str(tmp_path / "data" / "video" / "00000007.mp4")
    assert "no avqa-train.json below the folder" in report.notes


def test_slots_are_filled_in_order() -> None:
    text = "Is the instrument on the <LR> more rhythmic than the instrument on the <LR>?"
    assert fill(text, ["right", "left"]) == (
        "Is the instrument on the right more rhythmic than the instrument on the left?"
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"templ_values": "[]"}, "1 slots"),
        ({"templ_values": '["a", "b"]'}, "1 slots"),
        ({"templ_values": "violin"}, "templ_values"),
        ({"type": '["Audio"]'}, "type"),
        ({"anser": ""}, "anser"),
        ({"video_id": None}, "video_id"),
    ],
)
def test_questions_that_do_not_fit(tmp_path: Path, change: dict, reason: str) -> None:
    write_json(tmp_path / "avqa-test.json", [question(1), question(2, **change), question(3)])
    samples, problems, _ = read_source("music-avqa", tmp_path)
    assert [sample.id for sample in samples] == ["music-avqa/1", "music-avqa/3"]
    assert problems[0]["line"] == 11
    assert reason in str(problems[0]["reason"])


def test_deleted_questions_are_left_out_and_told(tmp_path: Path) -> None:
    write_json(tmp_path / "avqa-test.json", [question(1, question_deleted=1), question(2)])
    samples, problems, report = read_source("music-avqa", tmp_path)
    assert len(samples) == 1
    assert [problem["kind"] for problem in problems] == ["left_out"]
    assert report.counts["problem"] == 0


def test_the_corrected_set_is_read_and_the_other_named(tmp_path: Path) -> None:
    write_json(tmp_path / "json" / "avqa-test.json", [question(1, anser="old")])
    write_json(tmp_path / "json_update" / "avqa-test.json", [question(1, anser="new")])
    (sample,), _, report = read_source("music-avqa", tmp_path)
    assert sample.label["answer"] == "new"
    assert any(note.startswith("json/avqa-test.json was not read") for note in report.notes)


def test_a_question_twice_is_a_duplicate(tmp_path: Path) -> None:
    write_json(tmp_path / "avqa-train.json", [question(1)])
    write_json(tmp_path / "avqa-test.json", [question(1)])
    samples, problems, _ = read_source("music-avqa", tmp_path)
    assert [sample.split for sample in samples] == ["train"]
    assert "avqa-train.json:2" in str(problems[0]["reason"])
