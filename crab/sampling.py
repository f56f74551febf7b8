"""Which moments of a clip are looked at: frames by time, audio by windows.

Sampling is declared, not implied by a loader, because it is part of a cached feature's identity:
two features are the same only if the same moments went in. Everything is a whole number (counts,
milliseconds, microseconds, hertz), so a record has one spelling and no float rounding can turn a
hit into a miss.

Times are relative to the clip's start; `crab.media.probe` says where that is.
"""

from dataclasses import dataclass

MAX_FRAMES = 4096
MAX_SIZE = 4096
MAX_SEGMENTS = 4096
MAX_SAMPLE_RATE_HZ = 192_000
MAX_AUDIO_MS = 6 * 3600 * 1000


def _require(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; expected a whole number from {low} to {high}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class VideoSampling:
    """`num_frames` frames at even times from the first frame on, each resized to a square of `size`
    pixels.
    """

    num_frames: int = 10
    size: int = 224

    def __post_init__(self) -> None:
        _require("num_frames", self.num_frames, 1, MAX_FRAMES)
        _require("size", self.size, 1, MAX_SIZE)

    def times_us(self, duration_us: int) -> tuple[int, ...]:
        """Microseconds from the first frame: t_i = i * duration / num_frames, the last instant
        never included.

        At a constant frame rate this picks the frames of Crab's `np.arange(0, vlen, vlen /
        num_frames)`.
        """
        if duration_us < 0:
            raise ValueError(f"duration_us is {duration_us}; expected 0 or more")
        return tuple(i * duration_us // self.num_frames for i in range(self.num_frames))

    def record(self) -> dict[str, int | str]:
        """What goes into the cache key."""
        return {"kind": "uniform-frames", "num_frames": self.num_frames, "size": self.size}


@dataclass(frozen=True, kw_only=True)
class AudioSampling:
    """`num_segments` mono windows: segment i covers [i * stride + offset, + segment) ms of the
    clip.

    What lies outside the track is silence. Windows may overlap and may begin before the clip.
    """

    num_segments: int = 10
    segment_ms: int = 1000
    stride_ms: int = 1000
    offset_ms: int = 0
    sample_rate_hz: int = 16_000

    def __post_init__(self) -> None:
        _require("num_segments", self.num_segments, 1, MAX_SEGMENTS)
        _require("segment_ms", self.segment_ms, 1, MAX_AUDIO_MS)
        _require("stride_ms", self.stride_ms, 1, MAX_AUDIO_MS)
        _require("offset_ms", self.offset_ms, -MAX_AUDIO_MS, MAX_AUDIO_MS)
        _require("sample_rate_hz", self.sample_rate_hz, 1000, MAX_SAMPLE_RATE_HZ)
        if self.segment_ms * self.sample_rate_hz % 1000:
            raise ValueError(
                f"segment_ms={self.segment_ms} at sample_rate_hz={self.sample_rate_hz} is not "
                "a whole number of samples; choose a segment length that is"
            )
        if self.segments_ms()[-1][1] > MAX_AUDIO_MS:
            raise ValueError(
                f"the last segment ends at {self.segments_ms()[-1][1]} ms; expected at "
                f"most {MAX_AUDIO_MS} ms: use fewer segments or a shorter stride"
            )

    @property
    def segment_samples(self) -> int:
        """Samples in one segment."""
        return self.segment_ms * self.sample_rate_hz // 1000

    def segments_ms(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of every segment in milliseconds from the clip's start; the start may be
        negative.
        """
        starts = (i * self.stride_ms + self.offset_ms for i in range(self.num_segments))
        return tuple((start, start + self.segment_ms) for start in starts)

    def segment_starts(self) -> tuple[int, ...]:
        """First sample of every segment, counted from the clip's start, rounded down."""
        return tuple(start * self.sample_rate_hz // 1000 for start, _ in self.segments_ms())

    def record(self) -> dict[str, int | str]:
        """What goes into the cache key."""
        return {
            "kind": "audio-segments",
            "num_segments": self.num_segments,
            "segment_ms": self.segment_ms,
            "stride_ms": self.stride_ms,
            "offset_ms": self.offset_ms,
            "sample_rate_hz": self.sample_rate_hz,
        }


def music_avqa_audio() -> AudioSampling:
    """MUSIC-AVQA as Crab hears it: of 60 s, ten windows of 2 s, [t - 0.5, t + 1.5) around t = 0, 6,
    ..., 54 s.
    """
    return AudioSampling(num_segments=10, segment_ms=2000, stride_ms=6000, offset_ms=-500)
