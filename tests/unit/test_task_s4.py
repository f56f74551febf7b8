"""S4 and the scoring that it shares with MS3: which frames are judged, empty masks, full denominators, constants."""

import itertools
import os
from pathlib import Path

import mask_samples
import numpy as np
import pytest
from mask_samples import EMPTY, FULL, LEFT, RIGHT, blocks, mask_sample, masks, said

from crab.samples import Sample
from crab.tasks import TASKS, Answer, Masks
from crab.tasks.mask_answer import NOTHING, parse_mask_answer

S4 = TASKS["s4"]
QUARTER = [[1, 0, 0, 0]]


def sample(folder: Path, *truths: list[list[int]], number: int = 0, first: int = 0) -> Sample:
    return mask_sample(folder, "s4", truths, number=number, first=first)


def test_true_masks_score_one(tmp_path: Path) -> None:
    samples = [sample(tmp_path, LEFT, EMPTY, RIGHT), sample(tmp_path, FULL, number=1)]
    answers = [said([LEFT, EMPTY, RIGHT]), said([FULL])]
    assert S4.score(samples, answers) == {"miou": 1.0, "f": 1.0, "parse_rate": 1.0}
    assert [S4.goodness(s, a) for s, a in zip(samples, answers, strict=True)] == [1.0, 1.0]


def test_the_mean_is_over_frames_and_not_over_clips(tmp_path: Path) -> None:
    samples = [sample(tmp_path, LEFT, LEFT, LEFT), sample(tmp_path, LEFT, number=1)]
    answers = [said([LEFT, LEFT, LEFT]), said([RIGHT])]
    assert S4.score(samples, answers)["miou"] == 0.75


@pytest.mark.parametrize(
    "answer",
    [
        Answer(text=""),
        Answer(text="a bell", masks=masks([QUARTER, QUARTER])),
        Answer(text=mask_samples.text() + " and more", masks=masks([QUARTER, QUARTER])),
    ],
)
def test_an_unreadable_text_is_an_empty_mask_and_stays_in_the_mean(
    tmp_path: Path, answer: Answer
) -> None:
    samples = [sample(tmp_path, QUARTER, EMPTY, number=n) for n in range(2)]
    metrics = S4.score(samples, [said([QUARTER, EMPTY]), answer])
    # Frame 0 of the second sample is missed, frame 1 is rightly empty.
    assert metrics["miou"] == 0.75
    # At every threshold above 0 the missed frame has F = 0.
    assert metrics["f"] == pytest.approx(0.5)
    assert metrics["parse_rate"] == 0.5
    assert S4.goodness(samples[1], answer) == 0.5


def test_masks_that_are_not_there_are_empty_but_the_text_is_readable(tmp_path: Path) -> None:
    samples = [sample(tmp_path, LEFT, LEFT)]
    for answer in (Answer(text=mask_samples.text()), Answer(text=NOTHING, masks=masks([LEFT] * 2))):
        metrics = S4.score(samples, [answer])
        assert (metrics["miou"], metrics["parse_rate"]) == (0.0, 1.0)
    one_of_two = Answer(text=mask_samples.text(), masks=masks([LEFT, LEFT, LEFT], first=1))
    assert S4.score(samples, [one_of_two])["miou"] == 0.5
    in_no_span = Answer(text=mask_samples.text(0, 1), masks=masks([LEFT, LEFT]))
    assert S4.score(samples, [in_no_span])["miou"] == 0.5


def test_frames_without_a_true_mask_are_not_judged(tmp_path: Path) -> None:
    # As in the train split of AVSBench: one labelled frame of five. Here it is frame 3.
    labelled = sample(tmp_path, LEFT, first=3)
    unlabelled = sample(tmp_path, number=1)
    answer = said([RIGHT, RIGHT, RIGHT, LEFT, RIGHT])
    assert S4.score([labelled, unlabelled], [answer, answer])["miou"] == 1.0
    assert S4.goodness(unlabelled, answer) == 1.0
    with pytest.raises(ValueError, match="none of the 1 s4 samples has a true mask"):
        S4.score([unlabelled], [answer])


def test_probability_above_a_half_belongs_to_the_mask(tmp_path: Path) -> None:
    samples = [sample(tmp_path, LEFT)]
    assert S4.score(samples, [said([[[0.5, 0.4]]])])["miou"] == 0.0
    assert S4.score(samples, [said([[[0.51, 0.5]]])])["miou"] == 1.0
    # F does not depend on it: some threshold separates the halves.
    assert S4.score(samples, [said([[[0.3, 0.1]]])])["f"] == 1.0


def test_f_of_an_empty_answer_is_that_of_a_full_one(tmp_path: Path) -> None:
    """At threshold 0 every pixel is predicted: a floor of the official definition, and why the table has constants."""
    samples = [sample(tmp_path, LEFT)]
    floor = S4.score(samples, [Answer(text="")])["f"]
    assert floor == S4.score(samples, [said([FULL])])["f"] == pytest.approx(1.3 * 0.5 / 1.15)


def test_f_is_left_out_where_every_truth_is_empty(tmp_path: Path) -> None:
    assert S4.score([sample(tmp_path, EMPTY)], [said([EMPTY])]) == {"miou": 1.0, "parse_rate": 1.0}


def test_scores_do_not_depend_on_the_order_of_samples(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pairs = []
    for number in range(4):
        truths = draw.integers(0, 2, (3, 4, 7)).tolist()
        answer = said(draw.random((3, 4, 7)).tolist()) if number else Answer(text="?")
        pairs.append((sample(tmp_path, *truths, number=number), answer))
    expected = S4.score(*zip(*pairs, strict=True))
    for order in itertools.permutations(pairs):
        assert S4.score(*zip(*order, strict=True)) == pytest.approx(expected, rel=1e-12)


def test_answers_are_taken_one_at_a_time(tmp_path: Path) -> None:
    samples = [sample(tmp_path, LEFT, number=n) for n in range(5)]
    alive = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal alive
            alive -= self.base is None

    def answers():
        nonlocal alive
        for _ in samples:
            values = np.ndarray.__new__(Counted, (1, 224, 224), np.float16)
            values[:] = blocks(LEFT)
            alive += 1
            assert alive <= 2
            yield Answer(text=mask_samples.text(), masks=Masks(frames=(0,), values=values))
            del values

    assert S4.score(samples, answers())["miou"] == 1.0


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan"), 255.0])
def test_what_is_no_probability_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="'s40' have values from"):
        S4.score([sample(tmp_path, LEFT)], [said([[[value, 0]]], np.float32)])


def test_answers_and_samples_must_fit(tmp_path: Path) -> None:
    one = sample(tmp_path, LEFT)
    with pytest.raises(ValueError, match="1 answers given for 2"):
        S4.score([one, one], [said([LEFT])])
    with pytest.raises(ValueError, match="expected 's4'"):
        S4.score([one.model_copy(update={"task": "ms3"})], [said([LEFT])])


def test_what_is_asked_and_learnt(tmp_path: Path) -> None:
    one = sample(tmp_path, LEFT)
    assert S4.request(one) == "Mask it."
    assert S4.target(one) == "It rings. " + mask_samples.text()
    assert S4.parse(S4.target(one)) == parse_mask_answer(mask_samples.text())
    assert "mask" in S4.instruction(None)
    with pytest.raises(ValueError, match="asks its own question"):
        S4.instruction("the dog")


@pytest.mark.parametrize("task", ["s4", "ms3", "ref-avs"])
def test_constants_are_masks_for_any_number_of_frames(tmp_path: Path, task: str) -> None:
    label = {"expression": "it", "subset": "seen"}
    judge = TASKS[task]
    train = [
        mask_sample(tmp_path, task, truths, number=n, label=label)
        for n, truths in enumerate([[LEFT, LEFT], [LEFT], [FULL]])
    ]
    number = len(train)
    constants = judge.constants(train)
    assert all(judge.parse(answer.text) is not None for answer in constants)

    def best(*truths: list[list[int]]) -> float:
        nonlocal number
        number += 1
        test = [mask_sample(tmp_path, task, truths, number=number, label=label)]
        return max(judge.score(test, [answer])[judge.headline] for answer in constants)

    assert best(*[EMPTY] * 10) == 1.0
    assert best(*[FULL] * 10) == 1.0
    # Left is what most train masks have: it is among the thresholds of their mean.
    assert best(*[LEFT] * 10) == 1.0
    assert best(*[RIGHT] * 10) == 0.5


def test_constants_find_the_place_of_rare_objects(tmp_path: Path) -> None:
    # No pixel is set in half of the train masks.
    constants = S4.constants([sample(tmp_path, LEFT, EMPTY, EMPTY, EMPTY)])
    test = [sample(tmp_path, LEFT, number=1)]
    assert max(S4.score(test, [answer])["miou"] for answer in constants) == 1.0
    rare = said([[[0.25, 0]]])
    assert S4.score(test, [rare])["miou"] == 0.0
    soft = constants[2]
    assert S4.score(test, [soft])["miou"] == 1.0


def test_constants_without_train_masks_are_empty_and_full(tmp_path: Path) -> None:
    unlabelled = sample(tmp_path)
    for train in ([], [unlabelled]):
        empty, full = S4.constants(train)
        assert empty.text == NOTHING
        assert full.masks is not None
        assert (full.masks.values == 1).all()


def test_only_some_of_many_train_samples_are_read(tmp_path: Path) -> None:
    there = sample(tmp_path, LEFT)
    missing = there.model_copy(
        update={"masks": (there.masks[0].model_copy(update={"file": str(tmp_path / "gone.png")}),)}
    )
    # 1000 / 200: every fifth is looked at, and no other.
    assert len(S4.constants([there if n % 5 == 0 else missing for n in range(1000)])) == 7
    with pytest.raises(FileNotFoundError, match="gone"):
        S4.constants([there if n % 5 == 0 else missing for n in range(200)])


def test_a_mask_file_that_changes_is_read_again(tmp_path: Path) -> None:
    assert S4.score([sample(tmp_path, LEFT)], [said([LEFT])])["miou"] == 1.0
    changed = sample(tmp_path, EMPTY)
    os.utime(changed.masks[0].file, ns=(1, 1))
    assert S4.score([changed], [said([LEFT])])["miou"] == 0.5
