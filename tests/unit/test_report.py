"""What a report says about samples that need no clip to be said of: choice, order, truth, errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.elements import Elements
from support.evaluated_run import HOSTILE, write_run

from crab.report import overlay
from crab.report.asked import Asked
from crab.report.clip import Clip
from crab.report.examples import show
from crab.report.files import Files
from crab.report.page import new_folder, polyline
from crab.report.texts import MAX_CHARACTERS, clean, in_parts
from crab.report.views import Curve, Example
from crab.samples import MaskRef, Sample
from crab.tasks import TASKS, Answer, Masks
from jobs.report import make_report
from jobs.spec import SpecError

FORTY = 40


def question(number: int, answer: str = "two") -> Sample:
    return Sample(
        id=f"question-{number}",
        task="avqa",
        split="test",
        clip=f"clip-{number}",
        video="/nowhere/clip.mp4",
        instruction="Answer this question: how many?",
        reasoning="Heard: a bell, a dog.",
        answer=f"<answer> {answer} </answer>",
        label={"answer": answer, "type": ["audio", "counting"]},
    )


def clip(num_frames: int = 10) -> Clip:
    frames = np.random.default_rng(1).integers(0, 255, (num_frames, 224, 224, 3), dtype=np.uint8)
    return Clip(
        frames=frames,
        times_us=tuple(1_000_000 * i for i in range(num_frames)),
        sound=np.zeros(0, np.float32),
        sample_rate_hz=16_000,
    )


def example(tmp_path: Path, asked: Asked, seen: Clip | None = None) -> Example:
    return show(TASKS[asked.sample.task], asked, seen or clip(), Files(tmp_path))


def test_page_of_clips_that_are_gone(tmp_path: Path) -> None:
    samples = [question(number) for number in range(12)]
    write_run(tmp_path / "runs" / "quiz", samples, hostile=["question-5"], silent=["question-7"])
    page = make_report("quiz", str(tmp_path / "runs"), examples=6)
    assert page == tmp_path / "runs" / "quiz" / "report" / "index.html"
    seen = Elements(page)
    titles = re.findall(r"(Worst|Best) (\d+) of 12", seen.text)
    assert titles == [("Worst", str(n)) for n in range(1, 5)] + [("Best", "1"), ("Best", "2")]
    assert (
        seen.text.count("not_found") == 6 + 1
    )  # a clip each, and the remark on what was not asked
    assert "No answer" in seen.text
    again = make_report(str(page.parent.parent), "no/such/folder")  # a folder will do as well
    assert again.read_text() == page.read_text()
    assert [path.name for path in (tmp_path / "runs" / "quiz").glob(".report*")] == []


def test_hostile_texts_are_text(tmp_path: Path) -> None:
    sample = question(0).model_copy(
        update={"instruction": HOSTILE.replace("\ud800", ""), "id": "<b>/../../etc"}
    )
    write_run(tmp_path / "quiz", [sample, question(1)], hostile=[sample.id])
    seen = Elements(make_report(str(tmp_path / "quiz"), "", examples=6))
    assert not {tag for tag, _ in seen.found} & {"script", "iframe", "object", "link"}
    assert [
        attrs for tag, attrs in seen.found if any(name.startswith("on") for name in attrs)
    ] == []
    assert seen.text.count('<script>document.title = "owned"</script>') == 2
    policy = next(attrs for tag, attrs in seen.found if attrs.get("http-equiv"))["content"]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_texts_are_fit_for_a_page() -> None:
    assert clean("a\x00b\ud800c\nd") == "a\ufffdb\ufffdc\nd"
    assert clean("x" * (MAX_CHARACTERS + 5)).endswith("… and 5 characters more")
    parts = in_parts("Heard: a bell. <answer> one </answer>")
    assert (parts.prose, parts.tagged) == ("Heard: a bell.", "<answer> one </answer>")


def test_words_that_were_picked_stand_side_by_side(tmp_path: Path) -> None:
    shown = example(
        tmp_path, Asked(sample=question(0), answer=Answer(text="<answer> ten </answer>"))
    )
    assert (shown.answer, shown.wanted) == ("ten", "two")
    unread = example(tmp_path, Asked(sample=question(0), answer=Answer(text="ten"), finished=False))
    assert [note.split(":")[0] for note in unread.notes] == [
        "Not an answer in the grammar of avqa",
        "Cut off",
    ]


def test_timelines_keep_sight_and_sound_apart(tmp_path: Path) -> None:
    sample = question(0).model_copy(
        update={
            "task": "avvp",
            "answer": "<visual_event> dog,(0 4)(6 7) </visual_event> <audio_event> bell,(0 10) </audio_event>",
            "label": {"visual": [["dog", 0, 4], ["dog", 6, 7]], "audio": [["bell", 0, 10]]},
        }
    )
    said = "<visual_event> dog,(0 5) </visual_event> <audio_event> cat,(1 2) </audio_event>"
    timeline = example(tmp_path, Asked(sample=sample, answer=Answer(text=said))).timeline
    assert timeline is not None
    lanes = {
        stream: [(lane.name, lane.predicted, lane.true) for lane in found]
        for stream, found in timeline.lanes.items()
    }
    assert lanes == {
        "Seen": [("dog", ((0, 5),), ((0, 4), (6, 7)))],
        "Heard": [("bell", (), ((0, 10),)), ("cat", ((1, 2),), ())],
    }


def masked(tmp_path: Path, task: str, numbers: dict[int, np.ndarray], **label: Any) -> Sample:
    refs = []
    for number, pixels in numbers.items():
        Image.fromarray(pixels).save(tmp_path / f"true-{number}.png")
        refs.append(MaskRef(frame=number, file=str(tmp_path / f"true-{number}.png")))
    return question(0).model_copy(
        update={
            "task": task,
            "masks": tuple(refs),
            "label": label,
            "answer": "<range> none </range>",
        }
    )


SAYS_2_TO_4 = "<range> 2,4 </range> dog <mask_start><mask_0><mask_1><mask_2><mask_3><mask_4><mask_5><mask_end>"


def square(value: int = 1, left: int = 0) -> np.ndarray:
    pixels = np.zeros((224, 224), np.uint8)
    pixels[:FORTY, left : left + FORTY] = value
    return pixels


def test_masks_lie_on_their_frames_with_the_iou_that_is_scored(tmp_path: Path) -> None:
    nothing = np.zeros((224, 224), np.uint8)
    sample = masked(tmp_path, "s4", {2: square(), 3: square(), 5: square(), 6: nothing})
    half = np.zeros((10, 224, 224), np.float16)
    half[2], half[3] = square() * 0.9, square(left=FORTY // 2) * 0.9
    half[5] = square()  # the text has no span there, so it does not count
    answer = Answer(text=SAYS_2_TO_4, masks=Masks(frames=tuple(range(10)), values=half))
    (row,) = example(tmp_path, Asked(sample=sample, answer=answer)).rows
    assert [frame.label for frame in row.frames] == [f"{second} s" for second in range(10)]
    verdicts = {i: frame.verdict for i, frame in enumerate(row.frames)}
    assert (verdicts[2], verdicts[3]) == (
        "IoU 1.00",
        "IoU 0.33",
    )
    assert (verdicts[5], verdicts[6], verdicts[8]) == ("IoU 0.00", "empty ✓", "not judged")
    assert [i for i, frame in enumerate(row.frames) if frame.predicted] == [2, 3]
    assert [i for i, frame in enumerate(row.frames) if frame.true] == [2, 3, 5]
    drawn = np.asarray(Image.open(tmp_path / str(row.frames[3].predicted)).convert("RGBA"))
    assert (drawn[..., 3] > 0).tolist() == (square(left=FORTY // 2) > 0).tolist()
    mean = TASKS["s4"].goodness(sample, answer)
    assert mean == pytest.approx((1 + 1 / 3 + 0 + 1) / 4, abs=0.01)


def test_classes_have_colours_and_names(tmp_path: Path) -> None:
    names = {"1": "dog", "2": "cat"}
    sample = masked(tmp_path, "avss", {2: square(1)}, num_classes=3, names=names)
    values = np.stack([np.zeros((224, 224), np.uint8)] * 2 + [square(2)] + [square(1)])
    answer = Answer(text=SAYS_2_TO_4, masks=Masks(frames=(0, 1, 2, 3), values=values))
    shown = example(tmp_path, Asked(sample=sample, answer=answer))
    assert [row.title for row in shown.rows] == ["Predicted", "True"]
    assert shown.rows[0].frames[2].verdict == "IoU 0.00"
    assert [name for _, name in shown.legend] == ["dog", "cat"]
    drawn = np.asarray(Image.open(tmp_path / str(shown.rows[1].frames[2].true)).convert("RGBA"))
    assert tuple(drawn[20, 20, :3]) == overlay.class_colour(1)
    assert drawn[100, 100, 3] == 0


def test_a_damaged_mask_is_told_and_the_others_are_shown(tmp_path: Path) -> None:
    sample = masked(tmp_path, "ms3", {2: square(), 3: square()})
    (tmp_path / "true-3.png").write_bytes(b"no picture")
    shown = example(tmp_path, Asked(sample=sample, answer=Answer(text=SAYS_2_TO_4)))
    assert any("true-3.png" in note for note in shown.notes)
    assert shown.rows[0].frames[2].true is not None


def test_boxes_lie_on_the_second_that_was_asked(tmp_path: Path) -> None:
    sample = question(0).model_copy(
        update={
            "task": "arig",
            "answer": "The sounding object is dog. <obj>(10,20)(30,60)</obj>",
            "label": {"event": "dog", "box": [10, 20, 30, 60], "second": 7},
        }
    )
    said = Answer(text="The sounding object is dog. <obj>(10,20)(30,40)</obj>")
    box = example(tmp_path, Asked(sample=sample, answer=said)).box
    assert box is not None
    assert (box.label, box.verdict, box.predicted, box.true) == (
        "7 s",
        "IoU 0.50",
        (10, 20, 20, 20),
        (10, 20, 20, 40),
    )


def test_loose_clips_have_no_truth(tmp_path: Path) -> None:
    asked = Asked(sample=question(0), answer=Answer(text="<answer> ten </answer>"), has_truth=False)
    shown = example(tmp_path, asked)
    assert (shown.answer, shown.wanted, shown.expected) == ("ten", "", ())


def test_the_same_frame_is_one_file(tmp_path: Path) -> None:
    files = Files(tmp_path)
    frame = clip(1).frames[0]
    assert files.jpeg(frame) == files.jpeg(frame.copy())
    assert len(list((tmp_path / "media").iterdir())) == 1


def test_edges_are_inside_of_masks() -> None:
    mask = square().astype(bool)
    edge = overlay.edge(mask, 2)
    assert not (edge & ~mask).any()
    assert edge[20, FORTY - 1]
    assert not edge[20, FORTY - 3]
    assert not edge[20, 0]  # the frame's border is none


def test_curves_run_from_the_first_step_to_the_last() -> None:
    points = tuple((float(step), 1000.0 - step) for step in range(1, 1001))
    drawn = [
        tuple(map(float, p.split(",")))
        for p in polyline(Curve(name="loss", points=points), 300, 90).split()
    ]
    assert (drawn[0][0], drawn[-1][0]) == (0, 300)
    assert drawn[0][1] < 1
    assert drawn[-1][1] > 89
    assert len(drawn) <= 150


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"job": "train", "adapter": "x"}, "evaluate-shapes.yaml --set adapter=mine"),
        ({"job": "preprocess", "manifest": "x"}, "preprocess job"),
        (None, "has not ended"),
    ],
)
def test_runs_without_answers_name_the_next_command(
    tmp_path: Path, record: dict[str, Any] | None, words: str
) -> None:
    (tmp_path / "mine").mkdir()
    if record is not None:
        (tmp_path / "mine" / "result.json").write_text(json.dumps(record))
    with pytest.raises(SpecError, match=re.escape(words)):
        make_report("mine", str(tmp_path))


def test_an_unknown_run_names_the_nearest(tmp_path: Path) -> None:
    write_run(tmp_path / "evaluate-shapes", [question(0)])
    with pytest.raises(SpecError, match="did you mean 'evaluate-shapes'"):
        make_report("evaluate-shape", str(tmp_path))
    with pytest.raises(SpecError, match="expected 1 or more"):
        make_report("evaluate-shapes", str(tmp_path), examples=0)


def test_answers_of_an_older_version_are_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "predictions.jsonl").write_text('{"id": "a", "task": "ave", "text": ""}\n')
    with pytest.raises(SpecError, match=r"predictions\.jsonl:1: .*evaluate again"):
        make_report("old", str(tmp_path))


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"), new_folder(tmp_path):
        raise AssertionError
    assert (tmp_path / "thesis.tex").exists()


def test_a_page_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    with new_folder(tmp_path / "page") as work:
        (work / "index.html").write_text("old")
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "page") as work:
        (work / "nowhere" / "index.html").write_text("new")
    assert (tmp_path / "page" / "index.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
