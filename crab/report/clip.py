"""The clip of an example as a person needs it: a few frames with their times, and the sound in one piece.

Decoded by `crab.media` in children with limits, with the sampling that the model saw. What cannot be read is a line of
text in the clip, never an exception: the page is made all the same.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crab.media import Decoded, DecodePool, DecodeRequest, Failure
from crab.samples import Sample
from crab.sampling import AudioSampling, VideoSampling

SIZE = 224
"""Side of the frames in pixels: that of the masks' truth."""
MAX_SOUND_MS = 60_000
"""The longest clips of the data sets (MUSIC-AVQA)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """uint8 [T, 224, 224, 3] RGB frames (T may be 0), their times, float32 [n] mono sound, and what is missing."""

    frames: np.ndarray
    times_us: tuple[int, ...]
    sound: np.ndarray
    sample_rate_hz: int
    problems: tuple[str, ...] = ()

    def frame_at(self, second: float) -> int:
        """The index of the frame nearest to a time. The clip must have frames."""
        return min(range(len(self.frames)), key=lambda i: abs(self.times_us[i] - second * 1e6))


def read_clips(
    pool: DecodePool, wanted: Sequence[tuple[Sample, int, AudioSampling]]
) -> Iterator[Clip]:
    """One clip for each (sample, number of frames, windows of sound that the model heard), in order, one at a time.

    The sound is the stretch that the windows cover, from the clip's start, at most a minute of it. A clip that several
    samples share is decoded once and held until the last of them.
    """
    plans = [_requests(sample, frames, heard) for sample, frames, heard in wanted]
    uses = Counter(plans)
    results = pool.decode(request for plan in uses for request in plan)
    held: dict[tuple[DecodeRequest, ...], Clip] = {}
    for plan, (_, _, heard) in zip(plans, wanted, strict=True):
        if plan not in held:
            held[plan] = _clip([next(results).decoded for _ in plan], heard.sample_rate_hz)
        uses[plan] -= 1
        yield held[plan] if uses[plan] else held.pop(plan)


def _clip(parts: Sequence[Decoded], sample_rate_hz: int) -> Clip:
    frames = np.zeros((0, SIZE, SIZE, 3), np.uint8)
    times: tuple[int, ...] = ()
    sound = np.zeros(0, np.float32)
    problems: dict[Failure, list[str]] = {}
    for decoded in parts:
        for stream, found in (("picture", decoded.video), ("sound", decoded.audio)):
            if isinstance(found, Failure):
                problems.setdefault(found, []).append(stream)
        if isinstance(decoded.video, np.ndarray):
            frames, times = decoded.video, decoded.frame_times_us
        if isinstance(decoded.audio, np.ndarray):
            sound = np.trim_zeros(decoded.audio.ravel(), "b")
    return Clip(
        frames=frames,
        times_us=times,
        sound=sound,
        sample_rate_hz=sample_rate_hz,
        problems=tuple(
            f"{' and '.join(streams)}: {why.reason}: {why.detail}"
            for why, streams in problems.items()
        ),
    )


def _requests(sample: Sample, num_frames: int, heard: AudioSampling) -> tuple[DecodeRequest, ...]:
    """One request where picture and sound lie in one file, else one each."""
    picture, sound = sample.image or sample.video, sample.audio or sample.video
    video = VideoSampling(num_frames=num_frames, size=SIZE)
    audio = AudioSampling(
        num_segments=1,
        segment_ms=max(1, min(MAX_SOUND_MS, heard.segments_ms()[-1][1])),
        sample_rate_hz=heard.sample_rate_hz,
    )
    if picture == sound and picture is not None:
        return (DecodeRequest(source=picture, video=video, audio=audio),)
    requests = []
    if picture is not None:
        requests.append(DecodeRequest(source=picture, video=video))
    if sound is not None:
        requests.append(DecodeRequest(source=sound, audio=audio))
    return tuple(requests)
