"""Text loss and mask loss together, on packed rows: first for the mask decoder alone, then for the whole Crab.

Legend: as in crab_model.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from crab.model.collate import Batch, Collator, Example
from crab.model.crab_model import CrabModel
from crab.pretrain.drills import drills
from crab.pretrain.fit import OnStep, Rates, fit
from crab.pretrain.language import DRILLS, QUESTIONS, drawn
from crab.pretrain.packing import pack
from crab.samples import Sample
from crab.synth.make import Dice
from crab.synth.questions import samples_of
from crab.synth.scene import Scene

MASK_TASKS = ("s4", "ms3", "avss", "ref-avs")

MASKS = 3
"""Frames of a sample that are drawn in a step: neighbours teach the same, and a frame costs as much as a sample."""

ExamplesOf = Callable[[int, Sequence[Sample]], list[Example]]
"""(number of the scene in the pool, samples of it) -> the samples with its features."""


def train_crab(
    model: CrabModel,
    collate: Collator,
    pool: Sequence[Scene],
    examples_of: ExamplesOf,
    *,
    parameters: Rates,
    matrices: Rates,
    steps: int,
    batch: int,
    count: int,
    seed: int,
    on_step: OnStep,
    tasks: Collection[str] | None = None,
) -> None:
    """Trains what `parameters` (by AdamW) and `matrices` (by Muon) hold; everything else of the model is frozen.

    Args:
        batch: scenes a step. count: samples of each.
        tasks: samples of these alone; None: of all, and drills beside them.
    """
    model.train().requires_grad_(False)
    for group in (*parameters.values(), *matrices.values()):
        for parameter in group:
            parameter.requires_grad_(True)
    dice = Dice(seed, 6)

    def batches() -> Iterator[Batch]:
        while True:
            rows: list[list[Example]] = []
            while len(rows) < batch:
                number = dice.below(len(pool))
                samples = samples_of(pool[number], QUESTIONS)
                chosen = drawn(
                    [s for s in samples if tasks is None or s.task in tasks], dice, count
                )
                if chosen:
                    more = drills(pool[number], dice, DRILLS) if tasks is None else []
                    chosen = [_fewer_masks(sample, dice) for sample in chosen]
                    rows.append(examples_of(number, [*chosen, *more]))
            yield pack(collate, rows)

    def loss(packed: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(packed)
        frames = max(1, int(output["sample_mask_frames"].sum()))
        report = {
            "text": (output["sample_loss"].sum() / output["sample_tokens"].sum()).item(),
            "mask": (output["sample_mask_loss"].sum() / frames).item(),
        }
        return output["loss"], report

    fit(parameters, batches(), loss, steps=steps, on_step=on_step, matrices=matrices)


def _fewer_masks(sample: Sample, dice: Dice) -> Sample:
    if len(sample.masks) <= MASKS:
        return sample
    return sample.model_copy(update={"masks": tuple(dice.sample(sample.masks, MASKS))})
