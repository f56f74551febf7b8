"""Token ids of several samples -> one batch: a row each, padded on the left, or all in one row without padding.

A packed batch has `lengths` [N] in place of attention_mask: its only row holds N samples, the first lengths[0]
positions are the first sample's, and so on. What reads a batch must ask for it: without attention_mask nothing takes a
packed row for one long sample by mistake.

Legend: N samples, R rows, L length of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crab.model.example import Batch

IGNORED = -100
"""Label of a position that is not learnt from."""


def padded(rows: Sequence[Sequence[int]], starts: Sequence[int] | None, pad_id: int) -> Batch:
    """input_ids, attention_mask, position_ids, and labels with `starts`, each int64 [N, L].

    Args:
        rows: the ids of each sample.
        starts: where each sample's answer starts, its first supervised position; None: nothing is learnt.
    """
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for index, row in enumerate(rows):
        offset = longest - len(row)
        input_ids[index, offset:] = torch.tensor(row)
        attention_mask[index, offset:] = 1
        if starts is not None:
            start = starts[index]
            labels[index, offset + start :] = torch.tensor(row[start:])
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
    }
    return batch if starts is None else batch | {"labels": labels}


def packed(rows: Sequence[Sequence[int]], starts: Sequence[int]) -> Batch:
    """input_ids, position_ids (from 0 in each sample) and labels, each int64 [1, L], and lengths [N].

    Args:
        rows: the ids of each sample.
        starts: as in `padded`; at least 1, as the position before would be another sample's.
    """
    if min(starts) < 1:
        raise ValueError(
            f"sample {min(range(len(starts)), key=starts.__getitem__)} of the batch is supervised at its first token, "
            "which nothing predicts; give it a prompt of one token at least"
        )
    labels = [
        [IGNORED] * start + list(row[start:]) for row, start in zip(rows, starts, strict=True)
    ]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[position for row in rows for position in range(len(row))]]),
        "labels": torch.tensor([[label for row in labels for label in row]]),
        "lengths": torch.tensor([len(row) for row in rows]),
    }


def num_samples(batch: Batch) -> int:
    """Samples of a batch of either kind."""
    return len(batch["lengths"] if "lengths" in batch else batch["input_ids"])


def num_tokens(batch: Batch) -> int:
    """Positions of a batch that are not padding; those that are computed are input_ids.numel()."""
    if "lengths" in batch:
        return batch["input_ids"].numel()
    return int(batch["attention_mask"].sum())


def sample_numbers(batch: Batch) -> Tensor:
    """int64 [R, L]: the sample that a position belongs to, padding included."""
    rows, length = batch["input_ids"].shape
    if "lengths" not in batch:
        number = torch.arange(rows, device=batch["input_ids"].device)
        return number.unsqueeze(1).expand(rows, length)
    lengths = batch["lengths"]
    number = torch.arange(len(lengths), device=lengths.device)
    return number.repeat_interleave(lengths, output_size=length).unsqueeze(0)


def ranks_within_samples(where: Tensor, batch: Batch) -> Tensor:
    """How many True of `where` [R, L] stand before a position within its sample, int64 [R, L]."""
    before = where.cumsum(1) - where.long()
    if "lengths" not in batch:
        return before
    starts = batch["lengths"].cumsum(0) - batch["lengths"]
    return before - before[:, starts].gather(1, sample_numbers(batch))
