"""What holds for every task. A new task is one row of ROWS: two samples that have different true answers."""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crab.evaluate import constant_baseline, score
from crab.masks import MASK_SIZE
from crab.model.prompt import user_text
from crab.samples import MaskRef, Sample
from crab.synth import make_scene
from crab.synth import samples_of as shapes_of
from crab.tasks import TASKS, Answer, Masks
from crab.tasks.mask_answer import MaskItem, format_mask_answer

ClassMap = NDArray[np.uint8]


def picture(number: int, rows: slice) -> ClassMap:
    """[224, 224]: class `number` in these rows, background elsewhere."""
    map_HW = np.zeros((MASK_SIZE, MASK_SIZE), np.uint8)
    map_HW[rows] = number
    return map_HW


TOP, BOTTOM = slice(0, 100), slice(150, 224)
BELL, DOG = (
    format_mask_answer([MaskItem(start_s=0, end_s=2, names=(name,))]) for name in ("bell", "dog")
)


@dataclass(frozen=True)
class Row:
    task: str
    answers: tuple[str, str]
    labels: tuple[dict[str, Any], dict[str, Any]]
    maps: tuple[ClassMap, ClassMap] | None = None
    "the true masks of both samples, the same in frames 0 and 1"
    question: str | None = None
    "what `instruction` wants to be given"


ROWS = [
    Row(
        "ave",
        (
            "<event> bell </event> <range> 2,7 </range>",
            "<event> dog </event> <range> 0,10 </range>",
        ),
        (
            {"event": "bell", "start_s": 2, "end_s": 7},
            {"event": "dog", "start_s": 0, "end_s": 10},
        ),
    ),
    Row(
        "avvp",
        (
            "<visual_event> bell,(0 3)(5 8) </visual_event> <audio_event> none </audio_event>",
            "<visual_event> dog,(2 10) </visual_event> <audio_event> bell,(1 2) </audio_event>",
        ),
        (
            {"visual": [["bell", 0, 3], ["bell", 5, 8]], "audio": []},
            {"visual": [["dog", 2, 10]], "audio": [["bell", 1, 2]]},
        ),
    ),
    Row(
        "arig",
        (
            "The sounding object is bell. <obj>(0,0)(20,20)</obj>",
            "The sounding object is dog. <obj>(10,100)(200,224)</obj>",
        ),
        (
            {"event": "bell", "box": [0, 0, 20, 20], "second": None},
            {"event": "dog", "box": [10, 100, 200, 224], "second": 4},
        ),
    ),
    Row(
        "s4",
        (BELL, DOG),
        ({"event": "bell"}, {"event": "dog"}),
        (picture(1, TOP), picture(1, BOTTOM)),
    ),
    Row("ms3", (BELL, DOG), ({}, {}), (picture(1, TOP), picture(1, BOTTOM))),
    Row(
        "avss",
        (BELL, DOG),
        ({"num_classes": 3, "names": {"1": "bell", "2": "dog"}},) * 2,
        (picture(1, TOP), picture(2, BOTTOM)),
    ),
    Row(
        "ref-avs",
        (BELL, DOG),
        (
            {"expression": "the bell", "subset": "seen"},
            {"expression": "the dog", "subset": "unseen"},
        ),
        (picture(1, TOP), picture(1, BOTTOM)),
        question="the bell",
    ),
    Row(
        "avqa",
        ("<answer> two </answer>", "<answer> left </answer>"),
        (
            {"answer": "two", "question": "How many?", "type": ["Audio", "Counting"]},
            {"answer": "left", "question": "Where?", "type": ["Visual", "Location"]},
        ),
        question="How many?",
    ),
    Row(
        "avcap",
        ("A bell rings in a church.", "Two dogs bark at the postman."),
        (
            {"captions": ["A bell rings in a church."]},
            {"captions": ["Two dogs bark at the postman."]},
        ),
    ),
]

UNREADABLE = "I do <not> know"

every_task = pytest.mark.parametrize("row", ROWS, ids=[row.task for row in ROWS])


def samples_of(row: Row, folder: Path) -> list[Sample]:
    samples = []
    for number, (answer, label) in enumerate(zip(row.answers, row.labels, strict=True)):
        masks: tuple[MaskRef, ...] = ()
        if row.maps is not None:
            file = folder / f"{number}.png"
            Image.fromarray(row.maps[number]).save(file)
            masks = tuple(MaskRef(frame=frame, file=str(file)) for frame in (0, 1))
        samples.append(
            Sample(
                id=f"{row.task}-{number}",
                task=row.task,
                split="test",
                clip=f"c{number}",
                video="v.mp4",
                instruction="Do it.",
                reasoning="" if row.task == "avcap" else "It is seen and heard.",
                answer=answer,
                label=label,
                masks=masks,
            )
        )
    return samples


def truths(row: Row, samples: list[Sample]) -> list[Answer]:
    """The answers that are right: the targets, with the true masks."""
    task = TASKS[row.task]
    drawn: list[Masks | None] = [None, None]
    if row.maps is not None:
        drawn = [Masks(frames=(0, 1), values=_drawn(row.task, map_HW)) for map_HW in row.maps]
    return [
        Answer(text=task.target(sample), masks=masks)
        for sample, masks in zip(samples, drawn, strict=True)
    ]


def _drawn(task: str, map_HW: ClassMap) -> NDArray[Any]:
    values = map_HW if TASKS[task].needs == "classes" else (map_HW > 0).astype(np.float16)
    return np.stack([values, values])


def test_every_task_has_a_row() -> None:
    assert [row.task for row in ROWS] == list(TASKS)


@every_task
def test_a_task_reads_what_it_teaches(row: Row, tmp_path: Path) -> None:
    task = TASKS[row.task]
    read = [task.parse(task.target(sample)) for sample in samples_of(row, tmp_path)]
    assert None not in read
    assert read == [task.parse(answer) for answer in row.answers]
    assert read[0] != read[1]


@every_task
def test_the_true_answers_score_perfectly(row: Row, tmp_path: Path) -> None:
    task, samples = TASKS[row.task], samples_of(row, tmp_path)
    metrics = task.score(samples, truths(row, samples))
    assert metrics[task.headline] == pytest.approx(task.perfect)
    assert metrics["parse_rate"] == 1.0


@every_task
def test_a_constant_answer_scores_below_perfect(row: Row, tmp_path: Path) -> None:
    task, samples = TASKS[row.task], samples_of(row, tmp_path)
    found = constant_baseline(row.task, samples, samples)
    assert found is not None
    answer, metrics = found
    assert 0 < metrics[task.headline] < 0.99 * task.perfect
    assert metrics == task.score(samples, itertools.repeat(answer, 2))
    assert metrics["parse_rate"] == 1.0


@every_task
def test_an_unreadable_answer_is_wrong_and_stays_in_the_mean(row: Row, tmp_path: Path) -> None:
    task, samples = TASKS[row.task], samples_of(row, tmp_path)
    right = truths(row, samples)
    # Masks without a readable text do not count either.
    lost = Answer(text=UNREADABLE, masks=right[1].masks)
    metrics = task.score(samples, [right[0], lost])
    assert metrics["parse_rate"] == 0.5
    assert metrics[task.headline] < 0.9 * task.perfect
    # A sample of which nothing is known is the same as one with an unreadable text.
    scores = score(samples, {samples[0].id: right[0]})[row.task]
    assert scores == metrics | {"missing": 1.0, "num_samples": 2.0}


@every_task
def test_goodness_is_one_for_the_true_answer_and_within_0_and_1_for_any(
    row: Row, tmp_path: Path
) -> None:
    task, samples = TASKS[row.task], samples_of(row, tmp_path)
    right = truths(row, samples)
    for sample, true, false in zip(samples, right, reversed(right), strict=True):
        assert task.goodness(sample, true) == pytest.approx(1)
        unreadable = Answer(text=UNREADABLE, masks=true.masks)
        for answer in (false, unreadable):
            assert 0 <= task.goodness(sample, answer) < 0.9
        for answer in task.constants(samples):
            assert 0 <= task.goodness(sample, answer) <= 1


@every_task
def test_answers_are_taken_one_at_a_time_and_let_go(row: Row, tmp_path: Path) -> None:
    samples = samples_of(row, tmp_path) * 3
    alive: list[weakref.ref[Answer]] = []

    def loaded() -> Iterator[Answer]:
        for answer in truths(row, samples[:2]) * 3:
            assert sum(one() is not None for one in alive) <= 1
            fresh = Answer(text=answer.text, masks=answer.masks)
            alive.append(weakref.ref(fresh))
            yield fresh
            del fresh

    assert TASKS[row.task].score(samples, loaded())["parse_rate"] == 1.0
    assert len(alive) == len(samples)


@every_task
def test_there_are_as_many_answers_as_samples_and_all_of_the_task(row: Row, tmp_path: Path) -> None:
    task, samples = TASKS[row.task], samples_of(row, tmp_path)
    right = truths(row, samples)
    with pytest.raises(ValueError, match="1 answers given for 2"):
        task.score(samples, right[:1])
    with pytest.raises(ValueError, match="more than 2 answers given for 2"):
        task.score(samples, [*right, right[0]])
    with pytest.raises(ValueError, match="is of task 'other'"):
        task.score([samples[0].model_copy(update={"task": "other"})], right[:1])
    with pytest.raises(ValueError, match="at least one"):
        task.score([], [])


@every_task
def test_every_split_is_asked_the_same(row: Row, tmp_path: Path) -> None:
    # Crab's release asks otherwise in test than in training: MS3 for the third second alone, Ref-AVS in other words.
    (one, _) = samples_of(row, tmp_path)
    splits = [one.model_copy(update={"split": split}) for split in ("train", "val", "test")]
    task = TASKS[row.task]
    assert {task.request(sample) for sample in splits} == {one.instruction}
    assert len({user_text(sample, ["video", "audio"]) for sample in splits}) == 1


def test_shapes_are_asked_about_as_a_loose_clip_is() -> None:
    asked: defaultdict[str, set[str]] = defaultdict(set)
    for index in range(60):
        for sample in shapes_of(make_scene(3, index)):
            own = {
                "arig": str(sample.label.get("second")),
                "ref-avs": sample.label.get("expression"),
                "avqa": sample.label.get("question"),
            }
            task = TASKS[sample.task]
            assert task.request(sample) == task.instruction(own.get(sample.task)), sample.id
            asked[sample.split].add(sample.task)
    assert asked["train"] == asked["test"] >= {"ms3", "ref-avs"}


@every_task
def test_a_loose_clip_can_be_asked_about(row: Row, tmp_path: Path) -> None:
    task = TASKS[row.task]
    assert task.instruction(row.question)
    with pytest.raises(ValueError, match=row.task):
        task.instruction("What is it?" if row.question is None else None)
