"""Which requests to make for a set of byte ranges, and how their answers fill the ranges.

Reading a clip means a few hundred kilobytes somewhere in a pack of 256 MiB. Neighbours less than a
gap apart are fetched together, and long stretches are cut into pieces of 8 MiB: below that a
request is mostly latency, far above it a single connection is the limit. obstore's own `get_ranges`
does the first but not the second, and holds at most ten requests in flight for one file, which is
why the plan is made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GAP_BYTES = 1 << 20
PIECE_BYTES = 8 << 20

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


def scatter(
    piece: Piece, data: memoryview, ranges: Sequence[Range], buffers: Sequence[bytearray]
) -> None:
    """Copy one answer into every buffer it serves; `buffers[i]` is as long as `ranges[i]`."""
    for index in piece.serves:
        offset, length = ranges[index]
        start, stop = max(piece.start, offset), min(piece.stop, offset + length)
        buffers[index][start - offset : stop - offset] = data[
            start - piece.start : stop - piece.start
        ]


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
