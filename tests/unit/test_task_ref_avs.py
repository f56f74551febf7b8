"""Ref-AVS: subsets, the threshold of J, S of null expressions, which metrics there are."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from mask_samples import EMPTY, FULL, LEFT, RIGHT, mask_sample, said

from crab.samples import Sample
from crab.tasks import TASKS, Answer
from crab.tasks.mask_answer import NOTHING

REF = TASKS["ref-avs"]


def sample(folder: Path, subset: str, *truths: list[list[int]], number: int = 0) -> Sample:
    label = {"expression": "the bell that sounds", "subset": subset}
    return mask_sample(folder, "ref-avs", truths, number=number, label=label)


def test_true_masks_score_one_and_null_zero(tmp_path: Path) -> None:
    samples = [
        sample(tmp_path, "seen", LEFT, EMPTY),
        sample(tmp_path, "unseen", RIGHT, RIGHT, number=1),
        sample(tmp_path, "null", EMPTY, EMPTY, number=2),
    ]
    answers = [said([LEFT, EMPTY]), said([RIGHT, RIGHT]), Answer(text=NOTHING)]
    assert REF.score(samples, answers) == {
        "j": 1.0,
        "seen_j": 1.0,
        "seen_f": 1.0,
        "unseen_j": 1.0,
        "unseen_f": 1.0,
        "null_s": 0.0,
        "parse_rate": 1.0,
    }


def test_subsets_are_scored_apart_and_null_is_not_in_j(tmp_path: Path) -> None:
    samples = [
        sample(tmp_path, "seen", LEFT, LEFT),
        sample(tmp_path, "unseen", LEFT, number=1),
        sample(tmp_path, "null", EMPTY, number=2),
    ]
    metrics = REF.score(samples, [said([FULL, FULL]), said([RIGHT]), Answer(text=NOTHING)])
    assert metrics["seen_j"] == 0.5
    assert metrics["unseen_j"] == 0.0
    assert metrics["j"] == pytest.approx(1 / 3)
    assert metrics["seen_f"] == pytest.approx(1.3 * 0.5 / 1.15)
    assert metrics["null_s"] == 0.0


@pytest.mark.parametrize("subset", ["seen", "unseen"])
def test_metrics_of_a_subset_that_is_not_there_are_left_out(tmp_path: Path, subset: str) -> None:
    metrics = REF.score([sample(tmp_path, subset, LEFT)], [said([LEFT])])
    assert metrics.keys() == {"j", f"{subset}_j", f"{subset}_f", "parse_rate"}


def test_a_set_of_null_expressions_has_a_headline_too(tmp_path: Path) -> None:
    samples = [sample(tmp_path, "null", EMPTY, EMPTY)]
    metrics = REF.score(samples, [said([LEFT, EMPTY])])
    assert metrics == {"j": 0.75, "null_s": 0.5, "parse_rate": 1.0}
    assert REF.headline in metrics


def test_j_takes_pixels_above_two_fifths_and_s_above_a_half(tmp_path: Path) -> None:
    seen = [sample(tmp_path, "seen", LEFT)]
    assert REF.score(seen, [said([[[0.45, 0.4]]])])["j"] == 1.0
    assert REF.score(seen, [said([[[0.4, 0.3]]])])["j"] == 0.0
    null = [sample(tmp_path, "null", EMPTY, number=1)]
    assert REF.score(null, [said([[[0.5, 0.45]]])])["null_s"] == 0.0
    assert REF.score(null, [said([[[0.6, 0.6]]])])["null_s"] == 1.0


def test_s_is_the_root_for_each_clip_and_then_the_mean(tmp_path: Path) -> None:
    samples = [
        sample(tmp_path, "null", EMPTY, EMPTY, number=0),
        sample(tmp_path, "null", EMPTY, EMPTY, number=1),
    ]
    # 1/4 of the first clip's pixels, none of the second's. The root of the share of both would be 0.354.
    assert REF.score(samples, [said([LEFT, EMPTY]), Answer(text=NOTHING)])["null_s"] == 0.25


def test_frames_that_are_samples_are_put_together_for_s(tmp_path: Path) -> None:
    # The official pictures: frames of one clip and expression, a sample each. Here another expression stands between.
    frames = [sample(tmp_path, "null", EMPTY, number=n) for n in range(5)]
    clips = [frame.model_copy(update={"clip": "c"}) for frame in frames]
    other = {"expression": "the dog that sounds", "subset": "null"}
    clips[2] = clips[2].model_copy(update={"label": other})
    answers = [said([FULL]), *[Answer(text=NOTHING)] * 4]
    # One frame of four, and nothing for the other expression. The mean of the frames' roots would be 1/5.
    assert REF.score(clips, answers)["null_s"] == pytest.approx((0.5 + 0) / 2)
    assert REF.score(clips[::-1], answers[::-1])["null_s"] == pytest.approx(0.25)
    # The same words about another clip are another expression.
    clips[4] = frames[4]
    assert REF.score(clips, answers)["null_s"] == pytest.approx((1 / 3) ** 0.5 / 3)


def test_unreadable_answers_are_wrong_with_full_denominators(tmp_path: Path) -> None:
    samples = [sample(tmp_path, "seen", LEFT, number=n) for n in range(3)]
    samples.append(sample(tmp_path, "null", EMPTY, number=3))
    metrics = REF.score(samples, [said([LEFT]), Answer(text=""), Answer(text="x"), Answer(text="")])
    assert metrics["j"] == pytest.approx(1 / 3)
    # No mask is right for a null expression, no answer is not.
    assert metrics["null_s"] == 1.0
    assert metrics["parse_rate"] == 0.25


def test_goodness(tmp_path: Path) -> None:
    seen, null = (
        sample(tmp_path, "seen", LEFT, LEFT),
        sample(tmp_path, "null", EMPTY, EMPTY, number=1),
    )
    assert REF.goodness(seen, said([LEFT, FULL])) == 0.75
    assert REF.goodness(null, said([LEFT, EMPTY])) == 0.5
    assert REF.goodness(null, Answer(text=NOTHING)) == 1.0
    assert REF.goodness(null, Answer(text="")) == 0.0
    assert REF.goodness(seen, Answer(text=NOTHING)) == 0.0
    assert REF.goodness(sample(tmp_path, "seen", number=2), said([LEFT])) == 1.0


def test_scores_do_not_depend_on_the_order_of_samples(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pairs = []
    for number, subset in enumerate(["seen", "null", "unseen", "seen"]):
        truths = draw.integers(0, 2 if subset != "null" else 1, (2, 4, 7)).tolist()
        pairs.append(
            (
                sample(tmp_path, subset, *truths, number=number),
                said(draw.random((2, 4, 7)).tolist()),
            )
        )
    expected = REF.score(*zip(*pairs, strict=True))
    for order in itertools.permutations(pairs):
        assert REF.score(*zip(*order, strict=True)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "label", [{}, {"expression": "x"}, {"expression": "x", "subset": "all"}, {"subset": "seen"}]
)
def test_wrong_labels_are_named(tmp_path: Path, label: dict[str, str]) -> None:
    wrong = sample(tmp_path, "seen", LEFT).model_copy(update={"label": label})
    with pytest.raises(ValueError, match="'ref-avs0': Ref-AVS label"):
        REF.score([wrong], [said([LEFT])])


def test_no_true_mask_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has a true mask"):
        REF.score([sample(tmp_path, "seen")], [said([LEFT])])


def test_the_question_is_the_expression() -> None:
    assert "the red square" in REF.instruction("the red square")
    with pytest.raises(ValueError, match="needs a question"):
        REF.instruction(None)
