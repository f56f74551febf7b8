"""Loss of drawn masks: BCE and Dice for one mask a frame, cross entropy for a class a pixel.

Summed by sample, so that micro-batches and ranks add up to the loss of the whole batch. A frame without a true mask is
not handed in (see collate.py). Always at least float32: Dice sums thousands of pixels.

Legend: F frames, N samples, C classes, S side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from crab.model.config import MaskDecoderConfig

DICE_SMOOTHING = 1.0
"""Pixels added above and below: a frame whose true mask is empty then still has a slope towards empty."""


def mask_loss(
    binary: Tensor,
    classes: Tensor,
    target: Tensor,
    semantic: Tensor,
    sample: Tensor,
    num_samples: int,
    config: MaskDecoderConfig,
) -> Tensor:
    """Summed loss of each sample's frames, [N], float32 or wider; each frame counts its mean over pixels.

    Args:
        binary: logits [F, S, S]. classes: logits [F, C, S, S].
        target: uint8 [F, S, S], 0 or 1, or the class where `semantic` [F] (bool) says so.
        sample: int64 [F], the sample of each frame.
    """
    wide = torch.promote_types(binary.dtype, torch.float32)
    # A frame has one of the two losses. Indexing keeps both heads in the graph even when one has no frame.
    plain = ~semantic
    loss = binary.new_zeros(len(target), dtype=wide)
    loss = loss.index_put(
        (plain.nonzero()[:, 0],), binary_loss(binary[plain].to(wide), target[plain], config)
    )
    loss = loss.index_put(
        (semantic.nonzero()[:, 0],),
        config.ce_weight * class_loss(classes[semantic].to(wide), target[semantic]),
    )
    return loss.new_zeros(num_samples).index_add(0, sample, loss)


def binary_loss(logits: Tensor, target: Tensor, config: MaskDecoderConfig) -> Tensor:
    """Weighted BCE and Dice of each frame: [F, S, S] -> [F]."""
    truth = target.to(logits.dtype)
    bce = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1).mean(1)
    drawn = logits.sigmoid()
    overlap = (drawn * truth).flatten(1).sum(1)
    total = (drawn + truth).flatten(1).sum(1)
    dice = 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)
    return config.bce_weight * bce + config.dice_weight * dice


def class_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of each frame, the mean over its pixels: [F, C, S, S], [F, S, S] -> [F]."""
    return F.cross_entropy(logits, target.long(), reduction="none").flatten(1).mean(1)
