"""The files beside the page: frames as JPEG, masks as PNG, sound as MP3, each named by the digest of its bytes.

Names from digests cannot be steered by a data set's ids, and a frame that nine tasks show is one file. MP3 because
every browser plays it without system codecs; AAC and Opus do not play everywhere.
"""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from PIL import Image

FOLDER = "media"
_MP3_BITS_PER_S = 32_000
"""Ten seconds are 40 kB; speech and tones at 16 kHz mono lose little."""


class Files:
    """Writes into `page_folder/media`; every method returns the path to put into the page."""

    def __init__(self, page_folder: Path) -> None:
        self._page_folder = page_folder
        self._known: dict[tuple[str, str], str] = {}
        (page_folder / FOLDER).mkdir(parents=True, exist_ok=True)

    def jpeg(self, frame: np.ndarray) -> str:
        """uint8 [H, W, 3] RGB."""

        def encode() -> bytes:
            held = io.BytesIO()
            Image.fromarray(frame).save(held, "JPEG", quality=80, optimize=True)
            return held.getvalue()

        return self._once(frame, ".jpg", encode)

    def png(self, indices: np.ndarray, palette: list[tuple[int, int, int, int]]) -> str:
        """uint8 [H, W] indices into at most 256 RGBA colours: transparent overlays of a few hundred bytes."""
        image = Image.fromarray(indices, "P")
        image.putpalette([part for colour in palette for part in colour[:3]])
        held = io.BytesIO()
        image.save(held, "PNG", optimize=True, transparency=bytes(colour[3] for colour in palette))
        return self._add(held.getvalue(), ".png")

    def mp3(self, sound: np.ndarray, sample_rate_hz: int) -> str:
        """float32 [n] mono in [-1, 1]."""

        def encode() -> bytes:
            held = io.BytesIO()
            with av.open(held, "w", format="mp3") as container:
                stream = container.add_stream("libmp3lame", rate=sample_rate_hz, layout="mono")
                stream.bit_rate = _MP3_BITS_PER_S
                frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
                frame.sample_rate = sample_rate_hz
                container.mux([*stream.encode(frame), *stream.encode(None)])
            return held.getvalue()

        return self._once(sound, f"-{sample_rate_hz}.mp3", encode)

    def _once(self, content: np.ndarray, kind: str, encode: Callable[[], bytes]) -> str:
        """What is the same as before is not encoded again: nine tasks ask about one clip."""
        key = (hashlib.sha256(content.tobytes()).hexdigest(), kind)
        if key not in self._known:
            self._known[key] = self._add(encode(), Path(kind).suffix or kind)
        return self._known[key]

    def _add(self, data: bytes, suffix: str) -> str:
        name = f"{FOLDER}/{hashlib.sha256(data).hexdigest()[:20]}{suffix}"
        (self._page_folder / name).write_bytes(data)
        return name
