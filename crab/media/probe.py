"""What a media file holds, found without decoding: streams, the time of every frame, the clip's
start.

One pass over the packets gives exact presentation times, so variable frame rates, B-frames and a
start that is not zero need no special case later. Both frame backends receive the same positions
from it; the pass costs milliseconds, since the bytes are in memory.

**The clip's start** is the time of its first shown video frame, whether or not video was asked for;
a file without video starts at its first audio sample. Frames and sound share that zero.
"""

import io
import itertools
from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import av.container
from av.packet import Packet
from av.stream import Disposition

from crab.media.reasons import MediaError, Reason

# Every other demuxer is refused: playlists and concat scripts name files of their own, and subtitle
# or image-sequence demuxers accept plain text.
CONTAINER_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,ivf,h264,hevc,"
    "wav,w64,aiff,caf,au,mp3,aac,flac,ac3,eac3,amr"
)
MAX_PIXELS = 1 << 25
"""Per frame: 8K UHD fits. A 200 KB file can ask for frames that fill any machine."""
MAX_STREAMS = 64
MAX_SHORTFALL = Fraction(2, 100)
FRAME_SLACK_US = 1000
"""A frame counts as shown from 1 ms before its time: Matroska rounds times to milliseconds."""

_KNOWN_STARTS = (
    b"\x1aE\xdf\xa3", b"RIFF", b"OggS", b"fLaC", b"FLV", b"ID3", b"\x30\x26\xb2\x75",
    b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"\xff\xf1", b"FORM", b"caff", b".snd", b"DKIF",
)  # fmt: skip
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp")
_HEADER_HAS_DURATION = frozenset({"mov", "matroska", "avi", "flv", "asf", "flac"})


@dataclass(frozen=True, kw_only=True)
class VideoIndex:
    """The picture stream: when each frame is shown, and what decides which backend reads it."""

    stream_index: int
    codec: str
    pixel_format: str | None
    time_base: Fraction
    pts: tuple[int, ...]  # in time_base ticks, ascending: display order
    duration_us: int  # first frame's start to last frame's end
    exact: bool  # every packet has a presentation time of its own and is shown
    missing: Fraction  # part of the header's duration that is not in the file

    def positions(self, times_us: tuple[int, ...]) -> tuple[int, ...]:
        """Time from the first frame (us) -> number of the frame on screen then, in display order."""
        shown_us = self.shown_us
        return tuple(max(0, bisect_right(shown_us, time + FRAME_SLACK_US) - 1) for time in times_us)

    @property
    def shown_us(self) -> list[int]:
        """Start of each frame, microseconds from the first."""
        return [int((pts - self.pts[0]) * self.time_base * 1_000_000) for pts in self.pts]


@dataclass(frozen=True, kw_only=True)
class AudioIndex:
    """The sound stream."""

    stream_index: int
    codec: str
    missing: Fraction


@dataclass(frozen=True, kw_only=True)
class Probe:
    """All that decoding needs to know of a file. `video_start` is in seconds, None without video."""

    video: VideoIndex | None
    audio: AudioIndex | None
    video_start: Fraction | None
    video_problem: MediaError | None = None
    audio_problem: MediaError | None = None


def open_container(data: bytes) -> av.container.InputContainer:
    """Open media bytes with FFmpeg. Raises MediaError: not_media, corrupt, truncated."""
    options = {"format_whitelist": CONTAINER_FORMATS, "max_pixels": str(MAX_PIXELS)}
    try:
        return av.open(io.BytesIO(data), "r", options=options)
    except (av.error.FFmpegError, UnicodeError, LookupError) as error:
        if getattr(error, "errno", None) == 12:
            raise
        declared = declared_bytes(data)
        if declared > len(data):
            raise MediaError(
                Reason.TRUNCATED, f"{len(data)} bytes of the {declared} that its header declares"
            ) from error
        if data.startswith(_KNOWN_STARTS) or data[4:8] in _MP4_BOXES:
            raise MediaError(Reason.CORRUPT, f"FFmpeg cannot open it: {error}") from error
        raise MediaError(Reason.NOT_MEDIA, "no media format starts like this") from error


def declared_bytes(data: bytes) -> int:
    """Bytes that the outermost MP4 boxes or the RIFF header say the file has; 0 if they do not say."""
    if data[:4] == b"RIFF":
        size = int.from_bytes(data[4:8], "little")
        return (
            0 if size in (0, 0xFFFFFFFF) else size + 8
        )  # written by a program that could not seek back
    if data[4:8] not in _MP4_BOXES:
        return 0
    offset = 0
    while offset + 16 <= len(data):
        size = int.from_bytes(data[offset : offset + 4], "big")
        if size == 1:
            size = int.from_bytes(data[offset + 8 : offset + 16], "big")
        if size == 0:  # to the end of the file
            return len(data)
        if size < 8 or not data[offset + 4 : offset + 8].isalnum():
            return 0  # not a box: junk after the last one
        offset += size
    return offset


def probe(data: bytes) -> Probe:
    """Read the packet table of a file. Raises MediaError for what concerns the whole file."""
    with open_container(data) as container:
        if len(container.streams) > MAX_STREAMS:
            raise MediaError(
                Reason.TOO_LARGE, f"{len(container.streams)} streams; the limit is {MAX_STREAMS}"
            )
        packets: dict[int, _Packets] = {s.index: _Packets() for s in container.streams}
        try:
            for packet in container.demux():
                packets.setdefault(packet.stream_index, _Packets()).add(packet)
        except av.error.FFmpegError as error:
            raise MediaError(Reason.CORRUPT, f"the container breaks off: {error}") from error
        missing = _missing_of_file(data, container, packets)
        video, video_problem = _video(data, container, packets, missing)
        audio, audio_problem = _audio(container, packets, missing)
        start = video.pts[0] * video.time_base if video else None
        return Probe(
            video=video,
            audio=audio,
            video_start=start,
            video_problem=video_problem,
            audio_problem=audio_problem,
        )


class _Packets:
    """What the demux pass keeps of one stream."""

    def __init__(self) -> None:
        self.pts: list[int] = []
        self.dts: list[int] = []
        self.durations: dict[int, int] = {}
        self.num_shown = 0
        self.num_discarded = 0

    def add(self, packet: "Packet[Any]") -> None:
        if (
            packet.size == 0 or packet.is_corrupt
        ):  # the flush packet, or one that the file's end cut short
            return
        if packet.is_discard:  # an edit list decodes it for reference and never shows it
            self.num_discarded += 1
            return
        self.num_shown += 1
        if packet.pts is not None:
            self.pts.append(packet.pts)
            self.durations[packet.pts] = packet.duration or 0
        if packet.dts is not None:
            self.dts.append(packet.dts)

    def end(self) -> int | None:
        """Tick at which the last packet ends."""
        times = self.pts or self.dts
        return max(t + self.durations.get(t, 0) for t in times) if times else None


def _missing_of_file(
    data: bytes, container: av.container.InputContainer, packets: dict[int, _Packets]
) -> Fraction:
    """Part of the file that its header promises and that is not there, by bytes or by time; 0 if
    unknown.
    """
    declared = declared_bytes(data)
    by_bytes = Fraction(max(0, declared - len(data)), declared) if declared else Fraction(0)
    family = container.format.name.split(",")[0]
    # Without a Xing/Info header FFmpeg guesses an MP3's duration from the bit rate of its first
    # frame.
    trusted = family in _HEADER_HAS_DURATION or (
        family == "mp3" and any(tag in data[: 1 << 16] for tag in (b"Xing", b"Info"))
    )
    if not trusted or not container.duration:
        return by_bytes
    ends = [
        (end * stream.time_base, _median_gap(found.pts) * stream.time_base)
        for stream in container.streams
        if (found := packets[stream.index])
        and (end := found.end()) is not None
        and stream.time_base
    ]
    if not ends:
        return by_bytes
    promised = Fraction(container.duration, av.time_base)
    start = Fraction(min(container.start_time or 0, 0), av.time_base)
    last, gap = max(ends)
    # One packet of grace: many muxers leave the last one without a duration.
    return max(by_bytes, (promised - (last - start) - gap) / promised, Fraction(0))


def _missing_of_stream(stream: av.stream.Stream, found: _Packets) -> Fraction:
    """The same for one stream whose own duration the header gives (MP4, AVI)."""
    if not stream.duration or not found.pts or stream.container.format.name.split(",")[0] != "mov":
        return Fraction(0)
    end = found.end()
    assert end is not None
    covered = end - min(found.pts) + _median_gap(found.pts)
    return max(Fraction(0), Fraction(stream.duration - covered, stream.duration))


def _median_gap(pts: list[int]) -> int:
    ordered = sorted(pts)
    gaps = sorted(b - a for a, b in itertools.pairwise(ordered))
    return gaps[len(gaps) // 2] if gaps else 0


def _header_size(data: bytes, stream_index: int) -> tuple[int, int]:
    """Width and height as the header gives them, without the limit and without a frame decoded."""
    options = {
        "format_whitelist": CONTAINER_FORMATS,
        "probesize": "32",
        "analyzeduration": "0",
    }
    with av.open(io.BytesIO(data), "r", options=options) as container:
        stream = container.streams[stream_index]
        assert isinstance(stream, av.VideoStream)
        assert stream.codec_context is not None
        return stream.codec_context.width, stream.codec_context.height


def _video(
    data: bytes,
    container: av.container.InputContainer,
    packets: dict[int, _Packets],
    missing: Fraction,
) -> tuple[VideoIndex | None, MediaError | None]:
    stream = container.streams.best("video")
    if (
        stream is None or stream.disposition & Disposition.attached_pic
    ):  # the picture on a record's sleeve
        return None, MediaError(Reason.NO_VIDEO_STREAM, "the file has no video stream")
    assert isinstance(stream, av.VideoStream)
    if stream.codec_context is None:
        return None, MediaError(Reason.UNSUPPORTED_CODEC, "no decoder for the video stream")
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height == 0:  # FFmpeg forgets a size that is past the limit
        width, height = _header_size(data, stream.index)
    if width * height > MAX_PIXELS:
        return None, MediaError(
            Reason.TOO_LARGE, f"{width}x{height} pixels a frame; the limit is {MAX_PIXELS} pixels"
        )
    found = packets[stream.index]
    has_pts = len(found.pts) == found.num_shown
    times = sorted(found.pts if has_pts else found.dts)
    if not times or stream.time_base is None:
        return None, MediaError(Reason.NO_FRAMES, "the video stream holds no packets")
    # The greater, as muxers that do not know the last frame's duration write 0 or 1 tick.
    gap = max(found.durations.get(times[-1], 0), _median_gap(times))
    if not gap and stream.average_rate:
        gap = round(1 / (stream.average_rate * stream.time_base))
    duration = (times[-1] + gap - times[0]) * stream.time_base
    index = VideoIndex(
        stream_index=stream.index,
        codec=stream.codec_context.codec.canonical_name,
        pixel_format=stream.codec_context.pix_fmt,
        time_base=stream.time_base,
        pts=tuple(times),
        duration_us=int(duration * 1_000_000),
        exact=has_pts and len(set(times)) == len(times) and not found.num_discarded,
        missing=max(missing, _missing_of_stream(stream, found)),
    )
    return index, None


def _audio(
    container: av.container.InputContainer, packets: dict[int, _Packets], missing: Fraction
) -> tuple[AudioIndex | None, MediaError | None]:
    stream = container.streams.best("audio")
    if stream is None:
        return None, MediaError(Reason.NO_AUDIO_STREAM, "the file has no audio stream")
    assert isinstance(stream, av.AudioStream)
    if stream.codec_context is None:
        return None, MediaError(Reason.UNSUPPORTED_CODEC, "no decoder for the audio stream")
    found = packets[stream.index]
    if not found.pts and not found.dts:
        return None, MediaError(Reason.NO_FRAMES, "the audio stream holds no packets")
    index = AudioIndex(
        stream_index=stream.index,
        codec=stream.codec_context.codec.canonical_name,
        missing=max(missing, _missing_of_stream(stream, found)),
    )
    return index, None


def refuse_truncated(missing: Fraction, what: str) -> None:
    """Raise MediaError(truncated) if more is missing than MAX_SHORTFALL."""
    if missing > MAX_SHORTFALL:
        raise MediaError(
            Reason.TRUNCATED,
            f"{float(missing):.1%} of the {what} that the header promises is missing",
        )
