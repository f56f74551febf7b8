"""Which frames, and who decodes them.

decord comes first; PyAV takes what decord cannot do. The choice depends on the bytes alone, never
on a crash or a time-out, because both backends' pixels are stored under one key. They give the same
pixels: the PyAV backend builds the very filter chain that decord uses (pinned by a test on H.264
and HEVC).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from crab.media import decord_backend, pyav_backend
from crab.media.probe import VideoIndex, refuse_truncated
from crab.sampling import VideoSampling


@dataclass(frozen=True, kw_only=True, eq=False)
class Frames:
    """Decoded frames: uint8 [T, size, size, 3] RGB, their times (us from the first frame), who
    decoded them.
    """

    array: np.ndarray
    times_us: tuple[int, ...]
    backend: str


class FrameReader(Protocol):
    """Decodes chosen frames of a video held in memory."""

    def __call__(
        self, data: bytes, index: VideoIndex, positions: Sequence[int], size: int
    ) -> np.ndarray:
        """Frames `positions` (ascending, no repeats; numbers in display order) -> uint8 [n, size,
        size, 3] RGB.

        The picture is turned as the file's display matrix says and then stretched to the square.
        """
        ...


def read_video(data: bytes, index: VideoIndex, sampling: VideoSampling) -> Frames:
    """The frames on screen at the sampling's times, `num_frames` of them.

    A video with fewer frames than asked repeats frames, as a screen does. Raises MediaError.
    """
    refuse_truncated(index.missing, "video")
    positions = index.positions(sampling.times_us(index.duration_us))
    wanted = sorted(set(positions))
    frames, name = _read(data, index, wanted, sampling.size)
    shown_us = index.shown_us
    rows = [wanted.index(position) for position in positions]
    times_us = tuple(shown_us[position] for position in positions)
    return Frames(array=frames[rows], times_us=times_us, backend=name)


def _read(
    data: bytes, index: VideoIndex, wanted: Sequence[int], size: int
) -> tuple[np.ndarray, str]:
    read: FrameReader
    if decord_backend.can_read(index) and not pyav_backend.has_display_matrix(data, index):
        read = decord_backend.read_frames
        try:
            return read(data, index, wanted, size), "decord"
        except decord_backend.DeclinedError:
            # A property of the file: decord says so every time. If PyAV cannot read it either, it
            # names what is wrong.
            pass
    read = pyav_backend.read_frames
    return read(data, index, wanted, size), "pyav"
