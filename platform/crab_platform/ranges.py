"""Which requests to make for a set of byte ranges, and how their answers become the ranges.

Reading a clip means a few hundred kilobytes somewhere in a pack of 256 MiB. Neighbours less than a
gap apart are fetched together, and long stretches are cut into pieces of 8 MiB: below that a
request is mostly latency, far above it a single connection is the limit. obstore's own `get_ranges`
does the first but not the second, and holds at most ten requests in flight for one file, which is
why the plan is made here.

A range is not cut unless it is longer than a piece, so that most ranges can be lent: they are views
of the answer, which spares new memory and a copy of every byte: a quarter of the CPU of a read, an
eighth of one that is checked.

A gap is worth fetching when that costs less than one more request: 80 µs of CPU against 1 s a GB,
with hundreds of requests in flight to hide latency. With gaps of 1 MiB, 256 samples of 48 KiB
scattered over a pack pulled two thirds of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GAP_BYTES = 64 << 10
PIECE_BYTES = 8 << 20
SLAB_BYTES = 32 << 20
ALIGNMENT = 64

LENT_BYTES = 1 << 20
"""Answers from here on are lent. A shorter one may be a corner of a network buffer many times its size."""

LENT_ALIGNMENT = 16
"""What malloc gives: every type of numpy lies right on it."""

Range = tuple[int, int]
"""(offset, length) in bytes."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One request: bytes [start, stop) of a file, and the positions of the ranges it serves."""

    start: int
    stop: int
    serves: tuple[int, ...]
    lent: bool = False
    """Whether the ranges are views of the answer; each then lies in this piece alone."""


def plan(
    ranges: Sequence[Range], *, gap_bytes: int = GAP_BYTES, piece_bytes: int = PIECE_BYTES
) -> list[Piece]:
    """The requests that cover `ranges`: sorted, apart, none longer than `piece_bytes`.

    Ranges less than `gap_bytes` apart share requests; a gap as long as a piece is never fetched. Only ranges that
    are longer than a piece, or overlap for so long, are cut.
    Ranges of length zero need no request. Raises ValueError for negative numbers.
    """
    for offset, length in ranges:
        if offset < 0 or length < 0:
            raise ValueError(f"range (offset {offset}, length {length}) has a negative number")
    by_offset = sorted((offset, index) for index, (offset, length) in enumerate(ranges) if length)
    pieces: list[Piece] = []
    group: list[int] = []
    stop = 0
    for offset, index in by_offset:
        end = offset + ranges[index][1]
        full = group and offset >= stop and end - ranges[group[0]][0] > piece_bytes
        if group and (full or offset - stop >= gap_bytes):
            pieces += _cut(ranges, group, stop, piece_bytes)
            group = []
        stop = max(stop, end) if group else end
        group.append(index)
    return pieces + (_cut(ranges, group, stop, piece_bytes) if group else [])


def allocate(ranges: Sequence[Range], pieces: Sequence[Piece]) -> list[memoryview]:
    """Writable memory for each range that is not lent, on cache lines, many in one allocation of up to SLAB_BYTES.

    Memory that is new to a process costs a page fault for every 4 KiB, six times as much as copying the bytes.
    numpy asks for huge pages when it allocates 4 MiB or more.
    """
    lent = {index for piece in pieces if piece.lent for index in piece.serves}
    slots: list[tuple[int, int, int]] = []
    sizes: list[int] = []
    for index, (_, length) in enumerate(ranges):
        length = 0 if index in lent else length
        room = -(-length // ALIGNMENT) * ALIGNMENT
        if not sizes or sizes[-1] + room > SLAB_BYTES:
            sizes.append(0)
        slots.append((len(sizes) - 1, sizes[-1], sizes[-1] + length))
        sizes[-1] += room
    slabs = [np.empty(size, np.uint8).data for size in sizes]
    return [slabs[slab][start:stop] for slab, start, stop in slots]


def deliver(
    piece: Piece, data: memoryview, ranges: Sequence[Range], buffers: list[memoryview]
) -> None:
    """Make one answer the buffers that it serves: lent, or copied into those from `allocate`."""
    if piece.lent:
        for index in piece.serves:
            offset, length = ranges[index]
            buffers[index] = data[offset - piece.start : offset - piece.start + length]
        return
    source = np.frombuffer(data, np.uint8)
    for index in piece.serves:
        offset, length = ranges[index]
        start, stop = max(piece.start, offset), min(piece.stop, offset + length)
        # By numpy, which lets other threads run while it copies.
        target = np.frombuffer(buffers[index], np.uint8)
        target[start - offset : stop - offset] = source[start - piece.start : stop - piece.start]


def _cut(ranges: Sequence[Range], group: Sequence[int], stop: int, piece_bytes: int) -> list[Piece]:
    """Pieces for one stretch that ends at `stop`; `group` holds its ranges, the first one starts
    it.
    """
    first = ranges[group[0]][0]
    if stop - first <= piece_bytes:
        lent = _lendable([ranges[index] for index in group], stop - first)
        return [Piece(start=first, stop=stop, serves=tuple(group), lent=lent)]
    serves: list[list[int]] = [[] for _ in range(first, stop, piece_bytes)]
    for index in group:
        offset, length = ranges[index]
        low, high = (offset - first) // piece_bytes, (offset + length - 1 - first) // piece_bytes
        for number in range(low, high + 1):
            serves[number].append(index)
    starts = range(first, stop, piece_bytes)
    return [
        Piece(start=start, stop=min(start + piece_bytes, stop), serves=tuple(indices))
        for start, indices in zip(starts, serves, strict=True)
    ]


def _lendable(ranges: Sequence[Range], num_bytes: int) -> bool:
    """Whether the ranges of one answer may be views of it: they lie well, and do not keep much else in memory."""
    first = ranges[0][0]
    return (
        num_bytes >= LENT_BYTES
        and 2 * sum(length for _, length in ranges) >= num_bytes
        and all((offset - first) % LENT_ALIGNMENT == 0 for offset, _ in ranges)
    )
