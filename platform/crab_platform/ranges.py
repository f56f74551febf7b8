"""Which requests to make for a set of byte ranges, and how their answers fill the ranges.

Reading a clip means a few hundred kilobytes somewhere in a pack of 256 MiB. Neighbours less than a
gap apart are fetched together, and long stretches are cut into pieces of 8 MiB: below that a
request is mostly latency, far above it a single connection is the limit. obstore's own `get_ranges`
does the first but not the second, and holds at most ten requests in flight for one file, which is
why the plan is made here.

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

Range = tuple[int, int]
"""(offset, length) in bytes."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One request: bytes [start, stop) of a file, and the positions of the ranges it serves."""

    start: int
    stop: int
    serves: tuple[int, ...]


def plan(
    ranges: Sequence[Range], *, gap_bytes: int = GAP_BYTES, piece_bytes: int = PIECE_BYTES
) -> list[Piece]:
    """The requests that cover `ranges`: sorted, apart, none longer than `piece_bytes`.

    Ranges less than `gap_bytes` apart share requests; a gap as long as a piece is never fetched.
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
        if group and offset - stop >= gap_bytes:
            pieces += _cut(ranges, group, stop, piece_bytes)
            group = []
        stop = max(stop, offset + ranges[index][1]) if group else offset + ranges[index][1]
        group.append(index)
    return pieces + (_cut(ranges, group, stop, piece_bytes) if group else [])


def allocate(ranges: Sequence[Range]) -> list[memoryview]:
    """Writable memory for each range, on cache lines, many of them in one allocation of up to SLAB_BYTES.

    Memory that is new to a process costs a page fault for every 4 KiB, six times as much as copying the bytes.
    numpy asks for huge pages when it allocates 4 MiB or more.
    """
    slots: list[tuple[int, int, int]] = []
    sizes: list[int] = []
    for _, length in ranges:
        room = -(-length // ALIGNMENT) * ALIGNMENT
        if not sizes or sizes[-1] + room > SLAB_BYTES:
            sizes.append(0)
        slots.append((len(sizes) - 1, sizes[-1], sizes[-1] + length))
        sizes[-1] += room
    slabs = [np.empty(size, np.uint8).data for size in sizes]
    return [slabs[slab][start:stop] for slab, start, stop in slots]


def scatter(
    piece: Piece, data: memoryview, ranges: Sequence[Range], buffers: Sequence[memoryview]
) -> None:
    """Copy one answer into every buffer it serves; `buffers[i]` is as long as `ranges[i]`."""
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
