"""Model and features in, one text a sample out. Parsing and scoring are the tasks' business
(crab/tasks).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from crab.model.collate import Collator, Example
from crab.model.crab_model import CrabModel
from crab.model.generate import generate


@dataclass(frozen=True, kw_only=True)
class Prediction:
    sample_id: str
    task: str
    text: str
    finished: bool
    """False: max_new_tokens came first, and the text is cut."""


def predict(
    model: CrabModel,
    collator: Collator,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 160,
    batch_size: int = 16,
) -> list[Prediction]:
    """Greedy answers in the order of `examples`; reads neither `answer` nor `reasoning` of a
    sample.

    Samples of like prompt length share a batch, which saves padding and changes no text.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    device = model.new_embedding.rows.device
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].sample.instruction))
    predictions: dict[int, Prediction] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collator([examples[index] for index in chosen], with_target=False)
        on_device = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.inference_mode():
            generated = generate(
                model, on_device, max_new_tokens=max_new_tokens, eos_id=collator.eos_id
            )
        for index, ids, finished in zip(chosen, generated.ids, generated.finished, strict=True):
            sample = examples[index].sample
            text = str(collator.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            predictions[index] = Prediction(
                sample_id=sample.id, task=sample.task, text=text, finished=finished
            )
    return [predictions[index] for index in range(len(examples))]
