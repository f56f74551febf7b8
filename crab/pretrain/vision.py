"""The visual encoder learns to name what covers every patch, where its edge runs and where its object lies.

Pictures are drawn at 224 pixels, spoiled as codecs spoil them and halved; the truth comes from `shape_mask`.

Legend: N frames, S patches on a side, P = S x S patches, K = 16 cells of a patch (4 x 4), D width.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from crab.encoders.clip import VisionFeatures
from crab.pretrain.fit import OnStep, fit, split_matrices
from crab.synth.make import Dice
from crab.synth.render import render_frame, shape_mask
from crab.synth.scene import CLASS_NAMES, Scene, on

DRAWN = 224
"""Side of the picture and of the masks before they are scaled to the encoder's."""

CELLS = 4
"""Cells on a patch's side whose cover is learnt: edges finer than a patch must survive for the mask decoder."""

MUON_RATE = 5e-3

UNSURE = -100
"""Class of a patch that an object only touches: it carries no loss."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The truth of N frames."""

    classes: Tensor
    """[N, P] class number from 1, 0 for background, UNSURE between a twentieth and a fifth of cover."""
    cover: Tensor
    """[N, P, K] share of each cell that some object covers, float32."""
    boxes: Tensor
    """[N, P, 4] left, top, right and bottom edge of the patch's object, as fractions of the frame; 0 without one."""


def train_vision(
    model: VisionFeatures,
    pool: Sequence[Scene],
    *,
    steps: int,
    batch: int,
    seed: int,
    on_step: OnStep,
) -> None:
    """Trains the whole tower. The first selected layer learns the same at a small weight: the mask decoder reads it."""
    width, side = model.config.hidden_size, model.config.image_size // model.config.patch_size
    heads = {f"layer_{layer}": _Heads(width) for layer in model.layers}
    last = f"layer_{model.layers[-1]}"
    dice = Dice(seed, 1)

    def batches() -> Iterator[tuple[Tensor, Patches]]:
        while True:
            picks = [(dice.pick(pool), _moment(dice)) for _ in range(batch)]
            frames = [
                spoiled(render_frame(*pick, DRAWN), model.config.image_size, dice) for pick in picks
            ]
            yield torch.from_numpy(np.stack(frames)), patches(picks, side)

    def loss(inputs: tuple[Tensor, Patches]) -> tuple[Tensor, dict[str, float]]:
        frames_NHWC, truth = inputs
        features = model(frames_NHWC)
        metrics: dict[str, float] = {}
        total = torch.zeros(())
        for name, head in heads.items():
            value, report = head(features[name].float(), truth)
            total = total + (1.0 if name == last else 0.3) * value
            metrics = report
        return total, metrics

    matrices, others = split_matrices(model)
    others += [p for head in heads.values() for p in head.parameters()]
    fit(
        {1e-3: others},
        batches(),
        loss,
        steps=steps,
        on_step=on_step,
        matrices={MUON_RATE: matrices},
    )


class _Heads(nn.Module):
    """Class, cover and box of every patch, each one linear map of its features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.name = nn.Linear(width, len(CLASS_NAMES) + 1)
        self.cover = nn.Linear(width, CELLS * CELLS)
        self.box = nn.Linear(width, 4)

    def forward(self, features: Tensor, truth: Patches) -> tuple[Tensor, dict[str, float]]:
        names = self.name(features)
        # Most patches show background; without the weight the first hundred steps learn nothing else.
        weight = torch.ones(len(CLASS_NAMES) + 1)
        weight[0] = 0.1
        named = F.cross_entropy(
            names.flatten(0, 1), truth.classes.flatten(), weight=weight, ignore_index=UNSURE
        )
        cover = self.cover(features)
        edges = F.binary_cross_entropy_with_logits(cover, truth.cover, reduction="none")
        # Cells of bare background far from any object are right at once and would drown the edges.
        near = 0.1 + 0.9 * (truth.cover.amax(-1, keepdim=True) > 0).float()
        shaped = (edges * near).sum() / near.expand_as(edges).sum()
        there = truth.classes > 0
        off = (self.box(features)[there] - truth.boxes[there]).abs()
        placed = F.smooth_l1_loss(off, torch.zeros_like(off), beta=0.01)
        right = (names.argmax(-1) == truth.classes)[there].float().mean().item()
        drawn, real = cover > 0, truth.cover > 0.5
        iou = ((drawn & real).sum() / (drawn | real).sum().clamp(min=1)).item()
        report = {"right_patches": right, "cover_iou": iou, "box_error": off.mean().item()}
        return named + 2 * shaped + 5 * placed, report


def spoiled(frame: np.ndarray, size: int, dice: Dice) -> np.ndarray:
    """uint8 [224, 224, 3] -> [size, size, 3] with a codec's losses: JPEG stands for H.264, as both cut 4:2:0 blocks."""
    picture = Image.fromarray(frame)
    if dice.chance(0.7):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=40 + dice.below(55))
        picture = Image.open(file)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


def patches(moments: Sequence[tuple[Scene, float]], side: int) -> Patches:
    """The truth of (scene, time in seconds) pairs for `side` x `side` patches."""
    classes = np.zeros((len(moments), side, side), dtype=np.int64)
    cover = np.zeros((len(moments), side * CELLS, side * CELLS), dtype=np.float32)
    boxes = np.zeros((len(moments), side, side, 4), dtype=np.float32)
    for row, (scene, t_s) in enumerate(moments):
        for actor in scene.actors:
            if not on(actor.visible, int(t_s)):
                continue
            mask = shape_mask(scene, actor, t_s, DRAWN)
            cells = _shares(mask, side * CELLS)
            share = _shares(cells, side)
            # Cells of the grid of objects are wider than a patch, but a patch may lie on the border of two.
            classes[row][(share > 0.05) & (classes[row] == 0)] = UNSURE
            classes[row][share >= 0.2] = 1 + CLASS_NAMES.index(actor.name)
            cover[row] = np.maximum(cover[row], cells)
            boxes[row][share >= 0.2] = np.array(box_of(mask), dtype=np.float32) / DRAWN
    by_patch = cover.reshape(-1, side, CELLS, side, CELLS).transpose(0, 1, 3, 2, 4)
    return Patches(
        classes=torch.from_numpy(classes.reshape(len(moments), -1)),
        cover=torch.from_numpy(by_patch.reshape(len(moments), side * side, CELLS * CELLS).copy()),
        boxes=torch.from_numpy(boxes.reshape(len(moments), -1, 4)),
    )


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the mask [H, W] in pixels, half-open; the mask is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _shares(mask: np.ndarray, side: int) -> np.ndarray:
    """[H, W] -> [side, side] mean of each block, float32."""
    block = mask.shape[0] // side
    return mask.reshape(side, block, side, block).mean((1, 3), dtype=np.float32)


def _moment(dice: Dice) -> float:
    """A time in seconds: half of them on the whole second, where the encoder will look, half anywhere."""
    second = dice.below(10)
    return float(second) if dice.chance(0.5) else dice.between(second, second + 0.99)
