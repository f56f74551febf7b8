"""What a sample brings for the mask decoder: features of its frames, and in training the true masks.

In training the labelled frames that lie in a span of the target are drawn; a frame in no span has an empty mask by the
text alone and carries no mask loss. Frame i is row i of the features: mask data sets have one frame a second.

Legend: F frames to be drawn, P encoder tokens, D feature width, S side of the drawn masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crab.masks import read_class_map, read_mask
from crab.model.example import Batch, Example, checked_layer
from crab.model.prompt import target_text
from crab.model.tokens import DRAWN_TOKENS
from crab.tasks import TASKS
from crab.tasks.mask_answer import frames_of, parse_mask_answer

if TYPE_CHECKING:
    from crab.model.config import CrabConfig, MaskDecoderConfig
    from crab.samples import MaskRef, Sample


def mask_features(example: Example, masks: MaskDecoderConfig) -> dict[str, np.ndarray]:
    """mask_coarse and mask_fine, each [frames, P, D], all frames of the sample.

    Raises:
        ValueError: the features are absent or of the wrong shape; names the sample.
    """
    stream = next((name for name in ("video", "image") if name in example.features), None)
    if stream is None:
        raise ValueError(
            f"sample {example.sample.id!r} wants masks and has features of neither video nor image"
        )
    coarse, fine = (
        checked_layer(example, stream, layer, masks.feature_size, "masks.layers")
        for layer in masks.layers
    )
    if coarse.shape != fine.shape:
        raise ValueError(
            f"sample {example.sample.id!r}: the layers {masks.layers} have the shapes {coarse.shape} and "
            f"{fine.shape}, expected the same"
        )
    return {"mask_coarse": coarse, "mask_fine": fine}


def drawing(example: Example, config: CrabConfig, index: int, first_group: int) -> Batch | None:
    """The mask_... entries of the sample at `index` of a batch (see Collator), None where it has nothing to draw.

    `first_group` is how many groups of mask tokens the batch has before this sample.

    Raises:
        ValueError: features absent, a mask of a frame that has none, or a class that the model does not know.
    """
    sample, masks = example.sample, config.masks
    frames = frames_to_draw(sample, config)
    if not frames or masks is None:
        return None
    features = mask_features(example, masks)
    last, available = frames[-1][0].frame, len(features["mask_coarse"])
    if last >= available:
        raise ValueError(
            f"sample {sample.id!r} has a mask of frame {last}, its features have {available} frames; "
            "preprocess the clip with one frame a second"
        )
    rows = [ref.frame for ref, _ in frames]
    semantic = TASKS[sample.task].needs == "classes"
    read = _class_target if semantic else _binary_target
    return {name: torch.from_numpy(array[rows]) for name, array in features.items()} | {
        "mask_group": torch.tensor([first_group + group for _, group in frames]),
        "mask_sample": torch.full((len(frames),), index),
        "mask_target": torch.stack([read(ref, masks, sample.id) for ref, _ in frames]),
        "mask_semantic": torch.full((len(frames),), semantic),
    }


def frames_to_draw(sample: Sample, config: CrabConfig) -> list[tuple[MaskRef, int]]:
    """(true mask, number of its group in the target) of the labelled frames that lie in a span, in their order.

    Raises:
        ValueError: the target has mask tokens and cannot be read.
    """
    text = target_text(sample, config.prompt)
    if config.masks is None or not sample.masks or DRAWN_TOKENS[0] not in text:
        return []
    items = parse_mask_answer(text)
    if items is None:
        raise ValueError(
            f"sample {sample.id!r}: the target has mask tokens and is not of the grammar of "
            f"crab/tasks/mask_answer.py: {text!r}"
        )
    refs = sorted(sample.masks, key=lambda ref: ref.frame)
    group_of = frames_of(items, refs[-1].frame + 1)
    pairs = [(ref, group_of[ref.frame]) for ref in refs]
    return [(ref, group) for ref, group in pairs if group is not None]


def join_drawings(drawings: list[Batch]) -> Batch:
    """One batch of several samples' mask_... entries.

    Raises:
        ValueError: the samples differ in their number of encoder tokens a frame.
    """
    tokens = {drawing["mask_coarse"].shape[1] for drawing in drawings}
    if len(tokens) > 1:
        raise ValueError(
            f"samples of one batch have {sorted(tokens)} encoder tokens a frame; masks need one image size"
        )
    return {name: torch.cat([drawing[name] for drawing in drawings]) for name in drawings[0]}


def _binary_target(ref: MaskRef, masks: MaskDecoderConfig, sample_id: str) -> Tensor:
    """uint8 [S, S]: 1 where at least half of a pixel's area belongs to the mask."""
    share = torch.from_numpy(read_mask(ref).astype(np.float32))[None, None]
    resized = F.interpolate(share, size=(masks.output_size, masks.output_size), mode="area")
    return (resized[0, 0] >= 0.5).to(torch.uint8)


def _class_target(ref: MaskRef, masks: MaskDecoderConfig, sample_id: str) -> Tensor:
    """uint8 [S, S]: the class of each pixel."""
    classes = torch.from_numpy(read_class_map(ref, masks.output_size))
    highest = int(classes.max())
    if highest >= masks.num_classes:
        raise ValueError(
            f"sample {sample_id!r}: {ref.file} holds class {highest}, the model has {masks.num_classes} "
            "(masks.num_classes, background included)"
        )
    return classes
