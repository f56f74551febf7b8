"""Compression of a tensor's bytes: blosc2 with shuffle and zstd at level 1, and the way back.

Stored are blosc2 chunks one after the other, each of at most CHUNK bytes of the array. A chunk's
32-byte header says how long it is and how long it becomes. blosc2 believes that header: it takes
the length of its output from there, and for codecs that it does not know it goes and looks for
plugins. So nothing reaches it that does not say exactly what we write.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

CHUNK = 1 << 28
"""Bytes of an array in one chunk. blosc2 ends at 2 GiB; a multiple of every element's size."""
BLOCK = 1 << 20
"""Bytes that are shuffled and compressed together. Fixed, so that it does not follow from the
processor that somebody wrote on. 128 KiB, which blosc2 would choose, saves a sixteenth where 1 MiB
saves a fifth: what is left over of a tensor after whole blocks compresses badly."""

_HEADER = struct.Struct("<BBBBiii6sBB6sBB")
_VERSION, _ZSTD_VERSION = 5, 1
# Six places for filters, the last one shuffle; codec zstd (again); no settings of either; reserved.
_REST = [bytes([0, 0, 0, 0, 0, 1]), 5, 0, bytes(6), 0]
# The third byte, in bits: codec (4 is zstd), "blocks are not split", a reserved one, "stored as it
# is", and two that together mean a header of 32 bytes. 0b111: too small to try zstd at all.
_FLAGS = frozenset([0b100_0_0_1_01, 0b100_0_0_1_11, 0b100_1_0_1_01, 0b100_1_0_1_11, 0b000_0_0_1_11])
_MORE = frozenset([0, 0x10])  # the last byte; 0x10: all bytes are zero, and none is stored


class BadChunk(ValueError):  # noqa: N818 (as CorruptEntry)
    """Compressed bytes are not of the form that `compress` writes."""


def compress(array: Array) -> bytes:
    """The bytes of `array`, compressed. The same array gives the same bytes."""
    import blosc2  # takes 0.3 s, and most caches are raw

    data = array.reshape(-1).view(np.uint8)
    chunks = [
        blosc2.compress2(
            data[start : start + CHUNK],
            codec=blosc2.Codec.ZSTD,
            clevel=1,
            filters=[blosc2.Filter.NOFILTER] * 5 + [blosc2.Filter.SHUFFLE],
            typesize=array.itemsize,
            blocksize=BLOCK,
            splitmode=blosc2.SplitMode.ALWAYS_SPLIT,
            nthreads=1,  # Ray places one worker a core
        )
        for start in range(0, data.size, CHUNK)
    ]
    return b"".join(chunks)


def decompress(stored: memoryview, kind: np.dtype[Any], count: int) -> Array:
    """`count` elements of `kind` from what `compress` made of them.

    Memory is taken only after every chunk's header was checked and all of them together promise
    exactly that many bytes. Raises BadChunk.
    """
    import blosc2

    expected = count * kind.itemsize
    chunks = list(_chunks(stored, kind.itemsize, expected))
    array = np.empty(count, kind)
    data = array.view(np.uint8)
    for chunk, start, size in chunks:
        try:
            blosc2.decompress2(chunk, dst=data[start : start + size], nthreads=1)
        except (RuntimeError, ValueError) as error:
            raise BadChunk(f"blosc2 cannot decompress the chunk of byte {start}") from error
    return array


def _chunks(
    stored: memoryview, itemsize: int, expected: int
) -> Iterator[tuple[memoryview, int, int]]:
    """(chunk, where its bytes begin in the array, how many), of chunks that together are whole."""
    at = done = 0
    while at < len(stored):
        if len(stored) - at < _HEADER.size:
            raise BadChunk(f"{len(stored) - at} bytes at the end are too few for a chunk")
        fields = _HEADER.unpack_from(stored, at)
        version, zstd, flags, typesize, size, block, length, *rest, more = fields
        known = (
            (version, zstd, typesize) == (_VERSION, _ZSTD_VERSION, itemsize)
            and flags in _FLAGS
            and rest == _REST
            and more in _MORE
            and 0 < block <= BLOCK
        )
        if not known:
            raise BadChunk(f"the chunk at stored byte {at} is not shuffled and zstd of our kind")
        if not _HEADER.size <= length <= len(stored) - at:
            raise BadChunk(f"the chunk at stored byte {at} says that it has {length} bytes")
        if size != min(CHUNK, expected - done) or size <= 0:
            raise BadChunk(f"the chunk at stored byte {at} says that it becomes {size} bytes")
        yield stored[at : at + length], done, size
        at, done = at + length, done + size
    if done != expected:
        raise BadChunk(f"the chunks become {done} bytes, expected {expected}")
