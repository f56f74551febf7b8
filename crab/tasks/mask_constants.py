"""Answers with masks that a model blind to the clip could always give."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crab.masks import MASK_SIZE, read_class_map, read_mask
from crab.samples import Sample
from crab.tasks.base import Answer, Masks
from crab.tasks.mask_answer import NOTHING, MaskItem, format_mask_answer
from crab.tasks.spans import NUM_SECONDS

TRAIN_SAMPLES = 200
"At most so many train samples, at even steps, are looked at: their mean mask hardly moves with more."

SHARES = (0.1, 0.25, 0.75, 0.9)
"Shares of the highest value of the mean mask above which a pixel is set. The mean mask as a probability is 0.5."

NUM_COMMON = 12
"So many of the commonest classes are tried alone; each costs a pass over the test masks."

_ALWAYS = format_mask_answer([MaskItem(start_s=0, end_s=NUM_SECONDS, names=("object",))])


def mask_constants(train: Sequence[Sample]) -> list[Answer]:
    """No masks, full masks, and the mean train mask: as a probability (highest = 1), and above several thresholds."""
    shape = (MASK_SIZE, MASK_SIZE)
    built = [Answer(text=NOTHING), _answer(np.ones(shape, np.float16))]
    total, num_frames = np.zeros(shape), 0
    for sample in _some(train):
        for ref in sample.masks:
            total += read_mask(ref, MASK_SIZE)
            num_frames += 1
    if not total.any():
        return built
    mean = total / total.max()
    built.append(_answer(mean.astype(np.float16)))
    return built + [_answer((mean >= share).astype(np.float16)) for share in SHARES]


def class_constants(train: Sequence[Sample], num_classes: int) -> list[Answer]:
    """No masks, the commonest class of each pixel, and, where objects are at least half as common as at the commonest
    place, the commonest object class of each pixel and each of the commonest classes."""
    built = [Answer(text=NOTHING)]
    frames = np.zeros((num_classes, MASK_SIZE * MASK_SIZE), np.int32)
    pixels = np.arange(MASK_SIZE * MASK_SIZE)
    for sample in _some(train):
        for ref in sample.masks:
            frames[read_class_map(ref, MASK_SIZE).ravel(), pixels] += 1
    objects = frames[1:]
    if not objects.any():
        return built
    common = objects.sum(0)
    there = common >= common.max() / 2
    counts = objects.sum(1)
    tried = [number for number in np.argsort(-counts, kind="stable")[:NUM_COMMON] if counts[number]]
    maps = [frames.argmax(0), np.where(there, objects.argmax(0) + 1, 0)]
    maps += [np.where(there, number + 1, 0) for number in tried]
    return built + [_answer(m.reshape(MASK_SIZE, MASK_SIZE).astype(np.uint8)) for m in maps]


def _some(train: Sequence[Sample]) -> Sequence[Sample]:
    labelled = [sample for sample in train if sample.masks]
    return labelled[:: -(-len(labelled) // TRAIN_SAMPLES) or 1]


def _answer(mask: NDArray[np.float16] | NDArray[np.uint8]) -> Answer:
    return Answer(text=_ALWAYS, masks=Masks(frames=(0,), values=mask[None]))
