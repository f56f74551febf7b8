"""Which ranges are lent, that none is cut without need, and that every byte is where it belongs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from crab_platform.ranges import LENT_BYTES, PIECE_BYTES, Range, allocate, deliver, plan

MIB = 1 << 20


def read(data: bytes, ranges: list[Range]) -> list[memoryview]:
    pieces = plan(ranges)
    buffers = allocate(ranges, pieces)
    for piece in pieces:
        deliver(piece, memoryview(data)[piece.start : piece.stop], ranges, buffers)
    return buffers


@pytest.mark.parametrize("seed", range(5))
def test_ranges_of_all_kinds_are_what_stands_there(seed: int) -> None:
    rng = random.Random(seed)
    data = rng.randbytes(40 * MIB)
    ranges = []
    for _ in range(200):
        length = rng.choice([0, 7, 48 << 10, 48 << 10, MIB, 3 * MIB, 11 * MIB])
        ranges.append((rng.randrange(0, len(data) - length, rng.choice([1, 16])), length))
    ranges = ranges[: rng.choice([3, 20, 200])]
    assert read(data, ranges) == [data[at : at + length] for at, length in ranges]


def test_neighbours_are_lent_and_none_is_cut() -> None:
    size = 48 << 10
    ranges = [(64 + n * size, size) for n in range(1000)]
    pieces = plan(ranges)
    assert all(piece.lent and piece.stop - piece.start <= PIECE_BYTES for piece in pieces)
    assert [index for piece in pieces for index in piece.serves] == list(range(1000))
    assert len(pieces) == -(-1000 // (PIECE_BYTES // size))
    assert [piece.stop for piece in pieces[:-1]] == [piece.start for piece in pieces[1:]]
    data = bytes(64 + 1000 * size)
    source = np.frombuffer(data, np.uint8)
    assert all(np.shares_memory(source, np.frombuffer(found)) for found in read(data, ranges))


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, LENT_BYTES - 16)],
        [(0, MIB), (MIB + 8, MIB)],
        [(n * (64 << 10), 16 << 10) for n in range(100)],
        [(0, PIECE_BYTES + 1)],
        [(0, 5 * MIB), (4 * MIB, 5 * MIB)],
    ],
    ids=["short", "not aligned", "mostly gaps", "longer than a piece", "overlap for too long"],
)
def test_others_are_copied(ranges: list[Range]) -> None:
    assert not any(piece.lent for piece in plan(ranges))
