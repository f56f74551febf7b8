"""A clip: bytes in, frames and sound out, from one read.

`decode_clip` never raises for what a file can be: every stream that was asked for comes back as an
array or as a reason. It runs in the process that calls it; `crab.media.pool` runs it in children
that may be killed.
"""

import numpy as np

from crab.media.frames import Frames, read_video
from crab.media.probe import probe
from crab.media.reasons import Failure, Reason, failure_of
from crab.media.request import Decoded, DecodeRequest
from crab.media.sound import read_audio
from crab.media.source import read_media, sha256_hex
from crab.media.still import is_image, read_still
from crab.sampling import AudioSampling, VideoSampling

DECODE_VERSION = 1
"""Raise it whenever the same file and sampling may give other numbers (a new FFmpeg that only gets
faster does not).
"""


def decode_record() -> dict[str, int | str]:
    """What decoding puts into the cache key."""
    return {"policy": "frames-decord-then-pyav.sound-pyav", "version": DECODE_VERSION}


def decode_clip(
    source: str, *, video: VideoSampling | None = None, audio: AudioSampling | None = None
) -> Decoded:
    """Read `source` once and decode the streams that were asked for; with neither, only hash it.

    Frames are uint8 [num_frames, size, size, 3] RGB (an image gives one frame whatever `num_frames`
    says), sound is float32 [num_segments, samples] mono in [-1, 1].
    """
    return decode_request(DecodeRequest(source=source, video=video, audio=audio))


def decode_request(request: DecodeRequest) -> Decoded:
    """`decode_clip` for a request object: what a pool's child runs."""
    try:
        data = read_media(request.source)
    except Exception as error:
        return Decoded.failed(request, failure_of(error))
    digest, size = sha256_hex(data), len(data)
    video, audio = _decode(data, request)
    return Decoded(
        source=request.source,
        media_sha256=digest,
        num_bytes=size,
        video=video.array if isinstance(video, Frames) else video,
        audio=audio,
        frame_times_us=video.times_us if isinstance(video, Frames) else (),
        backend=video.backend if isinstance(video, Frames) else None,
    )


def _decode(
    data: bytes, request: DecodeRequest
) -> tuple[Frames | Failure | None, np.ndarray | Failure | None]:
    if request.video is None and request.audio is None:
        return None, None
    if is_image(data):
        silent = Failure(reason=Reason.NO_AUDIO_STREAM, detail="an image has no sound")
        return _still(data, request.video), silent if request.audio else None
    try:
        found = probe(data)
    except Exception as error:
        problem = failure_of(error)
        return problem if request.video else None, problem if request.audio else None
    video: Frames | Failure | None = None
    audio: np.ndarray | Failure | None = None
    if request.video:
        try:
            if found.video is None:
                assert found.video_problem is not None
                raise found.video_problem
            video = read_video(data, found.video, request.video)
        except Exception as error:
            video = failure_of(error)
    if request.audio:
        try:
            audio = read_audio(data, found, request.audio)
        except Exception as error:
            audio = failure_of(error)
    return video, audio


def _still(data: bytes, sampling: VideoSampling | None) -> Frames | Failure | None:
    if sampling is None:
        return None
    try:
        return Frames(array=read_still(data, sampling.size), times_us=(0,), backend="pillow")
    except Exception as error:
        return failure_of(error)
