"""Sound on the clip's timeline, through PyAV for every file.

Not decord: measured on the test files, decord 0.6.0's sound is 16 to 17 samples (1 ms) late after
resampling, keeps Opus's pre-skip (6.5 ms), ignores when the track starts and leaks 0.4 to 6.6 MB a
call. FFmpeg's resampler through PyAV puts a pulse within 0.001 sample of its place.

Samples are placed by their time stamps: encoder priming is dropped by FFmpeg as the container asks
(MP4 edit list, Opus pre-skip, LAME tag), a track that starts late is preceded by silence, a gap is
silence, and nothing is stretched to the video's length (Crab's loader stretches).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.packet import Packet

from crab.media.probe import Probe, open_container, refuse_truncated
from crab.media.reasons import MediaError, Reason
from crab.sampling import AudioSampling

JUMP_S = 0.1
"""Time stamps that jitter by less are played on without a break, as FFmpeg's own aresample does."""
MARGIN_S = 0.5  # decoded past the last window, so that the resampler sees what follows it
MAX_BAD_PACKETS = 0.02

_FULL_SCALE = {np.dtype("int16"): 2.0**15, np.dtype("int32"): 2.0**31, np.dtype("int64"): 2.0**63}


@dataclass(kw_only=True)
class _Run:
    """Samples that follow each other without a gap."""

    start: Fraction  # seconds, on the container's clock
    rate: int
    pieces: list[np.ndarray] = field(default_factory=list)
    num_samples: int = 0

    @property
    def end(self) -> Fraction:
        return self.start + Fraction(self.num_samples, self.rate)

    def add(self, samples: np.ndarray) -> None:
        self.pieces.append(samples)
        self.num_samples += len(samples)


def read_audio(data: bytes, probe: Probe, sampling: AudioSampling) -> np.ndarray:
    """Media bytes -> float32 [num_segments, segment samples], mono (mean of the channels), in [-1,
    1].

    Raises MediaError: truncated, corrupt (over 2 % of the packets broken), no_frames, or the
    probe's problem.
    """
    if probe.audio is None:
        assert probe.audio_problem is not None
        raise probe.audio_problem
    refuse_truncated(probe.audio.missing, "sound")
    last_ms = sampling.segments_ms()[-1][1]
    runs = _decode_runs(data, probe.audio.stream_index, probe.video_start, last_ms)
    zero = runs[0].start if probe.video_start is None else probe.video_start
    return _cut(runs, zero, sampling)


def _decode_runs(
    data: bytes, stream_index: int, video_start: Fraction | None, last_ms: int
) -> list[_Run]:
    runs: list[_Run] = []
    zero = video_start
    num_bad = num_packets = 0
    with open_container(data) as container:
        stream = container.streams[stream_index]
        assert isinstance(stream, av.AudioStream)
        for packet in container.demux(stream):
            num_packets += 1
            try:
                frames = list(_decode(packet))
            except (av.error.InvalidDataError, av.error.EOFError):
                num_bad += 1  # heard as a gap; the time stamps after it hold
                continue
            for frame in frames:
                _append(runs, frame)
            if zero is None and runs:
                zero = runs[0].start
            if (
                zero is not None
                and runs
                and runs[-1].end > zero + Fraction(last_ms, 1000) + MARGIN_S
            ):
                break
    if num_bad > max(1, MAX_BAD_PACKETS * num_packets):
        raise MediaError(
            Reason.CORRUPT, f"{num_bad} of {num_packets} audio packets cannot be decoded"
        )
    if not runs:
        raise MediaError(Reason.NO_FRAMES, "the audio stream holds no samples")
    return runs


def _decode(packet: "Packet[Any]") -> Iterator[av.AudioFrame]:
    for frame in packet.decode():
        assert isinstance(frame, av.AudioFrame)
        if frame.samples:
            yield frame


def _append(runs: list[_Run], frame: av.AudioFrame) -> None:
    time = None
    if frame.pts is not None and frame.time_base is not None:
        time = frame.pts * frame.time_base
    current = runs[-1] if runs else None
    if (
        current is None
        or current.rate != frame.sample_rate
        or (time is not None and abs(time - current.end) > JUMP_S)
    ):
        if time is None:
            time = current.end if current else Fraction(0)
        current = _Run(start=time, rate=frame.sample_rate)
        runs.append(current)
    current.add(_mono(frame))


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """An audio frame of any format -> float32 [samples], the mean of its channels."""
    samples: np.ndarray = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    if samples.dtype == np.uint8:
        scaled = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype in _FULL_SCALE:
        scaled = samples / np.float32(_FULL_SCALE[samples.dtype])
    else:
        scaled = samples
    mono: np.ndarray = np.nan_to_num(scaled.mean(axis=0, dtype=np.float64)).astype(np.float32)
    return mono


def _resample(run: _Run, rate: int) -> np.ndarray:
    samples = np.concatenate(run.pieces)
    if run.rate == rate:
        return samples
    frame = av.AudioFrame.from_ndarray(samples[None], format="flt", layout="mono")
    frame.sample_rate = run.rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    return np.concatenate([part.to_ndarray().ravel() for part in parts] or [samples[:0]])


def _cut(runs: list[_Run], zero: Fraction, sampling: AudioSampling) -> np.ndarray:
    """Place the runs on the clip's timeline and take the windows out of it; silence where there is
    nothing.
    """
    rate = sampling.sample_rate_hz
    length = sampling.segment_samples
    out = np.zeros((sampling.num_segments, length), dtype=np.float32)
    for run in runs:
        samples = _resample(run, rate)
        first = round((run.start - zero) * rate)
        for segment, start in zip(out, sampling.segment_starts(), strict=True):
            low, high = max(start, first), min(start + length, first + len(samples))
            if low < high:
                segment[low - start : high - start] = samples[low - first : high - first]
    return np.clip(out, -1.0, 1.0, out=out)
