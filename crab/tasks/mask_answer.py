"""The answer of the four mask tasks (S4, MS3, AVSS, Ref-AVS): who is masked in which seconds, and the mask tokens.

    answer = "<range> none </range>" | item { " ; " item }
    item   = "<range> s,e </range> " name { ", " name } " " group
    group  = "<mask_start><mask_0><mask_1><mask_2><mask_3><mask_4><mask_5><mask_end>"

Spans are whole seconds, half-open, 0 <= s < e <= 10, ascending, and do not overlap. Frame i stands for second i. The
six mask tokens of the g-th item prompt the mask decoder for every frame of its span, so that one generation gives the
masks of a whole clip; Crab's release needs one a frame. Frames in no span have an empty mask, and `none` is the answer
where nothing is to be masked at all. An image is frame 0: its range is 0,1.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from crab.masks import MASK_SIZE
from crab.tasks.base import Answer, normalise
from crab.tasks.spans import NUM_SECONDS

NUM_MASK_TOKENS = 6
"Two scales of three tokens, as in Crab."

GROUP = "<mask_start>" + "".join(f"<mask_{i}>" for i in range(NUM_MASK_TOKENS)) + "<mask_end>"
NOTHING = "<range> none </range>"

_NAME = r"[^<>;,]*[^<>;,\s][^<>;,]*"
_GROUP = r"\s*".join(re.escape(token) for token in re.findall("<[^>]*>", GROUP))
_ITEM = rf"<range>\s*(\d{{1,2}})\s*,\s*(\d{{1,2}})\s*</range>({_NAME}(?:,{_NAME})*){_GROUP}"
_UNNAMED = re.sub(r"\((?=[^?])", "(?:", _ITEM)
_NOTHING = re.compile(r"[^<>]*<range>\s*none\s*</range>\s*", re.IGNORECASE)
_ANSWER = re.compile(rf"[^<>]*({_UNNAMED}(?:\s*;\s*{_UNNAMED})*)\s*")
_ITEMS = re.compile(_ITEM)


@dataclass(frozen=True, kw_only=True)
class MaskItem:
    """One span and the names of what is masked in it. Its mask tokens are the g-th group for the g-th item."""

    start_s: int
    end_s: int
    "half-open: the span has end_s - start_s frames"
    names: tuple[str, ...]


def format_mask_answer(items: Iterable[MaskItem]) -> str:
    """The answer in text; no items: nothing is masked. ValueError where the items would not be read back."""
    items = tuple(items)
    if not items:
        return NOTHING
    text = " ; ".join(
        f"<range> {item.start_s},{item.end_s} </range> {', '.join(item.names)} {GROUP}"
        for item in items
    )
    read = parse_mask_answer(text)
    if read is None or [len(item.names) for item in read] != [len(item.names) for item in items]:
        raise ValueError(
            f"mask items {items} given, expected ascending spans without overlap in 0..{NUM_SECONDS} and"
            " one or more names each, without any of < > ; ,"
        )
    return text


def parse_mask_answer(text: str) -> tuple[MaskItem, ...] | None:
    """The items of an answer, () for `none`. Strict: prose without tags, one answer of the grammar, then nothing.

    None where the text is not of the grammar or a span is empty, too long, out of order or overlaps the one before.
    """
    if _NOTHING.fullmatch(text):
        return ()
    match = _ANSWER.fullmatch(text)
    if match is None:
        return None
    items = tuple(
        MaskItem(
            start_s=int(start),
            end_s=int(end),
            names=tuple(normalise(name) for name in names.split(",")),
        )
        for start, end, names in _ITEMS.findall(match[1])
    )
    free_from = 0
    for item in items:
        if not free_from <= item.start_s < item.end_s <= NUM_SECONDS:
            return None
        free_from = item.end_s
    return items


def frames_of(items: Sequence[MaskItem], num_frames: int) -> list[int | None]:
    """For each frame the number of the item that covers it, None where its mask is empty.

    A span may reach past the last frame; an item that begins there covers none.
    """
    covering: list[int | None] = [None] * num_frames
    for number, item in enumerate(items):
        for frame in range(item.start_s, min(item.end_s, num_frames)):
            covering[frame] = number
    return covering


def counted_masks(answer: Answer, frames: Sequence[int]) -> list[NDArray[Any] | None]:
    """For each of `frames` the [H, W] of the answer's masks that counts for it, None where its mask is empty.

    It counts where the text is of the grammar and has a span over the frame, and the masks have the frame (a single
    one stands for every frame). ValueError where the masks are not one 224 x 224 array a frame.
    """
    items = parse_mask_answer(answer.text)
    if not items or answer.masks is None or not frames:
        return [None] * len(frames)
    values = answer.masks.values
    count = len(answer.masks.frames)
    if values.shape[1:] != (MASK_SIZE, MASK_SIZE) or len(values) not in (1, count):
        raise ValueError(
            f"masks of shape {values.shape} given for {count} frames, expected"
            f" {count} (or 1, for all frames) x {MASK_SIZE} x {MASK_SIZE}"
        )
    covering = frames_of(items, max(frames) + 1)
    places = {frame: place for place, frame in enumerate(answer.masks.frames)}
    if len(values) == 1:
        places = dict.fromkeys(frames, 0)
    return [
        values[places[frame]] if covering[frame] is not None and frame in places else None
        for frame in frames
    ]
