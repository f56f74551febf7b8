"""Media files made on the spot with PyAV, whose right answer is known."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np


def flat(level: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A grey picture, uint8 [height, width, 3]."""
    return np.full((height, width, 3), level, dtype=np.uint8)


def tone(seconds: Sequence[float], rate: int = 16_000) -> np.ndarray:
    """One second of sine at each frequency (Hz), half scale, float32 [samples]."""
    time = np.arange(rate) / rate
    return np.concatenate([0.5 * np.sin(2 * np.pi * hz * time) for hz in seconds]).astype(
        np.float32
    )


def loudest_hz(samples: np.ndarray, rate: int = 16_000) -> float:
    """Frequency of the strongest component."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * rate / len(samples))


def write_clip(
    path: Path,
    *,
    pictures: Sequence[np.ndarray] = (),
    times_ms: Sequence[int] = (),
    samples: np.ndarray | None = None,
    audio_start_ms: int = 0,
    audio_rate: int = 16_000,
    video_codec: str = "libx264",
    audio_codec: str = "pcm_s16le",
    options: dict[str, str] | None = None,
    pixel_format: str = "yuv420p",
    matrix: Sequence[int] | None = None,
) -> Path:
    """Write pictures at given times and mono or multi-channel samples ([n] or [channels, n])."""
    with av.open(path, "w") as container:
        video = audio = None
        if len(pictures):
            video = container.add_stream(video_codec, rate=1000, options=options or {})
            video.height, video.width = pictures[0].shape[:2]
            video.pix_fmt = pixel_format
            video.codec_context.time_base = video.time_base = Fraction(1, 1000)
            if matrix is not None:
                video.set_display_matrix(list(matrix))
        if samples is not None:
            channels = 1 if samples.ndim == 1 else len(samples)
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
            audio = container.add_stream(audio_codec, rate=audio_rate, layout=layout)

        def mux_video(packets):
            for packet in packets:
                # The encoder knows no durations: a frame lasts until the next, the last as the one
                # before.
                packet.duration = round(
                    durations_ms[packet.pts * packet.time_base * 1000] / 1000 / packet.time_base
                )
                container.mux(packet)

        gaps = [b - a for a, b in pairwise(times_ms)]
        durations_ms = (
            dict(zip(times_ms, [*gaps, gaps[-1] if gaps else 100], strict=True)) if times_ms else {}
        )
        for picture, time_ms in zip(pictures, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            mux_video(video.encode(frame))
        if video:
            mux_video(video.encode(None))
        if audio:
            block = np.atleast_2d(samples).astype(np.float32)
            step = 1024
            for first in range(0, block.shape[1], step):
                piece = np.ascontiguousarray(block[:, first : first + step])
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
                frame.sample_rate, frame.time_base = audio_rate, Fraction(1, audio_rate)
                frame.pts = first + audio_start_ms * audio_rate // 1000
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
    return path


def counting_clip(path: Path, seconds: int, fps: int = 10, **kwargs: object) -> Path:
    """A clip whose picture in second k is grey of level 20 + 20 k."""
    times_ms = [i * 1000 // fps for i in range(seconds * fps)]
    pictures = [flat(20 + 20 * (time // 1000)) for time in times_ms]
    return write_clip(path, pictures=pictures, times_ms=times_ms, **kwargs)
