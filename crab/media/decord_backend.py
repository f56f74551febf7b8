"""Frames through decord 0.6.0.

What is known of it and how it is met: it counts packets that are never shown and then loops for
ever (such files go to PyAV; the rest is left to the pool's time limit); it keeps decoding in the
background while a reader lives (the reader dies at once); its sound is 1 ms late and leaks (not
used, see docs/media.md); it ignores mirroring and the display matrix of Matroska (PyAV); it knows
no AV1.
"""

import io
from collections.abc import Sequence

import decord
import numpy as np

from crab.media.probe import VideoIndex

CODECS = frozenset({"h264", "hevc", "mpeg4", "vp9"})
PIXEL_FORMATS = frozenset({"yuv420p", "yuvj420p"})
MAX_TIME_ERROR_S = 0.002  # its time stamps are float32, Matroska's are whole milliseconds

decord.logging.set_level(decord.logging.QUIET)


class DeclinedError(Exception):
    """decord cannot read this file, and never will."""


def can_read(index: VideoIndex) -> bool:
    """True for the streams that decord is known to count and decode rightly."""
    return index.exact and index.codec in CODECS and index.pixel_format in PIXEL_FORMATS


def read_frames(data: bytes, index: VideoIndex, positions: Sequence[int], size: int) -> np.ndarray:
    """See `FrameReader`. Raises DeclinedError."""
    try:
        reader = decord.VideoReader(
            io.BytesIO(data), ctx=decord.cpu(0), width=size, height=size, num_threads=1
        )
    except (decord.DECORDError, RuntimeError) as error:
        raise DeclinedError(str(error)) from error
    try:
        _check_table(reader, index)
        frames: np.ndarray = reader.get_batch(list(positions)).asnumpy()
    except decord.DECORDError as error:
        raise DeclinedError(str(error)) from error
    finally:
        del reader
    return frames


def _check_table(reader: decord.VideoReader, index: VideoIndex) -> None:
    """Refuse the file unless decord sees the same frames at the same times as the packet table."""
    if len(reader) != len(index.pts):
        raise DeclinedError(f"decord counts {len(reader)} frames, the file has {len(index.pts)}")
    theirs = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64)[:, 0]
    ours = np.asarray(index.shown_us) / 1e6
    worst = float(np.abs(theirs - ours).max())
    if worst > MAX_TIME_ERROR_S:
        raise DeclinedError(f"decord's times differ from the file's by {worst:.3f} s")
