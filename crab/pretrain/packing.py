"""Several questions about one scene in one row, so that its media are read once.

The rows are the scene's media, then the questions with their answers. A question sees the media and itself, and its
positions go on from the media's end, so the model sees exactly what it sees of one sample alone.

Legend: R rows, L longest row.
"""

import math
from collections.abc import Sequence

import torch

from crab.model.collate import IGNORED, Batch, Collator, Example
from crab.model.drawing import join_drawings

LENGTH_STEP = 64


def pack(collate: Collator, rows: Sequence[Sequence[Example]]) -> Batch:
    """A batch as the collator makes it of one sample a row, with attention_mask bool [R, 1, L, L] and `sample` [R, L]:
    the number of the sample (counted over all rows) that a token belongs to, -1 for media and padding. `mask_sample`
    counts rows.

    The examples of a row share their media, which are taken from the first.
    """
    lines, media, drawings = [], [], []
    num_samples = num_groups = 0
    for index, row in enumerate(rows):
        singles = [collate([example]) for example in row]
        media.append(singles[0])
        lines.append(_line(singles, collate.table.id_of["<audio_end>"], num_samples))
        num_samples += len(row)
        for single in singles:
            if "mask_group" in single:
                drawn = {name: single[name] for name in single if name.startswith("mask_")}
                drawn["mask_group"] = drawn["mask_group"] + num_groups
                drawn["mask_sample"] = torch.full_like(drawn["mask_sample"], index)
                drawings.append(drawn)
            num_groups += int((single["labels"] == collate.table.drawn_ids[0]).sum())
    # Few different lengths: torch keeps buffers for every shape that it meets, gigabytes in a few hundred steps.
    longest = math.ceil(max(len(line["block"]) for line in lines) / LENGTH_STEP) * LENGTH_STEP
    fill = {
        "input_ids": collate.pad_id,
        "labels": IGNORED,
        "position_ids": 0,
        "block": -1,
        "sample": -1,
    }
    batch = {
        key: torch.tensor([line[key] + [value] * (longest - len(line[key])) for line in lines])
        for key, value in fill.items()
    }
    block = batch.pop("block")
    same = block.unsqueeze(1) == block.unsqueeze(2)
    batch["attention_mask"] = (same | (block == 0).unsqueeze(1)).tril().unsqueeze(1)
    for name in ("video", "audio"):
        batch[name] = torch.cat([single[name] for single in media])
    return batch | (join_drawings(drawings) if drawings else {})


def _line(singles: Sequence[Batch], last_of_media: int, first_sample: int) -> dict[str, list[int]]:
    """One row: the media of the first sample (block 0), then what follows them in each (blocks 1, 2 ...)."""
    line: dict[str, list[int]] = {
        "input_ids": [],
        "labels": [],
        "position_ids": [],
        "block": [],
        "sample": [],
    }
    for number, single in enumerate(singles):
        ids, labels = single["input_ids"][0].tolist(), single["labels"][0].tolist()
        start = ids.index(last_of_media) + 1
        parts = [(start, len(ids), number + 1, first_sample + number)]
        for first, end, block, sample in [(0, start, 0, -1), *parts] if number == 0 else parts:
            line["input_ids"] += ids[first:end]
            line["labels"] += labels[first:end]
            line["position_ids"] += range(first, end)
            line["block"] += [block] * (end - first)
            line["sample"] += [sample] * (end - first)
    return line
