"""A scene as a real video file: H.264 and AAC in mp4.

One thread a file, so that the same scene gives the same bytes on one machine; many files are written at once instead.
Picture and sound are handed over second by second, so the file is interleaved as a camera's is.
"""

import os
from pathlib import Path

import av
import numpy as np

from crab.synth.render import render_frame
from crab.synth.scene import Scene
from crab.synth.sound import render_audio

FPS = 25
AUDIO_RATE_HZ = 44_100
KEYFRAME_S = 2
"seconds between key frames, as streaming encoders set it; x264's own default would leave one a clip"
AAC_FRAME = 1024


def write_clip(scene: Scene, path: Path, size: int) -> None:
    """Encode the scene to `path`, whole or not at all: another name first, then a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _encode(scene, temporary, size)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(scene: Scene, path: Path, size: int) -> None:
    sound = render_audio(scene, AUDIO_RATE_HZ)
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        video.options = {
            "crf": "23",
            "preset": "veryfast",
            "threads": "1",
            "g": str(KEYFRAME_S * FPS),
        }
        audio = container.add_stream("aac", rate=AUDIO_RATE_HZ, layout="stereo", bit_rate=96_000)
        sent = 0
        for second in range(scene.duration_s):
            for number in range(second * FPS, (second + 1) * FPS):
                picture = av.VideoFrame.from_ndarray(
                    render_frame(scene, number / FPS, size), format="rgb24"
                )
                picture.pts = number
                container.mux(video.encode(picture))
            # AAC takes 1024 samples at a time; what is left of the second goes with the next one.
            last = second == scene.duration_s - 1
            end = len(sound) if last else (second + 1) * AUDIO_RATE_HZ
            while end - sent >= AAC_FRAME or (last and sent < end):
                block = sound[sent : min(sent + AAC_FRAME, end)]
                samples = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(block.T), format="fltp", layout="stereo"
                )
                samples.sample_rate = AUDIO_RATE_HZ
                samples.pts = sent
                container.mux(audio.encode(samples))
                sent += len(block)
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
