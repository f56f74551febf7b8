"""AV-UIE: entries told apart by their fields, reasoning, Crab's own tags."""

from pathlib import Path
from typing import Any

import pytest
from support.official_sets import read_source, write_json, write_map, write_text

from crab.datasets.av_uie import parse_events
from crab.tasks import TASKS

AVE = {"vid": "abc", "event": "Church bell", "start_time": 2, "end_time": 8}
AVVP = {
    "filename": "abc_0_10",
    "vid": "abc",
    "event": "Chainsaw,Speech",
    "label": "A saw runs. Visual and audio events are: <visual>Chainsaw,(0 1)(3 6)</visual> and"
    " <audio>Chainsaw,(0 10) Speech,(2 3)</audio>",
}
ENTRIES: dict[str, dict[str, Any]] = {
    "ave": AVE,
    "avvp": AVVP,
    "avqa": {
        "video_id": "v",
        "question_id": 5,
        "type": ["Audio", "Counting"],
        "video_path": "/group/x/v.mp4",
        "audio_path": "/group/x/v.mp3",
        "question": "How many?",
        "answer": "two",
    },
    "s4": {
        "vid": "a",
        "uid": "a_1",
        "s_min": 0,
        "s_sec": 1,
        "a_obj": "dog",
        "split": "train",
        "label": "v1s",
    },
    "ms3": {
        "vid": "a",
        "uid": "a_1",
        "s_min": 0,
        "s_sec": 1,
        "a_obj": "dog",
        "split": "train",
        "label": "v1m",
    },
    "avss": {
        "vid": "a",
        "uid": "a_1",
        "s_min": 0,
        "s_sec": 1,
        "a_obj": "dog",
        "split": "train",
        "label": "v2",
    },
    "arig": {
        "split": "train",
        "audio_path": "/group/AVS/v1s/a_1/audio.wav",
        "frame_path": "/group/AVS/v1s/a_1/frames/0.jpg",
        "mask_path": "/group/AVS/v1s/a_1/labels_semantic/0.png",
        "top_left": [3, 4],
        "bottom_right": [30, 40],
        "a_obj": "dog",
    },
    "ref-avs": {"vid": "v", "uid": "v_0_1_cat_1", "split": "train", "fid": 0, "exp": "The cat"},
    "avcap": {"video_id": "v", "desc": "A dog barks."},
}


@pytest.mark.parametrize("task", ENTRIES)
def test_each_task_is_known_by_its_fields(tmp_path: Path, task: str) -> None:
    write_json(tmp_path / f"{task}_valid_train_samples.json", [ENTRIES[task]])
    samples, problems, _ = read_source("av-uie", tmp_path)
    assert not problems
    frames = {"s4": 1, "ms3": 5, "avss": 10, "ref-avs": 10}
    assert len(samples) == frames.get(task, 1)
    assert {(sample.task, sample.split) for sample in samples} == {(task, "train")}
    assert all(TASKS[task].parse(sample.answer) is not None for sample in samples)


def test_reasoning_is_taken_where_its_answer_is_the_true_one(tmp_path: Path) -> None:
    write_json(
        tmp_path / "ave" / "test_samples.json", [AVE, AVE | {"vid": "def"}, AVE | {"vid": "ghi"}]
    )
    labels = tmp_path / "AVE" / "converted_label"
    text = "A bell hangs. So the event is <event> Church bell </event>, and the time range is <range> 2,{} </range>."
    write_text(labels / "abc.txt", text.format(8))
    write_text(labels / "def.txt", text.format(9))
    samples, problems, _ = read_source("av-uie", tmp_path)
    assert [sample.reasoning for sample in samples] == ["A bell hangs. So the event is", "", ""]
    assert TASKS["ave"].parse(TASKS["ave"].target(samples[0])) is not None
    assert [problem["line"] for problem in problems] == [8]
    assert "def.txt" in str(problems[0]["reason"])


def test_avvp_tags_become_ours(tmp_path: Path) -> None:
    write_json(tmp_path / "train_samples.json", [AVVP])
    (sample,), _, _ = read_source("av-uie", tmp_path)
    assert sample.answer == (
        "<visual_event> chainsaw,(0 1)(3 6) </visual_event>"
        " <audio_event> chainsaw,(0 10) ; speech,(2 3) </audio_event>"
    )
    assert sample.reasoning == "A saw runs. Visual and audio events are:"


@pytest.mark.parametrize(
    "label",
    [
        "A saw runs.",
        "<visual>Chainsaw</visual> and <audio>Chainsaw,(0 10)</audio>",
        "<visual>Unicorn,(0 1)</visual> and <audio>none</audio>",
        "<visual>Chainsaw,(4 2)</visual> and <audio>none</audio>",
        "<visual>Chainsaw,(4 12)</visual> and <audio>none</audio>",
        "<b>So:</b> <visual>Chainsaw,(0 2)</visual> and <audio>none</audio>",
    ],
)
def test_avvp_texts_that_are_not_of_the_grammar_are_told_and_weak(
    tmp_path: Path, label: str
) -> None:
    with pytest.raises(ValueError, match=r"label|classes"):
        parse_events(label)
    write_json(tmp_path / "train_samples.json", [AVVP | {"label": label}])
    (sample,), problems, _ = read_source("av-uie", tmp_path)
    assert sample.label == {"weak": ["Chainsaw", "Speech"]}
    assert len(problems) == 1


def test_a_frame_in_which_nothing_sounds_is_left_out(tmp_path: Path) -> None:
    write_json(
        tmp_path / "v1s_grounding_samples.json", [ENTRIES["arig"] | {"top_left": [1000, 1000]}]
    )
    samples, problems, _ = read_source("av-uie", tmp_path)
    assert not samples
    assert problems[0]["kind"] == "left_out"


def test_media_are_found_where_the_official_sets_have_them(tmp_path: Path) -> None:
    write_json(tmp_path / "ave_train_samples.json", [AVE])
    write_json(tmp_path / "s4_samples.json", [ENTRIES["s4"]])
    (tmp_path / "AVE").mkdir()
    (tmp_path / "AVE" / "abc.mp4").touch()
    (tmp_path / "audio_data").mkdir()
    (tmp_path / "audio_data" / "abc.mp3").touch()
    write_map(tmp_path / "AVS/v1s/a_1/labels_semantic/0.png", [(17, 0, 0, 9, 9)])
    samples, _, _ = read_source("av-uie", tmp_path)
    ave, s4 = sorted(samples, key=lambda sample: sample.task)
    assert (ave.video, ave.audio) == (
        str(tmp_path / "AVE/abc.mp4"),
        str(tmp_path / "audio_data/abc.mp3"),
    )
    assert s4.masks[0].file == str(tmp_path / "AVS/v1s/a_1/labels_semantic/0.png")


@pytest.mark.parametrize(
    "entry",
    [
        {"a": 1},
        ENTRIES["arig"] | {"frame_path": "0.jpg"},
        ENTRIES["arig"] | {"top_left": 5},
        ENTRIES["arig"] | {"bottom_right": [1, 2, 3]},
        ENTRIES["s4"] | {"label": ["v1s"]},
        AVE | {"end_time": 2},
        {"filename": "abc_0_10", "event": "Unicorn"},
    ],
)
def test_entries_that_do_not_fit(tmp_path: Path, entry: dict[str, Any]) -> None:
    write_json(tmp_path / "train_samples.json", [entry])
    samples, problems, _ = read_source("av-uie", tmp_path)
    assert not samples
    assert problems[0]["line"] == 2
