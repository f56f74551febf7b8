"""VALOR-32K: lists and lines, several captions of a clip."""

from pathlib import Path

from support.official_sets import read_source, write_json, write_text

CLIP = "x6-qmZTWHUM_30.000_40.000"


def test_captions(tmp_path: Path) -> None:
    write_json(
        tmp_path / "desc_train.json",
        [{"video_id": CLIP, "desc": " A dog\nbarks. "}, {"video_id": CLIP, "desc": "Barking."}],
    )
    write_text(tmp_path / "desc_test.json", '{"video_id": "b", "desc": "Rain falls."}')
    (train, test), problems, report = read_source("valor", tmp_path)
    assert not problems
    assert (train.id, train.split) == (f"valor/{CLIP}", "train")
    assert (train.answer, train.label) == (
        "A dog barks.",
        {"captions": ["A dog barks.", "Barking."]},
    )
    assert train.video == str(tmp_path / "raw_videos" / f"{CLIP}.mp4")
    assert (test.split, test.answer) == ("test", "Rain falls.")
    assert report.notes == ["no desc_val.json below the folder"]


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    write_text(
        tmp_path / "desc_val.json",
        '{"video_id": "a", "desc": ""}',
        '{"video_id": "b"}',
        '{"video_id": "c", "desc": "A <tag>."}',
        '{"video_id": "d", "desc": "Fine."}',
        '{"video_id": "d", "desc": "Fine."}',
    )
    samples, problems, _ = read_source("valor", tmp_path)
    assert [sample.clip for sample in samples] == ["d"]
    assert [(p["line"], p["kind"]) for p in problems] == [
        (1, "problem"),
        (2, "problem"),
        (3, "problem"),
        (5, "duplicate"),
    ]
