"""Samples of one frame with its sound, as the official mask data sets keep them, and what their mask files show.

AVSBench and Ref-AVS ship a picture a second and an audio.wav, no video, so a frame is a sample: an image, frame 0 of
its masks, and the sound of the whole clip. The instruction tells which second of the sound the picture is from.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from crab.masks import MASK_SIZE, read_class_map
from crab.samples import MaskRef
from crab.tasks import TASKS
from crab.tasks.mask_answer import MaskItem, format_mask_answer

SPECK = 1e-3
"""A class with a smaller share of the masked pixels is not named: official maps have stray pixels at edges, such as 15
of class 9 in 204,637 (Crab's MS3 example)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class MapContent:
    """What a class map holds at 224 x 224."""

    classes: tuple[int, ...]
    """Class numbers without background and specks, ascending; () for an empty map."""
    box: tuple[int, int, int, int] | None
    """Tight box of all that is not background, half-open; None for an empty map."""


def read_content(ref: MaskRef) -> MapContent:
    """ValueError naming the file where it cannot be read."""
    try:
        numbers = read_class_map(ref, MASK_SIZE)
    except OSError as error:
        raise ValueError(f"mask file {ref.file} cannot be read: {error}") from error
    rows, columns = np.nonzero(numbers)
    if not rows.size:
        return MapContent(classes=(), box=None)
    counts = np.bincount(numbers[rows, columns])
    return MapContent(
        classes=tuple(int(n) for n in np.flatnonzero(counts >= max(SPECK * rows.size, 1))),
        box=(int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1),
    )


def frame_answer(names: Iterable[str]) -> str:
    """The mask answer of one picture: one item with these names, or `none` where there are none."""
    names = tuple(readable(name) for name in names)
    return format_mask_answer([MaskItem(start_s=0, end_s=1, names=names)] if names else [])


def readable(name: str) -> str:
    """Official names have _ for a blank. Those with < > ; or , are refused by `format_mask_answer`."""
    return " ".join(name.replace("_", " ").split())


def frame_instruction(task: str, second: int, question: str | None = None) -> str:
    return f"{TASKS[task].instruction(question)} The picture is from second {second} of the sound."


def ahead(
    work: Callable[[Item], Result], items: Iterable[Item], depth: int = 32
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in order; threads work up to `depth` items ahead. Decoding a PNG releases Python's lock."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) >= depth:
                    first, result = waiting.popleft()
                    yield first, result.result()
            while waiting:
                first, result = waiting.popleft()
                yield first, result.result()
        finally:
            for _, result in waiting:
                result.cancel()
