"""Samples with small mask files, and answers with masks, for the tests of the four mask tasks.

Pictures are given as a few rows of blocks: `[[1, 0]]` is a picture whose left half is set.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from crab.masks import MASK_SIZE
from crab.samples import MaskRef, Sample
from crab.tasks import Answer, Masks
from crab.tasks.mask_answer import MaskItem, format_mask_answer

EMPTY = [[0]]
FULL = [[1]]
LEFT = [[1, 0]]
RIGHT = [[0, 1]]
TOP = [[1], [0]]


def blocks(rows: ArrayLike, dtype: type = np.uint8) -> NDArray[Any]:
    """[224, 224] from rows of equal blocks; both counts must divide 224."""
    small = np.asarray(rows)
    height, width = small.shape
    return np.kron(small, np.ones((MASK_SIZE // height, MASK_SIZE // width))).astype(dtype)


def mask_sample(
    folder: Path,
    task: str,
    truths: Sequence[ArrayLike],
    *,
    number: int = 0,
    label: dict[str, Any] | None = None,
    first: int = 0,
) -> Sample:
    """A sample whose frames first, first + 1 ... have these true masks or class maps."""
    masks = []
    for frame, rows in enumerate(truths, start=first):
        file = folder / f"{task}_{number}_{frame}.png"
        Image.fromarray(blocks(rows)).save(file)
        masks.append(MaskRef(frame=frame, file=str(file)))
    return Sample(
        id=f"{task}{number}",
        task=task,
        split="test",
        clip=f"c{number}",
        video="v.mp4",
        instruction="Mask it.",
        reasoning="It rings.",
        answer=text(0, 10),
        label=label or {"event": "bell"},
        masks=tuple(masks),
    )


def text(start_s: int = 0, end_s: int = 10) -> str:
    return format_mask_answer([MaskItem(start_s=start_s, end_s=end_s, names=("bell",))])


def masks(pictures: Sequence[ArrayLike], dtype: type = np.float16, first: int = 0) -> Masks:
    values = np.stack([blocks(rows, dtype) for rows in pictures])
    return Masks(frames=tuple(range(first, first + len(pictures))), values=values)


def said(pictures: Sequence[ArrayLike], dtype: type = np.float16) -> Answer:
    """A readable answer with these masks for the frames 0, 1 ..."""
    return Answer(text=text(), masks=masks(pictures, dtype))
