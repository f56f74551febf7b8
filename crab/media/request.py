"""What is asked of the decoder and what it answers: the objects that cross between processes."""

from dataclasses import dataclass

import numpy as np

from crab.media.reasons import Failure
from crab.sampling import AudioSampling, VideoSampling


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """One medium and the streams wanted of it. With neither stream the bytes are only read and
    hashed.
    """

    source: str
    video: VideoSampling | None = None
    audio: AudioSampling | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """The answer. A stream that was not asked for is None; one that was is an array or the reason
    why not.
    """

    source: str
    media_sha256: str | None  # None if the bytes could not be read
    num_bytes: int | None
    video: np.ndarray | Failure | None  # uint8 [T, size, size, 3] RGB
    audio: np.ndarray | Failure | None  # float32 [S, samples] mono
    frame_times_us: tuple[
        int, ...
    ] = ()  # of the frames in `video`, from the first frame of the clip
    backend: str | None = None  # who decoded the frames; for reports, not for keys

    @classmethod
    def failed(cls, request: DecodeRequest, why: Failure) -> "Decoded":
        """Nothing could be had: every stream that was asked for carries the same reason.

        A request that only wanted the hash carries it in `video`, so that no failure is silent.
        """
        nothing_asked = request.video is None and request.audio is None
        return cls(
            source=request.source,
            media_sha256=None,
            num_bytes=None,
            video=why if request.video or nothing_asked else None,
            audio=why if request.audio else None,
        )

    def problems(self) -> tuple[Failure, ...]:
        """The reasons among the answers, video first."""
        return tuple(answer for answer in (self.video, self.audio) if isinstance(answer, Failure))
