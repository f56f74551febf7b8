"""Scores of masks, summed up frame by frame, so that no more than one sample's masks are held at a time.

One mask a frame (S4, MS3, Ref-AVS; `mask_iou` and `Eval_Fmeasure` in `utils/utility.py` of OpenNLPLab/AVSBench):
- IoU of the pixels with p > 0.5. Where the truth is empty, IoU of the background, which is the share of pixels left
  empty. Mean over frames.
- F = 1.3 P R / (0.3 P + R) of the pixels with p >= t, for 255 thresholds t = 0, 1/254 ... 1. Frames with an empty truth
  are skipped. The mean over the frames of the set is taken at each threshold, and then the largest mean. Published test
  scripts take that maximum a batch, and their batch is one video, Crab's release even one frame: each choice is made
  with a look at the truth, and the finer it is, the higher the figure.
  At t = 0 every pixel is predicted, whatever the answer: F is never below that of full masks. Compare with a constant.

A class a pixel (AVSS; `calc_color_miou_fscore`, AVSBench): see `ClassScores`.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab.masks import MASK_SIZE, read_class_map, read_mask
from crab.samples import MaskRef, Sample
from crab.tasks.base import Answer, Metrics
from crab.tasks.mask_answer import counted_masks

BETA_SQUARED = 0.3
"Weight of recall in F; below 1 favours precision. AVSBench took it over from salient object detection."

NUM_THRESHOLDS = 255
THRESHOLDS = np.linspace(0, 1, NUM_THRESHOLDS, dtype=np.float32)
"The last one is 1 and not the official 1 - 1e-10, which float32 cannot tell from 1."

KEPT = 1 << 16
"So many true masks are kept, about 1 kB each: each constant answer is judged by all of them, and reading is slow."

Mask = NDArray[np.bool_]
Probability = NDArray[np.float32]
ClassMap = NDArray[np.uint8]


def mask_pairs(sample: Sample, answer: Answer) -> list[tuple[Probability, Mask]]:
    """Probabilities and truth, both [224, 224], for each frame of the sample that has a true mask.

    ValueError naming the sample where a probability is not within 0..1.
    """
    counted = counted_masks(answer, [ref.frame for ref in sample.masks])
    return [
        (_probability(values, sample), _truth(ref, read_mask).astype(bool))
        for ref, values in zip(sample.masks, counted, strict=True)
    ]


def class_pairs(
    sample: Sample, answer: Answer, num_classes: int
) -> list[tuple[ClassMap, ClassMap]]:
    """Predicted and true class numbers, both [224, 224], for each frame of the sample that has a true map.

    ValueError naming the sample or file where a prediction is not of class numbers, or the truth has one too large.
    """
    pairs = []
    counted = counted_masks(answer, [ref.frame for ref in sample.masks])
    for ref, values in zip(sample.masks, counted, strict=True):
        truth = _truth(ref, read_class_map)
        if truth.max() >= num_classes:
            raise ValueError(
                f"class map {ref.file} of sample {sample.id!r} has class {truth.max()},"
                f" expected numbers below num_classes = {num_classes}"
            )
        prediction = np.zeros_like(truth) if values is None else values
        if prediction.dtype != np.uint8:
            raise ValueError(
                f"masks of {prediction.dtype} given for sample {sample.id!r}, expected class numbers (uint8)"
            )
        pairs.append((prediction, truth))
    return pairs


def mask_iou(prediction: Mask, truth: Mask) -> float:
    """Shared pixels as a fraction of those in either mask; of the background where the truth is empty.

    The official 1e-7 in the denominator is left out: with a truth that is not empty it is never 0.
    """
    if not truth.any():
        return float(1 - np.count_nonzero(prediction) / truth.size)
    return float(np.count_nonzero(prediction & truth) / np.count_nonzero(prediction | truth))


def f_by_threshold(probability: Probability, truth: Mask) -> NDArray[np.float64]:
    """F at each of THRESHOLDS, [255]. `truth` must not be empty.

    With TP shared, N predicted and Y true pixels, P = TP / N and R = TP / Y give F = 1.3 TP / (0.3 Y + N), which is 0
    where nothing is predicted. One histogram of the probabilities gives TP and N for all thresholds at once.
    """
    # Bin k: the k + 1 lowest thresholds are reached.
    bins = np.searchsorted(THRESHOLDS, probability.ravel(), side="right") - 1
    counts = np.bincount(bins + NUM_THRESHOLDS * truth.ravel(), minlength=2 * NUM_THRESHOLDS)
    outside, inside = counts.reshape(2, NUM_THRESHOLDS)[:, ::-1].cumsum(1)[:, ::-1]
    return (1 + BETA_SQUARED) * inside / (BETA_SQUARED * inside[0] + inside + outside)


def empty_score(predicted: Mask | Sequence[float]) -> float:
    """S of null expressions, less is better: root of the share of predicted pixels, of all frames of a clip at once
    (`metric_s_for_null` in `utils/metric/utility.py` of GeWu-Lab/Ref-AVS). `predicted`: each pixel, or the share of
    each frame."""
    return float(np.sqrt(np.mean(predicted)))


class MaskScores:
    """IoU and F over all frames that were added."""

    def __init__(self, threshold: float = 0.5) -> None:
        """`threshold`: a pixel belongs to the mask, for IoU, where its probability is larger."""
        self.threshold = threshold
        self.num_frames = 0
        self.num_objects = 0
        "frames whose truth is not empty"
        self.total_iou = 0.0
        self._f = np.zeros(NUM_THRESHOLDS)

    def add(self, probability: Probability, truth: Mask) -> None:
        self.num_frames += 1
        self.total_iou += mask_iou(probability > self.threshold, truth)
        if truth.any():
            self.num_objects += 1
            self._f += f_by_threshold(probability, truth)

    def metrics(self, iou: str, f: str) -> Metrics:
        """The two scores under these names; without those that no frame was there for."""
        scores: Metrics = {}
        if self.num_frames:
            scores[iou] = self.total_iou / self.num_frames
        if self.num_objects:
            scores[f] = float(self._f.max()) / self.num_objects
        return scores


class ClassScores:
    """IoU and F of every class, over all frames that were added.

    In each frame IoU and F (beta^2 = 0.3) of each class that its truth or its prediction has; a class predicted in vain
    counts as a frame with 0. Mean over these frames, then mean over all `num_classes`. A class that no truth and no
    prediction of the set has counts as 0, as in the official code, so that the figures are comparable with published
    ones, and do not rise when a class is never tried. The price is that a set without some class cannot reach 1:
    `miou_attainable` says what perfect masks reach.

    Two things differ from the official script. Without background means without class 0; there it means without the
    last class, which is a class like the others. And frames without a label are not judged; there they are judged as
    all background.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.num_frames = 0
        self._frames = np.zeros(num_classes)
        self._true_frames = np.zeros(num_classes)
        self._iou = np.zeros(num_classes)
        self._f = np.zeros(num_classes)

    def add(self, prediction: ClassMap, truth: ClassMap) -> None:
        """A predicted number that is no class is wrong for the true class, and counts for no other."""
        self.num_frames += 1
        shared, predicted, true = class_counts(prediction, truth, self.num_classes)
        union = predicted + true - shared
        self._frames += union > 0
        self._true_frames += true > 0
        self._iou += shared / np.maximum(union, 1)
        self._f += (
            (1 + BETA_SQUARED) * shared / np.maximum(BETA_SQUARED * true + predicted, BETA_SQUARED)
        )

    def metrics(self) -> Metrics:
        """miou, f, both with _no_background too, and miou_attainable: the share of the classes that the truth has."""
        iou, f = self._iou / np.maximum(self._frames, 1), self._f / np.maximum(self._frames, 1)
        return {
            "miou": float(iou.mean()),
            "f": float(f.mean()),
            "miou_no_background": float(iou[1:].mean()),
            "f_no_background": float(f[1:].mean()),
            "miou_attainable": float((self._true_frames > 0).mean()),
        }


def class_counts(
    prediction: ClassMap, truth: ClassMap, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pixels of each class, [num_classes] each: in both maps, in the prediction, in the truth."""
    columns = num_classes + 1
    pairs = truth.astype(np.int64) * columns + np.minimum(prediction, num_classes)
    table = np.bincount(pairs.ravel(), minlength=num_classes * columns).reshape(-1, columns)
    return table.diagonal(), table.sum(0)[:num_classes], table.sum(1)


def class_iou(prediction: ClassMap, truth: ClassMap, num_classes: int) -> float:
    """Mean IoU of the classes, background left out, that either map has; 1 where both are all background."""
    shared, predicted, true = (
        counts[1:] for counts in class_counts(prediction, truth, num_classes)
    )
    union = predicted + true - shared
    there = union > 0
    return float((shared[there] / union[there]).mean()) if there.any() else 1.0


def no_masks(samples: Sequence[Sample], task: str) -> ValueError:
    return ValueError(
        f"none of the {len(samples)} {task} samples has a true mask; a score needs at least one"
    )


Read = Callable[[MaskRef, int], NDArray[Any]]


@lru_cache(maxsize=KEPT)
def _packed(ref: MaskRef, read: Read, stamp: object) -> bytes:
    return zlib.compress(read(ref, MASK_SIZE).astype(np.uint8).tobytes(), level=1)


def _truth(ref: MaskRef, read: Read) -> NDArray[np.uint8]:
    """[224, 224]. Kept until a local file changes; a file behind a URL is taken not to change in a process' life."""
    local = None if "://" in ref.file else Path(ref.file).stat()
    stamp = local and (local.st_mtime_ns, local.st_size, local.st_ino)
    flat = np.frombuffer(zlib.decompress(_packed(ref, read, stamp)), np.uint8)
    return flat.reshape(MASK_SIZE, MASK_SIZE)


def _probability(values: NDArray[Any] | None, sample: Sample) -> Probability:
    if values is None:
        return np.zeros((MASK_SIZE, MASK_SIZE), np.float32)
    probability = values.astype(np.float32)
    if not (probability.min() >= 0 and probability.max() <= 1):
        raise ValueError(
            f"masks of sample {sample.id!r} have values from {probability.min()} to {probability.max()},"
            " expected probabilities in 0..1"
        )
    return probability
