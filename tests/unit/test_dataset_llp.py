"""LLP: exact and weak labels of one clip, class names, half-open spans."""

from pathlib import Path

import pytest
from support.official_sets import read_source, write_csv

from crab.datasets.llp import CLASSES
from crab.tasks import TASKS

WEAK = ["filename", "event_labels"]
EXACT = ["filename", "onset", "offset", "event_labels"]


def write(
    folder: Path, *, audio: list, visual: list, train: list = (), val: list = (), test: list = ()
) -> None:
    for name, header, rows in (
        ("AVVP_train.csv", WEAK, train),
        ("AVVP_val_pd.csv", WEAK, val),
        ("AVVP_test_pd.csv", WEAK, test),
        ("AVVP_eval_audio.csv", EXACT, audio),
        ("AVVP_eval_visual.csv", EXACT, visual),
    ):
        write_csv(folder / "data" / name, header, rows, "\t")


def test_class_names_can_be_read_backwards_and_hold_nothing_of_the_grammar() -> None:
    assert len(CLASSES) == 25
    assert len(set(CLASSES.values())) == 25
    assert not any(set("<>();,_") & set(name) for name in CLASSES.values())
    assert CLASSES["Frying_(food)"] == "Frying food"


def test_exact_labels_win_and_their_weak_row_is_covered(tmp_path: Path) -> None:
    write(
        tmp_path,
        audio=[("a-_b_0_10", 0, 4, "Frying_(food)"), ("a-_b_0_10", 6, 10, "Frying_(food)")],
        visual=[("a-_b_0_10", 5, 10, "Speech")],
        test=[("a-_b_0_10", "Frying_(food),Speech")],
        train=[("c_30_40", "Dog,Speech")],
    )
    (exact, weak), problems, report = read_source("llp", tmp_path)
    assert not problems
    assert report.counts["covered"] == 1
    assert exact.split == "test"
    assert exact.answer == (
        "<visual_event> speech,(5 10) </visual_event> <audio_event> frying food,(0 4)(6 10) </audio_event>"
    )
    assert TASKS["avvp"].parse(exact.answer) is not None
    assert exact.video == str(tmp_path / "data" / "LLP_dataset" / "video" / "a-_b.mp4")
    assert (weak.split, weak.label, weak.answer) == (
        "train",
        {"weak": ["Dog", "Speech"]},
        "Dog, Speech",
    )
    assert TASKS["avvp"].parse(weak.answer) is None


def test_a_clip_that_is_only_heard(tmp_path: Path) -> None:
    write(tmp_path, audio=[("a_0_10", 1, 2, "Dog")], visual=[], val=[("a_0_10", "Dog")])
    (sample,), _, _ = read_source("llp", tmp_path)
    assert sample.split == "val"
    assert sample.answer.startswith("<visual_event> none </visual_event>")


def test_an_event_without_length_is_told_and_its_clip_stays_exact(tmp_path: Path) -> None:
    write(
        tmp_path,
        audio=[("a_0_10", 9, 9, "Speech"), ("a_0_10", 0, 3, "Dog")],
        visual=[],
        test=[("a_0_10", "Dog,Speech")],
    )
    (sample,), problems, _ = read_source("llp", tmp_path)
    assert sample.label == {"visual": [], "audio": [["Dog", 0, 3]]}
    assert [(problem["file"], problem["line"]) for problem in problems] == [
        ("data/AVVP_eval_audio.csv", 2)
    ]


def test_a_clip_with_a_broken_event_is_weak(tmp_path: Path) -> None:
    write(
        tmp_path,
        audio=[("a_0_10", 0, 12, "Speech"), ("a_0_10", 0, 3, "Dog"), ("b_0_10", 0, 1, "Unicorn")],
        visual=[],
        test=[("a_0_10", "Dog,Speech")],
    )
    (sample,), problems, _ = read_source("llp", tmp_path)
    assert sample.label == {"weak": ["Dog", "Speech"]}
    assert [problem["line"] for problem in problems] == [2, 4]
    assert "Unicorn" in str(problems[1]["reason"])


def test_half_of_the_exact_files_is_not_used(tmp_path: Path) -> None:
    write(tmp_path, audio=[("a_0_10", 0, 3, "Dog")], visual=[], test=[("a_0_10", "Dog")])
    (tmp_path / "data" / "AVVP_eval_visual.csv").unlink()
    (sample,), _, report = read_source("llp", tmp_path)
    assert sample.label == {"weak": ["Dog"]}
    assert any("need both" in note for note in report.notes)


def test_a_clip_of_no_official_split_is_left_out(tmp_path: Path) -> None:
    write(
        tmp_path,
        audio=[("P7x4FV4lg_570_580", 0, 3, "Dog"), ("a_0_10", 0, 3, "Dog")],
        visual=[("P7x4FV4lg_570_580", 0, 10, "Dog")],
        test=[("a_0_10", "Dog")],
    )
    (sample,), problems, report = read_source("llp", tmp_path)
    assert (sample.clip, sample.split) == ("a_0_10", "test")
    assert [(p["file"], p["line"], p["kind"]) for p in problems] == [
        ("data/AVVP_eval_visual.csv", 2, "left_out")
    ]
    assert "no official split" in str(problems[0]["reason"])
    assert not any("went to test" in note for note in report.notes)


@pytest.mark.parametrize("name", ["AVVP_val_pd.csv", "AVVP_test_pd.csv"])
def test_without_a_list_a_clip_in_none_goes_to_test_and_is_told(tmp_path: Path, name: str) -> None:
    write(tmp_path, audio=[("a_0_10", 0, 3, "Dog")], visual=[])
    (tmp_path / "data" / name).unlink()
    (sample,), _, report = read_source("llp", tmp_path)
    assert sample.split == "test"
    assert any("went to test" in note for note in report.notes)


def test_a_weak_row_twice_is_a_duplicate(tmp_path: Path) -> None:
    write(tmp_path, audio=[], visual=[], train=[("a_0_10", "Dog"), ("a_0_10", "Cat"), ("b", "Cat")])
    samples, problems, _ = read_source("llp", tmp_path)
    assert len(samples) == 1
    assert [(p["line"], p["kind"]) for p in problems] == [(4, "problem"), (3, "duplicate")]
