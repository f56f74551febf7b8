"""The frames of a clip as pictures, and boxes on one of them."""

from crab.report.clip import Clip
from crab.report.files import Files
from crab.report.views import Box, Frame, FrameRow
from crab.samples import Sample
from crab.tasks.arig import ArigBox, iou

MAX_FRAMES = 20
"""Frames of a strip; of more, every n-th is shown."""


def strip(clip: Clip, files: Files) -> FrameRow:
    step = -(-len(clip.frames) // MAX_FRAMES)
    return FrameRow(
        frames=tuple(picture(clip, index, files) for index in range(0, len(clip.frames), step))
    )


def picture(clip: Clip, index: int, files: Files) -> Frame:
    return Frame(picture=files.jpeg(clip.frames[index]), label=when(clip, index))


def when(clip: Clip, index: int) -> str:
    return "image" if len(clip.frames) == 1 else f"{round(clip.times_us[index] / 1e6, 1):g} s"


def box(
    sample: Sample, parsed: object | None, truth: object | None, clip: Clip, files: Files
) -> Box | None:
    predicted = parsed.box if isinstance(parsed, ArigBox) else None
    true = truth.box if isinstance(truth, ArigBox) else None
    if predicted is None and true is None:
        return None
    second = sample.label.get("second")
    index = clip.frame_at(second if isinstance(second, int) else 0)
    verdict = ""
    if true is not None:
        verdict = f"IoU {iou(predicted, true) if predicted else 0.0:.2f}"
    return Box(
        picture=files.jpeg(clip.frames[index]),
        label=when(clip, index),
        size=clip.frames.shape[1],
        predicted=_corner_and_size(predicted),
        true=_corner_and_size(true),
        verdict=verdict,
    )


def _corner_and_size(box: tuple[int, int, int, int] | None) -> tuple[int, int, int, int] | None:
    return None if box is None else (box[0], box[1], box[2] - box[0], box[3] - box[1])
