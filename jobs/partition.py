"""A batch in parts of nearly equal work: workers wait for each other in every part."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence


def parts_of_equal_work(
    lengths: Sequence[int], extras: Sequence[int], num_parts: int
) -> list[slice]:
    """Cuts a batch into consecutive parts, none empty, so that the largest work is as small as can be.

    `lengths` ascend. The work of a part is its number of samples times its longest, which the others are padded to, and
    the `extras` of its samples. Where tasks differ in length, parts of equal number would differ twofold, and half of
    the work would be padding. Raises ValueError for more parts than samples.
    """
    count = len(lengths)
    before = [0, *itertools.accumulate(extras)]
    if not 1 <= num_parts <= count:
        raise ValueError(f"{count} samples do not make {num_parts} parts")
    # best[k][n]: the largest work when the first n samples make k parts, and where the last part starts.
    best = [[(0, 0)] + [(lengths[-1] * count + before[-1], 0)] * count]
    for parts in range(1, num_parts + 1):
        row = [(0, 0)] * (count + 1)
        for end in range(parts, count + 1):
            row[end] = min(
                (
                    max(
                        best[parts - 1][start][0],
                        (end - start) * lengths[end - 1] + before[end] - before[start],
                    ),
                    start,
                )
                for start in range(parts - 1, end)
            )
        best.append(row)
    ends, end = [], count
    for parts in range(num_parts, 0, -1):
        ends.append(end)
        end = best[parts][end][1]
    starts = [0, *ends[:0:-1]]
    return [slice(start, end) for start, end in zip(starts, reversed(ends), strict=True)]


def parts_of_equal_sum(works: Sequence[int], num_parts: int) -> list[list[int]]:
    """Numbers of the samples in each of `num_parts` parts, none empty, whose sums of `works` are nearly alike.

    The largest first, each to the part that has least: the largest part has at most a third more than it must
    (R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969). Raises ValueError for more parts than samples.
    """
    if not 1 <= num_parts <= len(works):
        raise ValueError(f"{len(works)} samples do not make {num_parts} parts")
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [(0, part) for part in range(num_parts)]
    for index in sorted(range(len(works)), key=lambda index: (-works[index], index)):
        load, part = loads[0]
        parts[part].append(index)
        heapq.heapreplace(loads, (load + works[index], part))
    return [sorted(part) for part in parts]
