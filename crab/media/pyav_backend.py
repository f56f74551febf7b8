"""Frames through PyAV (FFmpeg 8): AV1 and whatever else decord declines.

Decodes forward from the start in one thread and converts only the frames that were asked for.
Resizing goes through the filter chain that decord builds (bilinear, chroma taken as centred), not
through `VideoFrame.reformat`, whose chroma position differs: up to 53 grey levels on the test
files, against none with the chain.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import Type as SideDataType

from crab.media.probe import MAX_PIXELS, MAX_SHORTFALL, VideoIndex, open_container
from crab.media.reasons import MediaError, Reason

# Signs of the display matrix [a b; c d] -> the filters that show the picture upright.
_UPRIGHT: dict[tuple[int, int, int, int], tuple[tuple[str, str], ...]] = {
    (1, 0, 0, 1): (),
    (0, 1, -1, 0): (("transpose", "clock"),),
    (-1, 0, 0, -1): (("hflip", ""), ("vflip", "")),
    (0, -1, 1, 0): (("transpose", "cclock"),),
    (-1, 0, 0, 1): (("hflip", ""),),
    (1, 0, 0, -1): (("vflip", ""),),
    (0, 1, 1, 0): (("transpose", "cclock_flip"),),
    (0, -1, -1, 0): (("transpose", "clock_flip"),),
}


def has_display_matrix(data: bytes, index: VideoIndex) -> bool:
    """True if the picture has to be turned or mirrored; decodes the first frame to see. Raises
    MediaError.
    """
    for frame in _decode(data, index):
        return bool(_upright_filters(frame))
    raise MediaError(Reason.NO_FRAMES, "no frame of the video stream can be decoded")


def read_frames(data: bytes, index: VideoIndex, positions: Sequence[int], size: int) -> np.ndarray:
    """See `FrameReader`. Raises MediaError (no_frames, truncated, corrupt) or FFmpeg's error."""
    out = np.empty((len(positions), size, size, 3), dtype=np.uint8)
    chain: _Chain | None = None
    done = 0
    last: av.VideoFrame | None = None
    for number, frame in enumerate(_decode(data, index)):
        while done < len(positions) and _reached(frame, number, index, positions[done]):
            if frame.is_corrupt:
                raise MediaError(Reason.CORRUPT, f"the frame at {frame.time} s is damaged")
            if chain is None or not chain.fits(frame):
                chain = _Chain(frame, index.time_base, size)
            out[done] = chain.convert(frame)
            done += 1
        last = frame
        if done == len(positions):
            return out
    if last is None:
        raise MediaError(Reason.NO_FRAMES, "no frame of the video stream can be decoded")
    # Hidden frames (VP8) and a cut last packet leave the decoder a few frames short of the packet
    # table.
    if index.exact and last.pts is not None:
        short_us = (index.pts[positions[-1]] - last.pts) * index.time_base * 1_000_000
        if short_us > MAX_SHORTFALL * index.duration_us + Fraction(
            index.duration_us, len(index.pts)
        ):
            raise MediaError(
                Reason.TRUNCATED,
                f"decoding ends {float(short_us) / 1e6:.2f} s before the last frame wanted",
            )
    if chain is None or not chain.fits(last):
        chain = _Chain(last, index.time_base, size)
    out[done:] = chain.convert(last)
    return out


def _decode(data: bytes, index: VideoIndex) -> Iterator[av.VideoFrame]:
    """Frames in display order, those that an edit list hides left out."""
    with open_container(data) as container:
        stream = container.streams[index.stream_index]
        assert isinstance(stream, av.VideoStream)
        assert stream.codec_context is not None
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # the size may change midway
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)


def _reached(frame: av.VideoFrame, number: int, index: VideoIndex, position: int) -> bool:
    if index.exact and frame.pts is not None:
        return frame.pts >= index.pts[position]
    return number >= position  # no usable times in the file: count


def _upright_filters(frame: av.VideoFrame) -> tuple[tuple[str, str], ...]:
    side_data: Any = frame.side_data  # a Mapping; its stub is a TypedDict without this key
    if SideDataType.DISPLAYMATRIX not in side_data:
        return ()
    matrix = np.frombuffer(bytes(side_data[SideDataType.DISPLAYMATRIX]), dtype=np.int32)
    a, b, c, d = (int(np.sign(matrix[i])) for i in (0, 1, 3, 4))
    # Slanted matrices (no right angle) are shown as coded.
    return _UPRIGHT.get((a, b, c, d), ())


class _Chain:
    """FFmpeg filters: upright -> size x size -> RGB."""

    def __init__(self, frame: av.VideoFrame, time_base: Fraction, size: int) -> None:
        self._shape = (frame.width, frame.height, frame.format.name)
        self._graph = av.filter.Graph()
        source = self._graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=time_base
        )
        links = [source]
        links += [self._graph.add(name, args) for name, args in _upright_filters(frame)]
        links.append(self._graph.add("scale", f"{size}:{size}:flags=bilinear:in_chroma_loc=center"))
        links.append(self._graph.add("format", "rgb24"))
        links.append(self._graph.add("buffersink"))
        self._graph.link_nodes(*links).configure()

    def fits(self, frame: av.VideoFrame) -> bool:
        """False when the stream changed its size or pixel format on the way."""
        return self._shape == (frame.width, frame.height, frame.format.name)

    def convert(self, frame: av.VideoFrame) -> np.ndarray:
        """A frame -> uint8 [size, size, 3]."""
        self._graph.push(frame)
        shown = self._graph.pull()
        assert isinstance(shown, av.VideoFrame)
        return shown.to_ndarray()
