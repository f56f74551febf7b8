"""Model and features in, one text a sample out, and masks where the task draws.

Scoring is the tasks' business (crab/tasks). Masks cost no further pass of the language model: the spans in the text say
which frames each group of mask tokens is for, and the decoder draws these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crab.masks import MASK_SIZE
from crab.model.collate import Collator, Example
from crab.model.crab_model import CrabModel
from crab.model.drawing import mask_features
from crab.model.generate import generate
from crab.tasks import TASKS, Masks
from crab.tasks.mask_answer import NUM_MASK_TOKENS, frames_of, parse_mask_answer


@dataclass(frozen=True, kw_only=True)
class Prediction:
    sample_id: str
    task: str
    text: str
    finished: bool
    """False: max_new_tokens came first, and the text is cut."""
    masks: Masks | None = None
    """All frames of the sample, MASK_SIZE x MASK_SIZE: probabilities (float16), or class numbers (uint8) for AVSS. None
    where the task draws nothing, the text names no frame, or it cannot be read.
    """


def predict(
    model: CrabModel,
    collator: Collator,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 400,
    batch_size: int = 16,
) -> list[Prediction]:
    """Greedy answers in the order of `examples`; reads neither `answer` nor `reasoning` nor `masks` of a sample.

    Samples of like prompt length share a batch, which saves padding and changes no text. Masks are drawn a sample at a
    time: 71 classes at 224 x 224 are 14 MB a frame.

    Raises:
        ValueError: a sample's features are absent or of the wrong shape; names the sample.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = model.new_embedding.rows.device
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].sample.instruction))
    predictions: dict[int, Prediction] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        together = [examples[index] for index in chosen]
        canvases = [_canvas(model, example) for example in together]
        batch = collator(together, with_target=False)
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.inference_mode():
            generated = generate(
                model, on_device, max_new_tokens=max_new_tokens, eos_id=collator.eos_id
            )
            for place, index in enumerate(chosen):
                sample = examples[index].sample
                ids, canvas = generated.ids[place], canvases[place]
                text = str(collator.tokenizer.decode(ids, skip_special_tokens=True)).strip()
                predictions[index] = Prediction(
                    sample_id=sample.id,
                    task=sample.task,
                    text=text,
                    finished=generated.finished[place],
                    masks=None
                    if canvas is None
                    else _masks(model, sample.task, text, generated.drawn[place], canvas),
                )
    return [predictions[index] for index in range(len(examples))]


def _canvas(model: CrabModel, example: Example) -> dict[str, np.ndarray] | None:
    """What the decoder draws on, all frames of the sample; None where model or task draws nothing."""
    task = TASKS.get(example.sample.task)
    if model.config.masks is None or task is None or task.needs not in ("mask", "classes"):
        return None
    return mask_features(example, model.config.masks)


def _masks(
    model: CrabModel, task: str, text: str, drawn: Tensor, canvas: dict[str, np.ndarray]
) -> Masks | None:
    """`drawn` [tokens, W]: the hidden states that predicted the mask tokens of `text`."""
    items = parse_mask_answer(text) or ()
    num_frames = len(canvas["mask_coarse"])
    covering = frames_of(items, num_frames)
    frames = [frame for frame, group in enumerate(covering) if group is not None]
    if not frames:
        return None
    batch = {name: torch.from_numpy(array[frames]) for name, array in canvas.items()}
    batch["mask_group"] = torch.tensor([group for group in covering if group is not None])
    # The grammar has mask tokens in whole groups alone, one an item.
    prompts = drawn.unflatten(0, (len(items), NUM_MASK_TOKENS))
    binary, classes = model.draw(prompts, {n: t.to(drawn.device) for n, t in batch.items()})
    if TASKS[task].needs == "classes":
        # One class is chosen after the resizing: class numbers cannot be blended.
        values = _resized(classes.float().softmax(1)).argmax(1).to(torch.uint8)
    else:
        values = _resized(binary.float().sigmoid().unsqueeze(1))[:, 0].half()
    everything = values.new_zeros(num_frames, MASK_SIZE, MASK_SIZE)
    everything[frames] = values
    return Masks(frames=tuple(range(num_frames)), values=everything.cpu().numpy())


def _resized(shares: Tensor) -> Tensor:
    size = (MASK_SIZE, MASK_SIZE)
    return F.interpolate(shares, size=size, mode="bilinear", align_corners=False)
