"""Predicted and true masks over the frames of a clip."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from crab.masks import MASK_SIZE, read_class_map, read_mask
from crab.report import overlay
from crab.report.asked import Asked
from crab.report.clip import Clip
from crab.report.files import Files
from crab.report.frames import MAX_FRAMES, picture
from crab.report.texts import clean
from crab.report.views import Example, FrameRow
from crab.samples import MaskRef
from crab.tasks import Answer, Task, ref_avs, s4
from crab.tasks.mask_answer import counted_masks
from crab.tasks.mask_metrics import class_iou, mask_iou

_THRESHOLDS = {"ref-avs": ref_avs.J_THRESHOLD}
"""Where a task's probabilities become a mask; `s4.THRESHOLD` for those that are not named."""

Truth = Mapping[int, np.ndarray]
"""Frame number -> bool mask or class map, 224 x 224."""
Reader = Callable[[MaskRef], np.ndarray]
Drawing = Callable[[np.ndarray, overlay.Colour], tuple[np.ndarray, overlay.Palette]]


def with_masks(example: Example, task: Task, asked: Asked, clip: Clip, files: Files) -> Example:
    true, problems = _read_truth(asked, lambda ref: read_mask(ref, MASK_SIZE))
    threshold = _THRESHOLDS.get(task.name, s4.THRESHOLD)
    frames = []
    for index, number, values in _places(asked, clip, true):
        frame = picture(clip, index, files)
        if number is not None:
            mask = None if values is None else values > threshold
            right = true.get(number)
            frame = replace(
                frame,
                predicted=_png(files, mask, overlay.filled, overlay.PREDICTED),
                true=_png(files, right, overlay.outlined, overlay.TRUE),
                verdict=_verdict(mask, right) if asked.has_truth else "",
            )
        frames.append(frame)
    return replace(
        example, rows=(FrameRow(frames=tuple(frames)),), notes=(*example.notes, *problems)
    )


def with_classes(example: Example, asked: Asked, clip: Clip, files: Files) -> Example:
    true, problems = _read_truth(asked, lambda ref: read_class_map(ref, MASK_SIZE))
    above, below = [], []
    present: set[int] = set()
    for index, number, said in _places(asked, clip, true):
        frame = picture(clip, index, files)
        right = None if number is None else true.get(number)
        for classes in (said, right):
            present |= set() if classes is None else {int(n) for n in np.unique(classes)} - {0}
        verdict = _class_verdict(said, right) if asked.has_truth else ""
        above.append(replace(frame, predicted=_class_png(files, said), verdict=verdict))
        below.append(replace(frame, true=_class_png(files, right)))
    names = asked.sample.label.get("names")
    names = names if isinstance(names, Mapping) else {}
    rows = [FrameRow(frames=tuple(above), title="Predicted")]
    if asked.has_truth:
        rows.append(FrameRow(frames=tuple(below), title="True"))
    return replace(
        example,
        rows=tuple(rows),
        notes=(*example.notes, *problems),
        legend=tuple(
            (overlay.hex_of(overlay.class_colour(n)), clean(str(names.get(str(n), f"class {n}"))))
            for n in sorted(present)
        ),
    )


def _read_truth(asked: Asked, read: Reader) -> tuple[dict[int, np.ndarray], list[str]]:
    """True masks by frame, and a line for each file that cannot be read."""
    true, problems = {}, []
    for ref in asked.sample.masks:
        try:
            true[ref.frame] = read(ref)
        except (OSError, ValueError) as error:
            problems.append(clean(f"true mask of frame {ref.frame}: {error}"))
    return true, problems


def _places(
    asked: Asked, clip: Clip, true: Truth
) -> list[tuple[int, int | None, np.ndarray | None]]:
    """(frame of the clip, number of the mask on it or None, what was predicted there or None), in order of time.

    Mask i lies on the i-th frame that the model saw, as crab.model.drawing says; on the last one if there are fewer.
    """
    last = len(clip.frames) - 1
    answer = asked.answer or Answer(text="")
    numbers = sorted({*(answer.masks.frames if answer.masks else ()), *true})
    predicted = counted_masks(answer, numbers)
    placed = [
        (min(number, last), number, values)
        for number, values in zip(numbers, predicted, strict=True)
    ]
    bare = set(range(last + 1)) - {index for index, _, _ in placed}
    if last >= MAX_FRAMES:
        bare = set()
    rest = [(index, None, None) for index in bare]
    return sorted([*placed, *rest], key=lambda place: (place[0], place[1] or 0))


def _verdict(predicted: np.ndarray | None, true: np.ndarray | None) -> str:
    if true is None:
        return "not judged"
    predicted = np.zeros_like(true) if predicted is None else predicted
    if true.any():
        return f"IoU {mask_iou(predicted, true):.2f}"
    return "should be empty" if predicted.any() else "empty ✓"


def _class_verdict(predicted: np.ndarray | None, true: np.ndarray | None) -> str:
    """The mean over the classes that are seen or predicted there, background left out."""
    if true is None:
        return "not judged"
    predicted = np.zeros_like(true) if predicted is None else predicted
    if not true.any():
        return "should be empty" if predicted.any() else "empty ✓"
    return f"IoU {class_iou(predicted, true, int(max(predicted.max(), true.max())) + 1):.2f}"


def _png(
    files: Files, mask: np.ndarray | None, draw: Drawing, colour: overlay.Colour
) -> str | None:
    return files.png(*draw(mask, colour)) if mask is not None and mask.any() else None


def _class_png(files: Files, classes: np.ndarray | None) -> str | None:
    if classes is None or not classes.any():
        return None
    return files.png(*overlay.coloured(classes))
