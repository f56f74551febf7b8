"""IoU, F and S against their definitions, written out with one comparison a threshold and one loop a class."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_samples import EMPTY, FULL, LEFT, RIGHT, TOP, blocks
from numpy.typing import NDArray

from crab.tasks.mask_metrics import (
    THRESHOLDS,
    ClassScores,
    MaskScores,
    class_iou,
    empty_score,
    f_by_threshold,
    mask_iou,
)

LEFT_MASK, RIGHT_MASK, TOP_MASK = (blocks(rows, bool) for rows in (LEFT, RIGHT, TOP))
EMPTY_MASK, FULL_MASK = blocks(EMPTY, bool), blocks(FULL, bool)


def f_directly(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> list[float]:
    """F at each threshold, the way the definition reads."""
    values = []
    for threshold in THRESHOLDS:
        predicted = probability >= threshold
        shared = (predicted & truth).sum()
        precision = shared / predicted.sum() if predicted.any() else 0.0
        recall = shared / truth.sum()
        values.append(1.3 * precision * recall / (0.3 * precision + recall) if shared else 0.0)
    return values


@pytest.mark.parametrize(
    ("prediction", "truth", "iou"),
    [
        (LEFT_MASK, LEFT_MASK, 1.0),
        (LEFT_MASK, RIGHT_MASK, 0.0),
        (LEFT_MASK, TOP_MASK, 1 / 3),
        (LEFT_MASK, FULL_MASK, 0.5),
        (FULL_MASK, LEFT_MASK, 0.5),
        (EMPTY_MASK, LEFT_MASK, 0.0),
        (EMPTY_MASK, EMPTY_MASK, 1.0),
        (LEFT_MASK, EMPTY_MASK, 0.5),
        (FULL_MASK, EMPTY_MASK, 0.0),
    ],
)
def test_iou_is_that_of_the_background_where_the_truth_is_empty(
    prediction: NDArray[np.bool_], truth: NDArray[np.bool_], iou: float
) -> None:
    assert mask_iou(prediction, truth) == pytest.approx(iou, abs=1e-12)


def test_there_are_255_thresholds_from_0_to_1() -> None:
    assert len(THRESHOLDS) == 255
    assert THRESHOLDS[0] == 0
    assert THRESHOLDS[127] == 0.5
    assert THRESHOLDS[-1] == 1


@pytest.mark.parametrize("kind", ["smooth", "float16", "on thresholds", "ones", "zeros"])
def test_f_by_histogram_equals_f_by_comparison(kind: str) -> None:
    draw = np.random.default_rng(0)
    probability = {
        "smooth": draw.random((20, 30), np.float32),
        "float16": draw.random((20, 30)).astype(np.float16).astype(np.float32),
        "on thresholds": draw.choice(THRESHOLDS, (20, 30)),
        "ones": np.ones((20, 30), np.float32),
        "zeros": np.zeros((20, 30), np.float32),
    }[kind]
    truth = draw.random((20, 30)) < 0.3
    assert f_by_threshold(probability, truth) == pytest.approx(f_directly(probability, truth))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1))
def test_f_of_any_masks(seed: int, share: float) -> None:
    draw = np.random.default_rng(seed)
    probability = np.round(draw.random((6, 7)), 2).astype(np.float32)
    truth = draw.random((6, 7)) < share
    truth[0, 0] = True
    assert f_by_threshold(probability, truth) == pytest.approx(f_directly(probability, truth))


def test_f_of_halves() -> None:
    # Left predicted, top true: P = R = 0.5, so F = 0.5 at every threshold above 0; all predicted at 0: P = 0.5, R = 1.
    f = f_by_threshold(LEFT_MASK.astype(np.float32), TOP_MASK)
    assert f[0] == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1))
    assert f[1:] == pytest.approx(0.5)


def test_f_weighs_precision_more_than_recall() -> None:
    quarter = blocks([[1, 0], [0, 0]], np.float32)
    precise = f_by_threshold(quarter, LEFT_MASK)[-1]
    complete = f_by_threshold(blocks(FULL, np.float32), LEFT_MASK)[-1]
    assert precise == pytest.approx(1.3 * 0.5 / (0.3 + 0.5))
    assert complete == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1))


def test_f_is_maximised_over_the_mean_of_the_set_and_not_per_frame() -> None:
    # The same picture, seen once with low and once with high probabilities: no one threshold suits both frames.
    low = np.where(LEFT_MASK, 0.3, 0.1).astype(np.float32)
    high = np.where(LEFT_MASK, 0.9, 0.7).astype(np.float32)
    scores = MaskScores()
    scores.add(low, LEFT_MASK)
    scores.add(high, LEFT_MASK)
    per_frame = [max(f_directly(p, LEFT_MASK)) for p in (low, high)]
    of_the_set = np.mean([f_directly(p, LEFT_MASK) for p in (low, high)], 0).max()
    assert per_frame == [1.0, 1.0]
    assert of_the_set < 0.8
    assert scores.metrics("j", "f")["f"] == pytest.approx(of_the_set)


def test_frames_with_an_empty_truth_count_for_iou_and_not_for_f() -> None:
    scores = MaskScores()
    scores.add(LEFT_MASK.astype(np.float32), LEFT_MASK)
    scores.add(LEFT_MASK.astype(np.float32), EMPTY_MASK)
    assert scores.metrics("j", "f") == {"j": 0.75, "f": 1.0}


def test_a_score_without_frames_is_left_out() -> None:
    scores = MaskScores()
    assert scores.metrics("j", "f") == {}
    scores.add(EMPTY_MASK.astype(np.float32), EMPTY_MASK)
    assert scores.metrics("j", "f") == {"j": 1.0}


@pytest.mark.parametrize("threshold", [0.5, 0.4])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_pixel_exactly_at_the_threshold_is_outside_the_mask(
    threshold: float, dtype: type
) -> None:
    at = LEFT_MASK.astype(dtype) * dtype(threshold)
    above = LEFT_MASK.astype(dtype) * np.nextafter(dtype(threshold), dtype(1)) * dtype(1.001)
    for probability, iou in ((at, 0.0), (above, 1.0)):
        scores = MaskScores(threshold)
        scores.add(probability.astype(np.float32), LEFT_MASK)
        assert scores.metrics("j", "f")["j"] == iou


def test_s_is_the_root_of_the_share_predicted_in_all_frames() -> None:
    assert empty_score(np.stack([LEFT_MASK, EMPTY_MASK])) == 0.5
    assert empty_score(np.stack([EMPTY_MASK])) == 0.0
    assert empty_score(np.stack([FULL_MASK, FULL_MASK])) == 1.0


def class_scores_directly(
    frames: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], num_classes: int
) -> tuple[list[float], list[float]]:
    """IoU and F of each class, mean over the frames that have it in truth or prediction, 0 where none has."""
    ious: list[list[float]] = [[] for _ in range(num_classes)]
    fs: list[list[float]] = [[] for _ in range(num_classes)]
    for prediction, truth in frames:
        for number in range(num_classes):
            p, t = prediction == number, truth == number
            if not (p | t).any():
                continue
            shared = (p & t).sum()
            ious[number].append(shared / (p | t).sum())
            precision = shared / p.sum() if p.any() else 0.0
            recall = shared / t.sum() if t.any() else 0.0
            fs[number].append(
                1.3 * precision * recall / (0.3 * precision + recall) if shared else 0.0
            )
    return (
        [float(np.mean(values)) if values else 0.0 for values in ious],
        [float(np.mean(values)) if values else 0.0 for values in fs],
    )


def test_class_scores_equal_their_definition() -> None:
    draw = np.random.default_rng(1)
    scores = ClassScores(6)
    frames = []
    for _ in range(5):
        # Class 5 is in no frame, class 4 is only predicted, class 3 is only true.
        truth = draw.choice(np.array([0, 0, 1, 2, 3], np.uint8), (9, 8))
        prediction = draw.choice(np.array([0, 1, 2, 2, 4], np.uint8), (9, 8))
        frames.append((prediction, truth))
        scores.add(prediction, truth)
    ious, fs = class_scores_directly(frames, 6)
    assert scores.metrics() == pytest.approx(
        {
            "miou": np.mean(ious),
            "f": np.mean(fs),
            "miou_no_background": np.mean(ious[1:]),
            "f_no_background": np.mean(fs[1:]),
            "miou_attainable": 4 / 6,
        }
    )
    assert fs[1] > 0
    assert ious[4] == ious[5] == 0


def maps(*pairs: tuple[list[list[int]], list[list[int]]]) -> dict[str, float]:
    scores = ClassScores(4)
    for prediction, truth in pairs:
        scores.add(blocks(prediction), blocks(truth))
    return scores.metrics()


def test_a_class_that_nobody_has_counts_as_0() -> None:
    # Perfect, with classes 0 and 1 of four: the official definition gives 2 of 4.
    metrics = maps(([[1, 0]], [[1, 0]]))
    assert metrics["miou"] == metrics["f"] == metrics["miou_attainable"] == 0.5
    assert metrics["miou_no_background"] == pytest.approx(1 / 3)


def test_a_class_predicted_in_vain_costs_a_frame() -> None:
    right = ([[1, 0]], [[1, 0]])
    assert maps(right, right)["miou"] == 0.5
    vain = maps(right, ([[1, 0]], [[0, 0]]))
    # Class 1: 1 and 0. Background: 1 and 0.5.
    assert vain["miou"] == pytest.approx((0.75 + 0.5) / 4)


def test_without_background_means_without_class_0_and_not_the_last() -> None:
    # Class 3 is right and the background is not: leaving out the last class would give 0.
    metrics = maps(([[3, 1]], [[3, 0]]))
    assert metrics["miou_no_background"] == pytest.approx(1 / 3)
    metrics = maps(([[0, 0]], [[0, 3]]))
    assert metrics["miou"] == pytest.approx(0.5 / 4)
    assert metrics["miou_no_background"] == metrics["f_no_background"] == 0


def test_a_number_that_is_no_class_is_wrong_for_the_true_one() -> None:
    # Classes 3 and 1: 1 and 0. With 200 read as the last class it would be 0.5 and 0.
    assert maps(([[3, 200]], [[3, 1]]))["miou"] == 1 / 4


def test_iou_of_a_frame_by_class() -> None:
    assert class_iou(blocks([[0, 0]]), blocks([[0, 0]]), 4) == 1.0
    assert class_iou(blocks([[1, 0]]), blocks([[0, 0]]), 4) == 0.0
    assert class_iou(blocks([[1, 1]]), blocks([[1, 0]]), 4) == 0.5
    assert class_iou(blocks([[1, 2]]), blocks([[1, 0]]), 4) == 0.5


def test_a_thousand_frames_take_seconds() -> None:
    rows, columns = np.mgrid[:224, :224] / 224
    probability = np.exp(-((rows - 0.5) ** 2 + (columns - 0.4) ** 2) * 8).astype(np.float32)
    scores, began = MaskScores(), time.process_time()
    for _ in range(100):
        scores.add(probability, LEFT_MASK)
    # Measured 0.1 s; 255 comparisons a frame take 25 s.
    assert time.process_time() - began < 1.0
