"""The folder of an evaluate run whose answers we chose: true masks moved, texts that are right or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crab.evaluate import constant_baseline, get_task, score
from crab.masks import MASK_SIZE, read_class_map, read_mask
from crab.samples import Sample
from crab.tasks import TASKS, Answer, Masks
from jobs.output import write_result
from jobs.predictions import Predictions, Said, masks_to_npz

HOSTILE = '<script>document.title = "owned"</script><img src=x onerror="document.title=1"> & \x00 \ud800 \u202e'
"""What no page may take for markup."""


def moved_masks(sample: Sample, pixels: int) -> Masks | None:
    """The true masks, moved to the right and down."""
    needs = get_task(sample.task).needs
    if needs not in ("mask", "classes") or not sample.masks:
        return None
    values = []
    for ref in sample.masks:
        true = read_class_map(ref, MASK_SIZE) if needs == "classes" else read_mask(ref, MASK_SIZE)
        values.append(np.roll(true, (pixels, pixels), (0, 1)))
    kind = np.uint8 if needs == "classes" else np.float16
    return Masks(
        frames=tuple(ref.frame for ref in sample.masks), values=np.stack(values).astype(kind)
    )


def write_run(
    folder: Path, samples: Sequence[Sample], hostile: Sequence[str] = (), silent: Sequence[str] = ()
) -> None:
    """predictions.jsonl, masks and result.json. Samples in `silent` have no answer, those in `hostile` a hostile one.

    Of each task the first answer is its target, the second that of the first, the third cannot be read, and so on.
    """
    predictions = Predictions(folder, samples)
    first: dict[str, Sample] = {}
    seen: dict[str, int] = {}
    for sample in samples:
        task = get_task(sample.task)
        first.setdefault(sample.task, sample)
        place = seen[sample.task] = seen.get(sample.task, -1) + 1
        if sample.id in silent:
            continue
        text = (
            task.target(sample),
            task.target(first[sample.task]),
            "I see <nothing",
            task.target(sample),
        )[place % 4]
        if sample.id in hostile:
            text = HOSTILE
        masks = moved_masks(sample, 4 * place)
        goodness = task.goodness(sample, Answer(text=text, masks=masks))
        predictions.add(
            sample.id,
            Said(
                text=text,
                finished=place % 4 != 2,
                goodness=goodness,
                masks=None if masks is None else masks_to_npz(masks),
            ),
        )
    predictions.write()
    scores = score(samples, predictions)
    constants = {task: constant_baseline(task, samples, samples) for task in scores}
    write_result(
        folder,
        {
            "job": "evaluate",
            "name": folder.name,
            "adapter": str(folder / "adapter"),
            "split": "test",
            "scores": scores,
            "constants": {
                task: {"text": best[0].text, "metrics": best[1]} if best else None
                for task, best in constants.items()
            },
            "type_priors": {},
            "left_out": {"not_found": list(silent)} if silent else {},
        },
    )


def write_steps(path: Path, count: int = 400) -> None:
    """Losses of a training that went well, by step."""
    with path.open("w") as file:
        for step in range(1, count + 1):
            row = {"step": step, "loss": 3 / step**0.4, "learning_rate": 1e-4}
            row |= {f"loss/{task}": 2 / step**0.3 + 0.1 * (step % 7) / 7 for task in TASKS}
            file.write(json.dumps(row) + "\n")
